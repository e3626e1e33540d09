"""A GGUF file written with the `gguf` package: weights, rope, tokenizer, chat template, where it came from.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md names the keys. llama.cpp's llama graph turns neighbouring
channels of a head, transformers turns the halves, so the rows of q and k are permuted for that architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from compressor import families
from compressor.checkpoint import Checkpoint, copy_files, copy_tokenizer
from compressor.errors import UserError
from compressor.run import write_json
from compressor.runtime.in_gguf import FILE
from compressor.shape import Shape

from . import k_quants
from .gguf_tokenizer import tokenizer_fields
from .k_quants import MIXES, SUPER_BLOCK
from .settings import Settings

if TYPE_CHECKING:
    import torch

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# values and bytes of a block; rows that are no multiple of it stay in float16, as llama.cpp does
BLOCKS = {"q8_0": (32, 34), "q5_1": (32, 24), "q5_0": (32, 22), "q4_1": (32, 20), "q4_0": (32, 18)}
BLOCKS |= {"q6_k": (SUPER_BLOCK, 210), "q5_k": (SUPER_BLOCK, 176), "q4_k": (SUPER_BLOCK, 144)}
VALUE_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


def write_gguf(
    student: Path,
    folder: Path,
    settings: Settings,
    *,
    about: Mapping[str, str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write model.gguf, and beside it the config and tokenizer that transformers reads, into `folder`.

    about: general.* metadata, such as name and description. Weights pass through memory one at a time, in float32.
    Raises UserError for a family or a rope scaling that llama.cpp has no graph for.
    """
    import gguf
    from transformers import AutoConfig

    if settings.precision in MIXES:
        k_quants.require()
    checkpoint = Checkpoint(student)
    shape = checkpoint.shape
    config: Any = AutoConfig.from_pretrained(student, local_files_only=True)
    _check_window(config)
    names, tensors = tensor_names(shape), layout(shape, settings.precision)
    writer = gguf.GGUFWriter(folder / FILE, architecture(shape), use_temp_file=False)
    try:
        # transformers takes a llama file for Mistral's where its name says so
        _write_sizes(writer, config, shape, settings, {"name": student.name} | dict(about or {}))
        for key, value in tokenizer_fields(student, shape.vocab, pre=settings.tokenizer_pre).items():
            _add(writer, key, value)
        for name, (kind, rows, row_bytes) in tensors.items():
            # described first, streamed below: the file needs its header before its data
            described = [rows, row_bytes] if rows else [row_bytes]
            raw = gguf.GGMLQuantizationType[kind.upper()]
            writer.add_tensor_info(names[name], described, numpy.dtype(numpy.uint8), max(rows, 1) * row_bytes, raw)
        factors = _rope_factors(config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (kind, _, _) in tensors.items():
            weight = checkpoint.tensor(name).float()
            writer.write_tensor_data(encoded(permuted(name, weight, shape), kind))
            if progress is not None:
                progress(weight.numel())
        if factors is not None:
            writer.write_tensor_data(factors)
    finally:
        writer.close()
    write_json(folder / "config.json", checkpoint.config)
    copy_files(student, folder, ["generation_config.json"])
    copy_tokenizer(student, folder)


def architecture(shape: Shape) -> str:
    """The graph of llama.cpp that computes this model.

    Its qwen2 graph wants heads x head_dim to be the hidden size, which pruning changes; its llama graph does not, and
    takes the biases of q, k and v too.
    """
    if shape.family == "qwen2" and shape.size("heads") != shape.hidden:
        return "llama"
    return ARCHITECTURES[shape.family]


def layout(shape: Shape, precision: str) -> dict[str, tuple[str, int, int]]:
    """Hugging Face name -> (type, rows, bytes of a row) of every tensor, in file order; 0 rows for a vector."""
    found = {}
    for name, axes in families.tensors(shape):
        *rows, columns = (shape.size(axis) for axis in axes)
        kind = _kind(name, precision, shape, columns) if rows else "f32"
        block, block_bytes = BLOCKS.get(kind, (1, VALUE_BYTES.get(kind, 0)))
        found[name] = (kind, prod(rows) if rows else 0, columns // block * block_bytes)
    return found


def _kind(name: str, precision: str, shape: Shape, columns: int) -> str:
    """The type of a matrix."""
    head = name.startswith("lm_head") or (shape.tied and "embed_tokens" in name)
    kind = precision
    if precision in MIXES:
        kind = k_quants.kind_of(precision, name, layers=shape.num_layers, head=head)
        if columns % SUPER_BLOCK:
            kind = k_quants.FALLBACK[kind]
    elif precision in BLOCKS and head:
        kind = "q8_0"  # a head at 4 bits costs far more quality than its bytes are worth; llama.cpp keeps 6 to 8 too
    return "f16" if kind in BLOCKS and columns % BLOCKS[kind][0] else kind


def fallen_back(shape: Shape, precision: str) -> list[str]:
    """The matrices whose rows fill no super-blocks, so that k-quants cannot hold them."""
    if precision not in MIXES:
        return []
    return [name for name, (kind, rows, _) in layout(shape, precision).items() if rows and not kind.endswith("_k")]


def tensor_names(shape: Shape) -> dict[str, str]:
    """Hugging Face name -> GGUF name of every tensor."""
    import gguf

    known = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture(shape).upper()), shape.num_layers)
    found = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name, _ in families.tensors(shape)}
    return {name: target for name, target in found.items() if target is not None}


def arithmetic_bytes(config: Mapping[str, Any], settings: Settings) -> int:
    """Bytes of all tensors; the file adds its header, which holds the vocabulary."""
    shape = Shape.from_config(config)
    return sum(max(rows, 1) * row_bytes for _, rows, row_bytes in layout(shape, settings.precision).values())


def encoded(weight: torch.Tensor, kind: str) -> numpy.ndarray:
    """The bytes of a tensor in one of gguf's types."""
    import gguf

    values = numpy.ascontiguousarray(weight.numpy(), dtype=numpy.float32)
    if kind.endswith("_k"):
        return k_quants.pack(values, kind)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind.upper()])


def permuted(name: str, weight: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Rows of q and k so that the channels that turn together lie side by side: (2, d/2) becomes (d/2, 2)."""
    return _reordered(name, weight, shape, (2, shape.head_dim // 2))


def unpermuted(name: str, weight: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The inverse of `permuted`."""
    return _reordered(name, weight, shape, (shape.head_dim // 2, 2))


def _reordered(name: str, weight: torch.Tensor, shape: Shape, split: tuple[int, int]) -> torch.Tensor:
    heads = {"q_proj": shape.num_heads, "k_proj": shape.num_kv_heads}.get(name.split(".")[-2])
    if heads is None or architecture(shape) != "llama":
        return weight
    return weight.view(heads, *split, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _write_sizes(writer: Any, config: Any, shape: Shape, settings: Settings, about: dict[str, str]) -> None:
    """Everything but the tokenizer; `config` is transformers', with its defaults filled in."""
    import gguf

    for key, value in about.items():
        writer.add_string(f"general.{key}", value)
    kind = "ALL_F32" if settings.precision == "f32" else f"MOSTLY_{settings.precision.upper()}"
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(shape.head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind not in ("default", "llama3"):  # llama3's scaling is a tensor of its own
        raise UserError(
            f"rope scaling {kind!r} is not written to GGUF; expected default, linear or llama3; export to onnx instead"
        )


def _rope_factors(config: Any) -> Any:
    """What llama.cpp divides each frequency by, for llama3's scaling: (head_dim / 2,), or None without it."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = 2 * len(scaled)
    plain = rope["rope_theta"] ** -(torch.arange(0, dim, 2).float() / dim)
    return (plain / scaled).float().numpy()


def _check_window(config: Any) -> None:
    window = families.attention_window(config)
    if window is not None:
        raise UserError(
            f"this model attends to a window of {window} tokens, for which llama.cpp has no graph in this family; "
            f"expected full attention; set sliding_window to null if {window} tokens of context are enough"
        )


def _add(writer: Any, key: str, value: Any) -> None:
    """One metadata field by the type of its value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
