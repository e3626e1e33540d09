"""Offline distillation: the teacher's next-token distribution on real data, one divergence, one loop.

Teacher and student read the same packed rows; the student's final hidden states at the target positions go, with what
the signal knows of the teacher there, to the fused loss. Without a signal the data alone are learned. A teacher that is
corrected beside the student learns the data from the same pass. The student must end better on held-out rows than it
was found, or the result says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import load_model
from .data import Batch, targets
from .errors import UserError
from .losses import Dense, HiddenLoss, balanced, fused_linear_divergence
from .signals import Online, Signal, check_head, head_weight, observed, predicting
from .train import Judge, LossFunction, LossSum, TrainResult, train


def distill(
    student_folder: Path,
    *,
    signal: Signal | None,
    batches: torch.utils.data.IterableDataset,
    heldout: Sequence[Batch],
    settings: Any,
    folder: Path,
    seed: int = 0,
    vocab: int | None = None,
    hidden: HiddenLoss | None = None,
    teacher_lr: float | None = None,
    metrics: Path | None = None,
    judge: Judge | None = None,
) -> TrainResult:
    """Distill the student in `student_folder` by `signal` (see signals); checkpoints go to `folder`.

    `batches`, `heldout`, `metrics`, `judge` and `settings` (a recipe.Distill) are as in `train.train`; `vocab` is
    the number of real ids (default: the smaller of the two heads), so that padded ids take no part; `hidden` adds the
    loss on hidden states, which wants the teacher itself as signal; `teacher_lr` is the peak learning rate of a teacher
    that learns (default: the student's); checkpoints are then chosen by cross-entropy, as a divergence to what moves
    does not compare them.
    Continues by itself after a kill. Checkpoints are float32 and carry no tokenizer. Raises UserError for
    input that cannot be distilled; a student that comes out worse is no error here but the status of the
    result, and `best_folder` is then the folder that came in.
    """
    student = load_model(student_folder, dtype=torch.float32)
    check_head(student)
    learner = signal.teacher if isinstance(signal, Online) and signal.learns else None
    rates = {} if learner is None else {learner: settings.lr if teacher_lr is None else teacher_lr}
    beside = [module for module in (hidden, learner) if module is not None]
    result = train(
        student,
        loss=distillation_loss(signal, settings=settings, vocab=vocab, hidden=hidden),
        beside=nn.ModuleList(beside) if len(beside) > 1 else beside[0] if beside else None,
        rates=rates,
        best="ce" if learner is not None else "loss",
        batches=batches,
        heldout=heldout,
        settings=settings,
        folder=folder,
        metrics=metrics,
        seed=seed,
        judge=judge,
    )
    return replace(result, best_folder=result.best_folder or student_folder)


def distillation_loss(
    signal: Signal | None, *, settings: Any, vocab: int | None = None, hidden: HiddenLoss | None = None
) -> LossFunction:
    """The loss function for `train`: divergence to the teacher, mixed with cross-entropy by ce_weight.

    Without a signal it is cross-entropy alone. `hidden`, and the cross-entropy of a teacher that learns, are added to
    training, never to what is held out and compared. No gradient passes between teacher and student.
    Raises UserError for hidden states of a teacher that is not there.
    """
    if hidden is not None and not isinstance(signal, Online):
        raise UserError("a loss on hidden states wants the teacher itself; expected signal online; choose that")

    def loss(student: nn.Module, batch: Batch) -> LossSum:
        counted_BT = targets(batch)
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        if hidden is not None and isinstance(signal, Online) and torch.is_grad_enabled():
            student_ND, ours = observed(student, batch, counted_BT, [pair.student for pair in hidden.pairs])
            known, theirs = signal.observed(batch, counted_BT, [pair.teacher for pair in hidden.pairs])
        else:
            student_ND = predicting(student, batch, counted_BT)
            known = signal(batch, counted_BT) if signal else None
        labels_N = batch["labels"][:, 1:][counted_BT]
        parts = fused_linear_divergence(
            student_ND,
            head_weight(student),
            known,
            labels_N=labels_N,
            divergence=settings.divergence,
            mix=settings.mix,
            temperature=settings.temperature,
            ce_weight=settings.ce_weight if signal else 1.0,
            vocab=vocab,
            chunk_tokens=settings.chunk_tokens,
        )
        assert parts.ce is not None
        total = balanced(parts.loss, hidden(ours, theirs)) if hidden is not None and ours else parts.loss
        told = {"kl": parts.kl, "ce": parts.ce} if signal else {"ce": parts.ce}
        if isinstance(signal, Online) and signal.learns:
            assert isinstance(known, Dense)
            sizes = {"vocab": vocab, "chunk_tokens": settings.chunk_tokens}
            own = fused_linear_divergence(*known, None, labels_N=labels_N, ce_weight=1.0, **sizes)
            total = total + own.loss if torch.is_grad_enabled() else total
            told["teacher_ce"] = own.loss.detach()
        return LossSum(total, told)

    return loss
