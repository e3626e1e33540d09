"""Blind votes on pairs of answers: appended to a file, tallied with an interval, exported."""

from __future__ import annotations

import csv
import io
import json
import threading
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from compressor.errors import UserError

CHOICES = ("left", "right", "tie", "bad")  # of the sides as they were shown
COLUMNS = ("time", "left", "right", "choice", "winner", "skill", "prompt", "left_answer", "right_answer", "blind")
Z = 1.96  # of a 95 % interval


class Ballot:
    """The votes of one run, a JSON line each in votes.jsonl; kept in memory where there is no folder."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.votes: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self.votes = _read(path)

    def cast(self, choice: str, *, left: str, right: str, **about: Any) -> dict[str, Any]:
        """Count one vote: `choice` of CHOICES, left and right the models as they were shown. Raises UserError."""
        if choice not in CHOICES:
            raise UserError(f"vote {choice[:20]!r} is not known; expected one of {', '.join(CHOICES)}")
        if left == right:
            raise UserError(f"both sides are {left}; expected two models; choose another")
        winner = {"left": left, "right": right}.get(choice)
        vote = {"time": round(time.time(), 3), "left": left, "right": right, "choice": choice, "winner": winner} | about
        with self._lock:
            if self._path is not None:
                _append(self._path, json.dumps(vote, ensure_ascii=False) + "\n")
            self.votes.append(vote)
        return vote

    def tally(self) -> list[dict[str, Any]]:
        """For each pair of models: wins, ties, both bad, and the share that prefers the first, with its interval.

        Votes that were blind and those that were not are counted apart. A tie counts half for each; pairs judged both
        bad count for none. Wilson's interval at 95 %.
        """
        pairs: dict[tuple[str, str, bool], dict[str, int]] = {}
        for vote in self.votes:
            first, second = sorted((vote["left"], vote["right"]))
            pair = (first, second, bool(vote.get("blind")))
            found = pairs.setdefault(pair, {"first": 0, "second": 0, "tie": 0, "bad": 0})
            key = {first: "first", second: "second"}.get(str(vote["winner"]), str(vote["choice"]))
            found[key] += 1
        rows = []
        for (first, second, blind), found in sorted(pairs.items()):
            decided = found["first"] + found["second"] + found["tie"]
            share, low, high = wilson(found["first"] + found["tie"] / 2, decided)
            names = {"models": (first, second), "blind": blind, "wins": (found["first"], found["second"])}
            rows.append(
                names | {"ties": found["tie"], "both_bad": found["bad"], "share": share, "interval": (low, high)}
            )
        return rows

    def as_json(self) -> str:
        """Votes and tally."""
        return json.dumps({"votes": self.votes, "tally": self.tally()}, indent=2, ensure_ascii=False) + "\n"

    def as_csv(self) -> str:
        """One vote a row."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([_tame(vote.get(key)) for key in COLUMNS] for vote in self.votes)
        return text.getvalue()


def wilson(wins: float, count: int) -> tuple[float | None, float, float]:
    """The share of wins and Wilson's interval for it; (None, 0, 1) without votes.

    Wilson 1927; https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval
    """
    if not count:
        return None, 0.0, 1.0
    share = wins / count
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    reach = Z / (1 + Z**2 / count) * (share * (1 - share) / count + Z**2 / (4 * count**2)) ** 0.5
    return share, max(0.0, middle - reach), min(1.0, middle + reach)


class _Vote(BaseModel):
    """A line of the file, as far as the tally reads it."""

    left: str
    right: str
    choice: Literal["left", "right", "tie", "bad"]
    winner: str | None
    blind: bool = False


def _read(path: Path) -> list[dict[str, Any]]:
    """The votes of a file; a last line that a crash cut short is left out."""
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    try:
        for line in lines:
            _Vote.model_validate_json(line)
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise UserError(f"{path} is no list of votes ({why}); expected one a line; move it away") from error
    return [json.loads(line) for line in lines]


def _append(path: Path, line: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; expected a folder to keep votes in") from error


def _tame(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value
