"""What a person sees: one progress bar on stderr where that is a terminal, and tables on stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .run import RANK

if TYPE_CHECKING:
    from rich.console import Console

PIPED_COLUMNS = 160


class Advance:
    """What a long task is handed: call it with how much was done, or `of` with how much is done of how much."""

    def __init__(self, bar: Any, task: Any, unit: str) -> None:
        self._bar, self._task, self._unit = bar, task, unit

    def __call__(self, count: int) -> None:
        self._bar.advance(self._task, count)
        self._rate()

    def to(self, done: int, *, note: str = "") -> None:
        """`done` in all, and what there is to say about it."""
        self._bar.update(self._task, completed=done, what=note)
        self._rate()

    def of(self, what: str, done: int, total: int | None) -> None:
        """`done` of `total` (None: unknown) of `what`; a new `what` starts the bar anew."""
        if self._bar.tasks[self._task].fields["what"] != what:
            self._bar.reset(self._task, what=what)
        self._bar.update(self._task, completed=done, total=total)
        self._rate()

    def _rate(self) -> None:
        speed = self._bar.tasks[self._task].speed
        if speed:
            self._bar.update(self._task, rate=f"{speed:,.0f} {self._unit}/s")


def stdout() -> Console:
    """A console on stdout; where nobody's terminal has a width, one in which no table is folded."""
    from rich.console import Console

    plain = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=PIPED_COLUMNS if plain else None)


@contextmanager
def progress(name: str, *, total: int | None = None, unit: str = "") -> Iterator[Advance]:
    """A bar called `name` over `total` units while the block runs."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn(name),
        TextColumn("{task.fields[what]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=RANK > 0 or not sys.stderr.isatty(),
    )
    with bar:
        yield Advance(bar, bar.add_task("", total=total, what="", rate=""), unit)
