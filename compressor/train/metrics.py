"""What training writes and shows: lines of metrics.jsonl, and one bar on the terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Our names for what the Trainer logs under its own.
NAMES = {
    "loss": "loss",
    "learning_rate": "lr",
    "grad_norm": "grad_norm",
    "tokens_per_second": "tokens_per_second",
    "eval_loss": "heldout_loss",
    "eval_kl": "heldout_kl",
    "eval_ce": "heldout_ce",
}


def metric_lines(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The training and held-out entries of the Trainer's log, under our names."""
    return [
        {key: entry[key] for key in ("step", "tokens", "seconds")}
        | {ours: entry[theirs] for theirs, ours in NAMES.items() if theirs in entry}
        for entry in log_history
        if "loss" in entry or "eval_loss" in entry
    ]


def json_lines(lines: Sequence[Mapping[str, float]]) -> str:
    """Lines of JSON; NaN and infinity, which JSON does not know, become null."""
    strict = ({key: value if math.isfinite(value) else None for key, value in line.items()} for line in lines)
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in strict)


class Progress(TrainerCallback):
    """One bar on stderr with rate, losses and time left; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.bar = Bar(
            TextColumn("distill"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self.task = self.bar.add_task("", total=None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar where the training starts or continues."""
        if state.is_world_process_zero:
            self.bar.start()
            self.bar.update(self.task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move on by a step."""
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say what is known of speed and losses."""
        known = {key: value for line in metric_lines(state.log_history[-20:]) for key, value in line.items()}
        parts = [f"{known['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in known else []
        parts += [f"{name} {known[name]:.4f}" for name in ("loss", "heldout_loss") if name in known]
        self.bar.update(self.task, description=", ".join(parts))

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.stop()
