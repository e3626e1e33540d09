"""What an answer got right, in pieces a page can show: constraints, citations, calls. The checks are evaluate's."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from compressor.evaluate.skills import CHECKS, function_of, parse_calls

WORDS = {
    "case": lambda v: f"{v} case" if v != "title" else "Every Word Capitalised",
    "list": lambda v: f"exactly this list, as {v['layout']}",
    "json": lambda v: "exactly this JSON",
    "word_count": lambda v: f"{v} words",
    "max_words": lambda v: f"at most {v} words",
    "repeat": lambda v: f"“{v['word']}” {v['times']} times",
    "starts_with": lambda v: f"begins with “{v}”",
    "ends_with": lambda v: f"ends with “{v}”",
    "ends_mark": lambda v: f"last character “{v}”",
    "contains": lambda v: "contains " + ", ".join(f"“{word}”" for word in v),
    "excludes": lambda v: "without " + ", ".join(f"“{word}”" for word in v),
    "cites": lambda v: "cites " + (", ".join(f"[{n}]" for n in v) or "nothing"),
    "refuses": lambda v: "says that the passages do not tell" if v else "answers",
    "calls": lambda v: "calls " + (", ".join(call["name"] for call in v) or "nothing"),
}


@dataclass(frozen=True)
class Mark:
    """One requirement, in words, and whether the answer meets it."""

    words: str
    passed: bool


def marks(check: dict[str, Any], answer: str) -> list[Mark]:
    """A mark for each requirement of a task's check."""
    return [Mark(WORDS[kind](value), CHECKS[kind](answer, value)) for kind, value in check.items()]


def cited_spans(answer: str, passages: int) -> list[tuple[str, list[int]]]:
    """The answer cut into runs of text, each with the passages that it cites: a sentence up to its [2], or none.

    A number that no passage has is 0.
    """
    found: list[tuple[str, list[int]]] = []
    for part in re.split(r"((?:(?!\[\d+\])[^.!?\n])*(?:\[\d+\][ ,]*)+)", answer):
        numbers = [int(number) for number in re.findall(r"\[(\d+)\]", part)]
        if part:
            found.append((part, [number if 1 <= number <= passages else 0 for number in numbers]))
    return found


def call_report(answer: str, tools: list[dict[str, Any]], teacher: str | None = None) -> dict[str, Any]:
    """{"calls", "errors", "same_as_teacher"}: calls parsed from an answer, held to their schemas and the teacher's.

    calls is None where a call is malformed; same_as_teacher is None without a teacher's answer.
    """
    calls = parse_calls(answer)
    errors = ["a call is malformed"] if calls is None else [e for call in calls for e in call_errors(call, tools)]
    same = None
    if teacher is not None:
        theirs = parse_calls(teacher)
        same = calls is not None and theirs is not None and sorted(map(_key, calls)) == sorted(map(_key, theirs))
    return {"calls": calls, "errors": errors, "same_as_teacher": same}


def call_errors(call: dict[str, Any], tools: list[dict[str, Any]]) -> list[str]:
    """Where a call departs from the JSON schema of its function; arguments it does not name are errors too."""
    from jsonschema import Draft202012Validator

    schemas = {function_of(tool).get("name"): function_of(tool).get("parameters", {}) for tool in tools}
    if call["name"] not in schemas:
        return [f"{call['name']} is not on offer"]
    schema = {"type": "object", "additionalProperties": False} | schemas[call["name"]]
    found = sorted(Draft202012Validator(schema).iter_errors(call["arguments"]), key=lambda error: list(error.path))
    return [f"{'.'.join(map(str, [call['name'], *error.path]))}: {error.message}" for error in found]


def _key(call: dict[str, Any]) -> str:
    return json.dumps(call, sort_keys=True)
