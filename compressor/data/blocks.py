"""Rows and batches: text packed into rows of exactly `context` tokens, chats one to a row.

Row: input_ids (T,), labels (T,) with -100 where nothing is learned, attention_mask (T,), position_ids (T,)
that start anew at each document. Labels are not shifted; position 0 of a document never is a label, since
nothing precedes it. Documents of a row must not see each other: call the model with position_ids, without
attention_mask and with use_cache=False, and transformers builds the block-diagonal mask; padding stands on
the right with position 0, where no real token can see it.
"""

import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch

from ..errors import UserError
from .batches import IGNORED
from .encoding import TemplateError, encode
from .sources import Record, records

Row = dict[str, torch.Tensor]
log = logging.getLogger(__name__)


@dataclass
class Counts:
    """What became of the records of one pass: kept, too long for a row, refused by the template, without a
    target.
    """

    kept: int = 0
    too_long: int = 0
    refused: int = 0
    untrained: int = 0

    def describe(self) -> str:
        """One line for a warning or an error."""
        return (
            f"{self.kept} used, {self.too_long} longer than the context, "
            f"{self.refused} refused by the chat template, {self.untrained} without an assistant's token"
        )


class Blocks(torch.utils.data.IterableDataset):
    """The training stream of rows: endless, reshuffled each epoch, the same on every run with the same seed.

    group: rows per forward pass. Above 1, rows of like length follow each other in runs of that many, and the
    runs keep a random order: a batch of short chats then needs little padding.
    Every process sees every row: accelerate's IterableDatasetShard deals them out, and resuming by skipping
    batches lands on the same row. Iterating raises UserError when an epoch holds nothing to train on.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Any,
        *,
        context: int,
        split: str = "train",
        fraction: float = 0.01,
        seed: int = 0,
        buffer: int = 4096,
        group: int = 1,
    ) -> None:
        if group < 1 or buffer < 1:
            raise ValueError(f"group is {group} and buffer {buffer}; both are at least 1")
        self.group = group
        self.source, self.tokenizer, self.context = source, tokenizer, context
        self.split, self.fraction, self.seed, self.buffer = split, fraction, seed, buffer

    def __iter__(self) -> Iterator[Row]:
        counts = Counts()
        rows = _rows(self._epochs(counts), self.tokenizer, context=self.context, counts=counts)
        if self.group > 1:
            rows = _grouped(rows, group=self.group, seed=self.seed)
        worker = torch.utils.data.get_worker_info()
        # Loader workers each hold a copy of the data set: without this every row would be read once per
        # worker.
        return rows if worker is None else islice(rows, worker.id, None, worker.num_workers)

    def _epochs(self, counts: Counts) -> Iterator[Record]:
        epoch = 0
        while True:
            kept = counts.kept
            stream = records(self.source, split=self.split, fraction=self.fraction, seed=self.seed)
            if self.source != "demo":  # generated records come in random order already
                stream = shuffled(stream, buffer=self.buffer, seed=self.seed + 1_000_003 * epoch)
            yield from stream
            if counts.kept == kept:
                raise UserError(_nothing(self.source, "to train on", counts))
            if epoch == 0 and (counts.too_long or counts.refused):
                log.warning("%s: %s in the first epoch", self.source, counts.describe())
            epoch += 1


def shuffled(stream: Iterator[Record], *, buffer: int = 4096, seed: int = 0) -> Iterator[Record]:
    """Shuffle through a buffer: each record out makes room for the next one in."""
    rng = random.Random(seed)
    held = list(islice(stream, buffer))
    rng.shuffle(held)
    for record in stream:
        i = rng.randrange(len(held))
        yield held[i]
        held[i] = record
    rng.shuffle(held)
    yield from held


def _grouped(rows: Iterator[Row], *, group: int, seed: int) -> Iterator[Row]:
    """Sort windows of 32 runs by length, cut them into runs of `group` rows, and shuffle the runs."""
    rng = random.Random(seed)
    while window := list(islice(rows, 32 * group)):
        window.sort(key=lambda row: len(row["input_ids"]))
        runs = [window[i : i + group] for i in range(0, len(window), group)]
        rng.shuffle(runs)
        yield from chain.from_iterable(runs)


def _rows(
    stream: Iterable[Record], tokenizer: Any, *, context: int, counts: Counts, count_bytes: bool = False
) -> Iterator[Row]:
    """Pack text and pass chats through; what is left of the text at the end becomes one shorter row."""
    pending: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": [], "num_bytes": []}
    for record in stream:
        try:
            example = encode(record, tokenizer, count_bytes=count_bytes)
        except TemplateError as error:
            if counts.refused == 0:
                log.warning("the chat template refused a record and others may follow: %s", error)
            counts.refused += 1
            continue
        if not any(example.trained):
            counts.untrained += 1
        elif example.packs:
            counts.kept += 1
            pending["input_ids"] += example.ids
            pending["labels"] += _labels(example.ids, example.trained)
            pending["position_ids"] += range(len(example.ids))
            pending["num_bytes"] += example.num_bytes or []
            while len(pending["input_ids"]) >= context:
                yield _row({key: values[:context] for key, values in pending.items()}, count_bytes)
                pending = {key: values[context:] for key, values in pending.items()}
        elif len(example.ids) > context:
            counts.too_long += 1
        else:
            counts.kept += 1
            columns = {"input_ids": example.ids, "labels": _labels(example.ids, example.trained)}
            columns |= {"position_ids": list(range(len(example.ids))), "num_bytes": example.num_bytes or []}
            yield _row(columns, count_bytes)
    if len(pending["input_ids"]) > 1:
        yield _row(pending, count_bytes)


def _labels(ids: list[int], trained: list[bool]) -> list[int]:
    return [token if is_target else IGNORED for token, is_target in zip(ids, trained, strict=True)]


def _row(columns: dict[str, list[int]], count_bytes: bool) -> Row:
    row = {key: torch.tensor(values) for key, values in columns.items() if key != "num_bytes"}
    row["labels"][0] = IGNORED
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    # A document that began in the row before starts again at position 0: this row knows nothing of its past.
    starts = (row["position_ids"] == 0).nonzero().flatten()
    first = int(starts[0]) if len(starts) else len(row["position_ids"])
    row["position_ids"][:first] -= row["position_ids"][0].clone()
    if count_bytes:
        row["num_bytes"] = torch.tensor(columns["num_bytes"])
    return row


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Stack rows (T,) into a batch (B, T), padded on the right to the longest row.

    Padding: id 0, label -100, attention_mask 0, position 0.
    """
    fill = {"labels": IGNORED}
    return {
        key: torch.nn.utils.rnn.pad_sequence(
            [row[key] for row in rows], batch_first=True, padding_value=fill.get(key, 0)
        )
        for key in rows[0]
    }


def heldout_rows(
    source: str,
    tokenizer: Any,
    *,
    context: int,
    limit: int,
    split: str = "train",
    fraction: float = 0.01,
    seed: int = 0,
) -> list[Row]:
    """The first `limit` held-out rows, always the same ones. UserError when nothing is held out."""
    counts = Counts()
    stream = records(source, part="heldout", split=split, fraction=fraction, seed=seed)
    rows = list(islice(_rows(stream, tokenizer, context=context, counts=counts), limit))
    if not rows:
        raise UserError(_nothing(source, f"held out (fraction {fraction})", counts))
    return rows


def heldout_batches(
    source: str,
    tokenizer: Any,
    *,
    context: int,
    limit: int,
    batch_size: int,
    split: str = "train",
    fraction: float = 0.01,
    seed: int = 0,
) -> list[dict[str, torch.Tensor]]:
    """`heldout_rows`, collated in batches of at most `batch_size` rows."""
    rows = heldout_rows(source, tokenizer, context=context, limit=limit, split=split, fraction=fraction, seed=seed)
    return [collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]


def text_batches(
    source: str,
    tokenizer: Any,
    *,
    context: int,
    tokens: int,
    batch_size: int = 8,
    split: str = "train",
    fraction: float = 0.01,
    seed: int = 0,
) -> list[dict[str, torch.Tensor]]:
    """Held-out rows for perplexity: at least `tokens` targets if there are as many, with `num_bytes` (B, T).

    Plain text is taken where the source has any among its first 1,000 held-out records, else the chats'
    answers.
    UserError when nothing is held out.
    """
    counts = Counts()
    stream = records(source, part="heldout", split=split, fraction=fraction, seed=seed)
    seen = []
    for record in islice(stream, 1000):
        seen.append(record)
        if "text" in record:
            break
    every: Iterable[Record] = chain(seen, stream)
    if seen and "text" in seen[-1]:
        every = (record for record in every if "text" in record)
    rows, found = [], 0
    for row in _rows(every, tokenizer, context=context, counts=counts, count_bytes=True):
        rows.append(row)
        found += int((row["labels"] != IGNORED).sum())
        if found >= tokens:
            break
    if not found:
        raise UserError(_nothing(source, f"held out (fraction {fraction})", counts))
    return [collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]


def calibration_batches(
    stream: Iterable[Record], tokenizer: Any, *, samples: int, context: int, batch_size: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """Stream `samples` rows in batches {"input_ids" (B, T), "attention_mask", "position_ids", "labels"}.

    `stream` is what `records` gives; UserError when there is nothing in it.
    """
    counts = Counts()
    rows = islice(_rows(stream, tokenizer, context=context, counts=counts), samples)
    empty = True
    while batch := list(islice(rows, batch_size)):
        empty = False
        yield collate(batch)
    if empty:
        raise UserError(_nothing("the data", "to calibrate on", counts))


def _nothing(source: str, what: str, counts: Counts) -> str:
    if counts.too_long or counts.refused or counts.untrained:
        return f"{source} has nothing {what}: {counts.describe()}; raise data.context or use other data"
    return (
        f"{source} has nothing {what}: no records; expected at least one on each side of the held-out split; "
        "use more data or another data.heldout_fraction"
    )
