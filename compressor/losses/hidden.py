"""Minitron's intermediate loss: the student's hidden states held to the teacher's, beside their logits.

arXiv 2407.14679, section 3 and tables 17 and 18: it helps where much depth was cut, mapped from the third block from
the end to the third block from the end, with the embeddings held to each other too; for width it gave nothing.
Shape suffixes: N rows, D student width, E teacher width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

FROM_THE_END = 3  # the paper's best map: block 29 of 32 to block 13 of 16, counted from 0


class Pair(NamedTuple):
    """A state of the student and the teacher's that it is held to: what enters the block of that number, normalised."""

    student: int
    teacher: int


def paper_pairs(student_layers: int, teacher_layers: int) -> tuple[Pair, ...]:
    """The embeddings, and what leaves the third block from the end (the last one of shallower models)."""
    back = min(FROM_THE_END, student_layers, teacher_layers) - 1
    return (Pair(0, 0), Pair(student_layers - back, teacher_layers - back))


class HiddenLoss(nn.Module):
    """The loss and its projection from student width to teacher width, shared by all pairs, learned with the student.

    channels: which of the teacher's channels the student's are, where pruning chose them: the projection starts as that
    choice. measure: "cosine" (1 - cos) or "mse" (squared distance over the teacher's mean square).
    """

    def __init__(
        self, pairs: Sequence[Pair], *, channels: Sequence[int], teacher_width: int, measure: str = "cosine"
    ) -> None:
        super().__init__()
        self.pairs, self.measure = tuple(pairs), measure
        self.projection = nn.Linear(len(channels), teacher_width, bias=False)
        with torch.no_grad():
            self.projection.weight.zero_()
            self.projection.weight[torch.tensor(channels), torch.arange(len(channels))] = 1.0

    def forward(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        """The sum over rows of the mean over pairs. ours: (N, D) for each pair, theirs: (N, E), without gradient."""
        total = torch.zeros((), device=ours[0].device)
        for our_ND, their_NE in zip(ours, theirs, strict=True):
            found_NE, their_NE = self.projection(our_ND.float()), their_NE.detach().float()
            if self.measure == "cosine":
                total = total + (1 - functional.cosine_similarity(found_NE, their_NE, dim=-1)).sum()
            else:
                scale = their_NE.square().sum() / max(1, their_NE.numel())  # no rows give 0, not NaN
                total = total + (found_NE - their_NE).square().mean(-1).sum() / scale.clamp(min=1e-12)
        return total / len(self.pairs)


def balanced(logits_loss: Tensor, hidden_loss: Tensor) -> Tensor:
    """Both, the second weighted to be as large as the first, always anew: alpha = sg(L_logits / L_hidden)."""
    weight = (logits_loss / hidden_loss.clamp(min=1e-12)).detach()
    return logits_loss + weight * hidden_loss
