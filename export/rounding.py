"""Rounding a weight matrix to 4 or 8 bits in blocks: the numbers, before any format packs them.

A block is a run of weights of one output channel that share a scale: value = scale * (q - zero), q an unsigned
integer of `bits` bits. Suffixes: N output channels, K input channels, G blocks of a channel, B weights of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


CHUNK_VALUES = 2**20  # rounded at a time
MOVED = 2  # steps that gptq may take a weight away from its nearest


@dataclass(frozen=True)
class Blocks:
    """A rounded matrix. zero_NG is None where it is the middle of the range, 2 ** (bits - 1), in every block."""

    q_NGB: torch.Tensor  # uint8
    scale_NG: torch.Tensor  # float32
    zero_NG: torch.Tensor | None
    bits: int

    @classmethod
    def joined(cls, parts: Sequence[Blocks]) -> Blocks:
        """The rows of several symmetric matrices, one after the other."""
        import torch

        q_NGB, scale_NG = torch.cat([part.q_NGB for part in parts]), torch.cat([part.scale_NG for part in parts])
        return cls(q_NGB, scale_NG, None, parts[0].bits)

    def cpu(self) -> Blocks:
        """The same, moved from a GPU."""
        return Blocks(self.q_NGB.cpu(), self.scale_NG.cpu(), self.zero_NG, self.bits)

    def values(self) -> torch.Tensor:
        """The weights that these stand for (N, G * B), in float32."""
        zero: Any = 2 ** (self.bits - 1) if self.zero_NG is None else self.zero_NG.float().unsqueeze(-1)
        return ((self.q_NGB.float() - zero) * self.scale_NG.unsqueeze(-1)).flatten(1)

    def packed(self) -> torch.Tensor:
        """The bytes (N, G, B * bits / 8): two 4-bit values a byte, the earlier one in the low half."""
        if self.bits == 8:
            return self.q_NGB
        return self.q_NGB[..., 0::2] | (self.q_NGB[..., 1::2] << 4)


def round_blocks(weight_NK: torch.Tensor, *, bits: int, block: int, algorithm: str = "rtn") -> Blocks:
    """Round a float matrix (N, K) in blocks of `block` along K; the last block of a row is filled up with zeros.

    8-bit weights are always rounded to nearest: 256 steps leave the other algorithms nothing to gain.
    """
    import torch

    rounded = ALGORITHMS[algorithm] if bits == 4 else _nearest
    parts = []
    for rows in weight_NK.split(max(1, CHUNK_VALUES // weight_NK.shape[1])):  # so that copies stay small
        padded = torch.nn.functional.pad(rows.float(), (0, -rows.shape[1] % block))
        parts.append(rounded(padded.reshape(len(rows), -1, block), bits))
    zeros = [part.zero_NG for part in parts if part.zero_NG is not None]
    return Blocks(
        torch.cat([part.q_NGB for part in parts]),
        torch.cat([part.scale_NG for part in parts]),
        torch.cat(zeros) if zeros else None,
        bits,
    )


def _nearest(weight_NGB: torch.Tensor, bits: int) -> Blocks:
    """Symmetric round-to-nearest whose lowest step falls on the largest weight of the block, as in ORT and Q4_0."""
    half = 2 ** (bits - 1)
    largest_NG1 = weight_NGB.abs().argmax(-1, keepdim=True)
    scale_NG = weight_NGB.gather(-1, largest_NG1).squeeze(-1) / -half
    return _on_scale(weight_NGB, scale_NG, bits)


def _on_scale(weight_NGB: torch.Tensor, scale_NG: torch.Tensor, bits: int) -> Blocks:
    half = 2 ** (bits - 1)
    steps_NG = scale_NG.where(scale_NG != 0, scale_NG.new_ones(()))  # a block of zeros stays one
    q_NGB = (weight_NGB / steps_NG.unsqueeze(-1)).round_().add_(half).clamp_(0, 2 * half - 1)
    return Blocks(q_NGB.byte(), scale_NG, None, bits)


def _searched(weight_NGB: torch.Tensor, bits: int) -> Blocks:
    """Symmetric, with the scale of 21 near the nearest-rounding one that gives each block its least squared error."""
    import torch

    best = _nearest(weight_NGB, bits)
    least_NG = _error(best, weight_NGB)
    scale_NG = best.scale_NG.clone()
    for step in range(-10, 11):
        tried = _on_scale(weight_NGB, best.scale_NG * (1 + 0.02 * step), bits)
        error_NG = _error(tried, weight_NGB)
        scale_NG = torch.where(error_NG < least_NG, tried.scale_NG, scale_NG)
        least_NG = torch.minimum(error_NG, least_NG)
    return _on_scale(weight_NGB, scale_NG, bits)


def _error(blocks: Blocks, weight_NGB: torch.Tensor) -> torch.Tensor:
    return (blocks.values().view_as(weight_NGB) - weight_NGB).square_().sum(-1)


def _k_quant(weight_NGB: torch.Tensor, bits: int) -> Blocks:
    """Asymmetric, scale and minimum searched by weighted least squares, as llama.cpp's k-quants; by onnxruntime."""
    import torch
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    N, G, B = weight_NGB.shape
    _, scale, zero = quant_tensor_k_quant_cpu(weight_NGB.numpy().reshape(-1, B), num_bits=bits, group_size=B)
    return _asymmetric(weight_NGB, torch.from_numpy(scale).view(N, G), torch.from_numpy(zero).view(N, G), bits)


def _hqq(weight_NGB: torch.Tensor, bits: int) -> Blocks:
    """Half-quadratic quantization by onnxruntime; its zero points are rounded, to be packed as 4-bit integers."""
    from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, HQQWeightOnlyQuantizer

    N, G, B = weight_NGB.shape
    quantizer: Any = HQQWeightOnlyQuantizer(HQQWeightOnlyQuantConfig(block_size=B, bits=bits))
    _, scale, zero = quantizer.quantize_internal(weight_NGB.reshape(N, G * B), bits=bits, group_size=B)
    return _asymmetric(weight_NGB, scale.view(N, G), zero.view(N, G).round(), bits)


def _asymmetric(weight_NGB: torch.Tensor, scale_NG: torch.Tensor, zero_NG: torch.Tensor, bits: int) -> Blocks:
    import torch

    top = 2**bits - 1
    # a block of one sign has its zero beyond the range: it is rounded symmetrically
    one_sided_NG = (weight_NGB.amin(-1) > 0) | (weight_NGB.amax(-1) < 0)
    scale_NG = torch.where(one_sided_NG, _nearest(weight_NGB, bits).scale_NG, scale_NG.float())
    zero_NG = torch.where(one_sided_NG, 2.0 ** (bits - 1), zero_NG.float().clamp(0, top))
    steps_NG = scale_NG.where(scale_NG != 0, scale_NG.new_ones(()))
    q_NGB = (weight_NGB / steps_NG.unsqueeze(-1)).round_().add_(zero_NG.unsqueeze(-1)).clamp_(0, top)
    return Blocks(q_NGB.byte(), scale_NG, zero_NG.byte(), bits)


ASYMMETRIC = ("k_quant", "hqq")
ALGORITHMS: dict[str, Callable[[Any, int], Blocks]] = {
    "rtn": _nearest,
    "search": _searched,
    "k_quant": _k_quant,
    "hqq": _hqq,
    "gptq": _searched,  # of what reads no layer's output: head and embedding; `gptq` itself rounds the layers
}
