"""The formats as rows of a table: how each is written, read back, opened and measured. Adding one adds a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compressor.checkpoint import DTYPES, Checkpoint, load_tokenizer, read_config
from compressor.errors import CheckFailed
from compressor.runtime import LlamaCppRuntime, OnnxRuntime, TorchRuntime, open_gguf
from compressor.shape import Shape

from . import gguf_tokenizer, read_back, to_bitsandbytes, to_gguf, to_onnx
from .settings import Settings

if TYPE_CHECKING:
    from compressor.runtime import Runtime

    from .read_back import Read

Encode = Callable[[str], list[int]]
Forward = Callable[..., Any]
# What the RMS difference of logits may be, over their standard deviation, to torch in float32 on the same weights:
# float32 arithmetic, 16-bit arithmetic or cache, activations rounded to int8
EXACT, HALF, COARSE = 1e-3, 2e-2, 0.2


class Model(NamedTuple):
    """One set of weights: its tensors, and runtimes beside `Format.open` that must run it, each with its tolerance.

    A runtime is a function like `Runtime.cached_logits`, made when it is called for.
    """

    name: str
    weights: Iterator[Read]
    runtimes: Mapping[str, tuple[Callable[[], Forward], float]]


@dataclass(frozen=True)
class Format:
    """One row.

    write(student, folder, settings, progress=...); models: the weight files of a folder, the one that `open` runs
    last; sizes: file -> (bytes of weights stored, bytes that arithmetic expects); tolerance: of the logits of `open`
    by precision; own_tokenizers: text -> ids of runtimes that do not read tokenizer.json as transformers does, and
    what to do where they differ (None: the artifact is still right, and tells); check_tokens: raises CheckFailed where
    a tokenizer kept in the file itself is another.
    """

    write: Callable[..., None]
    models: Callable[[Path, Shape, Settings], Iterator[Model]]
    open: Callable[[Path], Runtime]
    sizes: Callable[[Path, Path, Settings], Mapping[str, tuple[int, int]]]
    tolerance: Callable[[str], float]
    own_tokenizers: Callable[[Path, Settings], dict[str, tuple[Encode, str | None]]] = lambda folder, settings: {}
    check_tokens: Callable[[Path, Any], None] = lambda folder, tokenizer: None


# --- onnx -----------------------------------------------------------------------------------------------------------


def _onnx_tolerance(precision: str) -> float:
    return {"fp32": EXACT, "fp16": HALF}.get(precision, COARSE)


def _plain(graph: Path, *, exact: bool = False) -> Forward:
    from .plain_onnx import PlainOnnx

    return PlainOnnx(graph, exact=exact).cached_logits


def _onnx_models(folder: Path, shape: Shape, settings: Settings) -> Iterator[Model]:
    for precision, path in reversed(to_onnx.graphs(settings).items()):
        graph = folder / path
        runtimes = {"onnxruntime": (partial(_plain, graph), _onnx_tolerance(precision))}
        if _onnx_tolerance(precision) == COARSE:  # held to its arithmetic too, without the rounding of activations
            exact = HALF if precision == "q4f16" else EXACT
            runtimes["onnxruntime, activations in float32"] = (partial(_plain, graph, exact=True), exact)
        yield Model(path, read_back.onnx_weights(graph, shape), runtimes)


def _onnx_sizes(student: Path, folder: Path, settings: Settings) -> dict[str, tuple[int, int]]:
    config = read_config(student)
    return {
        path: (
            to_onnx.data_name(folder / path).stat().st_size,
            to_onnx.arithmetic_bytes(config, settings, precision),
        )
        for precision, path in to_onnx.graphs(settings).items()
    }


def _genai_tokenizer(folder: Path, settings: Settings) -> dict[str, tuple[Encode, str | None]]:
    genai: Any = import_module("onnxruntime_genai")
    tokenizer = genai.Tokenizer(genai.Model(str(folder)))
    return {"onnxruntime-genai": (lambda text: [int(token) for token in tokenizer.encode(text)], None)}


# --- gguf -----------------------------------------------------------------------------------------------------------


def _gguf_models(folder: Path, shape: Shape, settings: Settings) -> Iterator[Model]:
    runtimes = {"llama.cpp": (lambda: LlamaCppRuntime(folder).cached_logits, COARSE)} if find_spec("llama_cpp") else {}
    yield Model(to_gguf.FILE, read_back.gguf_weights(folder / to_gguf.FILE, shape), runtimes)


def _gguf_sizes(student: Path, folder: Path, settings: Settings) -> dict[str, tuple[int, int]]:
    import gguf

    path = folder / to_gguf.FILE
    stored = path.stat().st_size - gguf.GGUFReader(path).data_offset
    return {to_gguf.FILE: (stored, to_gguf.arithmetic_bytes(read_config(student), settings))}


def gguf_fields(folder: Path) -> dict[str, Any]:
    """The tokenizer.* metadata of the file in a GGUF folder."""
    import gguf

    fields = gguf.GGUFReader(folder / to_gguf.FILE).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}


def _gguf_tokenizer(folder: Path, settings: Settings) -> dict[str, tuple[Encode, str | None]]:
    fields = gguf_fields(folder)
    tokenizer = gguf_tokenizer.rebuilt(fields)
    advice = None  # a rule that was given is taken at its word, and SentencePiece has none
    if settings.tokenizer_pre is None and "tokenizer.ggml.pre" in fields:
        advice = (
            f"no rule of llama.cpp's gives this model's tokens, {fields['tokenizer.ggml.pre']} comes nearest; name it "
            "with --tokenizer-pre and feed token ids, or export to onnx"
        )
    normalizer = load_tokenizer(folder).backend_tokenizer.normalizer

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    if find_spec("llama_cpp"):  # asked itself where it is there, else rebuilt from what the file says
        encode = LlamaCppRuntime(folder).tokenize
    if normalizer is None or fields["tokenizer.ggml.model"] == "llama":
        return {"llama.cpp": (encode, advice)}
    # llama.cpp normalizes nothing, as all of Qwen's files have to live with: its rule is held to normalized text
    rule = (lambda text: encode(normalizer.normalize_str(text)), advice)
    return {"llama.cpp on normalized text": rule, "llama.cpp": (encode, None)}


def _check_gguf_tokens(folder: Path, tokenizer: Any) -> None:
    """Every id has the text that the student's tokenizer has for it, and every key its value."""
    found = gguf_fields(folder)
    tokens = found["tokenizer.ggml.tokens"]
    known = {i: text for text, i in tokenizer.get_vocab().items()}
    for i, text in enumerate(tokens):
        if known.get(i, f"[PAD{i}]") != text:
            raise CheckFailed(f"token {i} is {known.get(i)!a} in the student and {text!a} in the GGUF file")
    wanted = gguf_tokenizer.tokenizer_fields(folder, len(tokens), pre=found.get("tokenizer.ggml.pre"))
    for key, value in wanted.items():
        if found.get(key) != value:
            raise CheckFailed(f"{key} of the GGUF file is not the student's")


# --- bitsandbytes ---------------------------------------------------------------------------------------------------


def _bitsandbytes_models(folder: Path, shape: Shape, settings: Settings) -> Iterator[Model]:
    yield Model("model.safetensors", read_back.bitsandbytes_weights(folder, shape), {})


def _bitsandbytes_sizes(student: Path, folder: Path, settings: Settings) -> dict[str, tuple[int, int]]:
    checkpoint = Checkpoint(student)
    stored = Checkpoint(folder, quantized=True)
    total = sum(stored.metadata(name).nbytes for name in stored.names)
    value_bytes = DTYPES[checkpoint.metadata("model.embed_tokens.weight").dtype][1]
    expected = to_bitsandbytes.arithmetic_bytes(checkpoint.config, settings, value_bytes=value_bytes)
    return {"model.safetensors": (total, expected)}


FORMATS: dict[str, Format] = {
    "onnx": Format(
        write=to_onnx.write_onnx,
        models=_onnx_models,
        open=OnnxRuntime,
        sizes=_onnx_sizes,
        tolerance=_onnx_tolerance,
        own_tokenizers=_genai_tokenizer,
    ),
    "gguf": Format(
        write=to_gguf.write_gguf,
        models=_gguf_models,
        open=partial(open_gguf, engine="transformers"),
        sizes=_gguf_sizes,
        tolerance=lambda precision: EXACT,
        own_tokenizers=_gguf_tokenizer,
        check_tokens=_check_gguf_tokens,
    ),
    "bitsandbytes": Format(
        write=to_bitsandbytes.write_bitsandbytes,
        models=_bitsandbytes_models,
        open=TorchRuntime,
        sizes=_bitsandbytes_sizes,
        tolerance=lambda precision: COARSE,
    ),
}
