"""The one training loop: a transformers Trainer that takes its loss as a function.

A loss function maps (student, batch) to a *sum* over the batch's targets, never a mean, so that a step
divides by the targets of the whole step: all micro-batches, all ranks. `loop` is the story, `trainer` the
Trainer, `whole` how its checkpoints get to disk, `metrics` what is written and shown.
"""

from .loop import TrainResult, check, mean_length, quiet, train
from .metrics import Progress, json_lines
from .trainer import Judge, LastStepIsLogged, LossFunction, LossSum, Objective, Supply, Trainer
from .whole import WholeCheckpoints, checkpoint_step, last_checkpoint, sweep

__all__ = [
    "Judge",
    "LastStepIsLogged",
    "LossFunction",
    "LossSum",
    "Objective",
    "Progress",
    "Supply",
    "TrainResult",
    "Trainer",
    "WholeCheckpoints",
    "check",
    "checkpoint_step",
    "json_lines",
    "last_checkpoint",
    "mean_length",
    "quiet",
    "sweep",
    "train",
]
