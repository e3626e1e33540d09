"""The stages the student learns by: what the teacher says, kept where the recipe asks for it, and trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..progress import progress
from ..run import RANK, staged
from .job import Job, public_name

DEEP_CUT = 1 / 3  # of the layers, from which on hidden states are matched: Minitron saw a gain at a half


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
    """Train the pruned model to predict what the teacher predicts; the best checkpoint becomes the student.

    Where alignment follows it is put aside for that.
    """
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
        aligned = bool(job.recipe.align.stages)
        write_model(job, result.best_folder or job.run.pruned, job.run.distilled if aligned else job.run.student)
    # the training time of all sessions, where a kill came between
    seconds = {"seconds": round(result.seconds, 2)}
    job.facts = {"status": result.status, "summary": result.describe(), "tokens": result.tokens} | seconds
    return result.describe()


def write_model(job: Job, best: Path, place: Path, *, configs: Path | None = None) -> None:
    """Save the best weights in the teacher's precision, with the tokenizer and generation config beside them.

    configs: a folder whose config and generation config are kept instead of those beside the weights.
    """
    import torch

    from ..checkpoint import DTYPES, copy_tokenizer, load_model, require_space
    from ..surgery import verify

    dtype = getattr(torch, DTYPES[job.teacher.metadata("model.embed_tokens.weight").dtype][0])
    require_space(job.run.folder, job.shape.parameters * dtype.itemsize)
    with staged(place) as folder:
        load_model(best, dtype=dtype).save_pretrained(folder)
        copy_tokenizer(job.run.pruned, folder)
        if configs is not None:
            for name in ("config.json", "generation_config.json"):
                shutil.copyfile(configs / name, folder / name)
        verify(folder, job.shape)
