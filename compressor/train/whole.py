"""Checkpoints that are whole or absent, for any transformers Trainer.

A Trainer writes into the folder it names, and a kill leaves half a checkpoint under a good name. Here a checkpoint is
written aside, synced and renamed, so a `checkpoint-N` folder is whole whenever it exists. The best one and the last are
kept.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from ..checkpoint import require_space
from ..run import staged

# a mixin, to be named before the Trainer it is for; types see the Trainer
Base = transformers.Trainer if TYPE_CHECKING else object


class WholeCheckpoints(Base):
    """Mixed into a Trainer, it replaces how checkpoints get to disk. Raises UserError for a full one."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        final = folder / f"checkpoint-{self.state.global_step}"
        best = folder / f"checkpoint-{self.state.best_global_step}"
        self.store_flos()
        self.state.best_model_checkpoint = str(best) if self.state.best_global_step else None
        if self.args.should_save:
            # Weights in float32 and the two moments of AdamW, with a little room.
            require_space(
                folder, 13 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            )
        with staged(final) if self.args.should_save else contextlib.nullcontext() as aside:
            place = [str(aside)]
            if self.args.world_size > 1:
                torch.distributed.broadcast_object_list(place)
            self.save_model(place[0], _internal_call=True)
            self._save_optimizer_and_scheduler(place[0])
            self._save_scaler(place[0])
            self._save_rng_state(place[0])
            self._save_more(Path(place[0]))
            if self.args.should_save:
                self.state.save_to_json(str(Path(place[0]) / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for other in set(folder.glob("checkpoint-*")) - {final, best}:
                # Renamed first: a kill in the middle must not leave half a folder under a good name.
                shutil.rmtree(other.rename(folder / f".{other.name}.old"))
        self.accelerator.wait_for_everyone()

    def _save_more(self, folder: Path) -> None:
        """What else a checkpoint holds; every rank calls it."""


def sweep(folder: Path) -> None:
    """Remove what a kill left of checkpoints that were being written or removed."""
    for leftover in [*folder.glob(".checkpoint-*.part"), *folder.glob(".checkpoint-*.old")]:
        shutil.rmtree(leftover)


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the latest step, if there is any: a folder of that name is whole."""
    return max(folder.glob("checkpoint-*"), key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path) -> int:
    """The step a checkpoint was saved after."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
