"""What a cache holds, as a signal: no teacher is in memory."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..data import Batch
from ..errors import UserError
from ..losses import Dense, Sampled, Teacher, TopK
from ..run import INDEX, check_about, read_json
from .cache import HEAD, row_keys

OPEN_SHARDS = 16  # at one time: there may be more of them than a process may have files open


class Cached:
    """Reads the rows of a batch by what they hold, wherever they lie; only their places are in memory, 32 bytes a row.

    about: a `cache.fingerprint` that the cache must have. Raises UserError for one that is absent, unfinished or
    another, and for a row that it does not hold.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        if not (folder / INDEX).is_file():
            raise UserError(f"{folder} holds no cache; expected its {INDEX}; build one with compressor cache")
        self.folder, self.index = folder, read_json(folder / INDEX)
        check_about(folder, self.index, about)
        if not self.index["complete"]:
            raise UserError(f"{folder} is unfinished; expected a whole cache; run compressor cache again to finish it")
        names = [folder / shard["name"] for shard in self.index["shards"]]
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(lambda number: safe_open(names[number], "pt"))
        keys, places = [np.empty(0, "S16")], [np.empty((0, 3), np.int64)]
        for number in range(len(names)):
            starts = self._shard(number).get_tensor("starts").numpy()
            keys.append(self._shard(number).get_tensor("keys").numpy().view("S16").reshape(-1))
            places.append(np.stack([np.full_like(starts[1:], number), starts[:-1], starts[1:]], -1))
        every = np.concatenate(keys)
        order = every.argsort()
        self._keys, self._places = every[order], np.concatenate(places)[order]
        self._head: Tensor | None = load_file(folder / HEAD)["weight"] if about["kind"] == "hidden" else None

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk for each target."""
        shards = self.index["shards"]
        return sum(shard["bytes"] for shard in shards) / max(1, sum(shard["targets"] for shard in shards))

    def __call__(self, batch: Batch, counted_BT: Tensor) -> Teacher:
        """As `Online`, from disk."""
        device = counted_BT.device
        places = self._found(batch, counted_BT)

        def column(name: str) -> Tensor:
            parts = [self._shard(number).get_slice(name)[start:stop] for number, start, stop in places]
            return torch.cat(parts).to(device)

        if self._head is not None:
            self._head = self._head.to(device)
            return Dense(column("hidden"), self._head)
        ids_NK = column("ids").long()
        about = self.index["about"]
        if about["kind"] == "sampled":
            weights_NK = torch.full(ids_NK.shape, 1 / ids_NK.shape[1], device=device)
            return Sampled(ids_NK, weights_NK, column("entropy"))
        if about["keep"] >= about["vocab"]:
            return TopK(ids_NK, column("log_p"), column("log_tail"))  # nothing is left to draw from
        return TopK(ids_NK, column("log_p"), column("log_tail"), column("drawn").long(), column("drawn_log_p"))

    def _found(self, batch: Batch, counted_BT: Tensor) -> list[list[int]]:
        """Where the rows of a batch lie: a shard, and the first and last of its targets."""
        wanted = np.array(row_keys(batch), "S16")
        at = self._keys.searchsorted(wanted).clip(max=max(0, len(self._keys) - 1))
        held = self._keys[at] == wanted if len(self._keys) else np.zeros(len(wanted), bool)
        places = self._places[at] if len(self._keys) else np.empty((0, 3), np.int64)
        sizes = counted_BT.sum(-1).cpu().numpy()
        if not held.all() or (places[:, 2] - places[:, 1] != sizes).any():
            raise UserError(
                f"{self.folder} does not hold a row of this run; expected the data, the seed and the tokens it was "
                "made with; build a cache of this recipe"
            )
        return places.tolist()
