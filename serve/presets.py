"""The library of prompts: ours for instruction models (prompts/*.yaml), the demo's own tasks for its teacher."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from compressor.demo import tasks

LEVELS = ("easy", "medium", "tricky")
DEMO_PROMPTS = 30  # a skill


@dataclass(frozen=True)
class Preset:
    """One prompt as its tab shows it. check: as in `compressor.evaluate.skills`; answer: one of ours that passes.

    level: one of LEVELS, or none for the demo's tasks, which are all alike.
    """

    title: str
    level: str
    prompt: str
    check: dict[str, Any]
    answer: str = ""
    system: str = ""
    turns: tuple[dict[str, str], ...] = ()
    passages: tuple[str, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """As the page lists it."""
        return f"{self.title} ({self.level})" if self.level else self.title


@cache
def library(skill: str) -> tuple[Preset, ...]:
    """The prompts of a skill, from easy to tricky."""
    text = (resources.files("serve") / "prompts" / f"{skill}.yaml").read_text(encoding="utf-8")
    found = []
    for entry in yaml.safe_load(text):
        entry["prompt"] = entry.pop("question", None) or entry["prompt"]
        for key in ("turns", "passages", "tools"):
            entry[key] = tuple(entry.get(key, ()))
        found.append(Preset(**entry))
    return tuple(found)


@cache
def demo_library(skill: str) -> tuple[Preset, ...]:
    """Tasks of the embedded teacher's own domain, whose prompts are whole already: passages stand in the message."""
    found = []
    for number, task in enumerate(tasks.suite(skill, DEMO_PROMPTS, seed=1), start=1):
        *before, last = task["messages"]
        system = before.pop(0)["content"] if before and before[0]["role"] == "system" else ""
        title = f"{number}. {textwrap.shorten(last['content'].splitlines()[-1], 70, placeholder=' ...')}"
        given = {"check": task["check"], "system": system, "turns": tuple(before)}
        found.append(Preset(title, "", last["content"], **given, tools=tuple(task.get("tools") or ())))
    return tuple(found)


def conversation(
    prompt: str, *, system: str = "", turns: tuple[dict[str, str], ...] = (), passages: tuple[str, ...] = ()
) -> list[dict[str, str]]:
    """The messages of one question; passages are numbered before it."""
    listed = "\n".join(f"[{number}] {passage}" for number, passage in enumerate(passages, start=1))
    content = f"{listed}\n\n{prompt}" if listed else prompt
    first = [{"role": "system", "content": system}] if system.strip() else []
    return [*first, *turns, {"role": "user", "content": content}]


def turns(asked: dict[str, Any], place: int) -> list[dict[str, str]]:
    """The whole conversation of a question (see `app`) as the side at `place` gets it."""
    *before, last = asked["messages"]
    return [*before, *asked["histories"][place], last]


def schema_errors(text: str) -> tuple[list[dict[str, Any]], str | None]:
    """The functions of a JSON text that a person may have edited, and what is wrong with it in one line, or None."""
    from jsonschema import Draft202012Validator, SchemaError

    try:
        tools = json.loads(text or "[]")
    except (ValueError, RecursionError) as error:
        return [], f"the schemas are no JSON ({error}); expected a list of functions"
    if not isinstance(tools, list):
        return [], "the schemas are no list; expected a list of functions"
    functions = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        parameters = function.get("parameters") or {} if isinstance(function, dict) else None
        if not isinstance(parameters, dict) or not isinstance(function.get("name"), str):
            return [], f"{json.dumps(tool)[:40]} is no function; expected an object with name and parameters"
        parameters = {"type": "object", "properties": {}} | parameters
        try:
            Draft202012Validator.check_schema(parameters)
        except (SchemaError, RecursionError) as error:
            why = error.message if isinstance(error, SchemaError) else "it is nested too deeply"
            return [], f"parameters of {function['name']} are no JSON schema: {why[:200]}; correct them"
        whole = {"description": "", **function, "parameters": parameters}
        functions.append({"type": "function", "function": whole})  # as chat templates know them
    return functions, None


__all__ = ["LEVELS", "Preset", "conversation", "demo_library", "library", "schema_errors", "turns"]
