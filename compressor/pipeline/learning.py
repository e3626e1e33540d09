"""The stages the student learns by: what the teacher says, kept where the recipe asks for it, and trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..progress import progress
from ..recipe import ON_POLICY
from ..run import RANK, check_about, outcome_counts, read_json, staged, write_json
from .job import Job, public_name

if TYPE_CHECKING:
    from ..recipe import Distill
    from ..train import Judge, TrainResult

DEEP_CUT = 1 / 3  # of the layers, from which on hidden states are matched: Minitron saw a gain at a half


OUTCOME = "correction.json"  # written last: with it, a correction is finished


def correct(job: Job) -> str:
    """Fine-tune the whole teacher on the data, and keep it for the student to learn from if that made it better."""
    from .. import teacher
    from ..distill import distillation_loss

    settings, given = job.recipe.correct, job.correcting
    training = given["settings"]
    about = {
        "teacher": job.teacher.fingerprint(),
        "source": public_name(job.source),
        "context": job.recipe.data.context,
        "seed": job.recipe.seed,
        "split": job.recipe.data.split,
        "heldout_fraction": job.recipe.data.heldout_fraction,
        "correct": settings.model_dump(),
        "distill": {key: getattr(training, key) for key in ("precision", "weight_decay", "heldout_rows")},
    }
    if (begun := job.correction / "begun.json").is_file():
        check_about(job.correction, read_json(begun), about)  # another correction's checkpoints would be gone on from
    elif RANK == 0:
        write_json(begun, {"about": about})
    if (path := job.correction / OUTCOME).is_file():  # finished by a process that was then ended, or for the cache
        outcome = read_json(path)
        check_about(job.correction, outcome, about)
    else:
        result = teacher.correct(
            job.teacher.folder,
            loss=distillation_loss(None, settings=training, vocab=job.vocab),
            batches=given["batches"],
            heldout=given["heldout"],
            settings=settings,
            training=training,
            folder=job.correction,
            out=job.corrected,
            seed=job.recipe.seed,
        )
        outcome = {
            "about": about,
            "mode": settings.mode,
            "used": result.best_folder is not None,
            "before": result.first_heldout,
            "after": result.best_heldout,
            "tokens": result.tokens,
            "seconds": round(result.seconds, 2),
        }
        if RANK == 0:
            write_json(path, outcome)
    job.facts = {key: outcome[key] for key in ("mode", "used", "before", "after", "tokens", "seconds")}
    if not outcome["used"]:
        return (
            f"no better than {outcome['before']:.4f} on held-out data, so the teacher stays as it was; "
            "lower correct.lr or raise correct.tokens"
        )
    return f"{settings.mode}: teacher's held-out loss {outcome['before']:.4f} -> {outcome['after']:.4f}"


def answers(job: Job) -> str:
    """Have the teacher answer the prompts of the data, and check that the answers can be trained on."""
    from ..answers import generate
    from ..data import records, shuffled
    from ..runtime import TorchRuntime
    from ..train import check

    settings = job.recipe.distill
    stream = shuffled(records(job.source, part="train", **job.data), seed=job.recipe.seed)
    with progress("answers", total=settings.prompts, unit="prompts") as advance:
        index = generate(
            job.answers,
            lambda: TorchRuntime(job.taught_by.folder, batch_size=job.recipe.evaluate.batch_size),
            stream,
            job.tokenizer,
            about={"teacher": job.taught_by.fingerprint(), "source": public_name(job.source)},
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
    """Ask the teacher once for all that the student will learn from, and measure what is lost by keeping part of it.

    That takes the pruned model, which is there in a run, and the teacher, where it was asked just now.
    """
    from itertools import chain, islice

    import torch

    from ..data import collate, heldout_rows, targets
    from ..signals import build, bytes_per_target
    from ..train import check

    settings = job.recipe.distill
    rows = check(batches=job.batches, heldout=job.heldout, settings=settings) * settings.batch
    held = heldout_rows(
        job.source, job.tokenizer, context=job.recipe.data.context, limit=settings.heldout_rows, **job.data
    )
    first = list(islice(job.batches, 64))
    value = 2 if torch.cuda.is_available() else 4  # bytes: a teacher is float32 on a processor
    sizes = {"keep": settings.keep, "vocab": job.vocab, "width": job.teacher.shape.hidden, "value": value}
    each = bytes_per_target(job.cached_of["kind"], **sizes)
    expected = each * (rows + len(held)) * int(targets(collate(first)).sum()) // len(first)
    asked: list[Any] = []

    def loaded() -> Any:
        asked.append(teacher_of(job))
        return asked[0]

    with progress("cache", total=rows + len(held), unit="rows") as advance:
        index = build(
            job.cache,
            loaded,
            chain(held, islice(job.batches, rows)),
            about=job.cached_of,
            batch_size=settings.micro_batch,
            expected=expected,
            progress=advance,
        )
    count = sum(shard["targets"] for shard in index["shards"])
    nbytes = sum(shard["bytes"] for shard in index["shards"])
    job.facts = {"folder": str(job.cache), "tokens": count, "bytes": nbytes, "bytes_per_token": nbytes / count}
    told = f"{count:,} tokens in {job.cache}, {nbytes / count:.0f} bytes a token"
    if not asked or not job.run.pruned.is_dir():
        return told
    job.facts["gap"] = _gap(job, asked[0])
    return f"{told}; the pruned model's held-out loss is {job.facts['gap']:+.3%} off the teacher's own"


def _gap(job: Job, teacher: Any) -> float:
    """By which share the pruned model's held-out loss from the cache is off the one beside the teacher."""
    import torch

    from ..checkpoint import load_model
    from ..distill import distillation_loss
    from ..signals import Cached, Online

    settings = job.recipe.distill.model_copy(update={"ce_weight": 0.0})
    student = load_model(job.run.pruned, dtype=torch.float32, device=teacher.device)
    sums = []
    for signal in (Online(teacher), Cached(job.cache, job.cached_of)):
        loss = distillation_loss(signal, settings=settings, vocab=job.vocab)
        with torch.no_grad():
            batches = ({name: value.to(teacher.device) for name, value in batch.items()} for batch in job.heldout)
            sums.append(sum(loss(student, batch).loss.item() for batch in batches))
    return sums[1] / sums[0] - 1


def teacher_of(job: Job) -> Any:
    """The teacher to learn from, loaded and frozen."""
    from .. import teacher

    return teacher.load(job.taught_by.folder)


def _learner(job: Job) -> Any:
    """The teacher to learn from, which goes on learning."""
    from .. import teacher

    recipe = job.recipe
    precision, seed = recipe.distill.precision, recipe.seed
    return teacher.to_correct(job.teacher.folder, settings=recipe.correct, precision=precision, seed=seed)


def _signal(job: Job, settings: Distill) -> Any:
    """What the method knows of the teacher."""
    from ..signals import Cached, Online

    if settings.method in ("sft", "seqkd"):
        return None
    if settings.signal == "online":
        return Online(_learner(job), learns=True) if job.recipe.correct.beside else Online(teacher_of(job))
    return Cached(job.cache, job.cached_of)


def _hidden(job: Job, settings: Distill) -> Any:
    """The loss on hidden states, where the recipe or a large cut in depth asks for it."""
    from ..losses import HiddenLoss, paper_pairs
    from ..scores import Scores
    from ..surgery import select

    teacher, student = job.teacher.shape, job.shape
    measure = settings.hidden_loss
    if measure == "auto":
        deep = student.num_layers <= teacher.num_layers * (1 - DEEP_CUT)
        measure = "cosine" if deep and settings.method == "kl" and settings.signal == "online" else "off"
    if measure == "off":
        return None
    pairs = paper_pairs(student.num_layers, teacher.num_layers)
    kept = select(Scores.load(job.run.scores), teacher, student)
    return HiddenLoss(pairs, channels=kept.hidden, teacher_width=teacher.hidden, measure=measure)


def start_phase(job: Job) -> Distill:
    """The settings of the start, with its share of the tokens."""
    options = job.recipe.onpolicy
    tokens = int(options.start_share * job.recipe.distill.tokens)
    asked = {"method": options.start, "tokens": tokens, "select": "loss", "divergence": "forward_kl"}
    return job.recipe.distill.model_copy(update=asked)


def own_phase(job: Job) -> Distill:
    """The settings of the training on the student's own answers: with its own batch, rates and intervals."""
    settings, options = job.recipe.distill, job.recipe.onpolicy
    tokens = settings.tokens - (start_phase(job).tokens if options.start != "none" else 0)
    own = {name: getattr(options, name) for name in ("batch", "lr", "warmup_steps", "eval_every")}
    return settings.model_copy(update=own | {"tokens": tokens, "min_lr": options.lr, "save_every": options.eval_every})


def start(job: Job) -> str:
    """Train the pruned model a little before its own answers count, and keep its best checkpoint."""
    result = _distilled(job, job.run.pruned, start_phase(job), job.run.checkpoints / "start")
    best = result.best_folder or job.run.pruned
    job.facts = {"tokens": result.tokens, "status": result.status, "seconds": round(result.seconds, 2)}
    job.facts["best"] = str(best.relative_to(job.run.folder)) if best != job.run.pruned else job.run.pruned.name
    return result.describe()


def distill_student(job: Job) -> str:
    """Train the student by the recipe's method; the best checkpoint becomes the student.

    Where alignment follows it is put aside for that.
    """
    from ..checkpoint import load_tokenizer
    from ..data import check_same_tokens

    check_same_tokens(job.tokenizer, load_tokenizer(job.run.pruned))
    settings, folder = job.recipe.distill, job.run.checkpoints
    if settings.method in ON_POLICY:
        result = _on_policy(job, folder)
    else:
        result = _distilled(job, job.run.pruned, settings, folder, metrics=job.run.metrics, judge=_judge(job))
    if RANK == 0:
        aligned = bool(job.recipe.align.stages)
        write_model(job, result.best_folder or job.run.pruned, job.run.distilled if aligned else job.run.student)
    # the training time of all sessions, where a kill came between
    seconds = {"seconds": round(result.seconds, 2)}
    job.facts = {"status": result.status, "summary": result.describe(), "tokens": result.tokens} | seconds
    if not job.recipe.correct.beside:
        return result.describe()
    found = job.facts["correction"] = _corrected_beside(job, result)
    return f"{result.describe()}; teacher's held-out loss {found['before']:.4f} -> {found['after']:.4f}"


def _corrected_beside(job: Job, result: TrainResult) -> dict[str, Any]:
    """What a stage of its own would note: the teacher's held-out loss at the first step and at the last."""
    found = [line["heldout_teacher_ce"] for line in result.history if "heldout_teacher_ce" in line]
    settings = job.recipe.correct
    told = {"mode": settings.mode, "when": settings.when, "used": found[-1] < found[0], "tokens": result.tokens}
    return told | {"before": found[0], "after": found[-1]}


def _distilled(job: Job, student: Path, settings: Distill, folder: Path, **options: Any) -> TrainResult:
    """Offline distillation by the run's rows."""
    from ..distill import distill

    return distill(
        student,
        signal=_signal(job, settings),
        batches=job.batches,
        heldout=job.heldout,
        settings=settings,
        folder=folder,
        seed=job.recipe.seed,
        vocab=job.vocab,
        hidden=_hidden(job, settings),
        teacher_lr=job.recipe.correct.lr,
        **options,
    )


def _on_policy(job: Job, folder: Path) -> TrainResult:
    """MiniLLM or GKD, from where the start left the student."""
    from .. import onpolicy
    from ..distill import distillation_loss
    from ..signals import Online

    settings, options, student = job.recipe.distill, job.recipe.onpolicy, job.run.pruned
    if options.start != "none":
        mark = job.run.done("start")
        assert mark is not None, "the stage start comes first"
        student = job.run.folder / mark["best"]
    settings = own_phase(job)
    prompts, references = job.prompts("train", settings.prompts)
    lengths = [len(ids) for ids in job.tokenizer(references, add_special_tokens=False)["input_ids"]]
    teacher = teacher_of(job)
    signal = Online(teacher)
    kl = settings.model_copy(update={"divergence": "forward_kl"})
    if settings.method == "minillm":
        tricks = onpolicy.tricks_of(options)
        own = onpolicy.minillm_objective(signal, tricks, job.vocab, settings.chunk_tokens)
        fixed = distillation_loss(None, settings=settings, vocab=job.vocab)
        if options.variant == "reference":  # the authors' code holds it to the teacher there, too
            both = kl.model_copy(update={"ce_weight": 0.5, "temperature": 1.0})
            fixed = distillation_loss(signal, settings=both, vocab=job.vocab)
    else:
        alone = settings.model_copy(update={"ce_weight": 0.0})  # its own answers are no labels
        tricks, own = None, distillation_loss(signal, settings=alone, vocab=job.vocab)
        fixed = distillation_loss(signal, settings=settings, vocab=job.vocab)
    heldout = distillation_loss(signal, settings=kl, vocab=job.vocab)
    return onpolicy.distill(
        student,
        teacher=teacher,
        losses=onpolicy.Losses(own, fixed, heldout),
        tricks=tricks,
        prompts=prompts,
        answer_tokens=sum(min(length, settings.max_new_tokens) for length in lengths) / len(lengths),
        tokenizer=job.tokenizer,
        batches=job.rows_anew,
        heldout=job.heldout,
        settings=settings,
        options=options,
        folder=folder,
        judge=_judge(job),
        seed=job.recipe.seed,
        vocab=job.vocab,
        metrics=job.run.metrics,
    )


def is_judged(settings: Distill) -> bool:
    """Whether what the student writes chooses its checkpoint."""
    return settings.select == "rouge_l" or (settings.select == "auto" and settings.method in ON_POLICY)


def _judge(job: Job) -> Judge | None:
    """How the student's writing is judged while it is trained, where that chooses the checkpoint."""
    from ..evaluate.generation import collapsed, writing
    from ..runtime import TorchRuntime
    from ..train import Judge

    settings = job.recipe.distill
    if not is_judged(settings):
        return None
    # others than those the student is judged by in the end
    prompts, references = job.prompts("heldout", settings.judged_prompts, after=job.recipe.evaluate.prompts)

    def measure(student: Any) -> dict[str, float]:
        runtime = TorchRuntime.around(student, job.tokenizer, batch_size=job.recipe.onpolicy.sample_rows)
        return writing(runtime, prompts, references, max_new_tokens=settings.max_new_tokens)

    return Judge(
        measure, lambda line: collapsed(repetition=line["repetition"], length_drift=line["length_drift"]), "rouge_l"
    )


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
