"""The stages in order: each loads from the run folder, calls one room of the house, saves, and says what came out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import CheckFailed, UserError
from ..progress import progress
from ..run import Run, staged, write_json
from .alignment import align
from .job import Job, public_name
from .learning import answers, cache, correct, distill_student, start
from .subject import Subject, suites_of

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..scores import Scores


def importance(job: Job) -> str:
    """Score every layer, channel, neuron and head of the teacher by forward passes over calibration rows."""
    from .. import importance, teacher
    from ..data import calibration_batches, records, shuffled

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
    from ..scores import Scores

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
    from .. import surgery
    from ..report import kept_summary
    from ..scores import Scores

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


def evaluate_all(job: Job) -> str:
    """Judge teacher, pruned model and student alike: held-out text, agreement with the teacher, the four skills.

    Where alignment ran, what it started from is judged too.
    """
    from ..data import text_batches
    from ..evaluate import evaluate as judge
    from ..runtime import TorchRuntime

    settings = job.recipe.evaluate
    tokenizer = job.tokenizer
    with progress("held-out text", unit="rows"):
        sizes = {"context": job.recipe.data.context, "tokens": settings.tokens}
        heldout = text_batches(job.source, tokenizer, **sizes, **job.data)
    suites = suites_of(None, tokenizer, prompts=settings.prompts, seed=job.recipe.seed)
    teacher = TorchRuntime(job.teacher.folder, batch_size=settings.batch_size)
    results = {}
    before = ("distilled",) if job.recipe.align.stages else ()
    for name in ("teacher", "pruned", *before, "student"):
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


def export_all(job: Job) -> str:
    """Turn the student into each format asked for: verified, judged like the student, timed in its own process."""
    import export

    from ..plan import hub_name

    settings = job.recipe.export
    subject = Subject.of_run(job.run, str(job.run.student))
    found = []
    for text in settings.formats:
        one = export.parse(text)
        out = job.run.export / one.name

        about = {
            "name": job.run.folder.resolve().name,
            "description": f"distilled from {public_name(hub_name(job.recipe.teacher))}",
        }
        entry: dict[str, Any] = {"format": one.format, "precision": one.precision, "path": None}
        try:
            with progress(f"export {one.name}") as advance:
                measure = subject.judged(job.run.student, advance.of)
                manifest = export.export(job.run.student, one, out, about=about, measure=measure, progress=advance.of)
            timed = export.bench([str(out)], on=settings.device)["artifacts"][0]
            entry = export.record(manifest, timed, path=str(out.relative_to(job.run.folder)))
        except (CheckFailed, UserError) as failed:  # the others are still worth having, and the report says what failed
            entry["failed"] = str(failed)
        found.append(entry)
        job.say(f"            {export.describe(entry)}")
        for warning in entry.get("warnings", []):
            job.say(f"            warning: {warning}")
    write_json(job.run.exports, found)
    return f"{sum(bool(one['path']) for one in found)} of {len(found)} verified and kept"


def report(job: Job) -> str:
    """Write the report, the student's model card and its checksums."""
    from .. import report

    status = (job.run.done("distill") or {})["status"]
    written = report.write(job.run.folder, status="done" if status == "ok" else status)
    ship(job.run, written, job.recipe)
    return str(job.run.folder / "report.html")


STAGES: dict[str, Callable[[Job], str]] = {
    "importance": importance,
    "surgery": surgery,
    "correct": correct,
    "answers": answers,
    "cache": cache,
    "start": start,
    "distill": distill_student,
    "align": align,
    "evaluate": evaluate_all,
    "export": export_all,
    "report": report,
}


# --- what finished runs need too --------------------------------------------------------------------------------------


def ship(run: Run, report: dict[str, Any], recipe: Recipe) -> None:
    """Write the student's card and checksums. The card may be published: paths on this machine become names."""
    from ..package import write_card, write_checksums
    from ..plan import hub_name

    data = recipe.data.model_copy(update={"source": public_name(recipe.data.source)})
    scores = recipe.importance.model_copy(update={"scores": public_name(recipe.importance.scores)})
    teacher = public_name(hub_name(recipe.teacher))
    distill = recipe.distill.model_copy(update={"cache": public_name(recipe.distill.cache)})
    places = {key: public_name(getattr(recipe.align, key)) for key in ("data", "pairs", "tasks")}
    align = recipe.align.model_copy(update=places)
    sections = {"data": data, "importance": scores, "distill": distill, "align": align}
    public = recipe.model_copy(update={"teacher": teacher} | sections)
    licence = run.read_facts().get("licence")
    write_card(run.student, report=report, teacher=public.teacher, recipe=public.to_yaml(), licence=licence)
    write_checksums(run.student)
