"""A bitsandbytes folder, nf4 or int8, that `from_pretrained` loads again on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from compressor import families
from compressor.checkpoint import DTYPES, Checkpoint, copy_tokenizer
from compressor.errors import UserError
from compressor.shape import Shape

from .settings import Settings

BLOCK = 64  # weights that share an absmax in nf4
PANEL = 32  # output channels that the AVX512-BF16 kernel works on at once


def write_bitsandbytes(
    student: Path, folder: Path, settings: Settings, *, progress: Callable[[int], object] | None = None
) -> None:
    """Quantize with bitsandbytes and save; matrices that a CPU kernel would refuse stay as they are.

    Raises UserError where that leaves nothing to quantize.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    checkpoint = Checkpoint(student)
    kept = refused(checkpoint.shape, settings.precision)
    if len(kept) == len(list(linears(checkpoint.shape))):
        raise UserError(
            f"no matrix of this model can be packed as {settings.precision}: its sizes are no multiples of {PANEL} "
            f"outputs and {BLOCK} inputs; expected such sizes; prune to them, or export to onnx or gguf"
        )
    stored = getattr(torch, DTYPES[checkpoint.metadata("model.embed_tokens.weight").dtype][0])
    skipped = ["lm_head", *kept]
    if settings.precision == "nf4":
        compute = torch.float32 if stored == torch.float32 else torch.bfloat16
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute,
            llm_int8_skip_modules=skipped,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    model = AutoModelForCausalLM.from_pretrained(
        student,
        dtype=stored,
        quantization_config=config,
        device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
        use_safetensors=True,
        local_files_only=True,
    )
    model.save_pretrained(folder)
    copy_tokenizer(student, folder)
    if progress is not None:
        progress(checkpoint.shape.parameters)


def linears(shape: Shape) -> Iterator[tuple[str, int, int]]:
    """Module name, outputs and inputs of every matrix of a layer: what bitsandbytes quantizes."""
    for name, axes in families.tensors(shape):
        if "layers." in name and len(axes) == 2:
            yield name.removesuffix(".weight"), shape.size(axes[0]), shape.size(axes[1])


def refused(shape: Shape, precision: str) -> list[str]:
    """The matrices whose sizes the CPU kernels refuse.

    On AVX512-BF16 an nf4 matrix is repacked in panels of 32 outputs, its absmax as rows of whole blocks of 64.
    """
    if precision != "nf4":
        return []
    return [name for name, outputs, inputs in linears(shape) if outputs % PANEL or inputs % BLOCK]


def arithmetic_bytes(config: Mapping[str, Any], settings: Settings, *, value_bytes: int) -> int:
    """Bytes of all tensors of the folder; `value_bytes` is the width of what stays in floating point."""
    shape = Shape.from_config(config)
    packed = {name for name, _, _ in linears(shape)} - set(refused(shape, settings.precision))
    total = 0
    for name, axes in families.tensors(shape):
        sizes = [shape.size(axis) for axis in axes]
        count = prod(sizes)
        if name.removesuffix(".weight") not in packed:
            total += count * value_bytes
        elif settings.precision == "nf4":
            total += count // 2 + 4 * count // BLOCK
        else:
            total += count + 4 * sizes[0]
    return total
