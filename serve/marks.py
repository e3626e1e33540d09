"""What an answer got right, in pieces a page can show: constraints, citations, calls. The checks are evaluate's."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from compressor.evaluate.skills import CHECKS, function_of, parse_calls

TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
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


def cited_spans(answer: str, passages: int) -> list[tuple[str, str | None]]:
    """The answer cut at its citations: (text, None), and ("[2]", "passage 2" or "no such passage")."""
    found: list[tuple[str, str | None]] = []
    for part in re.split(r"(\[\d+\])", answer):
        number = re.fullmatch(r"\[(\d+)\]", part)
        if number:
            known = 1 <= int(number[1]) <= passages
            found.append((part, f"passage {number[1]}" if known else "no such passage"))
        elif part:
            found.append((part, None))
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
    """Where a call departs from the schema of its function; the part of JSON Schema that functions are written in."""
    schemas = {function_of(tool).get("name"): function_of(tool).get("parameters", {}) for tool in tools}
    if call["name"] not in schemas:
        return [f"{call['name']} is not on offer"]
    return _departures(call["arguments"], schemas[call["name"]] | {"type": "object"}, str(call["name"]))


def _departures(value: Any, schema: dict[str, Any], where: str) -> list[str]:
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind] if kind else []
    allowed = tuple(found for name in kinds for found in TYPES.get(name, ()))
    if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)):
        return [f"{where} is {json.dumps(value)}, no {' or '.join(kinds)}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where} is {json.dumps(value)}, none of {json.dumps(schema['enum'])}"]
    found = []
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        found += [f"{where} lacks {name}" for name in schema.get("required", []) if name not in value]
        for name, inner in value.items():
            if name in properties:
                found += _departures(inner, properties[name], f"{where}.{name}")
            elif properties or schema.get("additionalProperties") is False:
                found.append(f"{where} has no {name}")
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        found += [e for i, inner in enumerate(value) for e in _departures(inner, schema["items"], f"{where}[{i}]")]
    return found


def _key(call: dict[str, Any]) -> str:
    return json.dumps(call, sort_keys=True)
