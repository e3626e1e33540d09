"""Offline distillation: the teacher's next-token distribution on real data, one divergence, one loop.

Teacher and student read the same packed rows; their final hidden states at the target positions go to the
fused loss (losses.py). The student must end better on held-out rows than it was found, or the result says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import load_model
from .data import Batch, hidden_states, targets
from .errors import UserError
from .losses import Dense, fused_linear_divergence
from .train import LossFunction, LossSum, TrainResult, train


def distill(
    student_folder: Path,
    *,
    teacher: nn.Module,
    batches: torch.utils.data.IterableDataset,
    heldout: Sequence[Batch],
    settings: Any,
    folder: Path,
    seed: int = 0,
    vocab: int | None = None,
    metrics: Path | None = None,
) -> TrainResult:
    """Distill the student in `student_folder` from `teacher` (see teacher.load); checkpoints go to `folder`.

    `batches`, `heldout`, `metrics` and `settings` (a recipe.Distill) are as in `train.train`; `vocab` is
    the number of real ids (default: the smaller of the two heads), so that padded ids take no part.
    Continues by itself after a kill. Checkpoints are float32 and carry no tokenizer. Raises UserError for
    input that cannot be distilled; a student that comes out worse is no error here but the status of the
    result, and `best_folder` is then the folder that came in.
    """
    student = load_model(student_folder, dtype=torch.float32)
    for model in (teacher, student):
        check_head(model)
    result = train(
        student,
        loss=distillation_loss(teacher, settings=settings, vocab=vocab),
        batches=batches,
        heldout=heldout,
        settings=settings,
        folder=folder,
        metrics=metrics,
        seed=seed,
    )
    return replace(result, best_folder=result.best_folder or student_folder)


def distillation_loss(teacher: nn.Module, *, settings: Any, vocab: int | None = None) -> LossFunction:
    """The loss function for `train`: divergence to `teacher`, mixed with cross-entropy by ce_weight."""

    def loss(student: nn.Module, batch: Batch) -> LossSum:
        counted_BT = targets(batch)
        with torch.no_grad():
            teacher_NE = _predicting(teacher, batch, counted_BT)
        parts = fused_linear_divergence(
            _predicting(student, batch, counted_BT),
            head_weight(student),
            Dense(teacher_NE, head_weight(teacher)),
            labels_N=batch["labels"][:, 1:][counted_BT],
            divergence=settings.divergence,
            mix=settings.mix,
            temperature=settings.temperature,
            ce_weight=settings.ce_weight,
            vocab=vocab,
            chunk_tokens=settings.chunk_tokens,
        )
        assert parts.ce is not None
        return LossSum(parts.loss, {"kl": parts.kl, "ce": parts.ce})

    return loss


def _predicting(model: nn.Module, batch: Batch, counted_BT: Tensor) -> Tensor:
    """Hidden states of the positions that predict a counted target, (N, width)."""
    return hidden_states(model, batch)[:, :-1][counted_BT]


def head_weight(model: nn.Module) -> Tensor:
    """The lm_head's weight (vocab, hidden); the embedding's own parameter where they are tied."""
    causal_lm: Any = model
    head = causal_lm.get_output_embeddings()
    return head.weight


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
