"""A comparison on disk: JSON that a page can replay without any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compressor.errors import UserError

VERSION = 1
MOST_BYTES = 5_000_000


def comparison(
    question: dict[str, Any], sides: list[dict[str, Any]], rated: list[list[Any]] | None = None
) -> dict[str, Any]:
    """{"version", "question", "sides", "rated"}; question: messages, tools, passages, check, settings."""
    kept = [{key: side.get(key) for key in ("name", "bytes", "text", "figures", "error")} for side in sides]
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
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a saved comparison; check the path") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); expected a saved comparison; save one from the app") from error
    check(found, str(path))
    return found


def check(found: Any, what: str) -> None:
    """Raise UserError where `found` is no comparison."""
    try:
        if found["version"] != VERSION:
            raise UserError(f"{what} is of version {found['version']}; expected {VERSION}; save it again")
        texts = [message["content"] for message in found["question"]["messages"]]
        texts += [side[key] for side in found["sides"] for key in ("name", "text")]
        rows = found.get("rated") or []
        right = bool(found["sides"]) and all(isinstance(text, str) for text in texts)
        right = right and all(isinstance(r[0], str) and isinstance(r[1], float) and len(r) == 4 for r in rows)
        right = right and all(isinstance(found["question"].get(key, []), list) for key in ("tools", "passages"))
    except (KeyError, TypeError, IndexError, AttributeError):
        right = False
    if not right:
        raise UserError(f"{what} is no comparison; expected what the app saves; save one from the app")
