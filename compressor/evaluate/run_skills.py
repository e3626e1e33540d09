"""Running skill suites through a Runtime: greedy answers in batches, one checker, bootstrap intervals.

The percentile bootstrap of a share of n right answers needs no resampling by hand: the number right among n
draws with replacement is binomial(n, share), which is sampled directly. The overall score is the plain mean
over the skills, so a long suite counts no more than a short one.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .skills import function_of, passes, validate

if TYPE_CHECKING:
    from ..runtime import Runtime

RESAMPLES = 10_000
LEVEL = 0.95
GROUP = 128  # conversations between two reports of progress


def run(
    runtime: "Runtime",
    suites: dict[str, list[dict[str, Any]]],
    *,
    max_new_tokens: int = 256,
    seed: int = 0,
    samples: int = 0,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> dict[str, Any]:
    """skills {name: {score, low, high, n}}, overall {score, low, high, n} (None without suites) and samples.

    Tasks are those of `skills`. All suites are answered together, longest prompts last, so batches stay full.
    """
    tasks = [(name, task) for name, suite in suites.items() for task in suite]
    order = sorted(range(len(tasks)), key=lambda i: len(json.dumps(tasks[i][1]["messages"])))
    answers: dict[int, str] = {}
    for start in range(0, len(order), GROUP):
        group = order[start : start + GROUP]
        texts = runtime.complete([tasks[i][1] for i in group], max_new_tokens=max_new_tokens)
        answers.update(zip(group, texts, strict=True))
        if progress is not None:
            progress("skills", len(answers), len(tasks))
    outcomes: dict[str, list[bool]] = {name: [] for name, suite in suites.items() if suite}
    kept = []
    for i, (name, task) in enumerate(tasks):
        right = passes(task, answers[i])
        outcomes[name].append(right)
        if len(outcomes[name]) <= samples:
            kept.append({"skill": name, "prompt": shown(task), "answer": answers[i], "passed": right})
    return {
        "skills": {name: interval([rights], seed=seed) for name, rights in outcomes.items()},
        "overall": interval(list(outcomes.values()), seed=seed) if outcomes else None,
        "samples": kept,
    }


def shown(task: dict[str, Any]) -> str:
    """A task as text to read beside its answers: the functions on offer, then who said what."""
    functions = [function_of(tool) for tool in task.get("tools") or []]
    lines = [f"{f['name']}({', '.join(f.get('parameters', {}).get('properties', {}))})" for f in functions]
    lines += [f"{message['role']}: {message['content']}" for message in task["messages"]]
    return "\n".join(lines)


def interval(groups: list[list[bool]], *, seed: int = 0) -> dict[str, Any]:
    """Mean over groups of the share that is true, with its 95 % bootstrap interval: score, low, high, n.

    Each group is resampled by itself. Every group must hold something.
    """
    import numpy

    rng = numpy.random.default_rng(seed)
    shares = [sum(group) / len(group) for group in groups]
    draws = numpy.mean(
        [rng.binomial(len(group), share, RESAMPLES) / len(group) for group, share in zip(groups, shares, strict=True)],
        axis=0,
    )
    low, high = numpy.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    n = sum(len(group) for group in groups)
    return {"score": sum(shares) / len(shares), "low": float(low), "high": float(high), "n": n}


def read_suite(path: Path | str) -> list[dict[str, Any]]:
    """Tasks from a JSONL file: {"skill", "messages", "tools"?, "check": {...}} per line.

    Raises UserError with the line number for anything else, and for a file without tasks.
    """
    expected = 'expected {"skill": ..., "messages": [...], "check": {...}}'
    tasks = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut inside strings
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the suite {path}: {error}; {expected}, one task per line") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            task = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not valid JSON ({error.msg}); {expected}") from error
        try:
            validate(task)
            passes(task, "")
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{place}: the check cannot be used ({error!r}); {expected}") from error
        tasks.append(task)
    if not tasks:
        raise UserError(f"the suite {path} holds no task; {expected}, one task per line")
    return tasks
