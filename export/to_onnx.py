"""An ONNX folder that onnxruntime-genai, plain onnxruntime and, with `web`, transformers.js open unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

from compressor import families
from compressor.checkpoint import copy_files, copy_tokenizer, read_config, skeleton
from compressor.errors import UserError
from compressor.run import write_json
from compressor.shape import Shape

from .gptq import round_layers
from .onnx_graph import build, fitting_block, hugging_face_names, write
from .onnx_traced import JOIN, matrices_of, trace
from .rounding import ASYMMETRIC, Blocks
from .settings import Settings, in_layers

Calibration = Callable[[], Iterable[Mapping[str, Any]]]
WEB_NAMES = {
    "fp32": "model",
    "fp16": "model_fp16",
    "int8": "model_quantized",
    "int4": "model_q4",
    "q4f16": "model_q4f16",
}
WEB_ALWAYS = ("int4", "q4f16", "int8")  # what a browser asks for: q4, q4f16 on WebGPU, q8


def write_onnx(
    student: Path,
    folder: Path,
    settings: Settings,
    *,
    calibration: Calibration | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write the graph, its weights, genai_config.json, config.json and the tokenizer into `folder`.

    calibration: gives the batches that gptq rounds on. Raises UserError for an architecture that cannot be built, and
    for gptq without calibration.
    """
    config = read_config(student)
    known = _rounded_beforehand(student, settings, calibration, progress) if settings.algorithm == "gptq" else {}
    for precision, path in graphs(settings).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        model, genai = (trace if is_traced(student) else build)(student, half=is_half(precision))
        write(
            model,
            target,
            bits=_bits_by_name(settings, student, precision),
            block=settings.block,
            algorithm=settings.algorithm,
            rounded=partial(_from_layers, known, student) if precision in ("int4", "q4f16") else lambda name: None,
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


def _rounded_beforehand(
    student: Path, settings: Settings, calibration: Calibration | None, progress: Callable[[int], object] | None
) -> dict[str, Blocks]:
    """Parameter -> its blocks, of the layers that gptq rounds."""
    if calibration is None:
        raise UserError("gptq rounds by what text does in the model; expected some; give it with --data")
    bits = _bits_by_name(settings, student, "int4")

    def block_of(name: str, columns: int) -> int | None:
        return fitting_block(settings.block, columns) if bits(name) == 4 else None

    return round_layers(student, calibration(), block_of=block_of, progress=progress)


def _from_layers(known: Mapping[str, Blocks], student: Path, initializer: str) -> Blocks | None:
    """The blocks of an initializer, from those of the parameters it holds."""
    if known and in_layers(initializer):
        names = initializer.split(JOIN)
        if not is_traced(student):
            names = hugging_face_names(initializer, tied=Shape.from_config(read_config(student)).tied)
        missing = [name for name in names if name not in known]
        if missing:
            raise UserError(f"gptq came to no {missing[0]}; expected a linear layer; choose another --algorithm")
        return Blocks.joined([known[name] for name in names])
    return None


@cache
def is_traced(student: Path) -> bool:
    """Whether transformers.exporters trace a model: `families` has no row, or it attends to a window.

    onnxruntime-genai's builder, which builds the others, leaves Mistral's window out.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(student, local_files_only=True)
    return config.model_type not in families.FAMILIES or families.attention_window(config) is not None


def is_half(precision: str) -> bool:
    """Whether a graph computes in float16."""
    return precision in ("fp16", "q4f16")


def graphs(settings: Settings) -> dict[str, str]:
    """precision -> path of its graph in the folder, the one that genai_config.json names first."""
    if not settings.web:
        return {settings.precision: "model.onnx"}
    wanted = dict.fromkeys((settings.precision, *WEB_ALWAYS))
    return {precision: f"onnx/{WEB_NAMES[precision]}.onnx" for precision in wanted}


def data_name(graph: Path) -> Path:
    """The file that holds a graph's weights, as the builder (model.onnx.data) or transformers.js calls it."""
    return graph.with_name(f"{graph.name}_data" if graph.parent.name == "onnx" else f"{graph.name}.data")


def _bits_by_name(settings: Settings, student: Path, precision: str) -> Callable[[str], int | None]:
    """Initializer, or parameter -> the bits it is rounded to."""
    if is_traced(student):
        matrices = matrices_of(skeleton(student))

        def bits_of_matrix(name: str) -> int | None:
            first = matrices.get(name.split(JOIN)[0])
            return settings.bits_of(first.parts, precision) if first and first.rounds else None

        return bits_of_matrix
    shape = Shape.from_config(read_config(student))
    known = {name: axes for name, axes in families.tensors(shape) if len(axes) == 2}

    def bits(initializer: str) -> int | None:
        name = hugging_face_names(initializer, tied=shape.tied)[0]
        if name not in known:
            return None
        return settings.bits(name, layers=shape.num_layers, tied=shape.tied, precision=precision)

    return bits


def arithmetic_bytes(student: Path, settings: Settings, precision: str) -> int:
    """What the data file of one graph must hold: packed weights, a scale a block, norms, biases, the builder's rope."""
    value = 2 if is_half(precision) else 4
    total = 0
    for sizes, bits, looked_up in _tensors(student, settings, precision):
        if bits is None:
            total += prod(sizes) * value
            continue
        rows, columns = sizes
        block = fitting_block(settings.block, columns)
        blocks = -(-columns // block)
        total += rows * blocks * (block * bits // 8 + value)
        symmetric = settings.algorithm not in ASYMMETRIC or bits == 8 or looked_up
        total += 0 if symmetric else rows * -(-blocks * bits // 8)
    return total


def _tensors(student: Path, settings: Settings, precision: str) -> Iterator[tuple[tuple[int, ...], int | None, bool]]:
    """Sizes, bits and whether it is an embedding, of every tensor that a graph holds."""
    from transformers import AutoConfig

    if is_traced(student):
        model: Any = skeleton(student)
        matrices, tokens = matrices_of(model), model.get_input_embeddings().weight
        for name, parameter in model.named_parameters():
            found = matrices.get(name)
            if found is None:
                yield tuple(parameter.shape), None, False
            else:
                bits = settings.bits_of(found.parts, precision) if found.rounds else None
                yield (found.rows, found.columns), bits, parameter is tokens
        return
    shape = Shape.from_config(read_config(student))
    positions = AutoConfig.from_pretrained(student, local_files_only=True).max_position_embeddings
    yield (positions, shape.head_dim), None, False  # rope: a cosine and a sine for every second channel
    for name, axes in families.tensors(shape):
        bits = settings.bits(name, layers=shape.num_layers, tied=shape.tied, precision=precision)
        yield tuple(map(shape.size, axes)), bits if len(axes) == 2 else None, "embed_tokens" in name


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
