"""Alignment: fine-tuning on chats, then preference tuning, by TRL's trainers; what comes out is the student."""

from __future__ import annotations

import json
import time
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..progress import progress
from ..run import RANK, outcome_counts, read_json
from .job import Job
from .learning import write_model

if TYPE_CHECKING:
    from ..recipe import Align

ORDER = ("sft", "dpo")


def check_order(settings: Align) -> None:
    """Raise UserError for stages named twice or out of order."""
    expected = [stage for stage in ORDER if stage in settings.stages]
    if settings.stages != expected:
        raise UserError(
            f"align.stages is {','.join(settings.stages)}; expected each once, sft before dpo; give --align "
            f"{','.join(expected)}"
        )


def check_alignment(job: Job) -> None:
    """Raise UserError for what cannot be aligned, as far as data and tokenizer tell; nothing is computed."""
    from ..align import check

    settings, tokenizer = job.recipe.align, job.tokenizer
    check(settings, rows=settings.batch, epochs=1)
    if settings.pairs is None and "dpo" in settings.stages:
        if not tokenizer.chat_template:
            raise UserError(
                "dpo makes its pairs from answers to chats and the teacher's tokenizer has no chat template; expected "
                "an instruct teacher, or pairs in text; give align.pairs"
            )
        if settings.tasks is not None:
            _tasks(job)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UserError("the teacher's tokenizer has no end token; expected one; set eos_token in its folder")
    if "sft" in settings.stages:
        _chats(job, sight=1)
    if "dpo" in settings.stages and settings.pairs is not None:
        _preference_rows(job, settings.pairs, count=1)


def align(job: Job) -> str:
    """Fine-tune the distilled student, then tune it to preferences, as the recipe says; the result is the student.

    Under a launcher all processes train; the first one alone makes pairs and writes.
    """
    from ..align import train
    from ..checkpoint import load_tokenizer

    recipe = job.recipe
    model, summaries = job.run.distilled, []
    for stage in recipe.align.stages:
        began = time.monotonic()
        rows, heldout = _chats(job) if stage == "sft" else _pairs(job, _source(job, model))
        result = train(
            stage,
            model,
            rows,
            heldout,
            tokenizer=load_tokenizer(job.run.distilled),  # one of its own, which TRL may change
            settings=recipe.align,
            folder=job.run.checkpoints / f"align-{stage}",
            metrics=job.run.folder / f"metrics-{stage}.jsonl",
            precision=recipe.distill.precision,
            gradient_checkpointing=recipe.distill.gradient_checkpointing,
            seed=recipe.seed,
        )
        counts = {"rows": len(rows), "heldout_rows": len(heldout), "seconds": round(time.monotonic() - began, 2)}
        job.facts[stage] = result.facts() | counts
        summaries.append(f"{stage}: {result.describe()}")
        model = result.folder
    if RANK == 0:
        # TRL writes its own padding and end tokens into the configs of its checkpoints
        write_model(job, model, job.run.student, configs=job.run.distilled)
    return "; ".join(summaries)


def _chats(job: Job, *, sight: int | None = None) -> tuple[list[Any], list[Any]]:
    """Chats to train on and held-out ones; `sight` of each, where one only wants to know that they are there."""
    from ..align import chats
    from ..data import records, shuffled

    settings = job.recipe.align
    source = settings.data or job.source
    reading: dict[str, Any] = {"tokenizer": job.tokenizer, "context": job.recipe.data.context}
    # another seed than distillation's: generated chats are new ones, stored ones come in another order
    data: dict[str, Any] = job.data | {"seed": job.recipe.seed + 1}
    stream = records(source, part="train", **data)
    if sight is None:
        stream = shuffled(stream, seed=data["seed"])
    rows = chats(stream, count=sight or settings.examples, **reading)
    return rows, chats(records(source, part="heldout", **data), count=sight or settings.heldout, **reading)


def _pairs(job: Job, source: str) -> tuple[list[Any], list[Any]]:
    """Preference pairs to train on and held-out ones."""
    from ..align import divided

    return divided(_preference_rows(job, source), heldout=job.recipe.align.heldout)


def _preference_rows(job: Job, source: str, *, count: int | None = None) -> list[Any]:
    from ..align import preference_rows
    from ..data import preferences

    found = preferences(source, split=job.recipe.data.split)
    return preference_rows(found, job.tokenizer, context=job.recipe.data.context, count=count)


def _source(job: Job, student: Path) -> str:
    """Where the pairs lie: the recipe's, or those that the first process makes here of the models' own answers."""
    if job.recipe.align.pairs is not None:
        return job.recipe.align.pairs
    if RANK == 0:
        _make_pairs(job, student)
    index = job.run.pairs / "index.json"
    while not (index.exists() and read_json(index)["complete"]):
        time.sleep(0.5)  # the launcher ends us if the first process fails
    return str(job.run.pairs / "data")


def _make_pairs(job: Job, student: Path) -> None:
    """Answers of both models to tasks with checks, ranked by how many each passes."""
    from ..align import build
    from ..checkpoint import Checkpoint
    from ..runtime import TorchRuntime

    settings, batch_size = job.recipe.align, job.recipe.evaluate.batch_size
    tasks = _tasks(job)
    about = {
        "teacher": job.taught_by.fingerprint(),
        "student": Checkpoint(student).fingerprint(),
        "prompts": sha256(json.dumps(tasks, sort_keys=True).encode()).hexdigest(),
    }
    with progress("pairs", total=len(tasks), unit="prompts") as advance:
        index = build(
            job.run.pairs,
            teacher=lambda: TorchRuntime(job.taught_by.folder, batch_size=batch_size),
            student=lambda: TorchRuntime(student, batch_size=batch_size),
            tasks=tasks,
            score=_passed,
            about=about,
            samples=settings.samples,
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            seed=job.recipe.seed,
            progress=advance,
        )
    job.facts["pairs"] = {"prompts": len(tasks)} | dict(sorted(outcome_counts(index).items()))


def _tasks(job: Job) -> list[dict[str, Any]]:
    """Tasks that no evaluation asks: the built-in skills' training side, or the recipe's own."""
    from ..demo.tasks import suite
    from ..evaluate.run_skills import read_suite
    from ..evaluate.skills import SKILLS

    settings, seed = job.recipe.align, job.recipe.seed
    if settings.tasks is not None:
        tasks = read_suite(settings.tasks)
    else:
        each = -(-settings.prompts // len(SKILLS))
        tasks = [task for skill in SKILLS for task in suite(skill, each, split="train", seed=seed + 1)]
    Random(seed).shuffle(tasks)
    return tasks[: settings.prompts]


def _passed(task: dict[str, Any], answer: str) -> int:
    """How many of the task's checks the answer passes."""
    from ..evaluate.skills import failures

    return len(task["check"]) - len(failures(task, answer))
