"""A comparison on disk: JSON that a page can replay without any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from compressor.errors import UserError
from compressor.evaluate.skills import CHECKS

from .difference import Rated
from .marks import marks
from .presets import schema_errors

VERSION = 1
MOST_BYTES = 5_000_000


class Message(BaseModel):
    """One turn of a conversation."""

    role: str
    content: str


class Figures(BaseModel):
    """What an answer cost. tokens_per_s counts the tokens after the first."""

    tokens: int
    ttft_s: float | None = None
    tokens_per_s: float | None = None
    peak_rss_bytes: int | None = None


class Side(BaseModel):
    """What one model said."""

    name: str
    bytes: int | None
    text: str
    figures: Figures | None
    error: str | None


class Question(BaseModel):
    """What was asked, as `serve.app` makes it."""

    messages: Annotated[list[Message], Field(min_length=1)]
    histories: list[list[Message]]
    tools: list[dict[str, Any]]
    numbered: int
    check: dict[str, Any]
    measure: Annotated[int, Field(ge=0)]


class Comparison(BaseModel):
    """The whole file."""

    version: Literal[1]
    question: Question
    sides: Annotated[list[Side], Field(min_length=1)]
    rated: list[list[Rated]] | None

    @model_validator(mode="after")
    def _fits(self) -> Comparison:
        sides = len(self.sides)
        if len(self.question.histories) != sides or self.question.measure >= sides:
            raise ValueError("a side lacks its history, or the measure is no side")
        _, wrong = schema_errors(json.dumps(self.question.tools))
        if wrong:
            raise ValueError(wrong)
        try:
            for side in self.sides:
                marks(self.question.check, side.text)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(f"check is none of ours; expected keys of {', '.join(CHECKS)}") from None
        if self.rated is not None and len(self.rated) != sides:
            raise ValueError("rated has another number of sides")
        return self


def comparison(
    question: dict[str, Any], sides: list[dict[str, Any]], rated: list[list[Any]] | None = None
) -> dict[str, Any]:
    """What is kept of an answered question; rated: for each side, what the measure gives its tokens."""
    kept = [{key: side.get(key) for key in Side.model_fields} for side in sides]
    return {"version": VERSION, "question": question, "sides": kept, "rated": rated}


def names_of(saved: dict[str, Any]) -> list[str]:
    """The sides' names."""
    return [str(side["name"]) for side in saved["sides"]]


def read(path: Path | str) -> dict[str, Any]:
    """A comparison from a file. Raises UserError for what is none."""
    path = Path(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(
                f"{path} has more than {MOST_BYTES:,} bytes; expected a saved comparison; choose another file"
            )
        return Comparison.model_validate_json(path.read_bytes()).model_dump()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a saved comparison; check the path") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path} is no comparison ({where}: {first['msg']}); expected what the app saves") from error
