"""The story: from a checkpoint and a target to a healthy smaller student. Read this first.

Each stage (`stages`; what the student learns by is in `learning` and `alignment`) loads what it needs from the run
folder, calls one room of the house, saves, and is marked done; a stage that is marked is never run again, so running
the same command again resumes. The rooms know nothing of each other: they meet here, through values and files. What is
done with a finished run is in `finished`; `subject` says what is judged or exported, and how.
"""

from __future__ import annotations

import platform
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import recipe as recipes
from ..architecture import choose, parse_target
from ..errors import CheckFailed, UserError
from ..run import RANK, Run, processes, read_json, write_text
from ..shape import Shape
from . import alignment, learning
from .checks import check_numbers, check_recipe
from .finished import bench, evaluate, export, package
from .job import Job, Say, hush, quiet
from .stages import STAGES

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..plan import Plan
    from ..recipe import Recipe

__all__ = ["bench", "cache", "distill", "evaluate", "export", "package", "plan"]

TRAINING = ("correct", "start", "distill", "align")  # stages in which all processes take part
PATIENCE_SECONDS = 600  # that other processes wait for the first one to open the run folder


def plan(recipe: Recipe | dict[str, Any]) -> Plan:
    """What `distill` would do: shapes, bytes, memory, time. UserError for a bad recipe, teacher or target."""
    from ..plan import plan

    recipe = _checked(recipe)
    check_recipe(recipe)
    found = plan(recipe)
    check_numbers(found.recipe)
    return found


def distill(recipe: Recipe | dict[str, Any], *, out: Path | str | None = None, say: Say = quiet) -> dict[str, Any]:
    """Run every stage that is not done yet in the run folder `out`, and return the report.

    `recipe` is a Recipe or its nested values; `say` is handed a line per stage. Raises UserError for input that has to
    change, CheckFailed when the student came out worse than it went in (report and best checkpoint are still written).
    Under `accelerate launch` or `torchrun` every process calls this: all of them train, the first does the rest and
    has the report, the others return {}.
    """
    if RANK:
        say = quiet
    job = _job(recipe, out, say)
    from ..train import check  # takes seconds: after what can be told without it

    recipe, run = job.recipe, job.run
    if RANK:
        return _assist(job)
    with run.locked():
        # what cannot be trained is told before anything is computed; where answers are to come, by the data they answer
        if run.done("distill") is None:
            read = job.before_answers() if run.done("answers") is None else job
            check(batches=read.batches, heldout=read.heldout, settings=recipe.distill)
            _check_ids(read)
            if recipe.distill.method in recipes.ON_POLICY:
                rows = {"batches": job.batches, "heldout": job.heldout}
                check(**rows, settings=learning.own_phase(job), section="onpolicy")
                if _wanted("start", recipe):
                    check(**rows, settings=learning.start_phase(job))
                job.prompts("train", 1)
            if learning.is_judged(recipe.distill):
                job.prompts("heldout", 1)
        if run.done("distill") is None and _wanted("correct", recipe):
            check(**job.correcting, section="correct")
        if run.done("align") is None and _wanted("align", recipe):
            alignment.check_alignment(job)
        _open(run, recipe, job.teacher)
        fresh = False
        for name, stage in STAGES.items():
            if not _wanted(name, recipe):
                continue
            # exports may be asked for after all, and the report is then written again
            if (mark := run.done(name)) is not None and not (name == "report" and fresh):
                say(f"{name:<11} done before ({mark['seconds']:.1f} s)")
                continue
            started = time.monotonic()
            job.facts = {}
            summary = stage(job)
            run.mark(name, started=started, **job.facts)
            fresh = True
            say(f"{name:<11} {time.monotonic() - started:6.1f} s  {summary}")
        result = _with_files(run)
        distilled = run.done("distill") or {}
    if distilled["status"] != "ok":
        raise CheckFailed(f"{distilled['summary']}; see {run.folder / 'report.html'}", result)
    for one in result["exports"]:
        if one.get("failed"):
            raise CheckFailed(one["failed"], result)
        if missed := [line for line in one["budget"] if not line["passed"]]:
            from export.tables import budget_line

            raise CheckFailed(f"budget missed: {budget_line(one['path'], missed[0])}", result)
    return result


def _wanted(stage: str, recipe: Recipe) -> bool:
    """Whether the recipe has the stage."""
    settings = recipe.distill
    if stage == "correct":
        return recipe.correct.before
    if stage == "answers":
        return settings.method == "seqkd"
    if stage == "start":
        return settings.method in recipes.ON_POLICY and recipe.onpolicy.start != "none"
    if stage == "cache":
        return settings.signal != "online" and settings.method == "kl"
    if stage == "align":
        return bool(recipe.align.stages)
    return stage != "export" or bool(recipe.export.formats)


def cache(recipe: Recipe | dict[str, Any], *, out: Path | str, say: Say = quiet) -> dict[str, Any]:
    """Ask the teacher for all that `distill` with this recipe would learn from it, and keep it in the folder `out`.

    The recipe's distill.signal says what is kept. A build that was ended goes on. Returns {"folder", "tokens", "bytes",
    "bytes_per_token"}. Raises UserError for a recipe that keeps nothing, and for a folder that holds something else.
    """
    recipe = _checked(recipe)
    if not _wanted("cache", recipe):
        asked = recipe.distill
        raise UserError(
            f"distill.signal is {asked.signal} and distill.method {asked.method}; expected kl by topk, sampled or "
            "hidden; give --signal"
        )
    distill = recipe.distill.model_copy(update={"cache": str(out)})
    job = _job(recipe.model_copy(update={"distill": distill}), out, say)
    if _wanted("correct", job.recipe):
        say(f"correct     {learning.correct(job)}")
    say(f"cache       {learning.cache(job)}")
    return job.facts


def _job(recipe: Recipe | dict[str, Any], out: Path | str | None, say: Say) -> Job:
    """The recipe, whole, with the teacher's checkpoint. UserError for what cannot be done."""
    recipe = _checked(recipe)
    check_recipe(recipe)
    from accelerate import PartialState

    from ..checkpoint import Checkpoint, resolve
    from ..data import DEFAULT_DATA
    from ..plan import hub_name, teacher_config

    hush()
    PartialState()  # a launcher's processes meet at the first call: here, where all of them come by
    # a target that cannot be met is told from the config alone, before gigabytes are fetched
    choose(parse_target(recipe.target), Shape.from_config(teacher_config(recipe.teacher)))
    teacher = Checkpoint(resolve(hub_name(recipe.teacher)))
    teacher.check()
    shape = choose(parse_target(recipe.target), teacher.shape)
    positions = teacher.config.get("max_position_embeddings") or recipe.data.context
    sizes = {"teacher": teacher.shape, "student": shape, "max_positions": positions}
    recipe = recipes.resolve(recipe, **sizes, processes=processes())
    check_numbers(recipe)
    if recipe.data.source is None:
        say(f"data: {DEFAULT_DATA} (the default; choose another with --data)")
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": DEFAULT_DATA})})
    run = Run(out or Path("runs") / _slug(f"{Path(recipe.teacher).name}-{recipe.target}"))
    return Job(run, recipe, teacher, shape, say)


def _check_ids(job: Job) -> None:
    """A tokenizer can have more tokens than its model knows: harmless until the data use one."""
    largest = max(int(batch["input_ids"].max()) for batch in job.heldout)
    if largest >= job.teacher.shape.vocab:
        raise UserError(
            f"the data hold the token id {largest}, but the teacher knows {job.teacher.shape.vocab} ids; expected a "
            "tokenizer that fits the weights; use the one that came with them"
        )


def _assist(job: Job) -> dict[str, Any]:
    """What every process but the first does: wait until there is something to train, and train along.

    The launcher ends us if the first process fails. Raises UserError where its run folder never comes into sight.
    """
    order = [name for name in STAGES if _wanted(name, job.recipe)]
    for name in TRAINING:
        if name in order:
            _wait(job, order[order.index(name) - 1])
            if job.run.done(name) is None:
                STAGES[name](job)
    return {}


def _wait(job: Job, stage: str) -> None:
    """Until the first process has done the stage."""
    started = time.monotonic()
    while job.run.done(stage) is None:
        if not job.run.recipe.exists() and time.monotonic() - started > PATIENCE_SECONDS:
            raise UserError(
                f"no {job.run.folder} after {PATIENCE_SECONDS // 60} minutes; expected a run folder that all processes "
                "see; put --out on a shared disk"
            )
        time.sleep(0.5)


# --- small things -----------------------------------------------------------------------------------------------------


def _checked(recipe: Recipe | dict[str, Any]) -> Recipe:
    if not isinstance(recipe, dict):
        return recipe
    if recipe.get("teacher") == "demo":
        recipe = recipes.merged(recipes.load_values("demo"), recipe)
    return recipes.build(recipe)


def _slug(text: str) -> str:
    return re.sub(r"[^\w.@=-]+", "-", text.replace("%", "pct")).strip("-")


def _open(run: Run, recipe: Recipe, teacher: Checkpoint) -> None:
    """Save the resolved recipe first of all, or check that the folder was started with this recipe and teacher."""
    import torch
    import transformers

    from ..package import licence_of

    if run.recipe.exists():
        saved = recipes.build(recipes.load_values(str(run.recipe)), origin=str(run.recipe))
        changed = recipes.differences(saved, recipe)
        if run.done("export") is None:  # nothing was exported yet: that may still be chosen
            changed = [key for key in changed if not key.startswith("export.")]
        if changed and all(key.startswith("export.") for key in changed):
            raise UserError(
                f"{run.folder} has its exports already, by another {', '.join(changed)}; expected the same to resume; "
                f"add one with compressor export FORMAT {run.folder}"
            )
        if changed:
            raise UserError(
                f"{run.folder} was started with another recipe, different in {', '.join(changed)}; expected the same "
                "one to resume; choose another --out or undo the change"
            )
        if "fingerprints" not in (facts := run.read_facts()):
            raise UserError(
                f"{run.facts} is gone, but {run.recipe} is not; expected both or none; choose another --out"
            )
        if facts["fingerprints"]["teacher"] != teacher.fingerprint():
            raise UserError(
                f"{run.folder} was started with other weights of {recipe.teacher}; expected the same ones "
                "to resume; choose another --out or put its files back"
            )
        if recipe != saved:  # exports asked for after all
            write_text(run.recipe, recipe.to_yaml())
        return
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    run.note(
        versions=versions,
        seeds={"seed": recipe.seed},
        fingerprints={"teacher": teacher.fingerprint()},
        licence=licence_of(teacher.folder),
    )
    write_text(run.recipe, recipe.to_yaml())  # last: a folder with a recipe has its facts


def _with_files(run: Run) -> dict[str, Any]:
    files = {kind: str(run.folder / f"report.{kind}") for kind in ("json", "md", "html")}
    return read_json(run.report) | {"files": files | {"student": str(run.student)}}
