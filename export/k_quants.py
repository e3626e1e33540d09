"""llama.cpp's k-quants: super-blocks of 256 weights whose blocks have scales of 6 or 8 bits, packed by ggml itself.

The `gguf` package unpacks them but does not pack; llama-cpp-python brings the library that does.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import UserError

if TYPE_CHECKING:
    import numpy

SUPER_BLOCK = 256
# precision -> the type of most matrices, and that of the head and of those llama.cpp spends more bits on
MIXES = {"q4_k_m": ("q4_k", "q6_k"), "q5_k_m": ("q5_k", "q6_k"), "q6_k": ("q6_k", "q6_k")}
FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}  # of rows that are no multiple of a super-block


def kind_of(precision: str, name: str, *, layers: int, head: bool) -> str:
    """The type of a matrix by its Hugging Face name, as llama.cpp mixes them: more bits for half of v_proj, down_proj.

    These are the matrices of the first and last eighth of the layers, and of every third between.
    """
    most, more = MIXES[precision]
    if head:
        return more
    found = re.search(r"layers\.(\d+)\..*(v_proj|down_proj)\.weight", name)
    if found is None:
        return most
    layer, eighth = int(found[1]), layers // 8
    return more if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2 else most


def require() -> None:
    """Raise UserError where the library that packs is not installed."""
    if find_spec("llama_cpp") is None:
        raise UserError(
            "k-quants are packed by llama.cpp's library, which is not installed; expected llama-cpp-python; "
            "run make llama-cpp, or choose q4_0 or q8_0"
        )


def pack(values: numpy.ndarray, kind: str) -> numpy.ndarray:
    """Float32 rows (N, K) -> their bytes (N, K / 256 * bytes of a super-block)."""
    import gguf
    import numpy

    raw = gguf.GGMLQuantizationType[kind.upper()]
    rows, columns = values.shape
    out = numpy.empty((rows, columns // SUPER_BLOCK * gguf.GGML_QUANT_SIZES[raw][1]), numpy.uint8)
    source = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    written = _ggml().ggml_quantize_chunk(raw.value, source, out.ctypes.data, 0, rows, columns, None)
    assert written == out.nbytes, (written, out.nbytes)
    return out


@cache
def _ggml() -> Any:
    spec = find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    path = next((Path(spec.origin).parent / "lib").glob("*ggml-base.*"), None)
    if path is None:
        raise UserError(
            "this llama-cpp-python has no ggml-base library, which packs k-quants; expected 0.3.36; run make llama-cpp"
        )
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    arguments = [ctypes.c_int, ctypes.POINTER(ctypes.c_float), pointer, number, number, number, pointer]
    library.ggml_quantize_chunk.argtypes = arguments
    return library
