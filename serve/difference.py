"""Where two answers part: words side by side, the first divergence, and how the teacher rates a student's tokens."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import NamedTuple


class Piece(NamedTuple):
    """A run of words: "same", "left" (only there), "right", and whether the answers part here for the first time."""

    text: str
    side: str
    first: bool = False


def words_with_space(text: str) -> list[str]:
    """Words with the space after them, so that joined they are the text."""
    return re.findall(r"\s*\S+\s*|\s+", text)


def difference(left: str, right: str) -> list[Piece]:
    """Both answers as runs of words that they share and that only one has; the first that differs is marked."""
    ours, theirs = words_with_space(left), words_with_space(right)
    matcher = SequenceMatcher(None, [w.strip() for w in ours], [w.strip() for w in theirs], autojunk=False)
    found: list[Piece] = []
    parted = False
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            found.append(Piece("".join(ours[a:b]), "same"))
            continue
        for text, side in (("".join(ours[a:b]), "left"), ("".join(theirs[c:d]), "right")):
            if text:
                found.append(Piece(text, side, not parted))
                parted = True
    return found


class Rated(NamedTuple):
    """A student's token, what the teacher gives it, and what the teacher would have said there."""

    text: str
    probability: float
    best: str
    agrees: bool


def heat(probability: float) -> int:
    """0 (the teacher would say it) to 4 (it never would), by the probability's decade."""
    return next((level for level, least in enumerate((0.5, 0.1, 0.01, 0.001)) if probability >= least), 4)
