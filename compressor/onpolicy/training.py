"""MiniLLM (arXiv 2306.08543) and on-policy GKD (arXiv 2306.13649): train on rounds of the student's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoint import load_model
from ..data import Batch, targets
from ..errors import UserError
from ..run import rows_at_a_time
from ..runtime import stop_ids
from ..signals import Online, check_head, head_weight, predicting
from ..train import Judge, LossFunction, LossSum, TrainResult, mean_length, train
from .objective import Tricks, minillm_loss
from .rounds import Rounds


class Losses(NamedTuple):
    """Of the student's own answers, of the data's rows beside them, and of what is held out."""

    own: LossFunction
    fixed: LossFunction
    heldout: LossFunction


def distill(
    student_folder: Path,
    *,
    teacher: nn.Module,
    losses: Losses,
    tricks: Tricks | None,
    prompts: Sequence[list[int]],
    answer_tokens: float,
    tokenizer: Any,
    batches: torch.utils.data.IterableDataset,
    heldout: Sequence[Batch],
    settings: Any,
    options: Any,
    folder: Path,
    judge: Judge | None,
    seed: int = 0,
    vocab: int | None = None,
    metrics: Path | None = None,
) -> TrainResult:
    """Train the student in `student_folder` on its own answers to `prompts` (token ids); checkpoints go to `folder`.

    tricks: MiniLLM's; None where no reward is wanted. answer_tokens: how long an answer is likely to be, from which the
    number of steps follows. tokenizer: its end ends an answer. settings is a recipe.Distill with the batch, rates and
    intervals of this phase, options a recipe.OnPolicy; the others are as in `train.train`. A run that was killed
    continues in the same bits on a CPU, the answers of its round included.
    Raises UserError for settings that do not fit together and heads that the fused loss cannot follow.
    """
    student: Any = load_model(student_folder, dtype=torch.float32)
    check_head(student)
    own, of = check(settings, options)
    rounds = Rounds(
        prompts,
        own=own,
        micro_batch=settings.micro_batch,
        answers=options.answers,
        inner_epochs=options.inner_epochs,
        weights=(1.0, options.anchor) if tricks is not None else (options.share, 1 - options.share),
        tricks=tricks,
        teacher=teacher,
        seed=seed,
        sample_rows=options.sample_rows,
        max_new_tokens=settings.max_new_tokens,
        temperature=options.temperature,
        eos_ids=sorted(stop_ids(student.generation_config.eos_token_id, tokenizer)),
        vocab=vocab,
    )
    told = sum(map(len, prompts)) / len(prompts) + answer_tokens
    result = train(
        student,
        loss=_by_kind(losses),
        batches=batches,
        heldout=heldout,
        settings=settings,
        folder=folder,
        metrics=metrics,
        seed=seed,
        supply=rounds,
        judge=judge,
        section="onpolicy",
        row_tokens=(own * told + (of - own) * mean_length(batches)) / of,
    )
    return replace(result, best_folder=result.best_folder or student_folder)


def tricks_of(options: Any) -> Tricks:
    """MiniLLM's tricks, as a recipe.OnPolicy has them."""
    return Tricks(
        single_step=options.single_step,
        length_norm=options.length_norm,
        alpha=options.teacher_share,
        importance=options.importance,
        clip=options.clip,
        variant=options.variant,
    )


def check(settings: Any, options: Any) -> tuple[int, int]:
    """How many of a step's micro-batches are the student's own answers, and of how many, on each process.

    Raises UserError where the share or the rounds cannot be kept.
    """
    rows = rows_at_a_time("onpolicy", options.batch, settings.micro_batch, shared="distill")
    of = options.batch // rows
    own = round(options.share * of)
    if not own or (own == of and options.share < 1):
        raise UserError(
            f"a step has {of} micro-batches on each process and onpolicy.share is {options.share}; "
            "expected at least one of answers and one of data; lower distill.micro_batch or change onpolicy.share"
        )
    step = own * rows
    if options.answers % step:
        raise UserError(
            f"onpolicy.answers is {options.answers}, and a step takes {step} answers; expected a multiple of {step}; "
            "change onpolicy.answers"
        )
    return own, of


def minillm_objective(signal: Online, tricks: Tricks, vocab: int | None, chunk_tokens: int) -> LossFunction:
    """`minillm_loss` of a micro-batch of `Rounds`."""

    def loss(student: nn.Module, batch: Batch) -> LossSum:
        counted_BT = targets(batch)
        parts = minillm_loss(
            predicting(student, batch, counted_BT),
            head_weight(student),
            signal(batch, counted_BT),
            ids_BT=batch["input_ids"][:, 1:],
            mask_BT=counted_BT,
            log_mix_BT=batch["log_mix"][:, 1:],
            advantages_BT=batch["advantages"][:, 1:],
            tricks=tricks,
            vocab=vocab,
            chunk_tokens=chunk_tokens,
        )
        names = {"importance_weight": parts.weight, "clipped": parts.clipped}
        return LossSum(parts.loss, names | ({"single_step": parts.single_step} if tricks.single_step else {}))

    return loss


def _by_kind(losses: Losses) -> LossFunction:
    """The loss by what a batch is: what is held out has no weight."""

    def loss(student: nn.Module, batch: Batch) -> LossSum:
        if "weight" not in batch:
            return losses.heldout(student, batch)
        found = (losses.own if "own" in batch else losses.fixed)(student, batch)
        prefix = "" if "own" in batch else "data_"
        return LossSum(found.loss * batch["weight"], {prefix + name: part for name, part in found.parts.items()})

    return loss
