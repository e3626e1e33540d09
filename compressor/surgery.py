"""Surgery: (checkpoint, Scores, Shape) -> a smaller checkpoint, by index selection alone (arXiv 2407.14679).

`select` ranks: neurons and heads per layer, heads within their KV group, hidden channels once for the whole
network, and one contiguous block of layers. `prune` then copies the kept rows and columns of each tensor,
bit for bit and in the stored dtype, from lazily opened safetensors into new shards, a few megabytes at a
time. Removing neurons or heads equals masking them in the dense model. Removing hidden channels does not
quite: RMSNorm then averages over the kept channels, so it differs from masking by a factor that training
absorbs.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import families
from .checkpoint import Checkpoint, Described, copy_files, copy_tokenizer, write_checkpoint
from .errors import CheckFailed, UserError

if TYPE_CHECKING:
    import torch

    from .scores import Scores
    from .shape import Shape

CHUNK_BYTES = 2 * 2**20  # read and written at a time: fits a CPU cache, and is long enough for a disk
THREADS, SLOTS = 2, 6  # cutting while the main thread writes; chunks in flight
Ids = tuple[int, ...]
Span = tuple[int, int, Any]  # first row, stop, and the rows wanted between them


@dataclass(frozen=True)
class Kept:
    """What stays, as the teacher's indices: layers; hidden channels; per kept layer, neurons and query heads.

    `select` returns them sorted; any order that keeps heads in their KV groups is a valid checkpoint.
    """

    layers: Ids
    hidden: Ids
    ffn: tuple[Ids, ...]
    heads: tuple[Ids, ...]

    @classmethod
    def everything(cls, shape: Shape) -> Kept:
        """Keep all: the identity."""
        count = shape.num_layers
        ffn, heads = tuple(range(shape.ffn)), tuple(range(shape.num_heads))
        return cls(tuple(range(count)), tuple(range(shape.hidden)), (ffn,) * count, (heads,) * count)


def select(scores: Scores, teacher: Shape, student: Shape) -> Kept:
    """The most important parts of `teacher` that fill the sizes of `student`: ids sorted, ties to the lower.

    Depth drops the one contiguous block, never the first or last layer, with the lowest removal loss if
    that was measured for every candidate, else with the lowest block influence. KV heads are kept whole,
    with the same number of query heads each; where fewer KV heads are asked for, the groups with the
    highest sums stay. Raises UserError when the student is larger, of another kind, or the scores belong to
    another shape.
    """
    _check_fits(scores, teacher, student)
    layers = _layers(scores, teacher.num_layers, student.num_layers)
    return Kept(
        layers=layers,
        hidden=_top(scores.hidden, student.hidden),
        ffn=tuple(_top(scores.ffn[i], student.ffn) for i in layers),
        heads=tuple(_heads(scores.heads[i], teacher, student) for i in layers),
    )


def _top(scores: torch.Tensor, count: int) -> Ids:
    """Indices of the `count` highest scores, ascending; ties to the lower index."""
    return tuple(sorted(scores.argsort(descending=True, stable=True)[:count].tolist()))


def _heads(scores: torch.Tensor, teacher: Shape, student: Shape) -> Ids:
    per_group, keep = teacher.num_heads // teacher.num_kv_heads, student.num_heads // student.num_kv_heads
    groups = scores.view(teacher.num_kv_heads, per_group)
    best = [_top(group, keep) for group in groups]
    strength = groups.sort(dim=1, descending=True).values[:, :keep].sum(dim=1)
    return tuple(group * per_group + head for group in _top(strength, student.num_kv_heads) for head in best[group])


def _layers(scores: Scores, count: int, keep: int) -> Ids:
    size = count - keep
    if size == 0:
        return tuple(range(count))
    if keep < 2:
        raise UserError(f"cannot keep {keep} layer; expected at least 2, the first and the last; raise the target")
    firsts = range(1, count - size)
    if all((first, first + size) in scores.removal for first in firsts):
        cost = [scores.removal[first, first + size] for first in firsts]
    elif size in scores.blocks:
        cost = scores.blocks[size][1 : count - size].tolist()
    else:
        cost = [float(scores.layers[first : first + size].sum()) for first in firsts]
    first = min(firsts, key=lambda first: cost[first - 1])
    return (*range(first), *range(first + size, count))


def _check_fits(scores: Scores, teacher: Shape, student: Shape) -> None:
    for name in ("family", "head_dim", "vocab", "tied", "qkv_bias", "output_bias", "mlp_bias", "qk_norm"):
        if getattr(teacher, name) != getattr(student, name):
            raise UserError(
                f"the student's {name} is {getattr(student, name)}; surgery keeps the teacher's "
                f"({getattr(teacher, name)}); choose a target of the same kind"
            )
    for name in ("num_layers", "hidden", "ffn", "num_heads", "num_kv_heads"):
        if getattr(student, name) > getattr(teacher, name):
            raise UserError(
                f"the target has {name} {getattr(student, name)}, the teacher only {getattr(teacher, name)}; "
                "expected a smaller student; lower the target"
            )
    if student.num_heads * teacher.num_kv_heads > teacher.num_heads * student.num_kv_heads:
        raise UserError(
            f"{student.num_heads} heads on {student.num_kv_heads} KV heads need larger groups than the "
            f"teacher's ({teacher.num_heads} on {teacher.num_kv_heads}); keep more KV heads"
        )
    expected = {
        "hidden": (teacher.hidden,),
        "ffn": (teacher.num_layers, teacher.ffn),
        "heads": (teacher.num_layers, teacher.num_heads),
        "layers": (teacher.num_layers,),
    }
    for name, sizes in expected.items():
        if tuple(getattr(scores, name).shape) != sizes:
            raise UserError(
                f"the {name} scores have shape {tuple(getattr(scores, name).shape)}; expected {sizes}, "
                "as the teacher; measure them again"
            )


def prune(
    source: Checkpoint,
    out: Path,
    *,
    kept: Kept,
    shape: Shape,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write the student of `shape` into `out`: weights, config, generation config, tokenizer.

    Memory is a dozen chunks of 2 MiB. `progress` advances by bytes written (see `output_bytes`).
    `out` is new or empty, and is emptied again if anything fails. Raises UserError for tensors that are
    missing, unknown, of an unexpected shape or not finite, for unreadable input and for a full disk.
    """
    _check_kept(kept, source.shape, shape)
    source.check()
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; expected a new folder; choose another or delete it")
    config = _student_config(source.config, kept, shape)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(THREADS) as pool:
            saw = _Saw(source, pool)
            tensors = [
                Described(
                    part.name,
                    source.metadata(part.origin).dtype,
                    part.sizes,
                    partial(saw.cut, part.origin, *part.ids),
                )
                for part in _parts(source.shape, kept, shape)
            ]
            write_checkpoint(
                out,
                tensors,
                config=config,
                max_shard_bytes=max_shard_bytes,
                progress=progress,
            )
        copy_files(source.folder, out, ["generation_config.json"])
        copy_tokenizer(source.folder, out)
    except BaseException as error:
        # also on Ctrl-C: half a student must not look like one
        shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(
                f"cannot write {out}: {error.strerror}; expected a writable folder; choose another"
            ) from error
        raise


def output_bytes(source: Checkpoint, *, kept: Kept, shape: Shape) -> int:
    """Bytes of weights that `prune` will write: the total of its progress."""
    return sum(prod(part.sizes) * source.width(part.origin) for part in _parts(source.shape, kept, shape))


def verify(folder: Path, shape: Shape) -> None:
    """Reload `folder` with stock transformers, as any user would, and run it once.

    Raises CheckFailed for keys that are missing, unexpected or of another size, for a parameter count other
    than the shape's, and for logits that are not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, info = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            raise CheckFailed(f"{folder} reloads with {what.replace('_', ' ')}: {sorted(map(str, info[what]))[:3]}")
    count = sum(parameter.numel() for parameter in model.parameters())
    if count != shape.parameters:
        raise CheckFailed(f"{folder} reloads with {count} parameters; its shape has {shape.parameters}")
    ids = torch.arange(8).unsqueeze(0) * (shape.vocab // 8)
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise CheckFailed(f"{folder} reloads, but its logits are not finite")


def _check_kept(kept: Kept, teacher: Shape, student: Shape) -> None:
    """Our own mistakes: ids that do not fill the shape or lie outside it, heads that would leave their group."""
    for axis, ids in (("num_layers", [kept.layers]), ("hidden", [kept.hidden]), ("ffn", kept.ffn)):
        assert all(0 <= i < getattr(teacher, axis) for part in ids for i in part), axis
    assert all(0 <= head < teacher.num_heads for part in kept.heads for head in part), "heads"
    assert len(kept.layers) == len(kept.ffn) == len(kept.heads) == student.num_layers, "layers"
    assert len(set(kept.hidden)) == student.hidden, "hidden"
    assert all(len(set(ids)) == student.ffn for ids in kept.ffn), "ffn"
    for ids in kept.heads:
        assert len(set(ids)) == student.num_heads, "heads"
        assert len(set(_kv_heads(ids, teacher, student))) == student.num_kv_heads, "KV groups"


def _kv_heads(heads: Ids, teacher: Shape, student: Shape) -> Ids:
    """The teacher's KV head of each of the student's KV heads."""
    old, new = teacher.num_heads // teacher.num_kv_heads, student.num_heads // student.num_kv_heads
    groups = [{head // old for head in heads[i : i + new]} for i in range(0, len(heads), new)]
    assert all(len(group) == 1 for group in groups), "a head left its KV group"
    return tuple(group.pop() for group in groups)


def _student_config(teacher: dict[str, Any], kept: Kept, shape: Shape) -> dict[str, Any]:
    """The teacher's config with the student's sizes; per-layer entries follow the layers that are kept."""
    config = shape.to_config(teacher, layers=kept.layers)
    if isinstance(full := teacher.get("max_window_layers"), int):
        # counts leading layers, so it becomes the number of those that are left
        config["max_window_layers"] = sum(layer < full for layer in kept.layers)
    # a stock architecture needs no code of its own
    config.pop("auto_map", None)
    return config


class _Part(NamedTuple):
    """A tensor of the student, and where its rows (and columns) come from: the teacher's tensor and indices."""

    name: str
    origin: str
    sizes: tuple[int, ...]
    ids: list[Sequence[int]]


def _parts(teacher: Shape, kept: Kept, student: Shape) -> Iterator[_Part]:
    for name, axes in families.tensors(student):
        prefix, dot, rest = name.partition(".layers.")
        layer, _, leaf = rest.partition(".")
        position = int(layer) if dot else 0
        origin = f"{prefix}.layers.{kept.layers[position]}.{leaf}" if dot else name
        ids = [_axis_ids(axis, position, kept, teacher, student) for axis in axes]
        yield _Part(name, origin, tuple(map(student.size, axes)), ids)


def _axis_ids(axis: str, position: int, kept: Kept, teacher: Shape, student: Shape) -> Sequence[int]:
    """The teacher's indices that the student's layer at `position` keeps along one axis."""

    def channels(heads: Ids) -> list[int]:
        return [head * teacher.head_dim + i for head in heads for i in range(teacher.head_dim)]

    if axis == "hidden":
        return kept.hidden
    if axis == "ffn":
        return kept.ffn[position]
    if axis == "heads":
        return channels(kept.heads[position])
    if axis == "kv_heads":
        return channels(_kv_heads(kept.heads[position], teacher, student))
    return range(teacher.size(axis))


class _Saw:
    """Cuts tensors out of a checkpoint: threads read, check and pick while the caller writes what came before.

    The work is copying and comparing, which numpy and torch do without the interpreter lock. Each chunk in
    flight has a slot of its own, reused for chunk after chunk, so memory stays at SLOTS times two chunks.
    """

    def __init__(self, source: Checkpoint, pool: Executor) -> None:
        self.source, self.pool = source, pool
        self.slots = [(bytearray(CHUNK_BYTES), bytearray(CHUNK_BYTES)) for _ in range(SLOTS)]

    def cut(self, name: str, rows: Sequence[int], columns: Sequence[int] | None = None) -> Iterator[torch.Tensor]:
        """The kept rows and columns of one tensor, in order, a chunk at a time, valid until the next."""
        import numpy

        stored, width = self.source.metadata(name), self.source.width(name)
        row_bytes = stored.nbytes // stored.shape[0]
        per_read = max(1, CHUNK_BYTES // row_bytes)
        if per_read * row_bytes > CHUNK_BYTES:  # a single row that is longer than a chunk
            self.slots = [(bytearray(row_bytes), bytearray(row_bytes)) for _ in self.slots]
        whole = columns is None or list(columns) == list(range(stored.shape[1]))
        picks = None if whole else numpy.asarray(columns)
        pending: deque[Future[torch.Tensor]] = deque()
        for number, span in enumerate(_spans(rows, per_read)):
            if len(pending) == SLOTS:
                # its slot is free once the caller asks for more
                yield pending.popleft().result()
            slot = self.slots[number % SLOTS]
            pending.append(self.pool.submit(self._chunk, name, width, span, picks, slot))
        while pending:
            yield pending.popleft().result()

    def _chunk(self, name: str, width: int, span: Span, picks: Any, slot: tuple[bytearray, bytearray]) -> torch.Tensor:
        import torch

        (first, stop, wanted), (read, spare) = span, slot
        # bits, not numbers: numpy's take is three times as fast as torch's, but knows no bfloat16
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
        chunk = self.source.rows(name, first, stop, buffer=read).view(bits).numpy()
        if len(wanted) < stop - first:
            chunk = _take(chunk, wanted - first, axis=0, into=spare)
            read, spare = spare, read
        if picks is not None:
            chunk = _take(chunk, picks, axis=1, into=spare)
        return torch.from_numpy(chunk)


def _take(chunk: Any, ids: Any, *, axis: int, into: bytearray) -> Any:
    """numpy.take into a buffer. mode="clip" skips a bounds check per value: `_check_kept` checked the ids."""
    import numpy

    sizes = [len(ids) if dimension == axis else size for dimension, size in enumerate(chunk.shape)]
    taken = numpy.frombuffer(into, dtype=chunk.dtype, count=prod(sizes)).reshape(sizes)
    return numpy.take(chunk, ids, axis=axis, out=taken, mode="clip")


def _spans(ids: Sequence[int], most: int) -> Iterator[Span]:
    """Ascending stretches of `ids` that lie within `most` rows: one read serves each."""
    import numpy

    order = numpy.asarray(ids)
    turns = [0, *(numpy.flatnonzero(numpy.diff(order) < 0) + 1).tolist(), len(order)]
    for begin, end in pairwise(turns):
        while begin < end:
            upto = begin + int(numpy.searchsorted(order[begin:end], order[begin] + most))
            yield int(order[begin]), int(order[upto - 1]) + 1, order[begin:upto]
            begin = upto
