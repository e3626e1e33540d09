"""The four skills and their checkers: given a task and an answer, is the answer right?

A task is plain JSON, so that suites can be files:
    {"skill": "rag", "messages": [...], "tools": [...]?, "check": {...}}
`check` holds one key per requirement; the answer passes when every requirement holds. The kinds follow the verifiable
instructions of IFEval (arXiv 2311.07911), citations in the manner of ALCE (arXiv 2305.14627), and AST matching of calls
as in the Berkeley Function-Calling Leaderboard. No judge model is involved, so a score means the same everywhere.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from ..errors import UserError

SKILLS = ("instruction", "roleplay", "rag", "tools")

REFUSAL = re.compile(
    r"\b(do(es)? not|don't|doesn't|cannot|can't|could not|no information|not (given|mentioned|stated|provided)|"
    r"none of the)\b",
    re.IGNORECASE,
)
_CALL_TAG = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_CITATION = re.compile(r"\[(\d+)\]")


def words(text: str) -> list[str]:
    """The words of a text: runs of letters, digits, apostrophes and inner hyphens."""
    return re.findall(r"\w+(?:['-]\w+)*", text)


def _letters(text: str) -> str:
    return "".join(c for c in text if c.isalpha())


def _has_case(text: str, case: str) -> bool:
    letters = _letters(text)
    if case == "upper":
        return bool(letters) and letters == letters.upper()
    if case == "lower":
        return bool(letters) and letters == letters.lower()
    spoken = [word for word in words(text) if word[0].isalpha()]
    return bool(spoken) and all(word[0].isupper() and word[1:] == word[1:].lower() for word in spoken)


def list_items(text: str, layout: str) -> list[str] | None:
    """The items of a list written in `layout`, or None where the text is not such a list."""
    text = text.strip()
    if layout == "json":
        try:
            items = json.loads(text)
        except ValueError:
            return None
        return items if isinstance(items, list) and all(isinstance(i, str) for i in items) else None
    if layout in ("numbered", "bullets"):
        items = []
        for number, line in enumerate(text.splitlines(), start=1):
            marker = rf"{number}[.)]\s+" if layout == "numbered" else r"[-*]\s+"
            match = re.fullmatch(marker + r"(.+?)\s*", line)
            if not match:
                return None
            items.append(match.group(1))
        return items
    separator = {"commas": ",", "hyphens": "-"}[layout]
    return [item.strip() for item in text.rstrip(".").split(separator)]


def _is_list(answer: str, value: dict[str, Any]) -> bool:
    items = list_items(answer, value["layout"])
    if items is None:
        return False
    if not value.get("case"):  # where no case is asked for, any will do
        items, wanted = [i.lower() for i in items], [i.lower() for i in value["items"]]
    else:
        wanted = value["items"]
    return items == wanted


def _is_json(answer: str, value: Any) -> bool:
    try:
        return json.loads(answer) == value
    except ValueError:
        return False


def _contains(answer: str, values: list[str]) -> bool:
    spoken = " " + " ".join(words(answer)).lower() + " "
    return all(" " + " ".join(words(value)).lower() + " " in spoken for value in values)


def _spoken(text: str) -> list[str]:
    return [word.lower() for word in words(text)]


def _starts_with(answer: str, value: str) -> bool:
    wanted = _spoken(value)
    return _spoken(answer)[: len(wanted)] == wanted


def _ends_with(answer: str, value: str) -> bool:
    wanted, spoken = _spoken(value), _spoken(answer)
    return spoken[max(0, len(spoken) - len(wanted)) :] == wanted


def _excludes(answer: str, values: list[str]) -> bool:
    spoken = words(answer)
    return not any(value in spoken for value in values)


def _cites(answer: str, value: list[int]) -> bool:
    return {int(n) for n in _CITATION.findall(answer)} == set(value)


def parse_calls(answer: str) -> list[dict[str, Any]] | None:
    """The calls in an answer, each as {"name", "arguments"}; [] where it makes none, None where one is malformed.

    Reads <tool_call> tags (Hermes, Qwen), bare JSON objects and lists of them (Llama 3.1 writes `parameters`).
    """
    tagged = _CALL_TAG.findall(answer)
    bare = answer.strip()
    if not tagged and "<tool_call>" in answer:
        return None
    if not tagged and not re.match(r"\[?\s*\{", bare):
        return []
    calls: list[dict[str, Any]] = []
    for body in tagged or [bare]:
        try:
            parsed = json.loads(body)
        except ValueError:
            return None
        for call in parsed if isinstance(parsed, list) else [parsed]:
            arguments = call.get("arguments", call.get("parameters")) if isinstance(call, dict) else None
            if not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
                return None
            calls.append({"name": call["name"], "arguments": arguments})
    return calls


def _calls(answer: str, wanted: list[dict[str, Any]]) -> bool:
    made = parse_calls(answer)
    if made is None or len(made) != len(wanted):
        return False
    left = list(made)
    for call in wanted:  # parallel calls may come in any order
        if call not in left:
            return False
        left.remove(call)
    return True


# kind of requirement -> does the answer meet it, given the requirement's value
CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "case": _has_case,
    "list": _is_list,
    "json": _is_json,
    "word_count": lambda answer, value: len(words(answer)) == value,
    "max_words": lambda answer, value: len(words(answer)) <= value,
    "repeat": lambda answer, value: [w.lower() for w in words(answer)] == [value["word"].lower()] * value["times"],
    "starts_with": _starts_with,
    "ends_with": _ends_with,
    "ends_mark": lambda answer, value: answer.strip().endswith(value),
    "contains": _contains,
    "excludes": _excludes,
    "cites": _cites,
    "refuses": lambda answer, value: bool(REFUSAL.search(answer)) is value,
    "calls": _calls,
}


def function_of(tool: dict[str, Any]) -> dict[str, Any]:
    """The function that a schema describes, with or without its {"type": "function"} wrapping."""
    function = tool.get("function", tool)
    return function if isinstance(function, dict) else {}


def validate(task: Any) -> None:
    """Raise UserError where `task` is not a task this module can check."""
    if not isinstance(task, dict) or task.get("skill") not in SKILLS:
        raise UserError(f'a task needs "skill", one of {", ".join(SKILLS)}; got {str(task)[:80]}')
    messages = task.get("messages")
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages)
    ):
        raise UserError('a task needs "messages": a list of {"role", "content"} objects')
    tools = task.get("tools")
    named = [isinstance(t, dict) and isinstance(function_of(t).get("name"), str) for t in tools or []]
    if not isinstance(tools, list | None) or not all(named):
        raise UserError('"tools" of a task needs a list of function schemas, each with its "name"; or leave it out')
    check = task.get("check")
    unknown = sorted(set(check) - set(CHECKS)) if isinstance(check, dict) else None
    if not check or unknown is None or unknown:
        raise UserError(f'a task needs "check" with keys among {", ".join(CHECKS)}; got {unknown or check}')


def failures(task: dict[str, Any], answer: str) -> list[str]:
    """The kinds of requirement that the answer does not meet; empty when it passes."""
    return [kind for kind, value in task["check"].items() if not CHECKS[kind](answer, value)]


def passes(task: dict[str, Any], answer: str) -> bool:
    """Does the answer meet every requirement of the task?"""
    return not failures(task, answer)
