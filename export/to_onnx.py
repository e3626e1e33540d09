"""An ONNX folder that onnxruntime-genai, plain onnxruntime and, with `web`, transformers.js open unchanged."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from compressor import families
from compressor.checkpoint import copy_tokenizer, read_config
from compressor.checkpoint.writing import copy_files
from compressor.run import write_json
from compressor.shape import Shape

from .onnx_graph import build, fitting_block, write
from .rounding import ASYMMETRIC
from .settings import Settings

WEB_NAMES = {
    "fp32": "model",
    "fp16": "model_fp16",
    "int8": "model_quantized",
    "int4": "model_q4",
    "q4f16": "model_q4f16",
}
WEB_ALWAYS = ("int4", "q4f16", "int8")  # what a browser asks for: q4, q4f16 on WebGPU, q8


def write_onnx(
    student: Path, folder: Path, settings: Settings, *, progress: Callable[[int], object] | None = None
) -> None:
    """Write the graph, its weights, genai_config.json, config.json and the tokenizer into `folder`.

    Raises UserError for an architecture the builder does not know.
    """
    config = read_config(student)
    shape = Shape.from_config(config)
    for precision, path in graphs(settings).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            model, genai = build(student, Path(work))
            write(
                model,
                target,
                bits=_bits_by_builder_name(settings, shape, precision),
                block=settings.block,
                algorithm=settings.algorithm,
                half=precision in ("fp16", "q4f16"),
                head_dim=shape.head_dim,
                data_name=data_name(target).name,
                progress=progress,
            )
        if precision == settings.precision:
            genai["model"]["decoder"]["filename"] = path
            write_json(folder / "genai_config.json", genai)
    if settings.web:
        config = config | {"transformers.js_config": _web_config(settings)}
    write_json(folder / "config.json", config)
    copy_files(student, folder, ["generation_config.json"])
    copy_tokenizer(student, folder)
    repair_tokenizer(folder)


def graphs(settings: Settings) -> dict[str, str]:
    """precision -> path of its graph in the folder, the one that genai_config.json names first."""
    if not settings.web:
        return {settings.precision: "model.onnx"}
    wanted = dict.fromkeys((settings.precision, *WEB_ALWAYS))
    return {precision: f"onnx/{WEB_NAMES[precision]}.onnx" for precision in wanted}


def data_name(graph: Path) -> Path:
    """The file that holds a graph's weights, as the builder (model.onnx.data) or transformers.js calls it."""
    return graph.with_name(f"{graph.name}_data" if graph.parent.name == "onnx" else f"{graph.name}.data")


def _bits_by_builder_name(settings: Settings, shape: Shape, precision: str) -> Callable[[str], int | None]:
    def bits(name: str) -> int | None:
        if not name.endswith(("MatMul.weight", "embed_tokens.weight")):
            return None
        return settings.bits(name, layers=shape.num_layers, tied=shape.tied, precision=precision)

    return bits


def arithmetic_bytes(shape: Shape, settings: Settings, precision: str, *, positions: int) -> int:
    """What the data file of one graph must hold: packed weights, a scale a block, norms, biases, rope tables.

    positions: how many the rope tables have, the model's context.
    """
    half = precision in ("fp16", "q4f16")
    value = 2 if half else 4
    total = 2 * value * positions * shape.head_dim // 2
    for name, axes in families.tensors(shape):
        sizes = [shape.size(axis) for axis in axes]
        bits = settings.bits(name, layers=shape.num_layers, tied=shape.tied, precision=precision)
        if bits is None or len(sizes) == 1:
            total += prod(sizes) * value
            continue
        rows, columns = sizes
        block = fitting_block(settings.block, columns)
        blocks = -(-columns // block)
        total += rows * blocks * (block * bits // 8 + value)
        symmetric = settings.algorithm not in ASYMMETRIC or bits == 8 or "embed_tokens" in name
        total += 0 if symmetric else rows * -(-blocks * bits // 8)
    return total


def _web_config(settings: Settings) -> dict[str, Any]:
    dtypes = {"int4": "q4", "q4f16": "q4f16", "int8": "q8", "fp16": "fp16", "fp32": "fp32"}
    files = [Path(path).name for path in graphs(settings).values()]
    return {
        "dtype": dtypes[settings.precision],
        "use_external_data_format": dict.fromkeys(files, 1),
        "kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"},
    }


def repair_tokenizer(folder: Path) -> None:
    """Write three keys of tokenizer_config.json as every reader knows them.

    transformers 5 names a class that 4.57 and older runtimes do not know, lists extra special tokens where they want a
    mapping, and keeps the chat template in a file that transformers.js does not read. The older spellings mean the same
    to all of them.
    """
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    template = folder / "chat_template.jinja"
    if template.exists():
        values["chat_template"] = template.read_text(encoding="utf-8")
    write_json(path, values)
