"""What training writes and shows: lines of metrics.jsonl, and the bar on the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..progress import Advance

# Our names for what the Trainer logs under its own.
NAMES = {
    "loss": "loss",
    "learning_rate": "lr",
    "grad_norm": "grad_norm",
    "tokens_per_second": "tokens_per_second",
    "eval_loss": "heldout_loss",
    "eval_kl": "heldout_kl",
    "eval_ce": "heldout_ce",
    "eval_teacher_ce": "heldout_teacher_ce",
    "kl": "kl",
    "ce": "ce",
    "teacher_ce": "teacher_ce",
    "data_kl": "data_kl",
    "data_ce": "data_ce",
    "single_step": "single_step",
    "importance_weight": "importance_weight",
    "clipped": "clipped",
    "eval_rouge_l": "rouge_l",
    "eval_repetition": "repetition",
    "eval_length_drift": "length_drift",
    "answer_length": "answer_length",
    "answer_reward": "answer_reward",
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
    """Moves the bar, and says what is known of speed and losses.

    lines: what of the Trainer's log to go by, under our names.
    """

    def __init__(
        self,
        advance: Advance,
        lines: Callable[[Sequence[Mapping[str, Any]]], list[dict[str, float]]] = metric_lines,
    ) -> None:
        self.advance, self.lines = advance, lines

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move on by a step."""
        known = {key: value for line in self.lines(state.log_history[-20:]) for key, value in line.items()}
        parts = [f"{known['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in known else []
        parts += [
            f"{name} {known[name]:.4f}" for name in ("loss", "heldout_loss") if math.isfinite(known.get(name, math.nan))
        ]
        self.advance.to(state.global_step, note=", ".join(parts))
