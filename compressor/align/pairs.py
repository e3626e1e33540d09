"""Preference pairs from the teacher's and the student's own answers, ranked by how many checks each passes.

pairs/
  index.json          what they were made of, and what became of the prompts
  data/00000.jsonl    pairs as `data.preferences` reads them, a shard after the other; each is whole or absent

The student draws several answers and the teacher gives its best guess: what a student of this size says itself tells it
most, and where it never gets it right the teacher shows how.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..run import build_shards, outcome_counts, write_json_lines
from ..runtime import Runtime
from ..runtime.prompts import ids_of

DATA = "data"
SHARD_PROMPTS = 128


class Answer(NamedTuple):
    """What a model said, and how many of the task's checks that passes."""

    side: str  # "teacher" or "student"
    text: str
    passed: int
    whole: bool  # not empty and not cut off, so fit to be learned


def build(
    folder: Path,
    *,
    teacher: Callable[[], Runtime],
    student: Callable[[], Runtime],
    tasks: Sequence[dict[str, Any]],
    score: Callable[[dict[str, Any], str], int],
    about: dict[str, Any],
    samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda prompts: None,
) -> dict[str, Any]:
    """Make at most one pair of each task ({"messages", "tools"?, ...}) and return the index.

    score(task, answer): checks passed. about: what the pairs depend on besides; with the settings here it is kept in
    the index, and a folder made of something else is refused. A build that was ended goes on, to the same bits.
    Raises UserError for a folder that holds something else, and where no task has a better and a worse answer.
    """
    about = about | {"tasks": len(tasks), "samples": samples, "temperature": temperature}
    about |= {"max_new_tokens": max_new_tokens, "seed": seed}
    models: dict[str, Runtime] = {}

    def write(number: int, group: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if not models:
            models.update(student=student(), teacher=teacher())
        sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed + 1_000_003 * number}
        pairs, outcomes = _shard(group, models, score, **sampling, temperature=temperature, samples=samples)
        name = f"{number:05d}.jsonl"
        write_json_lines(folder / DATA / name, pairs)
        progress(len(group))
        return {"name": name, "prompts": len(group), "outcomes": dict(outcomes)}

    groups = (tasks[start : start + SHARD_PROMPTS] for start in range(0, len(tasks), SHARD_PROMPTS))
    index = build_shards(folder, about, groups, write, passed=lambda group: progress(len(group)))
    if not outcome_counts(index)["pairs"]:
        raise UserError(
            f"no prompt in {folder} has a better and a worse answer ({dict(outcome_counts(index))}); expected some; "
            "raise align.prompts or align.samples, or give align.pairs"
        )
    return index


def ranked(answers: Sequence[Answer]) -> tuple[Answer, Answer] | str:
    """The best whole answer and the worst one, or why there are none: "tied", or "nothing_whole".

    Among equals the student's own come first, on both ends: those it can say are moved most by being preferred.
    """
    whole = [answer for answer in answers if answer.whole]
    if not whole:
        return "nothing_whole"
    chosen = max(whole, key=lambda answer: (answer.passed, answer.side == "student"))
    rejected = min(whole, key=lambda answer: (answer.passed, answer.side != "student"))
    return (chosen, rejected) if chosen.passed > rejected.passed else "tied"


def _shard(
    group: Sequence[dict[str, Any]],
    models: dict[str, Runtime],
    score: Callable[[dict[str, Any], str], int],
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The pairs of a few tasks, and what became of each."""
    drawn: dict[str, Iterator[tuple[str, bool]]] = {}
    for side, (count, heat) in {"student": (samples, temperature), "teacher": (1, 0.0)}.items():
        tokenizer = models[side].tokenizer
        prompts = [ids for task in group for ids in [ids_of(task, tokenizer)] * count]
        found = models[side].answers(prompts, max_new_tokens=max_new_tokens, temperature=heat, seed=seed)
        texts = (text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True))
        finished = (len(answer) < max_new_tokens for answer in found)
        drawn[side] = zip(texts, finished, strict=True)
    pairs, outcomes = [], Counter[str]()
    for task in group:
        said = [("student", *next(drawn["student"])) for _ in range(samples)]
        said.append(("teacher", *next(drawn["teacher"])))
        best = ranked([Answer(side, text, score(task, text), finished and bool(text)) for side, text, finished in said])
        if isinstance(best, str):
            outcomes[best] += 1
            continue
        chosen, rejected = best
        outcomes.update(["pairs", f"chosen_{chosen.side}", f"rejected_{rejected.side}"])
        pair = {"prompt": task["messages"], "chosen": _message(chosen), "rejected": _message(rejected)}
        pair |= {"tools": task["tools"]} if task.get("tools") else {}
        told = {"from": [chosen.side, rejected.side], "passed": [chosen.passed, rejected.passed]}
        pairs.append(pair | told | {"checks": len(task["check"])})
    return pairs, outcomes


def _message(answer: Answer) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer.text}]
