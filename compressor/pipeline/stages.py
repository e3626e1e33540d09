"""The stages in order: each loads from the run folder, calls one room of the house, saves, and says what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckFailed, UserError
from ..progress import progress
from ..run import RANK, Run, staged, write_json
from ..shape import Shape
from .subject import Subject, suites_of

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..recipe import Recipe
    from ..scores import Scores

Say = Callable[[str], None]
DEEP_CUT = 1 / 3  # of the layers, from which on hidden states are matched: Minitron saw a gain at a half


def quiet(message: str) -> None:
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
        from ..checkpoint import load_tokenizer

        return load_tokenizer(self.teacher.folder)

    @property
    def vocab(self) -> int:
        """How many token ids there are: the heads' further rows are padding and take no part in the loss."""
        from ..data import num_ids

        return min(num_ids(self.tokenizer), self.shape.vocab)

    @property
    def source(self) -> str:
        """Where the data come from; the recipe names it once the run is open."""
        return str(self.recipe.data.source)

    @property
    def learned_from(self) -> str:
        """Where the student's rows come from: the data, or the teacher's answers to them."""
        return str(self.answers / "data") if self.recipe.distill.method == "seqkd" else self.source

    @property
    def answers(self) -> Path:
        """Where the teacher's answers are kept."""
        return self.run.folder / "answers"

    @property
    def data(self) -> dict[str, Any]:
        """How this run reads its data, for every function of compressor.data."""
        section = self.recipe.data
        return {"split": section.split, "fraction": section.heldout_fraction, "seed": self.recipe.seed}

    @property
    def cache(self) -> Path:
        """Where what the teacher said is kept, by recipes that keep it."""
        return Path(self.recipe.distill.cache or self.run.folder / "cache")

    @cached_property
    def cached_of(self) -> dict[str, Any]:
        """What such a cache depends on."""
        from ..signals import fingerprint

        settings = self.recipe.distill
        assert settings.signal != "online"
        return fingerprint(
            teacher=self.teacher.fingerprint(),
            tokenizer=self.tokenizer,
            kind=settings.signal,
            keep=settings.keep,
            temperature=settings.temperature,
            vocab=self.vocab,
            rows={
                "source": public_name(self.source),
                "seed": self.recipe.seed,
                "context": self.recipe.data.context,
                "tokens": settings.tokens,
                "batch": settings.batch,
                "micro_batch": settings.micro_batch,
                "heldout_rows": settings.heldout_rows,
            },
        )

    @cached_property
    def batches(self) -> Any:
        """The rows to train on."""
        from ..data import Blocks

        sizes = {"context": self.recipe.data.context, "group": self.recipe.distill.micro_batch}
        return Blocks(self.learned_from, self.tokenizer, **sizes, **self.data)

    @cached_property
    def heldout(self) -> Any:
        """The batches of the held-out loss."""
        from ..data import heldout_batches

        settings = self.recipe.distill
        sizes = {"limit": settings.heldout_rows, "batch_size": settings.micro_batch}
        with progress("held-out rows", unit="rows"):
            return heldout_batches(
                self.learned_from, self.tokenizer, context=self.recipe.data.context, **sizes, **self.data
            )


# --- the stages, in order -------------------------------------------------------------------------------------------


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


def answers(job: Job) -> str:
    """Have the teacher answer the prompts of the data, and check that the answers can be trained on."""
    from ..answers import generate, outcome_counts
    from ..data import records, shuffled
    from ..runtime import TorchRuntime
    from ..train import check

    settings = job.recipe.distill
    stream = shuffled(records(job.source, part="train", **job.data), seed=job.recipe.seed)
    with progress("answers", total=settings.prompts, unit="prompts") as advance:
        index = generate(
            job.answers,
            lambda: TorchRuntime(job.teacher.folder, batch_size=job.recipe.evaluate.batch_size),
            stream,
            job.tokenizer,
            about={"teacher": job.teacher.fingerprint(), "source": public_name(job.source)},
            count=settings.prompts,
            context=job.recipe.data.context,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.sampling_temperature,
            seed=job.recipe.seed,
            progress=advance,
        )
    check(batches=job.batches, heldout=job.heldout, settings=settings)
    outcomes = outcome_counts(index)
    job.facts = {"outcomes": dict(outcomes)}
    left_out = ", ".join(f"{count} {why}" for why, count in sorted(outcomes.items()) if why != "kept")
    return f"{outcomes['kept']} of {outcomes.total()} prompts answered" + (
        f"; left out: {left_out}" if left_out else ""
    )


def cache(job: Job) -> str:
    """Ask the teacher once for all that the student will learn from, and measure what is lost by keeping part of it."""
    from itertools import chain, islice

    from ..data import heldout_rows
    from ..signals import build
    from ..train import check

    settings = job.recipe.distill
    rows = check(batches=job.batches, heldout=job.heldout, settings=settings) * settings.batch
    held = heldout_rows(
        job.source, job.tokenizer, context=job.recipe.data.context, limit=settings.heldout_rows, **job.data
    )
    with progress("cache", total=rows + len(held), unit="rows") as advance:
        index = build(
            job.cache,
            lambda: teacher_of(job),
            chain(held, islice(job.batches, rows)),
            about=job.cached_of,
            batch_size=settings.micro_batch,
            progress=advance,
        )
    count = sum(shard["targets"] for shard in index["shards"])
    nbytes = sum(shard["bytes"] for shard in index["shards"])
    job.facts = {"folder": str(job.cache), "tokens": count, "bytes": nbytes, "bytes_per_token": nbytes / count}
    return f"{count:,} tokens in {job.cache}, {nbytes / count:.0f} bytes a token"


def teacher_of(job: Job) -> Any:
    """The teacher, loaded and frozen."""
    from .. import teacher

    return teacher.load(job.teacher.folder)


def _signal(job: Job) -> Any:
    """What the recipe's method knows of the teacher."""
    from ..signals import Cached, Online

    if job.recipe.distill.method in ("sft", "seqkd"):
        return None
    if job.recipe.distill.signal == "online":
        return Online(teacher_of(job))
    return Cached(job.cache, job.cached_of)


def _hidden(job: Job) -> Any:
    """The loss on hidden states, where the recipe or a large cut in depth asks for it."""
    from ..losses import HiddenLoss, paper_pairs
    from ..scores import Scores
    from ..surgery import select

    settings, teacher, student = job.recipe.distill, job.teacher.shape, job.shape
    measure = settings.hidden_loss
    if measure == "auto":
        deep = student.num_layers <= teacher.num_layers * (1 - DEEP_CUT)
        measure = "cosine" if deep and settings.method == "kl" and settings.signal == "online" else "off"
    if measure == "off":
        return None
    pairs = paper_pairs(student.num_layers, teacher.num_layers)
    kept = select(Scores.load(job.run.scores), teacher, student)
    return HiddenLoss(pairs, channels=kept.hidden, teacher_width=teacher.hidden, measure=measure)


def distill_student(job: Job) -> str:
    """Train the pruned model to predict what the teacher predicts; the best checkpoint becomes the student."""
    from ..checkpoint import load_tokenizer
    from ..data import check_same_tokens
    from ..distill import distill

    tokenizer = job.tokenizer
    check_same_tokens(tokenizer, load_tokenizer(job.run.pruned))
    result = distill(
        job.run.pruned,
        signal=_signal(job),
        batches=job.batches,
        heldout=job.heldout,
        settings=job.recipe.distill,
        folder=job.run.checkpoints,
        seed=job.recipe.seed,
        vocab=job.vocab,
        hidden=_hidden(job),
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

    from ..checkpoint import DTYPES, copy_tokenizer, load_model, require_space
    from ..surgery import verify

    dtype = getattr(torch, DTYPES[job.teacher.metadata("model.embed_tokens.weight").dtype][0])
    require_space(job.run.folder, job.shape.parameters * dtype.itemsize)
    with staged(job.run.student) as folder:
        load_model(best, dtype=dtype).save_pretrained(folder)
        copy_tokenizer(job.run.pruned, folder)
        verify(folder, job.shape)


def evaluate_all(job: Job) -> str:
    """Judge teacher, pruned model and student alike: held-out text, agreement with the teacher, the four skills."""
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
    "answers": answers,
    "cache": cache,
    "distill": distill_student,
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
    sections = {"data": data, "importance": scores, "distill": distill}
    public = recipe.model_copy(update={"teacher": teacher} | sections)
    licence = run.read_facts().get("licence")
    write_card(run.student, report=report, teacher=public.teacher, recipe=public.to_yaml(), licence=licence)
    write_checksums(run.student)


def public_name(value: str | None) -> str | None:
    """A path on this machine becomes a name: what is written here may be published."""
    return Path(value).name if value and Path(value).exists() else value


def hush() -> None:
    """Keep the libraries' own bars and talk off the screen, but for downloads; ours say what there is to say."""
    import datasets
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()  # the Hub's too
    enable_progress_bars()  # a download takes long, and only the Hub's bar knows of it
    logging.set_verbosity_error()
