"""Ask the teacher once and write what it said, a shard after the other, to train from without it.

    cache/
      index.json            what it was made of (`fingerprint`), and its shards with their rows, targets and bytes
      00000.safetensors     keys (R, 2): a hash of each row's tokens; starts (R + 1,): where its targets begin; and, for
                            the N targets of all its rows, what was kept of the teacher
      head.safetensors      the teacher's head, where hidden states are kept

A shard is whole or absent, and always holds the same batches: a build that was killed goes on after the last one and
ends in the same bits. Draws are seeded by the row they are made for.
Shape suffixes: N targets, K kept ids, M ids drawn from the others, E teacher width, V real ids, R rows of a shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..data import Batch, collate, targets
from ..errors import UserError
from ..run import alone, aside, check_about, read_json, write_json
from .online import check_head, head_weight, predicting

Kind = Literal["topk", "sampled", "hidden"]
VERSION = 2
INDEX, HEAD = "index.json", "head.safetensors"
SHARD_BATCHES = 32
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


def build(
    folder: Path,
    teacher: Callable[[], nn.Module],
    rows: Iterable[dict[str, Tensor]],
    *,
    about: dict[str, Any],
    batch_size: int,
    progress: Say = lambda rows: None,
) -> dict[str, Any]:
    """Write what `teacher` says of `rows` and return the index; go on where an earlier build was ended.

    about: a `fingerprint`. progress is handed the rows of each batch. No teacher is loaded where nothing is missing.
    Raises UserError for a folder that holds another cache or is being written to, and for a full disk.
    """
    with alone(folder):
        folder.mkdir(parents=True, exist_ok=True)
        index = _begun(folder, about)
        if index.get("complete"):
            return index
        model: nn.Module | None = None
        batches = _batches(rows, batch_size)
        for shard in index["shards"]:
            for batch in islice(batches, shard["batches"]):
                progress(len(batch))
        while group := list(islice(batches, SHARD_BATCHES)):
            if model is None:
                model = _loaded(folder, teacher, about)
            tensors = _shard(model, group, about, progress)
            name = f"{len(index['shards']):05d}.safetensors"
            with aside(folder / name) as file:
                file.write(save(tensors))
            sizes = {"batches": len(group), "rows": len(tensors["keys"]), "targets": int(tensors["starts"][-1])}
            index["shards"].append({"name": name, **sizes, "bytes": (folder / name).stat().st_size})
            write_json(folder / INDEX, index)
        index["complete"] = True
        write_json(folder / INDEX, index)
        return index


def row_keys(batch: Batch) -> list[tuple[int, int]]:
    """128 bits for each row of a batch, that name its tokens, its targets and where its documents begin."""
    columns = [batch[name].to("cpu", torch.int64) for name in ("input_ids", "labels", "position_ids")]
    keys = []
    for row, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
        told = b"".join(column[row, :length].numpy().tobytes() for column in columns)
        digest = hashlib.blake2b(told, digest_size=16).digest()
        one, two = (int.from_bytes(digest[i : i + 8], "little", signed=True) for i in (0, 8))
        keys.append((one, two))
    return keys


def _begun(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    if not (folder / INDEX).is_file():
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no cache; expected a new folder; choose another")
        index = {"about": about, "shards": [], "complete": False}
        write_json(folder / INDEX, index)
        return index
    index = read_json(folder / INDEX)
    check_about(folder, index, about)
    return index


def _batches(rows: Iterable[dict[str, Tensor]], size: int) -> Iterator[list[dict[str, Tensor]]]:
    stream = iter(rows)
    while batch := list(islice(stream, size)):
        yield batch


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
    keys: list[tuple[int, int]] = []
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
    return {"keys": torch.tensor(keys), "starts": starts, **whole}


def _kept(
    hidden_NE: Tensor, head_VE: Tensor, about: dict[str, Any], keys: list[tuple[int, int]], sizes: list[int]
) -> dict[str, Tensor]:
    """What is kept of each target, by the cache's kind."""
    if about["kind"] == "hidden":
        return {"hidden": hidden_NE}
    ids_dtype = torch.uint16 if about["vocab"] <= 2**16 else torch.int32
    found: list[dict[str, Tensor]] = []
    for key, row_NE in zip(keys, hidden_NE.split(sizes), strict=True):
        generator = torch.Generator(head_VE.device).manual_seed(key[0] % 2**63)
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
