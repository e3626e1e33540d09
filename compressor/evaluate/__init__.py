"""Judging a model through its Runtime: held-out text, agreement with the teacher, the four skills.

    evaluate(runtime, against=teacher, heldout=data.text_batches(...), suites={"rag": [...], ...})

The result is plain JSON; docs/report.md describes the keys. Measures live in `text`, the skills' loop in
`run_skills`, the checkers in `skills`.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runtime import Runtime

Progress = Callable[[str, int, int | None], None]  # what is measured, how much is done, of how much (None: unknown)


def evaluate(
    runtime: "Runtime",
    *,
    against: "Runtime | None" = None,
    heldout: Iterable[dict[str, Any]] = (),
    suites: dict[str, list[dict[str, Any]]] | None = None,
    max_new_tokens: int = 256,
    chunk_tokens: int = 256,
    seed: int = 0,
    samples: int = 2,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Everything that is measured of one model, as a JSON-ready dict.

    heldout: batches of `data.text_batches`; none means no perplexity. against: the teacher, for KL(teacher
    || model) in nats per token and top-1 agreement. suites: skill -> tasks. samples: answers kept per skill,
    to be read.
    Keys: parameters, bytes, perplexity, bits_per_byte, heldout_tokens, agreement {kl, top1} or None,
    skills {name: {score, low, high, n}}, overall {score, low, high, n}, samples [{skill, prompt, answer,
    passed}].
    Raises UserError when the two models do not share token ids.
    """
    from . import run_skills, text

    result: dict[str, Any] = {"parameters": runtime.parameters, "bytes": runtime.nbytes}
    result |= text.measure(runtime, heldout, against=against, chunk_tokens=chunk_tokens, progress=progress)
    result |= run_skills.run(
        runtime, suites or {}, max_new_tokens=max_new_tokens, seed=seed, samples=samples, progress=progress
    )
    return result


def recovery(student: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    """Student score / teacher score, overall and per skill; None where the teacher scores 0 or was not
    asked.
    """

    def ratio(ours: dict | None, theirs: dict | None) -> float | None:
        if not ours or not theirs or not theirs["score"]:
            return None
        return ours["score"] / theirs["score"]

    skills = {name: ratio(score, teacher["skills"].get(name)) for name, score in student["skills"].items()}
    return {"overall": ratio(student.get("overall"), teacher.get("overall")), "skills": skills}
