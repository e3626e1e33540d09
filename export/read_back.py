"""The weights of an artifact, read from its files as its format is specified.

Each tensor comes under its Hugging Face name, in (out, in) order, with the interval in which the student's weight
must lie for the stored value to be its rounding. A changed block, a doubled scale or a swapped matrix falls outside.
The code that wrote is asked for names and order of rows alone, which the comparison itself and logits guard.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compressor import families
from compressor.shape import Shape

from .onnx_graph import hugging_face_names, orientation
from .onnx_traced import JOIN, matrices_of
from .settings import in_layers

if TYPE_CHECKING:
    import torch

    Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

SLACK = 0.02  # of a step: what float32 arithmetic may move a weight at the border of two steps
HALF_SLACK = 2.0**-10  # of a product: a scale stored in float16 is off by half of this at most
TINY = 2.0**-25  # and by this where it is below float16's smallest normal number, or vanishes
CLIPPED = 3.0 + SLACK  # steps that a weight may lie beyond its block's range: `search` takes 0.8 of the scale


class Read(NamedTuple):
    """A tensor as stored, and the lowest and highest weight that it can stand for."""

    name: str
    value: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def onnx_weights(graph_path: Path, shape: Shape, *, moved: int = 0) -> Iterator[Read]:
    """The weights of a graph that onnxruntime-genai's builder built.

    moved: steps that a weight of 4 bits may lie from its nearest, where its rounding made up for others' errors.
    """
    for initializer, tensors in _initializers(graph_path, lambda name: shape.hidden, moved=moved):
        names = hugging_face_names(initializer, tied=shape.tied)
        rows = [shape.size(families.axes_of(shape, name)[0]) for name in names]
        for name, *part in zip(names, *(tensor.split(rows) for tensor in tensors), strict=True):
            yield Read(name, *part)


def traced_weights(graph_path: Path, model: Any, *, moved: int = 0) -> Iterator[Read]:
    """The weights of a traced graph, which have their parameters' names; `model`, without weights, has their sizes.

    A vector that the tracer left as it is comes too; one that it folded into another has no name any more.
    """
    matrices, parameters = matrices_of(model), dict(model.named_parameters())
    for joined, tensors in _initializers(graph_path, lambda name: matrices[name].columns, moved=moved):
        names = joined.split(JOIN)
        if names[0] not in matrices:
            if joined in parameters:
                yield Read(joined, *tensors)
            continue
        parts = zip(names, *(tensor.split([matrices[name].rows for name in names]) for tensor in tensors), strict=True)
        for name, *part in parts:
            yield Read(name, *(tensor.T if matrices[name].turned else tensor for tensor in part))


def _initializers(
    graph_path: Path, table_columns: Callable[[str], int], *, moved: int
) -> Iterator[tuple[str, Tensors]]:
    """Name -> value, low, high, a matrix as (out, in), of a graph that `onnx_graph.write` wrote.

    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md has the layout of what MatMulNBits
    reads. An embedding's table is packed alike and read by its rows; one that lm_head shares comes once.
    table_columns: name -> the hidden size of such a table.
    """
    import onnx_ir as ir

    graph: Any = ir.load(graph_path).graph
    seen: set[str] = set()
    for node in graph:
        table = node.inputs[0] if node.op_type == "Gather" else None
        if node.op_type == "MatMulNBits":
            packed, scales, *zeros = (value for value in node.inputs[1:4] if value is not None)
            bits, columns = node.attributes["bits"].as_int(), node.attributes["K"].as_int()
        elif table is not None and (found := re.search(r"_q(\d)$", str(table.name))):
            packed, zeros, bits = table, [], int(found[1])
            columns = table_columns(re.sub(r"_q\d$", "", str(table.name)))
            scales = graph.initializers[re.sub(r"_q\d$", "_scales", str(table.name))]
        else:
            continue
        if packed.name in seen:
            continue
        seen |= {str(value.name) for value in (packed, scales, *zeros)}
        parts = [_array(value) for value in (packed, scales, *zeros)]
        base = re.sub(r"_q\d$", "", str(packed.name))
        yield base, _blocks(*parts, bits=bits, columns=columns, moved=moved if bits == 4 and in_layers(base) else 0)
    for name, value in graph.initializers.items():
        if name in seen or re.search(r"(_cache|/\w+)$", name):  # rope tables, constants of the graph's own
            continue
        if not value.dtype.is_floating_point():
            continue
        array = _array(value)
        if array.dim() == 2 and orientation(value) is False:
            array = array.T
        yield name, _floats(array)


def _array(value: Any) -> torch.Tensor:
    import numpy
    import torch

    return torch.from_numpy(numpy.array(value.const_value.numpy()))


def _blocks(
    packed_NGB: torch.Tensor,
    scales_NG: torch.Tensor,
    zeros: torch.Tensor | None = None,
    *,
    bits: int,
    columns: int,
    moved: int,
) -> Tensors:
    """Value, low and high (N, K) of a packed matrix."""
    import torch

    def unpack(packed: torch.Tensor) -> torch.Tensor:
        if bits == 8:
            return packed
        return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)

    q_NGB = unpack(packed_NGB).float()
    N, G, _ = q_NGB.shape
    zero = 2.0 ** (bits - 1) if zeros is None else unpack(zeros.view(N, -1))[:, :G].float().unsqueeze(-1)
    scale_NG1 = scales_NG.view(N, G, 1).float()
    values = tuple(
        (scale_NG1 * (q_NGB + shift - zero)).reshape(N, -1)[:, :columns]
        for shift in (
            torch.zeros(()),
            torch.where(q_NGB <= moved, -CLIPPED, -0.5 - SLACK) - moved,
            torch.where(q_NGB >= 2**bits - 1 - moved, CLIPPED, 0.5 + SLACK) + moved,
        )
    )
    value, one, other = values
    slack = torch.zeros(())
    if scales_NG.dtype == torch.float16:
        slack = value.abs() * HALF_SLACK + (q_NGB - zero).abs().reshape(N, -1)[:, :columns] * TINY
    return value, torch.minimum(one, other) - slack, torch.maximum(one, other) + slack  # a scale may be negative


def _floats(values: torch.Tensor) -> Tensors:
    """A float16 stands for what rounds to it, a float32 for itself."""
    import torch

    spread = 0.0 if values.dtype == torch.float32 else torch.finfo(values.dtype).eps
    value = values.float()
    reach = value.abs() * spread
    if spread:
        limits = torch.finfo(values.dtype)
        reach = reach + limits.smallest_normal * limits.eps / 2  # half of the smallest subnormal
    return value, value - reach, value + reach


def gguf_weights(path: Path, shape: Shape) -> Iterator[Read]:
    """The tensors of a GGUF file, dequantized by the `gguf` package and with the rows of q and k put back."""
    import gguf
    import numpy
    import torch

    from .to_gguf import tensor_names, unpermuted

    known = {target: name for name, target in tensor_names(shape).items()}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        name, kind = known[tensor.name], tensor.tensor_type.name
        value = torch.from_numpy(numpy.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        value = value.view(tuple(int(size) for size in reversed(tensor.shape)))
        plain = kind in _PLAIN
        if plain:
            parts = _floats(value.to(getattr(torch, _PLAIN[kind])))
        else:
            parts = (_super_steps if kind in _SUPER else _steps)(value, tensor.data, kind)
        yield Read(name, *(unpermuted(name, part, shape) for part in parts))


_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# type -> bits, whether it has a minimum beside its scale
_BLOCKED = {"Q8_0": (8, False), "Q5_0": (5, False), "Q5_1": (5, True), "Q4_0": (4, False), "Q4_1": (4, True)}


def _steps(value: torch.Tensor, data: Any, kind: str) -> Tensors:
    """Value, low and high of a block type: a step is the float16 that each block of 32 begins with."""
    import numpy
    import torch

    bits, with_minimum = _BLOCKED[kind]
    count = value.numel() // 32
    blocks = numpy.ascontiguousarray(data).reshape(count, -1)
    step_G1 = torch.from_numpy(blocks[:, :2].copy().view(numpy.float16).astype(numpy.float32))
    value_GB = value.reshape(count, 32)
    reach_GB = (step_G1.abs() * (0.5 + SLACK)).expand(count, 32)
    # q8_0 is symmetric and never clips; the others have one step less on the side opposite to the largest weight
    if not with_minimum and bits < 8:
        top_GB = value_GB >= step_G1.abs() * (2 ** (bits - 1) - 1.5)
        bottom_GB = value_GB <= -step_G1.abs() * (2 ** (bits - 1) - 1.5)
        ends_GB = torch.where(step_G1 > 0, top_GB, bottom_GB)
        reach_GB = torch.where(ends_GB, step_G1.abs() * (1 + SLACK), reach_GB)
    minimum_G1 = torch.zeros(())
    if with_minimum:
        minimum_G1 = torch.from_numpy(blocks[:, 2:4].copy().view(numpy.float16).astype(numpy.float32))
    reach_GB = reach_GB + ((value_GB - minimum_G1).abs() + minimum_G1.abs()) * HALF_SLACK + 2**bits * TINY
    low, high = value_GB - reach_GB, value_GB + reach_GB
    return value, low.view(value.shape), high.view(value.shape)


# type -> bytes of a super-block, its blocks, the levels of a weight
_SUPER = {"Q4_K": (144, 8, 16), "Q5_K": (176, 8, 32), "Q6_K": (210, 16, 64)}


def _super_steps(value: torch.Tensor, data: Any, kind: str) -> Tensors:
    """Value, low and high of a k-quant: the step of a block is its own small integer times the super-block's float16.

    Within its range a weight lies half a step from its value; beyond, it is off by what rounding the block's scale and
    minimum to those integers, and the search for them, left out.
    """
    import numpy
    import torch

    size, blocks, levels = _SUPER[kind]
    raw = numpy.ascontiguousarray(data).reshape(-1, size)

    def half(start: int) -> torch.Tensor:
        return torch.from_numpy(raw[:, start : start + 2].copy().view(numpy.float16).astype(numpy.float32))

    if kind == "Q6_K":
        d_S1, least_S1 = half(208), torch.zeros(())
        steps_SB = d_S1 * torch.from_numpy(raw[:, 192:208].copy().view(numpy.int8).astype(numpy.float32))
        bottom_SB1, reach = (steps_SB * -(levels // 2)).unsqueeze(-1), levels // 2
    else:
        d_S1, least_S1 = half(0), half(2)
        scales, minima = _six_bits(torch.from_numpy(raw[:, 4:16].astype(numpy.int64)))
        steps_SB = d_S1 * scales
        bottom_SB1, reach = (-least_S1 * minima).unsqueeze(-1), levels
    value_SBW = value.reshape(len(raw), blocks, -1)
    steps_SB1 = steps_SB.unsqueeze(-1)
    level_SBW = torch.where(steps_SB1 == 0, 0.0, (value_SBW - bottom_SB1) / steps_SB1).round()
    inside_SBW = (level_SBW > 0) & (level_SBW < levels - 1)
    lost_S11 = (d_S1.abs() * reach / 2 + least_S1.abs() / 2).unsqueeze(-1)
    slack_SBW = value_SBW.abs() * HALF_SLACK + levels * TINY
    edge_SBW = steps_SB1.abs() * CLIPPED + lost_S11
    reach_SBW = torch.where(inside_SBW, steps_SB1.abs() * (0.5 + SLACK), edge_SBW) + slack_SBW
    low, high = value_SBW - reach_SBW, value_SBW + reach_SBW
    return value, low.view(value.shape), high.view(value.shape)


def _six_bits(packed_S12: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of 6 bits from 12 bytes, the high bits of the last four in the first eight."""
    import torch

    low, middle, high = packed_S12.split(4, dim=1)
    scales = torch.cat([low & 63, (high & 15) | (low >> 6 << 4)], dim=1)
    minima = torch.cat([middle & 63, (high >> 4) | (middle >> 6 << 4)], dim=1)
    return scales.float(), minima.float()


def bitsandbytes_weights(folder: Path, shape: Shape) -> Iterator[Read]:
    """The tensors of a bitsandbytes folder: nf4 codes times absmax, int8 times the row's scale, or as they are."""
    import torch
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if not name.endswith((".weight", ".bias")):
                    continue
                values = file.get_tensor(name)
                if f"{name}.absmax" in file.keys():  # noqa: SIM118
                    sizes = tuple(shape.size(axis) for axis in families.axes_of(shape, name))
                    parts = _codes(values, file.get_tensor(f"{name}.absmax"), file.get_tensor(f"{name}.quant_map"))
                    yield Read(name, *(part.view(sizes) for part in parts))
                elif values.dtype == torch.int8:
                    scale_N1 = file.get_tensor(name.replace(".weight", ".SCB")).float().unsqueeze(1) / 127
                    value = values.float() * scale_N1
                    reach = scale_N1 * (0.5 + SLACK) + value.abs() * HALF_SLACK  # weights are read in float16
                    yield Read(name, value, value - reach, value + reach)
                else:
                    yield Read(name, *_floats(values))


def _codes(packed: torch.Tensor, absmax_G: torch.Tensor, code_C: torch.Tensor) -> Tensors:
    """Value, low and high of 4-bit codes, the earlier one in the high half of a byte: midpoints between codes."""
    import torch

    flat = packed.flatten()
    index_GB = torch.stack([flat >> 4, flat & 15], -1).view(len(absmax_G), -1).long()
    middle = (code_C[1:] + code_C[:-1]) / 2
    edge = torch.tensor([SLACK])
    low_C, high_C = torch.cat([code_C[:1] - edge, middle]), torch.cat([middle, code_C[-1:] + edge])
    slack_GB = SLACK * (high_C - low_C)
    return tuple(  # pyright: ignore[reportReturnType]
        (levels[index_GB] * absmax_G.unsqueeze(1)).flatten() for levels in (code_C, low_C - slack_GB, high_C + slack_GB)
    )
