"""Ask the teacher once and write what it said, a shard after the other, to train from without it.

    cache/
      index.json            what it was made of (`fingerprint`), and its shards with their rows, targets and bytes
      00000.safetensors     keys (R, 16): a hash of each row's tokens; starts (R + 1,): where its targets begin; and,
                            for the N targets of all its rows, what was kept of the teacher
      head.safetensors      the teacher's head, where hidden states are kept

A shard is whole or absent, and always holds the same batches: a build that was killed goes on after the last one and
ends in the same bits. Draws are seeded by the row they are made for.
Shape suffixes: N targets, K kept ids, M ids drawn from the others, E teacher width, V real ids, R rows of a shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache as once
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..checkpoint import require_space
from ..data import Batch, collate, targets
from ..run import aside, build_shards
from .online import check_head, head_weight, predicting

Kind = Literal["topk", "sampled", "hidden"]
VERSION = 2
HEAD = "head.safetensors"
SHARD_TARGETS = {"topk": 2**17, "sampled": 2**17, "hidden": 2**14}  # of a shard, at least: tens of megabytes
TAIL_DRAWS = 32  # ids drawn of what the top k leave: their noise is below 1 % of the loss over a few thousand targets
ROWS_AT_ONCE = 256  # targets whose distributions exist at one time
Say = Callable[[int], None]


def fingerprint(
    *, teacher: str, tokenizer: Any, kind: Kind, keep: int, temperature: float, vocab: int, rows: dict[str, Any]
) -> dict[str, Any]:
    """What a cache depends on.

    teacher: of its weights. rows: what decides which rows are asked for, and in which order. keep: ids kept of each
    target; no matter for hidden states, which know no temperature.
    """
    told = str(tokenizer.chat_template) + str(sorted(tokenizer.get_vocab().items()))
    found = {"version": VERSION, "kind": kind, "teacher": teacher, "vocab": vocab, **rows}
    found["tokenizer"] = hashlib.sha256(told.encode()).hexdigest()[:16]
    return found if kind == "hidden" else found | {"keep": keep, "temperature": temperature}


def bytes_per_target(kind: Kind, *, keep: int, vocab: int, width: int, value: int) -> int:
    """What a cache keeps of each target, in bytes. width, value: the teacher's, and the bytes of one of its values."""
    id_bytes = 2 if vocab <= 2**16 else 4
    if kind == "hidden":
        return width * value
    if kind == "sampled":
        return keep * id_bytes + 4
    return min(keep, vocab) * (id_bytes + 2) + 4 + (TAIL_DRAWS * id_bytes + 4 if keep < vocab else 0)


def build(
    folder: Path,
    teacher: Callable[[], nn.Module],
    rows: Iterable[dict[str, Tensor]],
    *,
    about: dict[str, Any],
    batch_size: int,
    expected: int = 0,
    progress: Say = lambda rows: None,
) -> dict[str, Any]:
    """Write what `teacher` says of `rows` and return the index; go on where an earlier build was ended.

    about: a `fingerprint`. expected: bytes it will take, about; there has to be as much room. progress is handed the
    rows of each batch. No teacher is loaded where nothing is missing, and no lock is taken of a cache that is complete.
    Raises UserError for a folder that holds another cache or is being written to, and for a disk without room.
    """

    @once
    def model() -> nn.Module:
        require_space(folder, expected - sum(file.stat().st_size for file in folder.glob("*.safetensors")))
        return _loaded(folder, teacher, about)

    def write(number: int, group: list[list[Any]]) -> dict[str, Any]:
        tensors = _shard(model(), group, about, progress)
        name = f"{number:05d}.safetensors"
        with aside(folder / name) as file:
            file.write(save(tensors))
        sizes = {"rows": len(tensors["keys"]), "targets": int(tensors["starts"][-1])}
        return {"name": name, **sizes, "bytes": (folder / name).stat().st_size}

    groups = _groups(rows, batch_size, SHARD_TARGETS[about["kind"]])
    return build_shards(folder, about, groups, write, passed=lambda group: progress(sum(map(len, group))))


def row_keys(batch: Batch) -> list[bytes]:
    """16 bytes for each row of a batch, that name its tokens, its targets and where its documents begin."""
    columns = [batch[name].to("cpu", torch.int64) for name in ("input_ids", "labels", "position_ids")]
    keys = []
    for row, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
        told = b"".join(column[row, :length].numpy().tobytes() for column in columns)
        keys.append(hashlib.blake2b(told, digest_size=16).digest())
    return keys


def _groups(rows: Iterable[dict[str, Tensor]], size: int, most: int) -> Iterator[list[list[dict[str, Tensor]]]]:
    """Batches of `size` rows, in groups of `most` targets or a few more."""
    stream = iter(rows)
    group: list[list[dict[str, Tensor]]] = []
    found = 0
    while batch := list(islice(stream, size)):
        group.append(batch)
        found += int(targets(collate(batch)).sum())
        if found >= most:
            yield group
            group, found = [], 0
    if group:
        yield group


def _loaded(folder: Path, teacher: Callable[[], nn.Module], about: dict[str, Any]) -> nn.Module:
    model = teacher()
    check_head(model)
    if about["kind"] == "hidden" and not (folder / HEAD).is_file():
        with aside(folder / HEAD) as file:
            file.write(save({"weight": head_weight(model)[: about["vocab"]].detach().cpu().contiguous()}))
    return model


def _shard(model: nn.Module, group: list[list[Any]], about: dict[str, Any], progress: Say) -> dict[str, Tensor]:
    """The tensors of one shard."""
    parts: list[dict[str, Tensor]] = []
    keys: list[bytes] = []
    counts: list[int] = []
    device = head_weight(model).device
    for rows in group:
        batch = collate(rows)
        counted_BT = targets(batch)
        here = row_keys(batch)
        with torch.no_grad():
            placed = {key: value.to(device) for key, value in batch.items()}
            hidden_NE = predicting(model, placed, counted_BT.to(device))
        sizes = counted_BT.sum(-1).tolist()
        kept = _kept(hidden_NE, head_weight(model), about, here, sizes)
        parts.append({name: value.cpu() for name, value in kept.items()})
        keys += here
        counts += sizes
        progress(len(rows))
    starts = torch.tensor([0, *counts]).cumsum(0)
    whole = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
    names = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 16)
    return {"keys": names, "starts": starts, **whole}


def _kept(
    hidden_NE: Tensor, head_VE: Tensor, about: dict[str, Any], keys: list[bytes], sizes: list[int]
) -> dict[str, Tensor]:
    """What is kept of each target, by the cache's kind."""
    if about["kind"] == "hidden":
        return {"hidden": hidden_NE}
    ids_dtype = torch.uint16 if about["vocab"] <= 2**16 else torch.int32
    found: list[dict[str, Tensor]] = []
    for key, row_NE in zip(keys, hidden_NE.split(sizes), strict=True):
        generator = torch.Generator(head_VE.device).manual_seed(int.from_bytes(key[:7], "little"))
        for chunk_CE in row_NE.split(ROWS_AT_ONCE):
            logits_CV = (chunk_CE @ head_VE[: about["vocab"]].t()).float() / about["temperature"]
            log_p_CV = logits_CV.log_softmax(-1)
            if about["kind"] == "topk":
                found.append(_top(log_p_CV, min(about["keep"], about["vocab"]), generator))
            else:
                ids_CK = torch.multinomial(log_p_CV.exp(), about["keep"], replacement=True, generator=generator)
                found.append({"ids": ids_CK, "entropy": -log_p_CV.gather(1, ids_CK).mean(-1)})
    columns = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    return {name: value.to(ids_dtype) if name in ("ids", "drawn") else value for name, value in columns.items()}


def _top(log_p_CV: Tensor, keep: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The likeliest ids, and of the others their sum (not what is left of 1: that would be rounding) and some draws."""
    log_p_CK, ids_CK = log_p_CV.topk(keep)
    rest_CV = log_p_CV.scatter(1, ids_CK, -torch.inf)
    found = {"ids": ids_CK, "log_p": log_p_CK.to(torch.float16), "log_tail": rest_CV.logsumexp(-1)}
    if keep == log_p_CV.shape[1]:
        return found
    drawn_CM = torch.multinomial(rest_CV.softmax(-1), TAIL_DRAWS, replacement=True, generator=generator)
    return found | {"drawn": drawn_CM, "drawn_log_p": log_p_CV.gather(1, drawn_CM).mean(-1)}
