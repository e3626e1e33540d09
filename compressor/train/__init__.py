"""The one training loop: a transformers Trainer that takes its loss as a function.

A loss function maps (student, batch) to a *sum* over the batch's targets, never a mean, so that a step
divides by the targets of the whole step: all micro-batches, all ranks. `loop` is the story, `trainer` the
Trainer, `metrics` what is written and shown.
"""

from .loop import TrainResult, check, num_steps, train
from .trainer import LossFunction, LossSum, Objective, Trainer, last_checkpoint

__all__ = [
    "LossFunction",
    "LossSum",
    "Objective",
    "TrainResult",
    "Trainer",
    "check",
    "last_checkpoint",
    "num_steps",
    "train",
]
