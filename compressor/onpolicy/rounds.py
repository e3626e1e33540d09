"""Rounds of answers: the student answers a set of prompts, is trained on them for some epochs, and answers others.

A round is decided by its number, so that a run that was killed goes on with the same prompts, the same order and, out
of its checkpoint, the same answers.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch, collate, targets
from ..run import processes
from .objective import Tricks, advantages
from .rollouts import Rollouts, sample, score


class Rounds:
    """A `train.Supply`: some micro-batches of each step become the student's own answers, the others stay the data's.

    prompts: token ids. own: how many of a step's micro-batches are answers, on each rank; they are marked by a column
    "own". weights: of the mean loss per token of answers, and of the data; a micro-batch carries what makes it so as
    "weight". tricks: MiniLLM's; None where no reward is wanted (GKD). answers: of a round, over all ranks. sample_rows:
    answers sampled together. sampled: further keywords of `sample`.
    """

    def __init__(
        self,
        prompts: Sequence[list[int]],
        *,
        own: int,
        micro_batch: int,
        answers: int,
        inner_epochs: int,
        weights: tuple[float, float],
        tricks: Tricks | None,
        teacher: nn.Module,
        seed: int,
        sample_rows: int = 64,
        **sampled: Any,
    ) -> None:
        self.rank = int(os.environ.get("RANK", "0"))  # read now: a server of forks set run.RANK before
        self.prompts, self.seed, self.teacher, self.tricks, self.sampled = prompts, seed, teacher, tricks, sampled
        self.own, self.micro_batch, self.weights, self.sample_rows = own, micro_batch, weights, sample_rows
        self.answers = answers
        self.steps_an_epoch = answers // (own * micro_batch * processes())
        self.steps = self.steps_an_epoch * inner_epochs  # of a round
        self.round = -1
        self.found: Rollouts | None = None
        self._rows: list[dict[str, Tensor]] = []
        self._notes: dict[str, float] = {}

    def of_step(
        self, student: nn.Module, step: int, batches: list[Batch], over_ranks: Callable[[Sequence[float]], list[float]]
    ) -> list[Batch]:
        """The micro-batches of a step; where its round begins, the student answers first."""
        number, within = divmod(step, self.steps)
        if number != self.round:
            self._hold(self._answered(student, number), number)
        epoch, first = divmod(within, self.steps_an_epoch)
        order = list(range(len(self._rows)))
        self._random(number, epoch + 1).shuffle(order)
        order = order[first * self.own * self.micro_batch :]
        runs = [order[i * self.micro_batch : (i + 1) * self.micro_batch] for i in range(self.own)]
        mine, theirs = [collate([self._rows[i] for i in run]) for run in runs], batches[self.own :]
        counts = over_ranks([float(sum(int(targets(b).sum()) for b in group)) for group in (mine, theirs)])
        weighed: list[Batch] = []
        for group, weight, count in zip((mine, theirs), self.weights, counts, strict=True):
            # the trainer divides by the targets of both kinds: each kind's mean is what is meant
            scale = torch.tensor(weight * sum(counts) / max(1.0, count))
            weighed += [{**batch, "weight": scale} for batch in group]
        return weighed

    def notes(self) -> dict[str, float]:
        """Mean length of the round's answers in tokens, and the mean reward of a token, in nats; of this rank's."""
        return self._notes

    def save(self, folder: Path) -> None:
        """Write the round's answers."""
        if self.found is not None:
            self.found.save(folder / self._name)

    def load(self, folder: Path, *, step: int) -> None:
        """Read the answers of the round that step number `step` ended in, unless the next one begins another."""
        if step % self.steps:
            self._hold(Rollouts.load(folder / self._name), step // self.steps)

    @property
    def _name(self) -> str:
        return f"answers-{self.rank}.safetensors"

    def _answered(self, student: Any, number: int) -> Rollouts:
        """Answers to the prompts of a round; those of like length are sampled together."""
        mine = self.steps_an_epoch * self.own * self.micro_batch
        chosen = sorted(self._chosen(number * self.answers + self.rank * mine, mine), key=len)
        device = student.device
        generator = torch.Generator(device).manual_seed(self._random(number, 0).getrandbits(63))
        mixed = self.tricks.alpha if self.tricks is not None else 0.0
        parts = []
        for start in range(0, mine, self.sample_rows):
            rows = chosen[start : start + self.sample_rows]
            width = max(map(len, rows))
            ids_BP = torch.tensor([[0] * (width - len(ids)) + ids for ids in rows], device=device)
            mask_BP = torch.tensor([[False] * (width - len(ids)) + [True] * len(ids) for ids in rows], device=device)
            options = {"teacher": self.teacher, "alpha": mixed, "generator": generator, **self.sampled}
            part = sample(student, ids_BP, mask_BP, **options)
            if self.tricks is not None and part.log_p_BT is None:
                part = score(part, self.teacher, vocab=self.sampled.get("vocab"))
            parts.append(part)
        return Rollouts.joined(parts)

    def _hold(self, found: Rollouts, number: int) -> None:
        """Make rows of a round's answers; advantages are taken over all of this rank's."""
        self.round, self.found = number, found
        columns, mask_BT = {}, found.mask_BT
        self._notes = {"answer_length": statistics.fmean(mask_BT.sum(-1).tolist())}
        if self.tricks is not None:
            advantages_BT = advantages(found.rewards, mask_BT, self.tricks)
            columns = {"log_mix": found.log_mix_BT, "advantages": advantages_BT}
            self._notes["answer_reward"] = float(found.rewards[mask_BT].mean())
        self._rows = found.rows(**columns, own=mask_BT.float())

    def _chosen(self, first: int, count: int) -> list[list[int]]:
        """Prompts number `first` and following of an endless list: all of them shuffled, over and over."""
        turns: dict[int, list[int]] = {}
        for turn in range(first // len(self.prompts), (first + count - 1) // len(self.prompts) + 1):
            turns[turn] = list(range(len(self.prompts)))
            random.Random(f"{self.seed} {turn}").shuffle(turns[turn])
        places = (divmod(place, len(self.prompts)) for place in range(first, first + count))
        return [self.prompts[turns[turn][number]] for turn, number in places]

    def _random(self, number: int, epoch: int) -> random.Random:
        """Of a round (0) or one of its epochs (1, 2, ...), on this rank."""
        return random.Random(f"{self.seed} {number} {epoch} {self.rank}")
