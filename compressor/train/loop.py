"""Train a student to the end of its token budget, continuing after a kill, and say how it went."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging as hf_logging

from ..data import Batch, real_tokens, targets
from ..errors import UserError
from ..progress import progress
from ..run import processes, rows_at_a_time
from .metrics import Progress, metric_lines
from .trainer import Judge, LossFunction, NotFiniteError, Supply, Trainer
from .whole import checkpoint_step, last_checkpoint, sweep


@dataclass(frozen=True)
class TrainResult:
    """How training went. Held-out figures are per target; `best_folder` is None when no checkpoint beats the start."""

    status: str  # "ok", "worse" (see `_result`), "not_finite" or "collapsed" (its writing has run away)
    first_heldout: float
    last_heldout: float
    best_heldout: float  # of the best checkpoint, or of the start where none beats it
    best_folder: Path | None
    steps: int
    tokens: int  # non-padding input tokens the student was trained on
    seconds: float  # of all sessions
    history: list[dict[str, float]]  # the lines of metrics.jsonl
    figure: str = "loss"  # which held-out figure the three are
    chosen_by: str | None = None  # the figure of Judge that chose, instead of the held-out one
    collapse: str | None = None  # in words
    rates: str = "distill.lr"  # of the recipe, that a lower value may help

    def describe(self) -> str:
        """One line for a summary or an error."""
        name = {"loss": "loss", "ce": "cross-entropy"}.get(self.figure, self.figure)
        kept = f"kept {self.best_folder} (held-out {name} {self.best_heldout:.4f})"
        if self.status == "not_finite":
            return f"loss not finite after {self.steps} steps; expected a finite one; {kept}; lower {self.rates}"
        change = f"held-out {name} {self.first_heldout:.4f} -> {self.last_heldout:.4f} in {self.steps} steps"
        if self.chosen_by is not None:
            found = [line[self.chosen_by] for line in self.history if self.chosen_by in line]
            change += f", {self.chosen_by} {found[0]:.4f} -> {found[-1]:.4f} (best {max(found):.4f})"
        if self.status == "collapsed":
            return f"{change}: its writing has run away ({self.collapse}); {kept}; lower {self.rates}"
        if self.status == "worse":
            return f"{change}: worse than before distillation; {kept}; lower {self.rates} or raise distill.tokens"
        return f"{change}; {kept}"


def train(
    model: nn.Module,
    *,
    loss: LossFunction,
    batches: torch.utils.data.IterableDataset,
    heldout: Sequence[Batch],
    settings: Any,
    folder: Path,
    metrics: Path | None = None,
    seed: int = 0,
    beside: nn.Module | None = None,
    supply: Supply | None = None,
    judge: Judge | None = None,
    row_tokens: float | None = None,
    section: str = "distill",
    best: str = "loss",
    rates: Mapping[nn.Module, float] | None = None,
) -> TrainResult:
    """Train `model` (what trains is made float32) and return how it went; run again after a kill, it continues.

    `batches` yields rows (T,) endlessly, and the same ones from the start each time it is iterated;
    `heldout` holds collated batches. `settings` has the fields of recipe.Distill; its `tokens`
    (non-padding input tokens) set the number of steps. Checkpoints and TensorBoard logs go to `folder`;
    lines of step, tokens, seconds, loss and its parts, lr, grad_norm, tokens_per_second or heldout_loss,
    heldout_kl, heldout_ce to `metrics` (default folder/metrics.jsonl). The held-out loss is taken before the first
    step, every `eval_every` steps and at the end; the checkpoint whose held-out figure `best` (loss, kl or ce) is the
    lowest and the last are kept. On CPU a resumed run ends in the same bits. `beside` holds parameters that the loss
    trains with the student's and that no student is saved with, `rates` peak learning rates of modules in it that have
    their own; `supply` makes batches of the student's own answers; `judge` chooses the best checkpoint instead of the
    held-out figure, and ends training where the student's writing has run away; `row_tokens` is the mean length of a
    row where `batches` do not tell it. Where parameters of `model` are frozen, checkpoints hold the others alone.
    `section` is the recipe's, for errors and the bar.
    Raises UserError for settings that do not fit together, empty data and a full disk.
    """
    steps = check(batches=batches, heldout=heldout, settings=settings, section=section, row_tokens=row_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = _arguments(settings, steps=steps, folder=folder, seed=seed, best=best, judge=judge)
    if arguments.should_save:
        sweep(folder)
    for parameter in [*model.parameters(), *(beside.parameters() if beside is not None else ())]:
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    learning: list[Any] = [model, *(rates or {})]
    if settings.gradient_checkpointing:
        for each in learning:
            each.activation_checkpointing_enable({"use_reentrant": False})
    told = {"best": best, "judge": judge, "rates": f"{section}.lr" + " or correct.lr" * bool(rates)}
    board, last = TensorBoardCallback(), last_checkpoint(folder)
    board.logging_dir = str(folder / "tensorboard")
    with quiet(), progress(section, total=steps, unit="steps") as advance:
        trainer = Trainer(
            model,
            loss=loss,
            beside=beside,
            rates=rates or {},
            arguments=arguments,
            batches=batches,
            heldout=heldout,
            metrics=metrics or folder / "metrics.jsonl",
            callbacks=[board, Progress(advance)],
            supply=supply,
            judge=judge,
        )
        if last is not None:
            state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
            ended = judge is not None and judge.stopped(metric_lines(state.log_history)) is not None
            if ended or checkpoint_step(last) >= steps:
                return _result("ok", state, folder, **told)
        trainer.args.eval_on_start = last is None
        status = "ok"
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except NotFiniteError:
            status = "not_finite"
        finally:
            if board.tb_writer is not None:
                board.tb_writer.close()
        return _result(status, trainer.state, folder, **told)


def _result(
    status: str, state: TrainerState, folder: Path, *, best: str, judge: Judge | None, rates: str
) -> TrainResult:
    """Worse: the held-out figure ended above where it began; with a judge, no checkpoint was better than the start."""
    history, key = metric_lines(state.log_history), f"heldout_{best}"
    losses = {int(line["step"]): line[key] for line in history if key in line}
    first, *_, last = [*losses.values(), *losses.values()]
    best_step = state.best_global_step or 0
    collapse = judge.stopped(history) if judge else None
    if status == "ok":
        worse = last > first if judge is None else not best_step
        status = "collapsed" if collapse else "worse" if worse else "ok"
    return TrainResult(
        status=status,
        first_heldout=first,
        last_heldout=last,
        best_heldout=losses.get(best_step, first),
        best_folder=folder / f"checkpoint-{best_step}" if best_step else None,
        steps=state.global_step,
        tokens=state.num_input_tokens_seen,
        seconds=history[-1]["seconds"],
        history=history,
        chosen_by=judge.best if judge else None,
        collapse=collapse,
        figure=best,
        rates=rates,
    )


def check(
    *,
    batches: torch.utils.data.IterableDataset,
    heldout: Sequence[Batch],
    settings: Any,
    section: str = "distill",
    row_tokens: float | None = None,
) -> int:
    """The number of optimizer steps that `train` would take with the same arguments, on as many processes as now.

    Raises UserError for settings that do not fit together, and for data without rows or without a target.
    """
    world = processes()
    shared = "distill" if section == "onpolicy" else section  # where tokens and rows per forward pass stand
    if not any(bool(targets(batch).any()) for batch in heldout):
        raise UserError("the held-out data has no target token; expected at least one; use more data")
    if len(heldout) < world:
        raise UserError(
            f"there are {len(heldout)} held-out batches for {world} processes; expected one each; "
            f"raise distill.heldout_rows or lower {shared}.micro_batch"
        )
    rows_at_a_time(section, settings.batch, settings.micro_batch, shared=shared)
    row_tokens = row_tokens or mean_length(batches)
    steps = int(round(settings.tokens / (row_tokens * settings.batch), 6))
    if not steps:
        raise UserError(
            f"{shared}.tokens is {settings.tokens}, but one step takes about {row_tokens * settings.batch:.0f} "
            f"({settings.batch} rows); expected at least one step; raise {shared}.tokens or lower {section}.batch"
        )
    if settings.warmup_steps >= steps:
        raise UserError(
            f"{shared}.tokens pays for {steps} steps and {section}.warmup_steps is {settings.warmup_steps}; "
            f"expected fewer warm-up steps than steps; raise {shared}.tokens or lower {section}.warmup_steps"
        )
    return steps


def mean_length(rows: torch.utils.data.IterableDataset) -> float:
    """Mean tokens of the first rows. Raises UserError where there are none."""
    seen = lengths = 0
    for row in islice(rows, 1024):
        seen, lengths = seen + 1, lengths + real_tokens(row)
        if lengths >= 2**18:
            break
    if not lengths:
        raise UserError("the training data is empty; expected at least one row; check --data")
    return lengths / seen


def _arguments(
    settings: Any, *, steps: int, folder: Path, seed: int, best: str, judge: Judge | None
) -> TrainingArguments:
    """The Trainer's arguments for settings that `check` has passed."""
    every = math.gcd(settings.eval_every, settings.save_every)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.micro_batch,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": settings.min_lr},
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=settings.max_grad_norm,
        # bf16 on the CPU is fast only where the processor has it; there float32 is the safe default.
        bf16=settings.precision == "bf16" or (settings.precision == "auto" and torch.cuda.is_available()),
        # A log line never spans a checkpoint, so a resumed run writes the same lines.
        logging_steps=max(interval for interval in range(1, 11) if every % interval == 0),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_steps=settings.save_every,
        metric_for_best_model=judge.best if judge else best,
        greater_is_better=judge is not None,
        seed=seed,
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        # Rows differ in length, so each rank reads for itself instead of being sent a slice.
        accelerator_config={"dispatch_batches": False},
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs take one process each (torchrun), never DataParallel
    arguments.gradient_accumulation_steps = settings.batch // (settings.micro_batch * arguments.world_size)
    return arguments


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own talk and bars off the screen; ours is the only one."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
