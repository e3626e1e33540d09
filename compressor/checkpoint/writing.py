"""Checkpoints out: tensors streamed into safetensors shards, with config, index and tokenizer beside them.

The header comes first, so tensors are described before their data exist; then rows go to disk as they come.
Every file is written under another name, synced and renamed: what has its final name is whole.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError
from ..run import aside, write_bytes, write_json
from .layout import DTYPES, INDEX, SINGLE, TOKENIZER_FILES

if TYPE_CHECKING:
    import torch


class Described(NamedTuple):
    """A tensor to write: its description first, so that headers precede data, then a source of row chunks."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype][1]


def write_checkpoint(
    folder: Path,
    tensors: Sequence[Described],
    *,
    config: dict[str, Any],
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Stream tensors into `folder` as a stock Hugging Face checkpoint; memory is one chunk.

    One model.safetensors, or shards of at most `max_shard_bytes` (a larger tensor has its own) and their
    index; config.json last. Every file is written aside, synced and renamed. `progress` advances by bytes.
    Raises UserError when the disk is full or not writable; the file at hand is removed then.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    require_space(folder, total)
    shards: list[list[Described]] = []
    room = -1
    for tensor in tensors:
        if tensor.nbytes > room or not shards:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, shard, progress=progress)
        weight_map |= {tensor.name: file for tensor in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)
    write_json(folder / "config.json", config)


def _write_shard(path: Path, tensors: list[Described], *, progress: Callable[[int], object] | None) -> None:
    import torch

    # widest values first, as safetensors itself does: every tensor stays aligned to its own dtype
    ordered = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype][1])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with aside(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered:
            written = 0
            for chunk in tensor.chunks():
                data = chunk.contiguous().view(-1).view(torch.uint8).numpy()
                file.write(data)
                written += data.nbytes
                if progress is not None:
                    progress(data.nbytes)
            assert written == tensor.nbytes, f"{tensor.name}: {written} bytes written, {tensor.nbytes} described"


def require_space(folder: Path, nbytes: int) -> None:
    """Raise UserError, before anything is written, when the disk of `folder` has less than `nbytes` free."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise UserError(
            f"cannot write {folder}: the disk has {free / 1e9:.1f} GB free; expected {nbytes / 1e9:.1f} GB; "
            "free some space or choose another folder"
        )


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files (and chat templates) that `source` has, byte for byte. Raises UserError."""
    extra = [f"additional_chat_templates/{p.name}" for p in source.glob("additional_chat_templates/*.jinja")]
    copy_files(source, target, [*TOKENIZER_FILES, *extra])


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of `names` that exist in `source` into `target`. Raises UserError."""
    for name in names:
        if (source / name).is_file():
            try:
                data = (source / name).read_bytes()
            except OSError as error:
                raise UserError(f"cannot read {source / name}: {error.strerror}; check the file") from error
            write_bytes(target / name, data)
