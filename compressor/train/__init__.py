"""The one training loop: a transformers Trainer that takes its loss as a function.

A loss function maps (student, batch) to a *sum* over the batch's targets, never a mean, so that a step
divides by the targets of the whole step: all micro-batches, all ranks. `loop` is the story, `trainer` the
Trainer, `batches` what a batch means to a model, `metrics` what is written and shown.
"""

from .batches import Batch, hidden_states, num_steps, position_ids, targets
from .loop import TrainResult, train
from .trainer import LossFunction, LossSum, Objective, Trainer, last_checkpoint

__all__ = [
    "Batch",
    "LossFunction",
    "LossSum",
    "Objective",
    "TrainResult",
    "Trainer",
    "hidden_states",
    "last_checkpoint",
    "num_steps",
    "position_ids",
    "targets",
    "train",
]
