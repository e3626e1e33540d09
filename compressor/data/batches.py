"""What a batch means to a model: which positions are targets, which documents see each other.

A batch holds input_ids and labels (-100: no target) and optionally attention_mask and position_ids that
restart at each document of a packed row; all (B, T). A row is the same without B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
IGNORED = -100  # a label that is no target, as everywhere in transformers


def targets(batch: Batch) -> Tensor:
    """Which of positions 1..T-1 count, (B, T-1) bool: labelled, and not the first token of a document."""
    counted = batch["labels"][:, 1:] != IGNORED
    if "position_ids" in batch:
        counted = counted & (batch["position_ids"][:, 1:] != 0)
    return counted


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """Final hidden states after the last norm, (B, T, hidden), no document of a row seeing another.

    transformers separates packed documents by position ids that restart, but only when neither an
    attention mask nor a cache is given; so padding is told by position ids too, never by a mask.
    """
    causal_lm: Any = model
    decoder = causal_lm.get_decoder()
    return decoder(input_ids=batch["input_ids"], position_ids=position_ids(batch), use_cache=False).last_hidden_state


def position_ids(batch: Batch) -> Tensor:
    """Position ids (B, T) that restart at every document and count on through padding on the right.

    Tokens cannot see what stands to their right, so counting on keeps padded rows on the fast causal path.
    """
    ids = batch["input_ids"]
    steps_T = torch.arange(ids.shape[1], device=ids.device)
    mask = batch.get("attention_mask")
    positions = batch.get("position_ids")
    if positions is None:
        # Zeros before the first real token: each is a document of its own to transformers, seen by none.
        positions = steps_T.expand_as(ids) if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    if mask is None:
        return positions
    last_B1 = (mask * steps_T).argmax(-1, keepdim=True)
    return torch.where(steps_T > last_B1, positions.gather(1, last_B1) + steps_T - last_B1, positions)


def real_tokens(batch: Batch) -> int:
    """Tokens of a batch or row that are not padding."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
