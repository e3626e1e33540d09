"""The one training loop: a transformers Trainer that takes its loss as a function.

A loss function maps (student, batch) to a *sum* over the batch's targets, never a mean, so that a step
divides by the targets of the whole step: all micro-batches, all ranks. `loop` is the story, `trainer` the
Trainer, `metrics` what is written and shown.
"""

from .loop import TrainResult, check, mean_length, train
from .trainer import Judge, LossFunction, LossSum, Objective, Supply, Trainer, last_checkpoint

__all__ = [
    "Judge",
    "LossFunction",
    "LossSum",
    "Objective",
    "Supply",
    "TrainResult",
    "Trainer",
    "check",
    "last_checkpoint",
    "mean_length",
    "train",
]
