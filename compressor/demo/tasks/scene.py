"""What a skill generates: scenes, in which one exchange is drawn after another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any


@dataclass(frozen=True)
class Turn:
    """One exchange: what it is about (this is hashed), what the user says, one right answer, and the answer's check."""

    about: list[Any]
    prompt: str
    answer: str
    check: dict[str, Any]


@dataclass(frozen=True)
class Scene:
    """What stays the same while a conversation goes on, and `ask`, which draws one exchange after another."""

    ask: Callable[[], Turn]
    system: str | None = None
    tools: list[dict[str, Any]] | None = None
    opening: str = ""  # shown to the model once, before the first question


def join(items: Sequence[str], rng: Random) -> str:
    return rng.choice([", ".join(items), ", ".join(items[:-1]) + " and " + items[-1]])


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun
