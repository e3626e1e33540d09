"""The story: from a checkpoint and a target to a healthy smaller student. Read this first.

Each stage loads what it needs from the run folder, calls one room of the house, saves, and is marked done; a stage
that is marked is never run again, so running the same command again resumes. The rooms know nothing of each other:
they meet here, through values and files.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import recipe as recipes
from .architecture import choose, parse_target
from .errors import CheckFailed, UserError
from .progress import progress
from .run import RANK, Run, read_json, staged, write_json, write_text
from .shape import Shape

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .plan import Plan
    from .recipe import Recipe
    from .scores import Scores

Say = Callable[[str], None]
PATIENCE_SECONDS = 600  # that other processes wait for the first one to open the run folder


def _quiet(message: str) -> None:
    """Say nothing: what a notebook gets unless it passes print."""


@dataclass
class Job:
    """What every stage of one run is handed: the folder, the recipe, the teacher and the shape to reach."""

    run: Run
    recipe: Recipe
    teacher: Checkpoint
    shape: Shape
    say: Say
    facts: dict[str, Any] = field(default_factory=dict)  # what the current stage wants noted with its mark

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's, read once for all stages."""
        from .checkpoint import load_tokenizer

        return load_tokenizer(self.teacher.folder)

    @property
    def vocab(self) -> int:
        """How many token ids there are: the heads' further rows are padding and take no part in the loss."""
        from .data import num_ids

        return min(num_ids(self.tokenizer), self.shape.vocab)

    @property
    def source(self) -> str:
        """Where the data come from; the recipe names it once the run is open."""
        return str(self.recipe.data.source)

    @property
    def data(self) -> dict[str, Any]:
        """How this run reads its data, for every function of compressor.data."""
        section = self.recipe.data
        return {"split": section.split, "fraction": section.heldout_fraction, "seed": self.recipe.seed}

    @cached_property
    def batches(self) -> Any:
        """The rows to train on."""
        from .data import Blocks

        sizes = {"context": self.recipe.data.context, "group": self.recipe.distill.micro_batch}
        return Blocks(self.source, self.tokenizer, **sizes, **self.data)

    @cached_property
    def heldout(self) -> Any:
        """The batches of the held-out loss."""
        from .data import heldout_batches

        settings = self.recipe.distill
        sizes = {"limit": settings.heldout_rows, "batch_size": settings.micro_batch}
        with progress("held-out rows", unit="rows"):
            return heldout_batches(self.source, self.tokenizer, context=self.recipe.data.context, **sizes, **self.data)


# --- the stages, in order -------------------------------------------------------------------------------------------


def importance(job: Job) -> str:
    """Score every layer, channel, neuron and head of the teacher by forward passes over calibration rows."""
    from . import importance, teacher
    from .data import calibration_batches, records, shuffled

    settings = job.recipe.importance
    removed = job.teacher.shape.num_layers - job.shape.num_layers
    blocks = importance.candidate_blocks(job.teacher.shape.num_layers, removed) if removed else []

    def rows(samples: int) -> Any:
        stream = shuffled(records(job.source, part="train", **job.data), seed=job.recipe.seed)
        sizes = {"context": job.recipe.data.context, "batch_size": settings.batch_size}
        return calibration_batches(stream, job.tokenizer, samples=samples, **sizes)

    scores = _reused_scores(job) if settings.scores else None
    if scores is not None and settings.depth == "block_influence":
        scores.removal.clear()  # surgery would go by it
        if removed > 1 and removed not in scores.blocks:
            scores = None
    model: Any = None
    if scores is None or (removed and settings.depth == "perplexity" and not set(blocks) <= set(scores.removal)):
        model = teacher.load(job.teacher.folder)
    measured = scores is None
    if scores is None:
        with progress("importance", total=settings.samples, unit="rows") as advance:
            scores = importance.measure(
                model,
                rows(settings.samples),
                batch=settings.batch,
                sequence=settings.sequence,
                block_sizes=(removed,) if removed and settings.depth == "block_influence" else (),
                teacher=job.teacher.fingerprint(),
                progress=advance,
            )
    if model is not None and removed and settings.depth == "perplexity":
        batches = -(-settings.depth_samples // settings.batch_size)
        with progress("layers", total=batches * len(blocks), unit="passes") as advance:
            scores.removal |= importance.removal_loss(model, rows(settings.depth_samples), blocks, progress=advance)
    scores.save(job.run.scores)
    job.run.note(fingerprints={"teacher": scores.teacher, "calibration": scores.calibration})
    reused = "" if measured else f", reused from {settings.scores}"
    return f"{scores.about['rows']} rows, {int(scores.about['tokens']):,} tokens{reused}"


def _reused_scores(job: Job) -> Scores:
    """The scores of an earlier run, if they are of this teacher and were aggregated as this recipe asks."""
    from .scores import Scores

    settings = job.recipe.importance
    scores = Scores.load(str(settings.scores))
    wanted = {"teacher": job.teacher.fingerprint(), "batch": settings.batch, "sequence": settings.sequence}
    for key, value in wanted.items():
        if scores.about.get(key) != value:
            raise UserError(
                f"{settings.scores} was measured with another {key} ({scores.about.get(key)}); expected {value}; "
                "unset importance.scores to measure anew"
            )
    return scores


def surgery(job: Job) -> str:
    """Cut the least important parts and write the pruned model as a stock checkpoint, reloaded and checked."""
    from . import surgery
    from .report import kept_summary
    from .scores import Scores

    kept = surgery.select(Scores.load(job.run.scores), job.teacher.shape, job.shape)
    total = surgery.output_bytes(job.teacher, kept=kept, shape=job.shape)
    with staged(job.run.pruned) as folder, progress("surgery", total=total, unit="bytes") as advance:
        surgery.prune(job.teacher, folder, kept=kept, shape=job.shape, progress=advance)
        surgery.verify(folder, job.shape)
    parts = kept_summary(
        layers=kept.layers, hidden=kept.hidden, ffn=kept.ffn, heads=kept.heads, teacher=job.teacher.shape
    )
    shapes = {"teacher": job.teacher.shape.to_dict(), "student": job.shape.to_dict()}
    write_json(job.run.shape, shapes | {"kept": parts})
    return f"{job.teacher.shape.parameters:,} -> {job.shape.parameters:,} parameters"


def distill_student(job: Job) -> str:
    """Train the pruned model to predict what the teacher predicts; the best checkpoint becomes the student."""
    from . import teacher
    from .checkpoint import load_tokenizer
    from .data import check_same_tokens
    from .distill import distill

    tokenizer = job.tokenizer
    check_same_tokens(tokenizer, load_tokenizer(job.run.pruned))
    result = distill(
        job.run.pruned,
        teacher=teacher.load(job.teacher.folder),
        batches=job.batches,
        heldout=job.heldout,
        settings=job.recipe.distill,
        folder=job.run.checkpoints,
        seed=job.recipe.seed,
        vocab=job.vocab,
        metrics=job.run.metrics,
    )
    if RANK == 0:
        _write_student(job, result.best_folder or job.run.pruned)
    # the training time of all sessions, where a kill came between
    seconds = {"seconds": round(result.seconds, 2)}
    job.facts = {"status": result.status, "summary": result.describe(), "tokens": result.tokens} | seconds
    return result.describe()


def _write_student(job: Job, best: Path) -> None:
    """Save the best weights in the teacher's precision, with the tokenizer and generation config beside them."""
    import torch

    from .checkpoint import DTYPES, copy_tokenizer, load_model, require_space
    from .surgery import verify

    dtype = getattr(torch, DTYPES[job.teacher.metadata("model.embed_tokens.weight").dtype][0])
    require_space(job.run.folder, job.shape.parameters * dtype.itemsize)
    with staged(job.run.student) as folder:
        load_model(best, dtype=dtype).save_pretrained(folder)
        copy_tokenizer(job.run.pruned, folder)
        verify(folder, job.shape)


def evaluate_all(job: Job) -> str:
    """Judge teacher, pruned model and student alike: held-out text, agreement with the teacher, the four skills."""
    from .data import text_batches
    from .evaluate import evaluate as judge
    from .runtime import TorchRuntime

    settings = job.recipe.evaluate
    tokenizer = job.tokenizer
    with progress("held-out text", unit="rows"):
        sizes = {"context": job.recipe.data.context, "tokens": settings.tokens}
        heldout = text_batches(job.source, tokenizer, **sizes, **job.data)
    suites = _suites(None, tokenizer, prompts=settings.prompts, seed=job.recipe.seed)
    teacher = TorchRuntime(job.teacher.folder, batch_size=settings.batch_size)
    results = {}
    for name in ("teacher", "pruned", "student"):
        runtime = teacher
        if name != "teacher":
            runtime = TorchRuntime(getattr(job.run, name), batch_size=settings.batch_size)
        with progress(f"evaluate {name}", unit="tasks") as advance:
            results[name] = judge(
                runtime,
                against=None if name == "teacher" else teacher,
                heldout=heldout,
                suites=suites,
                max_new_tokens=settings.max_new_tokens,
                seed=job.recipe.seed,
                progress=advance.of,
            )
    write_json(job.run.evaluation, results)
    scored = [f"{name} {results[name]['overall']['score']:.1%}" for name in results if results[name]["overall"]]
    return ", ".join(scored) or ", ".join(f"{name} perplexity {r['perplexity']:.3f}" for name, r in results.items())


def report(job: Job) -> str:
    """Write the report, the student's model card and its checksums."""
    from . import report

    status = (job.run.done("distill") or {})["status"]
    written = report.write(job.run.folder, status="done" if status == "ok" else status)
    _ship(job.run, written, job.recipe)
    return str(job.run.folder / "report.html")


STAGES: dict[str, Callable[[Job], str]] = {
    "importance": importance,
    "surgery": surgery,
    "distill": distill_student,
    "evaluate": evaluate_all,
    "report": report,
}


# --- what the commands call -----------------------------------------------------------------------------------------


def plan(recipe: Recipe | dict[str, Any]) -> Plan:
    """What `distill` would do: shapes, bytes, memory, time. UserError for a bad recipe, teacher or target."""
    from .plan import plan

    return plan(_checked(recipe))


def distill(recipe: Recipe | dict[str, Any], *, out: Path | str | None = None, say: Say = _quiet) -> dict[str, Any]:
    """Run every stage that is not done yet in the run folder `out`, and return the report.

    `recipe` is a Recipe or its nested values; `say` is handed a line per stage. Raises UserError for input that has to
    change, CheckFailed when the student came out worse than it went in (report and best checkpoint are still written).
    Under `accelerate launch` or `torchrun` every process calls this: all of them train, the first does the rest and
    has the report, the others return {}.
    """
    from accelerate import PartialState

    from .checkpoint import Checkpoint, resolve
    from .data import DEFAULT_DATA
    from .plan import hub_name, teacher_config
    from .train import check

    _hush()
    if RANK:
        say = _quiet
    recipe = _checked(recipe)
    # a target that cannot be met is told from the config alone, before gigabytes are fetched
    choose(parse_target(recipe.target), Shape.from_config(teacher_config(recipe.teacher)))
    teacher = Checkpoint(resolve(hub_name(recipe.teacher)))
    teacher.check()
    shape = choose(parse_target(recipe.target), teacher.shape)
    positions = teacher.config.get("max_position_embeddings") or recipe.data.context
    sizes = {"teacher": teacher.shape, "student": shape, "max_positions": positions}
    recipe = recipes.resolve(recipe, **sizes, processes=PartialState().num_processes)
    if recipe.data.source is None:
        say(f"data: {DEFAULT_DATA} (the default; choose another with --data)")
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": DEFAULT_DATA})})
    run = Run(out or Path("runs") / _slug(f"{Path(recipe.teacher).name}-{recipe.target}"))
    job = Job(run, recipe, teacher, shape, say)
    if RANK:
        return _assist(job)
    with run.locked():
        if run.done("distill") is None:  # what cannot be trained is told before anything is computed
            check(batches=job.batches, heldout=job.heldout, settings=recipe.distill)
            _check_ids(job)
        _open(run, recipe, teacher)
        for name, stage in STAGES.items():
            if (mark := run.done(name)) is not None:
                say(f"{name:<11} done before ({mark['seconds']:.1f} s)")
                continue
            started = time.monotonic()
            job.facts = {}
            summary = stage(job)
            run.mark(name, started=started, **job.facts)
            say(f"{name:<11} {time.monotonic() - started:6.1f} s  {summary}")
        result = _with_files(run)
        distilled = run.done("distill") or {}
    if distilled["status"] != "ok":
        raise CheckFailed(f"{distilled['summary']}; see {run.folder / 'report.html'}", result)
    return result


def _check_ids(job: Job) -> None:
    """A tokenizer can have more tokens than its model knows: harmless until the data use one."""
    largest = max(int(batch["input_ids"].max()) for batch in job.heldout)
    if largest >= job.teacher.shape.vocab:
        raise UserError(
            f"the data hold the token id {largest}, but the teacher knows {job.teacher.shape.vocab} ids; expected a "
            "tokenizer that fits the weights; use the one that came with them"
        )


def _assist(job: Job) -> dict[str, Any]:
    """What every process but the first does: wait until the student is cut, and train along.

    The launcher ends us if the first process fails. Raises UserError where its run folder never comes into sight.
    """
    started = time.monotonic()
    while job.run.done("surgery") is None:
        if not job.run.recipe.exists() and time.monotonic() - started > PATIENCE_SECONDS:
            raise UserError(
                f"no {job.run.folder} after {PATIENCE_SECONDS // 60} minutes; expected a run folder that all processes "
                "see; put --out on a shared disk"
            )
        time.sleep(0.5)
    if job.run.done("distill") is None:
        distill_student(job)
    return {}


def evaluate(
    what: str,
    *,
    against: str | None = None,
    suites: list[str] | None = None,
    data: str | None = None,
    prompts: int | None = None,
    tokens: int | None = None,
    seed: int | None = None,
    say: Say = _quiet,
) -> dict[str, Any]:
    """Judge one model (a run folder means its student) and return {"what", "against", "result"}.

    A run folder brings its own teacher, data, settings and seed (else 0). `suites` name skills or JSONL files; default:
    all four.
    Raises UserError for what cannot be found, loaded or asked.
    """
    from .checkpoint import resolve
    from .data import text_batches
    from .evaluate import evaluate as judge
    from .plan import hub_name
    from .runtime import TorchRuntime

    _hush()
    section: dict[str, Any] = {}
    settings, context = recipes.Evaluate(), 1024  # pyright: ignore[reportCallIssue] - every field has a default
    if (Path(what) / "run.json").exists():
        recipe = recipes.build(recipes.load_values(str(Path(what) / "recipe.yaml")), origin=what)
        section = {"split": recipe.data.split, "fraction": recipe.data.heldout_fraction, "seed": recipe.seed}
        settings, context = recipe.evaluate, recipe.data.context
        seed = recipe.seed if seed is None else seed
        against = against or recipe.teacher
        data = data or recipe.data.source
        what = str(_finished(Run(what)).student)
    elif "demo" in (what, against):
        data = data or "demo"
    runtime = TorchRuntime(resolve(hub_name(what)), batch_size=settings.batch_size)
    teacher = TorchRuntime(resolve(hub_name(against)), batch_size=settings.batch_size) if against else None
    heldout: list[Any] = []
    if data:
        sizes = {"context": min(context, runtime.context), "tokens": tokens or settings.tokens}
        heldout = text_batches(data, runtime.tokenizer, **sizes, **section)
    else:
        say("no --data, so no perplexity and no agreement with the teacher; only skills are judged")
    seed = seed or 0
    chosen = _suites(suites, runtime.tokenizer, prompts=prompts or settings.prompts, seed=seed)
    if not chosen and not heldout:
        raise UserError(f"{what} has no chat template and no --data was given; nothing to judge; give --data")
    with progress("evaluate", unit="tasks") as advance:
        result = judge(
            runtime,
            against=teacher,
            heldout=heldout,
            suites=chosen,
            max_new_tokens=settings.max_new_tokens,
            seed=seed,
            progress=advance.of,
        )
    return {"what": what, "against": against, "result": result}


def package(run_folder: Path | str, *, push: str | None = None, say: Say = _quiet) -> dict[str, Any]:
    """Write a finished run's card and checksums again, and push its student if asked: {"folder", "files", "url"}."""
    from .package import CHECKSUMS, check_checksums
    from .package import push as upload

    run = _finished(Run(run_folder))
    recipe = recipes.build(recipes.load_values(str(run.recipe)), origin=str(run.recipe))
    status = (run.done("distill") or {})["status"]
    if push and status != "ok":
        raise CheckFailed(f"{run.folder} ended {status}, so its student is not pushed; distill it to health first")
    with run.locked():
        _ship(run, read_json(run.report), recipe)
        files = check_checksums(run.student)
        say(f"{files} files in {run.student} match {CHECKSUMS}")
        url = upload(run.student, push) if push else None
    return {"folder": str(run.student), "files": files, "url": url}


# --- small things ---------------------------------------------------------------------------------------------------


def _hush() -> None:
    """Keep the libraries' own bars and talk off the screen, but for downloads; ours say what there is to say."""
    import datasets
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()  # the Hub's too
    enable_progress_bars()  # a download takes long, and only the Hub's bar knows of it
    logging.set_verbosity_error()


def _checked(recipe: Recipe | dict[str, Any]) -> Recipe:
    if not isinstance(recipe, dict):
        return recipe
    if recipe.get("teacher") == "demo":
        recipe = recipes.merged(recipes.load_values("demo"), recipe)
    return recipes.build(recipe)


def _ship(run: Run, report: dict[str, Any], recipe: Recipe) -> None:
    """Write the student's card and checksums. The card may be published: paths on this machine become names."""
    from .package import write_card, write_checksums
    from .plan import hub_name

    def named(value: str | None) -> str | None:
        return Path(value).name if value and Path(value).exists() else value

    data = recipe.data.model_copy(update={"source": named(recipe.data.source)})
    scores = recipe.importance.model_copy(update={"scores": named(recipe.importance.scores)})
    teacher = named(hub_name(recipe.teacher))
    public = recipe.model_copy(update={"teacher": teacher, "data": data, "importance": scores})
    licence = run.read_facts().get("licence")
    write_card(run.student, report=report, teacher=public.teacher, recipe=public.to_yaml(), licence=licence)
    write_checksums(run.student)


def _slug(text: str) -> str:
    return re.sub(r"[^\w.@=-]+", "-", text.replace("%", "pct")).strip("-")


def _open(run: Run, recipe: Recipe, teacher: Checkpoint) -> None:
    """Save the resolved recipe first of all, or check that the folder was started with this recipe and teacher."""
    import torch
    import transformers

    from .package import licence_of

    if run.recipe.exists():
        saved = recipes.build(recipes.load_values(str(run.recipe)), origin=str(run.recipe))
        if changed := recipes.differences(saved, recipe):
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


def _suites(names: list[str] | None, tokenizer: Any, *, prompts: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Tasks by skill: the built-in suites by name, files by path.

    A model without a chat template is asked only what is named: it has to continue a transcript.
    """
    from .demo import tasks
    from .evaluate.run_skills import read_suite
    from .evaluate.skills import SKILLS

    if not tokenizer.chat_template and not names:
        return {}
    suites: dict[str, list[dict[str, Any]]] = {}
    for name in names or SKILLS:
        if name in SKILLS:
            suites.setdefault(name, []).extend(tasks.suite(name, prompts, seed=seed))
            continue
        for task in read_suite(name):
            suites.setdefault(task["skill"], []).append(task)
    return suites


def _finished(run: Run) -> Run:
    if run.done("report") is None:
        raise UserError(f"{run.folder} holds no finished run; expected one; run compressor distill --out {run.folder}")
    return run


def _with_files(run: Run) -> dict[str, Any]:
    files = {kind: str(run.folder / f"report.{kind}") for kind in ("json", "md", "html")}
    return read_json(run.report) | {"files": files | {"student": str(run.student)}}
