"""How much a text repeats itself, in 4-grams of its tokens."""

from collections.abc import Sequence
from typing import Any

GRAM = 4  # Dist-4, and what counts as repeated: shorter runs of tokens recur in good text too

# Good answers repeat a few percent of their 4-grams and a looping one nearly all.
REPETITION_LIMIT = 0.3


def repetition(tokens: Sequence[Any]) -> float:
    """Share of the 4-grams of one text that occurred before in it; 0 where there are none."""
    found = grams(tokens)
    return 1 - len(set(found)) / len(found) if found else 0.0


def grams(tokens: Sequence[Any]) -> list[tuple[Any, ...]]:
    """All runs of four tokens, in order."""
    return [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
