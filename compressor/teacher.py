"""The teacher: loaded once, frozen, only ever asked for hidden states and logits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import load_model

if TYPE_CHECKING:
    import torch


def load(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.nn.Module:
    """Load a teacher in eval mode with no parameter to train.

    `dtype` defaults to bfloat16 on a GPU and float32 elsewhere, where half precision is slow or inexact;
    `device` to the one this process trains on. Raises UserError for a broken checkpoint and for NaN weights.
    """
    import torch
    from accelerate import PartialState

    place = torch.device(device) if device is not None else torch.device(PartialState().device or "cpu")
    if dtype is None:
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    return load_model(folder, dtype=dtype, device=place).requires_grad_(False)
