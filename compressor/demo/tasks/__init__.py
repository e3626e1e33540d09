"""The demo domain: four checkable skills and plain prose, generated in great variety from a closed vocabulary.

Every task is drawn from a seeded generator together with its check (see compressor.evaluate.skills) and one right
answer. The combination that a task is about (which words in which order, which persona with which manner, which facts
against which question, which functions with which arguments) is hashed, and the hash alone says whether it belongs to
training or to the test: the two can never share a combination, whatever the seeds.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import islice
from random import Random
from typing import Any

from ...errors import UserError
from .instruction import instruction
from .prose import prose
from .rag import MOST_PASSAGES, rag
from .roleplay import roleplay
from .scene import Scene
from .tools import tools

SPLITS = {"test": 0.05, "validation": 0.05, "train": 0.9}  # share of the combinations

Task = dict[str, Any]  # {"skill", "messages", "tools"?, "check", "answer", "about": the combination that is hashed}

SCENES: dict[str, Callable[..., Scene]] = {
    "instruction": instruction,
    "roleplay": roleplay,
    "rag": rag,
    "tools": tools,
}
MIX = {"instruction": 36, "roleplay": 10, "rag": 28, "tools": 20, "prose": 6}
MOST_TURNS = 4


def split_of(about: Any) -> str:
    """A name among SPLITS, by the hash of the combination a turn is about (phrasing left out), or of a story's text."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).digest()
    place = int.from_bytes(digest[:4], "big") / 2**32
    for name, share in SPLITS.items():
        if place < share:
            return name
        place -= share
    return name


def generate(
    *, split: str, seed: int, mix: dict[str, int] | None = None, most_turns: int = 1, most_passages: int = MOST_PASSAGES
) -> Iterator[Task]:
    """Endless tasks (with their answers) and prose of one split, in the proportions of `mix`.

    With most_turns > 1 a task ends a conversation of one to that many exchanges; those of other splits are left out.
    """
    mix = mix or MIX
    rng = Random(f"{split}-{seed}")
    while True:
        skill = rng.choices(list(mix), list(mix.values()))[0]
        if skill == "prose":
            record = prose(rng)
            if split_of(record["text"]) == split:
                yield record
            continue
        scene = rag(rng, most_passages=most_passages) if skill == "rag" else SCENES[skill](rng)
        turns = [scene.ask() for _ in range(rng.randint(1, most_turns))]
        turns = [turn for turn in turns if split_of([skill, *turn.about]) == split]
        if not turns:
            continue
        messages = [{"role": "system", "content": scene.system}] if scene.system else []
        for number, turn in enumerate(turns):
            messages.append({"role": "user", "content": ("" if number else scene.opening) + turn.prompt})
            messages.append({"role": "assistant", "content": turn.answer})
        task = {"skill": skill, "messages": messages[:-1], "check": turns[-1].check, "answer": turns[-1].answer}
        yield task | {"about": [skill, *turns[-1].about]} | ({"tools": scene.tools} if scene.tools else {})


def as_record(task: Task) -> dict[str, Any]:
    """What a trainer sees of a task: the conversation with its right answer, and the tools; prose as it is."""
    if "text" in task:
        return task
    messages = [*task["messages"], {"role": "assistant", "content": task["answer"]}]
    return {"messages": messages} | ({"tools": task["tools"]} if "tools" in task else {})


def records(
    *, split: str, seed: int, mix: dict[str, int] | None = None, most_passages: int = MOST_PASSAGES
) -> Iterator[dict[str, Any]]:
    """Endless training records of one split: {"messages", "tools"?} of up to MOST_TURNS exchanges, and {"text"}."""
    stream = generate(split=split, seed=seed, mix=mix, most_turns=MOST_TURNS, most_passages=most_passages)
    yield from map(as_record, stream)


def suite(skill: str, count: int, *, split: str = "test", seed: int = 0, draws: int = 100) -> list[Task]:
    """`count` tasks of one exchange of one skill, without answers, none twice.

    Raises UserError where `draws` for each task wanted do not bring so many: the skill has fewer.
    """
    seen: dict[str, Task] = {}
    for task in islice(generate(split=split, seed=seed, mix={skill: 1}), draws * count):
        answerless = {key: value for key, value in task.items() if key not in ("answer", "about")}
        seen.setdefault(json.dumps([task["messages"], task.get("tools")]), answerless)
        if len(seen) == count:
            return list(seen.values())
    raise UserError(f"the {skill} suite has {len(seen)} tasks; expected {count}; ask for fewer prompts")
