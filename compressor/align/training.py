"""TRL's SFTTrainer and DPOTrainer, run so that a kill costs nothing and nothing leaves this machine.

Checkpoints are whole or absent (train.whole) and a run of the same command continues from the last one, to the same
bits on a CPU. DPO's reference is the model that comes in: its log-probabilities are computed once, before the first
step, so that no second model is held. TRL's telemetry and model cards are off.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset, Features, Json, List, Value
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ..checkpoint import load_model
from ..progress import progress
from ..run import check_about, processes, read_json, rows_at_a_time, write_json, write_text
from ..train import (
    LastStepIsLogged,
    Progress,
    WholeCheckpoints,
    checkpoint_step,
    json_lines,
    last_checkpoint,
    quiet,
    sweep,
)

WARMUP_SHARE, EVALUATIONS = 10, 10  # a tenth of the steps; times that the held-out rows are looked at
INDEX, DATA = "index.json", "data"
# Our names for what TRL logs; margin and accuracy are of DPO's implicit rewards.
NAMES = {
    "loss": "loss",
    "learning_rate": "lr",
    "grad_norm": "grad_norm",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "eval_loss": "heldout_loss",
    "eval_rewards/margins": "heldout_margin",
    "eval_rewards/accuracies": "heldout_accuracy",
}
MESSAGES = Features({key: List(Json()) for key in ("prompt", "chosen", "rejected")} | {"tools": Value("string")})

Base = transformers.Trainer if TYPE_CHECKING else object


class Alone(WholeCheckpoints, Base):
    """What both of TRL's trainers do differently here."""

    def _send_telemetry(self) -> None:
        """Nothing is sent."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As ever; the first one sets what a checkpoint has to beat."""
        metrics = super().evaluate(*args, **kwargs)
        if self.state.global_step == 0:
            self.state.best_metric = metrics["eval_loss"]
        return metrics


class Sft(Alone, SFTTrainer):
    """Supervised fine-tuning on rows that are encoded already."""


class Dpo(Alone, DPOTrainer):
    """Direct preference optimization (Rafailov et al., arXiv 2305.18290)."""


@dataclass(frozen=True)
class Aligned:
    """How one stage went. `folder` holds the weights of the lowest held-out loss, or is what came in where none is."""

    folder: Path
    steps: int
    best_step: int  # 0: what came in
    history: list[dict[str, float]]  # lines of `NAMES` values, each with its step

    def facts(self) -> dict[str, Any]:
        """Steps, and first and last of everything that was logged."""
        found: dict[str, Any] = {"steps": self.steps, "best_step": self.best_step}
        for name in ("loss", "heldout_loss", "heldout_margin", "heldout_accuracy"):
            values = [line[name] for line in self.history if name in line]
            found |= {name: [values[0], values[-1]]} if values else {}
        return found

    def describe(self) -> str:
        """One line."""
        facts = self.facts()
        parts = ["held-out loss {:.4f} -> {:.4f}".format(*facts["heldout_loss"])]
        if "heldout_margin" in facts:
            parts.append("margin {:.3f} -> {:.3f}".format(*facts["heldout_margin"]))
            parts.append("accuracy {:.1%} -> {:.1%}".format(*facts["heldout_accuracy"]))
        kept = f"kept step {self.best_step}" if self.best_step else "no step was better, kept what came in"
        return f"{', '.join(parts)} in {self.steps} steps; {kept}"


def train(
    stage: str,
    student: Path,
    rows: Sequence[dict[str, Any]],
    heldout: Sequence[dict[str, Any]],
    *,
    tokenizer: Any,
    settings: Any,
    folder: Path,
    metrics: Path,
    precision: str = "auto",
    gradient_checkpointing: bool = False,
    seed: int = 0,
) -> Aligned:
    """Train the model in the folder `student` on `rows` (see `rows`), as `stage` says: "sft" or "dpo".

    `settings` has the fields of recipe.Align. Checkpoints go to `folder`, lines to `metrics`; run again after a kill,
    it continues. `tokenizer` is changed (TRL wants a padding token). All processes of a launcher take part.
    Raises UserError for settings that do not fit together, other rows than a begun training had, and a full disk.
    """
    steps = check(settings, rows=len(rows), epochs=getattr(settings, f"{stage}_epochs"))
    state = PartialState()
    _begin(folder, {"rows": _digest([*rows, *heldout]), "steps": steps}, first=state.is_main_process)
    last = last_checkpoint(folder)
    state.wait_for_everyone()  # no process writes before all have looked
    if last is not None and checkpoint_step(last) >= steps:
        return _result(TrainerState.load_from_json(str(last / TRAINER_STATE_NAME)), folder, student)
    with _silent(), progress(stage, total=steps, unit="steps") as advance:
        common: dict[str, Any] = {
            "model": load_model(student, dtype=torch.float32),
            "processing_class": tokenizer,
            "callbacks": [LastStepIsLogged(), Lines(metrics), Progress(advance, lines)],
        }
        arguments = _arguments(stage, settings, steps, folder, precision, gradient_checkpointing, seed)
        arguments["eval_on_start"] = last is None
        if stage == "sft":
            read: dict[str, Any] = {
                "train_dataset": Dataset.from_list([*rows]),
                "eval_dataset": Dataset.from_list([*heldout]),
            }
            trainer: Any = Sft(**common, **read, args=_single(SFTConfig(**arguments)))
        else:
            read = _on_disk(folder / DATA, train_dataset=rows, eval_dataset=heldout)
            arguments |= {"beta": settings.beta, "precompute_ref_log_probs": True}
            arguments |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, settings.nll_weight]}
            trainer = Dpo(**common, **read, args=_single(DPOConfig(**arguments)))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return _result(trainer.state, folder, student)


def check(settings: Any, *, rows: int, epochs: int) -> int:
    """Optimizer steps for so many rows. Raises UserError where a batch cannot be dealt out."""
    rows_at_a_time("align", settings.batch, settings.micro_batch)
    return epochs * -(-rows // settings.batch)


def _begin(folder: Path, about: dict[str, Any], *, first: bool) -> None:
    """A folder for checkpoints: new, or begun with the same rows."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX).is_file():
        check_about(folder, read_json(folder / INDEX), about)
    if first:
        sweep(folder)
        write_json(folder / INDEX, {"about": about})


def _digest(rows: Sequence[dict[str, Any]]) -> str:
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, sort_keys=True).encode())
    return found.hexdigest()


def _on_disk(folder: Path, **parts: Sequence[dict[str, Any]]) -> dict[str, Dataset]:
    """Pairs as data sets in files that every process sees: TRL keeps the reference's log-probabilities beside them."""
    if (state := PartialState()).is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        for name, rows in parts.items():
            texts = isinstance(rows[0]["prompt"], str)
            plain = [row if texts else row | {"tools": json.dumps(row["tools"] or None)} for row in rows]
            Dataset.from_list(plain, features=None if texts else MESSAGES).save_to_disk(folder / name)
    state.wait_for_everyone()
    return {name: Dataset.load_from_disk(folder / name) for name in parts}


def _arguments(
    stage: str, settings: Any, steps: int, folder: Path, precision: str, gradient_checkpointing: bool, seed: int
) -> dict[str, Any]:
    """The Trainer's arguments; those of TRL whose defaults are not ours are all named."""
    every = max(1, steps // EVALUATIONS)
    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": settings.micro_batch,
        "per_device_eval_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.batch // (settings.micro_batch * processes()),
        "learning_rate": getattr(settings, f"{stage}_lr"),
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // WARMUP_SHARE,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "bf16": precision == "bf16" or (precision == "auto" and cuda),
        "gradient_checkpointing": gradient_checkpointing,
        "max_length": None,  # what is too long was left out, not cut
        # a log line never spans a checkpoint, so a resumed run writes the same lines
        "logging_steps": max(interval for interval in range(1, 11) if every % interval == 0),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_steps": every,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "seed": seed,
        "use_cpu": not (cuda or torch.backends.mps.is_available()),
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": cuda,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }


def _single(arguments: TrainingArguments) -> Any:
    """Several GPUs take one process each (torchrun), never DataParallel."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _result(state: TrainerState, folder: Path, student: Path) -> Aligned:
    best = state.best_global_step or 0
    kept = folder / f"checkpoint-{best}" if best else student
    return Aligned(kept, state.global_step, best, lines(state.log_history))


def lines(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """What the Trainer logged, under our names."""
    return [
        {"step": entry["step"]} | {ours: entry[theirs] for theirs, ours in NAMES.items() if theirs in entry}
        for entry in log_history
        if "loss" in entry or "eval_loss" in entry
    ]


class Lines(TrainerCallback):
    """Writes all lines anew at every log: those of steps that a kill undid are gone."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what is known."""
        if state.is_world_process_zero:
            write_text(self.path, json_lines(lines(state.log_history)))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Ours is the only bar on the screen."""
    before, bars = os.environ.get("TQDM_DISABLE"), datasets.is_progress_bar_enabled()
    os.environ["TQDM_DISABLE"] = "1"  # TRL asks for it where it computes the reference's log-probabilities
    datasets.disable_progress_bars()
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TRL calls some of transformers by its old names
            yield
    finally:
        del os.environ["TQDM_DISABLE"]
        if before is not None:
            os.environ["TQDM_DISABLE"] = before
        if bars:
            datasets.enable_progress_bars()
