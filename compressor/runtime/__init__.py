"""Runtime: one face for every model that is judged, whatever runs it.

Evaluation, benchmark and the app speak to this face only, so the code that judged the torch student also
judges its exported, quantized copies. A conversation is {"messages": [...], "tools"?: [...]}.
"""

from pathlib import Path

from ..errors import UserError
from ..run import read_json
from .face import Runtime, prompt_ids, stop_ids
from .in_gguf import FILE as GGUF_FILE
from .in_gguf import LlamaCppRuntime, open_gguf
from .in_onnx import GENAI_CONFIG, OnnxRuntime
from .in_torch import TorchRuntime

__all__ = [
    "LlamaCppRuntime",
    "OnnxRuntime",
    "Runtime",
    "TorchRuntime",
    "is_artifact",
    "load",
    "name_of",
    "prompt_ids",
    "stop_ids",
]


def load(what: Path | str, *, batch_size: int = 64, threads: int | None = None) -> Runtime:
    """The runtime of an exported folder by what lies in it, else of a Hugging Face folder, a Hub id or `demo`.

    batch_size is torch's, threads the others'. Raises UserError for what cannot be found or opened.
    """
    folder = Path(what)
    _check_files(folder)
    if (folder / GENAI_CONFIG).is_file():
        return OnnxRuntime(folder, threads=threads)
    if (folder / GGUF_FILE).is_file():
        return open_gguf(folder, threads=threads)
    from ..checkpoint import resolve

    return TorchRuntime(resolve(str(what)), batch_size=batch_size)


def _check_files(folder: Path) -> None:
    """Every file that an artifact's export.json lists is there: a copy without its weights is told by name."""
    manifest = folder / "export.json"
    listed = read_json(manifest).get("files", {}) if manifest.is_file() else {}
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {missing[0]}; expected each of the {len(listed)} files that its export.json lists; copy "
            "the whole folder, or export it again"
        )


def is_artifact(what: Path | str) -> bool:
    """Whether a folder holds an ONNX graph or a GGUF file of ours, which no checkpoint's loader would find."""
    return any((Path(what) / name).is_file() for name in (GENAI_CONFIG, GGUF_FILE))


def name_of(runtime: Runtime) -> str:
    """The library that runs it: onnxruntime-genai, llama.cpp or transformers."""
    names: dict[type, str] = {OnnxRuntime: "onnxruntime-genai", LlamaCppRuntime: "llama.cpp"}
    return names.get(type(runtime), "transformers")
