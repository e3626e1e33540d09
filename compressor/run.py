"""The run folder: where every artifact lives, what is finished, and how files get there whole.

A file or folder is written aside, synced and renamed, so a reader never meets half of one. A stage is marked in
run.json only after its files are in place; whatever a crash leaves behind is redone from the last mark.
"""

import errno
import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import UserError

RANK = int(os.environ.get("RANK", "0"))  # of this process among those that a launcher started


def processes() -> int:
    """How many processes a launcher (torchrun, accelerate) started; accelerate itself does not know yet on a CPU."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rows_at_a_time(section: str, batch: int, micro_batch: int, *, shared: str | None = None) -> int:
    """Rows that all processes take in one pass; UserError where those of a step cannot be dealt out to them.

    section and shared: of the recipe, where batch and micro_batch stand (default: the same).
    """
    rows = micro_batch * processes()
    if batch % rows:
        raise UserError(
            f"{section}.batch is {batch} rows, and {processes()} process(es) take {micro_batch} each at a time; "
            f"expected a multiple of {rows}; change {section}.batch or {shared or section}.micro_batch"
        )
    return rows


@contextmanager
def aside(path: Path) -> Iterator["Writer"]:
    """A file opened under another name and renamed to `path` once synced; removed if anything fails.

    Raises UserError when the disk is full or not writable.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb", buffering=0) as raw:
            yield Writer(raw)
            os.fsync(raw.fileno())
        partial.replace(path)
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _unwritten(path: Path, error: Exception) -> UserError:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = "the disk is full" if full else getattr(error, "strerror", None) or str(error).splitlines()[0]
    return UserError(
        f"could not write {path}: {what}; expected a writable folder with room; free space or choose another"
    )


@dataclass(frozen=True)
class Writer:
    """Unbuffered writes that finish: the kernel may take less than it was given (2 GiB at most on Linux)."""

    raw: Any

    def write(self, data: Any) -> None:
        """Write all of a bytes-like object."""
        view = memoryview(data)
        while len(view):
            view = view[self.raw.write(view) :]


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole: aside, fsync, rename. Raises UserError when the disk is full or not writable."""
    with aside(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole, two spaces deep, keys as given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write a file whole with one JSON value per line."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def read_json(path: Path) -> Any:
    """Read a JSON file; UserError where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"could not read {path}: {error}; expected the JSON file that a run writes") from error


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_symlink():
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder to fill; it takes the place of `folder` when the block ends well and is removed when it does not."""
    aside = folder.with_name(f".{folder.name}.part")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        _sync_tree(aside)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    except OSError as error:
        raise _unwritten(folder, error) from error
    except Exception as error:
        # safetensors and torch.save have exceptions of their own for a disk that takes no more
        if "I/O error" in str(error) or "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
            raise _unwritten(folder, error) from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


INDEX = "index.json"


def build_shards(
    folder: Path,
    about: dict[str, Any],
    groups: Iterable[Any],
    write: Callable[[int, Any], dict[str, Any]],
    *,
    passed: Callable[[Any], None] = lambda group: None,
) -> dict[str, Any]:
    """Fill `folder` a shard after the other and return its index, {"about", "shards", "complete"}.

    groups: what each shard is made of, the same ones in every call. write: is handed a shard's number and its group,
    writes its files whole, and returns what the index says of it. A build that was ended goes on after the last shard;
    `passed` is handed the groups of those that are there. One that is complete is only read, by as many as like.
    Raises UserError for a folder that holds something else or is being written to.
    """
    if (index := _begun(folder, about))["complete"]:
        return index
    with alone(folder):
        index = _begun(folder, about)  # another process may have gone on in between
        write_json(folder / INDEX, index)  # before any shard, which then is known for one
        for number, group in enumerate(groups):
            if index["complete"]:
                break
            if number < len(index["shards"]):
                passed(group)
                continue
            index["shards"].append(write(number, group))
            write_json(folder / INDEX, index)
        index["complete"] = True
        write_json(folder / INDEX, index)
    return index


def outcome_counts(index: dict[str, Any]) -> Counter[str]:
    """What became of all that went into a build, by the "outcomes" of its shards."""
    total: Counter[str] = Counter()
    for shard in index["shards"]:
        total.update(shard["outcomes"])
    return total


def _begun(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The index of what is there already."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        check_about(folder, index, about)
        return index
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and has no {INDEX}; expected a new folder; choose another")
    return {"about": about, "shards": [], "complete": False}


def check_about(folder: Path, index: dict[str, Any], about: dict[str, Any]) -> None:
    """Raise UserError where what a folder holds, by its index, was made of something else than `about`."""
    for key, wanted in about.items():
        if index["about"].get(key) != wanted:
            raise UserError(
                f"{folder} was made with another {key} ({index['about'].get(key)}); expected {wanted}; choose another "
                "folder, or build it anew"
            )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the place of `folder`, which need not exist; UserError where another process is writing there."""
    lock = folder.with_name(f".{folder.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("a")
    except OSError as error:
        raise UserError(f"cannot write in {folder.parent}: {error.strerror}; choose another place") from error
    with handle:
        _hold(handle, f"another process is writing {folder}")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _hold(handle: Any, otherwise: str) -> None:
    """Lock an open file until it is closed or its process dies; UserError, `otherwise`, where another holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"{otherwise}; expected to be alone; wait for it or choose another --out") from error


class Run:
    """One run folder and the marks of its finished stages."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.recipe = self.folder / "recipe.yaml"
        self.facts = self.folder / "run.json"
        self.metrics = self.folder / "metrics.jsonl"
        self.scores = self.folder / "scores.safetensors"
        self.shape = self.folder / "shape.json"
        self.pruned = self.folder / "pruned"
        self.correction = self.folder / "correction"
        self.corrected = self.folder / "corrected"
        self.checkpoints = self.folder / "checkpoints"
        self.distilled = self.folder / "distilled"  # the student before alignment, where there is one
        self.pairs = self.folder / "pairs"
        self.student = self.folder / "student"
        self.evaluation = self.folder / "evaluation.json"
        self.export = self.folder / "export"
        self.exports = self.export / "exports.json"
        self.report = self.folder / "report.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder alone; UserError where another process holds it. The lock dies with its process."""
        made, lock = not self.folder.exists(), self.folder / ".lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = lock.open("a+")
        except OSError as error:
            raise UserError(
                f"could not use {self.folder} as a run folder: {error.strerror}; choose another --out"
            ) from error
        with handle:
            _hold(handle, f"another process is working in {self.folder}")
            try:
                yield
            finally:
                if [*self.folder.iterdir()] == [lock]:  # nothing was begun
                    lock.unlink()
                    if made:
                        self.folder.rmdir()

    def read_facts(self) -> dict[str, Any]:
        """run.json, or an empty one for a new run."""
        return read_json(self.facts) if self.facts.exists() else {"stages": {}}

    def note(self, **facts: Any) -> None:
        """Merge facts (versions, seeds, fingerprints, sizes) into run.json."""
        write_json(self.facts, self.read_facts() | facts)

    def done(self, stage: str) -> dict[str, Any] | None:
        """What the finished stage left to say, or None where it is still to do."""
        return self.read_facts()["stages"].get(stage)

    def mark(self, stage: str, *, started: float, **facts: Any) -> None:
        """Mark a stage finished, once its files are in place. `started` is time.monotonic() at its start."""
        known = self.read_facts()
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        known["stages"][stage] = {
            "seconds": round(time.monotonic() - started, 2),
            "finished": finished,
            **facts,
        }
        write_json(self.facts, known)
