"""The teacher itself, run beside the student on every batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch, hidden_states
from ..errors import UserError
from ..losses import Dense, Teacher

# (batch, counted_BT) -> what is known of the teacher at the N counted targets, row by row
Signal = Callable[[Batch, Tensor], Teacher]


class Online:
    """Whole distributions, by a forward pass of a frozen teacher. Raises UserError as `check_head`."""

    def __init__(self, teacher: nn.Module) -> None:
        check_head(teacher)
        self.teacher = teacher

    @torch.no_grad()
    def __call__(self, batch: Batch, counted_BT: Tensor) -> Dense:
        """Final hidden states (N, width) of the positions that predict the counted targets, and the head."""
        return Dense(predicting(self.teacher, batch, counted_BT), head_weight(self.teacher))


def predicting(model: nn.Module, batch: Batch, counted_BT: Tensor) -> Tensor:
    """Hidden states of the positions that predict a counted target, (N, width)."""
    return hidden_states(model, batch)[:, :-1][counted_BT]


def head_weight(model: nn.Module) -> Tensor:
    """The lm_head's weight (vocab, hidden); the embedding's own parameter where they are tied."""
    causal_lm: Any = model
    return causal_lm.get_output_embeddings().weight


def check_head(model: nn.Module) -> None:
    """Raise UserError unless the model's logits are its final hidden states times its head and nothing more.

    A bias, a scale or a cap on the logits would be lost in the fused loss, without any sign of it.
    """
    device = head_weight(model).device
    batch = {"input_ids": torch.tensor([[0, 1, 2, 3]], device=device)}
    with torch.no_grad():
        expected = model(batch["input_ids"], use_cache=False).logits.float()
        found = (hidden_states(model, batch) @ head_weight(model).t()).float()
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise UserError(
            f"{type(model).__name__} changes its logits after the lm_head; expected hidden states times the "
            "head; distill a model without a head bias, logit scale or soft cap"
        )
