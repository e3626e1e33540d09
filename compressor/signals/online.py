"""The teacher itself, run beside the student on every batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch, hidden_states
from ..errors import UserError
from ..losses import Dense, Teacher

# (batch, counted_BT) -> what is known of the teacher at the N counted targets, row by row
Signal = Callable[[Batch, Tensor], Teacher]


class Online:
    """Whole distributions, by a forward pass of the teacher, as it is at that moment.

    learns: the teacher is in training too, so its states keep their graph. Raises UserError as `check_head`.
    """

    def __init__(self, teacher: nn.Module, *, learns: bool = False) -> None:
        check_head(teacher)
        self.teacher, self.learns = teacher, learns

    def __call__(self, batch: Batch, counted_BT: Tensor) -> Dense:
        """Final hidden states (N, width) of the positions that predict the counted targets, and the head."""
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            return Dense(predicting(self.teacher, batch, counted_BT), head_weight(self.teacher))

    def observed(self, batch: Batch, counted_BT: Tensor, states: Sequence[int]) -> tuple[Dense, list[Tensor]]:
        """The same, and states inside the teacher, see `observed`."""
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            final_NE, inside = observed(self.teacher, batch, counted_BT, states)
        return Dense(final_NE, head_weight(self.teacher)), inside


def predicting(model: nn.Module, batch: Batch, counted_BT: Tensor) -> Tensor:
    """Hidden states of the positions that predict a counted target, (N, width)."""
    return hidden_states(model, batch)[:, :-1][counted_BT]


def observed(model: nn.Module, batch: Batch, counted_BT: Tensor, states: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """As `predicting`, and what enters each block of `states` after its norm, (N, width); the last block's successor is
    the final norm, whose states these are.
    """
    causal_lm: Any = model
    decoder = causal_lm.get_decoder()
    norms = [layer.input_layernorm for layer in decoder.layers] + [decoder.norm]
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found[number] = output  # cut only after the pass: under checkpointing the hook is gone at recomputation

        return hook

    hooks = [norms[number].register_forward_hook(keep(number)) for number in sorted(set(states))]
    try:
        final_ND = predicting(model, batch, counted_BT)
    finally:
        for hook in hooks:
            hook.remove()
    return final_ND, [found[number][:, :-1][counted_BT] for number in states]


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
