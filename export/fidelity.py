"""How near an artifact stays to the student and to the teacher, in one set of figures for every format."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from compressor.evaluate import evaluate, text

if TYPE_CHECKING:
    from compressor.runtime import Runtime


def fidelity(
    runtime: Runtime,
    *,
    student: Runtime,
    teacher: Runtime | None,
    heldout: list[dict[str, Any]],
    suites: dict[str, list[dict[str, Any]]],
    max_new_tokens: int = 256,
    seed: int = 0,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> dict[str, Any]:
    """perplexity, agreement {"student", "teacher"}, skills and overall of an artifact, by the student's own judge.

    An agreement has kl (mean), kl_median, kl_p99 in nats per token, top1, and perplexity_ratio. What there is no data,
    no teacher or no suite for is None or empty.
    """
    found = evaluate(
        runtime,
        against=student,
        heldout=heldout,
        suites=suites,
        max_new_tokens=max_new_tokens,
        seed=seed,
        samples=0,
        progress=progress,
    )
    to_teacher = text.measure(runtime, heldout, against=teacher, progress=progress)["agreement"] if teacher else None
    return {
        "perplexity": found["perplexity"],
        "heldout_tokens": found["heldout_tokens"],
        "agreement": {"student": found["agreement"], "teacher": to_teacher},
        "skills": found["skills"],
        "overall": found["overall"],
    }
