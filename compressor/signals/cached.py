"""What a cache holds, as a signal: no teacher is in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..data import Batch
from ..errors import UserError
from ..losses import Dense, Sampled, Teacher, TopK
from ..run import check_about, read_json
from .cache import HEAD, INDEX, row_keys


class Cached:
    """Reads the rows of a batch by what they hold, wherever they lie; only their places are kept in memory.

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
        self._shards = [safe_open(folder / shard["name"], "pt") for shard in self.index["shards"]]
        self._places: dict[tuple[int, int], tuple[int, int, int]] = {}
        for number, shard in enumerate(self._shards):
            starts = shard.get_tensor("starts").tolist()
            keys = shard.get_tensor("keys").tolist()
            for (one, two), start, stop in zip(keys, starts, starts[1:], strict=False):
                self._places[one, two] = (number, start, stop)
        self._head: Tensor | None = load_file(folder / HEAD)["weight"] if about["kind"] == "hidden" else None

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk for each target."""
        shards = self.index["shards"]
        return sum(shard["bytes"] for shard in shards) / max(1, sum(shard["targets"] for shard in shards))

    def __call__(self, batch: Batch, counted_BT: Tensor) -> Teacher:
        """As `Online`, from disk."""
        device = counted_BT.device
        if self._head is not None:
            self._head = self._head.to(device)
            return Dense(self._column("hidden", batch, counted_BT), self._head)
        ids_NK = self._column("ids", batch, counted_BT).long()
        if self.index["about"]["kind"] == "topk":
            log_p_NK, log_tail_N = self._column("log_p", batch, counted_BT), self._column("log_tail", batch, counted_BT)
            if self.index["about"]["keep"] >= self.index["about"]["vocab"]:
                return TopK(ids_NK, log_p_NK, log_tail_N)  # nothing is left to draw from
            drawn_NM = self._column("drawn", batch, counted_BT).long()
            return TopK(ids_NK, log_p_NK, log_tail_N, drawn_NM, self._column("drawn_log_p", batch, counted_BT))
        weights_NK = torch.full(ids_NK.shape, 1 / ids_NK.shape[1], device=device)
        return Sampled(ids_NK, weights_NK, self._column("entropy", batch, counted_BT))

    def _column(self, name: str, batch: Batch, counted_BT: Tensor) -> Tensor:
        parts = []
        for key, count in zip(row_keys(batch), counted_BT.sum(-1).tolist(), strict=True):
            number, start, stop = self._places.get(key, (0, 0, -1))
            if stop - start != count:
                raise UserError(
                    f"{self.folder} does not hold a row of this run; expected the data, the seed and the tokens it was "
                    "made with; build a cache of this recipe"
                )
            parts.append(self._shards[number].get_slice(name)[start:stop])
        return torch.cat(parts).to(counted_BT.device)
