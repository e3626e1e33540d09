"""What a run would do, from configs alone: shapes side by side, and memory, FLOPs and time of each stage.

FLOPs are counted, memory is reasoned (the formulas and what they assume stand in the docstrings), and time is
FLOPs over a matmul rate that is measured on this machine when the plan is made, at the share of it that whole
models reach. Nothing is downloaded but a config.json, and that only for a Hub id whose config is not shipped.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .architecture import PUBLISHED, choose, named_config, parse_target
from .families import tensors
from .run import processes
from .shape import Shape
from .units import duration, size

if TYPE_CHECKING:
    from rich.console import Console

    from .recipe import Recipe

UTILISATION = 0.4  # assumed share of the measured matmul rate that whole models reach
DISK_BYTES_PER_SECOND = 0.5e9  # assumed; reading and writing checkpoints
TEXT_ROWS, TEXT_CHUNK = 8, 256  # rows of a forward pass over held-out text, and tokens whose logits exist at once
PRECISIONS = ("bf16", "int8", "int4")


@dataclass(frozen=True)
class Rate:
    """How fast this machine multiplies matrices (FLOP/s) and reads memory (bytes/s), measured just now."""

    device: str
    precision: str
    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class Stage:
    """One stage: its peak memory in bytes, its FLOPs, its time in seconds, and what the figures assume."""

    name: str
    memory_bytes: int
    flops: int
    seconds: float
    note: str
    disk_bytes: int = 0  # that it leaves in the run folder beside models


@dataclass(frozen=True)
class Plan:
    """What `plan` found; `to_dict` is its JSON."""

    source: str
    target: str
    recipe: Recipe  # with every number that follows from the models
    teacher: Shape
    student: Shape
    rate: Rate
    stages: tuple[Stage, ...]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def memory_bytes(self) -> int:
        return max(stage.memory_bytes for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: teacher and student (shape, counts, bytes), rate, stages and totals."""
        return {
            "source": self.source,
            "target": self.target,
            "teacher": _describe(self.teacher),
            "student": _describe(self.student),
            "tokens": {"distill": self.recipe.distill.tokens},
            "recipe": self.recipe.model_dump(mode="json"),
            "rate": asdict(self.rate) | {"utilisation": UTILISATION},
            "stages": [asdict(stage) for stage in self.stages],
            "memory_bytes": self.memory_bytes,
            "seconds": self.seconds,
        }


def plan(recipe: Recipe) -> Plan:
    """Choose the student for `recipe.target` and estimate every stage of the recipe, from configs alone.

    The teacher is a folder with a config.json, the name or the Hub id of a published shape (shipped, no
    network), `demo`, or another Hub id (its config.json is downloaded). Measures the matmul rate, which takes
    about a second. Raises UserError for an unknown teacher, family or target.
    """
    from .recipe import resolve  # pydantic waits until there is a recipe

    config = teacher_config(recipe.teacher)
    teacher = Shape.from_config(config)
    student = choose(parse_target(recipe.target), teacher)
    positions = config.get("max_position_embeddings") or recipe.data.context
    sizes = {"teacher": teacher, "student": student, "max_positions": positions}
    recipe = resolve(recipe, **sizes, processes=processes())
    rate = measure_rate(precision=recipe.distill.precision)
    return Plan(
        source=recipe.teacher,
        target=recipe.target,
        recipe=recipe,
        teacher=teacher,
        student=student,
        rate=rate,
        stages=estimate(recipe, teacher=teacher, student=student, rate=rate),
    )


def hub_name(source: str) -> str:
    """The Hub id of a published shape's name; any other source as it is. A folder of that name comes first."""
    return source if Path(source).exists() else PUBLISHED.get(source.lower(), source)


def teacher_config(source: str) -> dict[str, Any]:
    """The config of a teacher, without its weights; a folder comes first, then the published shapes."""
    if not Path(source, "config.json").is_file():
        hub_ids = {hub_id.lower(): name for name, hub_id in PUBLISHED.items()}
        name = hub_ids.get(source.lower(), source.lower())
        if name in PUBLISHED:
            return named_config(name)
    from .checkpoint import read_config

    return read_config(source)


def measure_rate(*, precision: str = "auto", seconds: float = 0.5) -> Rate:
    """Measure square matmuls and plain copies for about `seconds` each, on the GPU if there is one.

    `auto` is bf16 on a GPU and fp32 on a CPU, as in training. The best of several rounds counts: a busy
    machine only ever makes a round slower.
    """
    import torch

    cuda = torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if cuda else "fp32"
    device = torch.device("cuda" if cuda else "cpu")
    width = 8192 if cuda else 512
    left = torch.randn(width, width, device=device).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    buffer = torch.ones(2**30 if cuda else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(buffer)

    def best(work: Any) -> float:
        """Seconds of the fastest of the rounds that fit, after one that warms up."""
        fastest = float("inf")
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < 2 or time.perf_counter() < end:
            start = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            if rounds:
                fastest = min(fastest, time.perf_counter() - start)
            rounds += 1
        return fastest

    with torch.no_grad():
        matmul = best(lambda: left @ left)
        copy = best(lambda: target.copy_(buffer))
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    return Rate(name, precision, 2 * width**3 / matmul, 2 * buffer.numel() / copy)


def estimate(recipe: Any, *, teacher: Shape, student: Shape, rate: Rate) -> tuple[Stage, ...]:
    """The stages in order: teacher, importance, surgery; correct, answers, cache or the student's own answers where the
    recipe has them; distill; align if asked for; evaluate. Pure; one device is assumed.
    """
    from .recipe import ON_POLICY

    value = 2 if rate.precision == "bf16" else 4
    held = 4 if rate.device.startswith("CPU") else value  # a teacher is float32 on a processor whatever the precision
    settings = recipe.distill
    asked: tuple[Stage, ...] = ()
    if settings.method == "seqkd":
        asked = (_answers(recipe, teacher, rate, held),)
    elif settings.method == "kl" and settings.signal != "online":
        asked = (_cache(recipe, teacher, rate, value, held),)
    elif settings.method in ON_POLICY:
        asked = (_own_answers(recipe, teacher, student, rate, held),)
    return (
        _teacher(teacher, held),
        _importance(recipe, teacher, student, rate, value, held),
        _surgery(teacher, student),
        *([_correct(recipe, teacher, rate, held)] if recipe.correct.before else []),
        *asked,
        _distill(recipe, teacher, student, rate, value, held),
        *([_align(recipe, teacher, student, rate, held)] if recipe.align.stages else []),
        _evaluate(recipe, teacher, student, rate, held),
    )


def distill_flops_per_token(teacher: Shape, student: Shape, *, context: int, checkpointing: bool = False) -> int:
    """FLOPs of one distilled token: 6 N_student + 2 N_teacher, plus attention over `context` / 2 keys.

    N counts the weights of all matrices with lm_head. Gradient checkpointing runs the student's forward pass
    once more: 8 N_student.
    """
    passes = 4 if checkpointing else 3
    return passes * student.flops_per_token(context / 2) + teacher.flops_per_token(context / 2)


def activation_bytes(shape: Shape, *, tokens: int, precision: str, checkpointing: bool = False) -> int:
    """Bytes that the layers keep for the backward pass of `tokens` tokens, as stock transformers saves them.

    Per layer and token, in values: two norms keep their input, the normed input and the output (3 hidden
    each); attention keeps q, k, v and its output (no score matrix: fused attention); norms on q and k keep
    their input and the normed input; the MLP keeps gate, its activation, up and the product (4 ffn). Under
    bf16 autocast the residual stream, the norms and the rotated q and k stay in fp32, and matrix inputs are 2
    bytes. With checkpointing each layer keeps its fp32 input, and one layer at a time has the rest.
    """
    value = 2 if precision == "bf16" else 4
    attention = 8 * (shape.size("heads") + shape.size("kv_heads")) + 4 * shape.num_heads
    if shape.qk_norm:
        attention += (4 + value) * (shape.size("heads") + shape.size("kv_heads"))
    norms = 2 * (8 + value) * shape.hidden + 8
    layer = norms + attention + 4 * value * shape.ffn
    if checkpointing:
        return tokens * (4 * shape.hidden * shape.num_layers + layer)
    return tokens * layer * shape.num_layers


def _forward_bytes(shape: Shape, *, tokens: int, value: int) -> int:
    """Peak of a forward pass that keeps nothing: the residual stream beside either attention or the MLP."""
    widest = max(3 * shape.size("heads") + 2 * shape.size("kv_heads"), 3 * shape.ffn)
    return tokens * (8 * shape.hidden + value * widest)


def _teacher(teacher: Shape, held: int) -> Stage:
    """Reading the weights once; a download, if there is one, is not counted."""
    stored = teacher.nbytes("bf16")
    return Stage(
        "teacher",
        held * teacher.parameters,
        0,
        stored / DISK_BYTES_PER_SECOND,
        "weights read once, 2 bytes each on disk; no download counted",
    )


def _importance(recipe: Any, teacher: Shape, student: Shape, rate: Rate, value: int, held: int) -> Stage:
    """Forward passes over the calibration samples; when layers go, once more per block that could be removed.

    First and last layers stay, so a block of n layers has (layers - n - 1) places; each is tried on
    `depth_samples`. Memory: the teacher, one batch in flight, fp32 scores, and when blocks are tried the
    logits of 256 tokens, twice (with their log-softmax).
    """
    settings, context = recipe.importance, recipe.data.context
    flops = settings.samples * context * teacher.flops_per_token(context / 2)
    batch = settings.batch_size * context
    memory = held * teacher.parameters + _forward_bytes(teacher, tokens=batch, value=value)
    memory += 4 * (teacher.hidden + teacher.num_layers * (teacher.ffn + teacher.num_heads + 1))
    note = f"{settings.samples:,} samples of up to {context:,} tokens, forward only"
    if student.num_layers < teacher.num_layers and settings.depth == "perplexity":
        blocks = student.num_layers - 1
        shorter = replace(teacher, num_layers=student.num_layers)
        flops += blocks * settings.depth_samples * context * shorter.flops_per_token(context / 2)
        memory += 2 * 4 * min(256, batch) * teacher.vocab
        note += f"; {settings.depth_samples:,} samples for each of {blocks} blocks that could go"
    return Stage("importance", memory, flops, _compute_seconds(flops, rate), note)


def _surgery(teacher: Shape, student: Shape) -> Stage:
    """Slicing holds a few chunks of 2 MiB; the check then loads the student as stored."""
    moved = teacher.nbytes("bf16") + 2 * student.nbytes("bf16")
    return Stage(
        "surgery",
        student.nbytes("bf16"),
        0,
        moved / DISK_BYTES_PER_SECOND,
        "slicing itself holds a few MiB; then the student is loaded for a check",
    )


def _answers(recipe: Any, teacher: Shape, rate: Rate, held: int) -> Stage:
    """The teacher's answers: an upper bound, with prompts of half a context and answers of `max_new_tokens`."""
    settings, context = recipe.distill, recipe.data.context
    batch, answer = recipe.evaluate.batch_size, settings.max_new_tokens
    seen = min(context, context // 2 + answer)
    flops = settings.prompts * seen * teacher.flops_per_token(seen / 2)
    cache = batch * seen * teacher.kv_bytes_per_token(held)
    read = -(-settings.prompts // batch) * answer * (held * teacher.parameters + cache)
    disk = 4 * settings.prompts * seen
    return Stage(
        "answers",
        held * teacher.parameters + cache,
        flops,
        _compute_seconds(flops, rate) + read / rate.bytes_per_second,
        f"{settings.prompts:,} prompts, {answer:,} new tokens each; {size(disk)} on disk; upper bound",
        disk,
    )


def _cache(recipe: Any, teacher: Shape, rate: Rate, value: int, held: int) -> Stage:
    """One forward pass of the teacher over all rows, and what is kept of them if every token is a target."""
    from .signals import bytes_per_target

    settings, context = recipe.distill, recipe.data.context
    tokens = settings.tokens + settings.heldout_rows * context
    flops = tokens * teacher.flops_per_token(context / 2)
    each = bytes_per_target(settings.signal, keep=settings.keep, vocab=teacher.vocab, width=teacher.hidden, value=held)
    memory = held * teacher.parameters + _forward_bytes(teacher, tokens=settings.micro_batch * context, value=value)
    seconds = _compute_seconds(flops, rate) + tokens * each / DISK_BYTES_PER_SECOND
    note = f"{tokens:,} tokens once through the teacher, {each:,} bytes each: {size(tokens * each)} on disk at most"
    return Stage("cache", memory, flops, seconds, note, tokens * each)


def _own_answers(recipe: Any, teacher: Shape, student: Shape, rate: Rate, held: int) -> Stage:
    """What gkd and minillm sample while they train: each new token reads the student, and the teacher where it has a
    share, with their KV caches; and what it writes alone to be judged. Answers are taken to be `max_new_tokens` long,
    and prompts half a context.
    """
    settings, own, context = recipe.distill, recipe.onpolicy, recipe.data.context
    phase = _phases(recipe)[-1]
    answers = round(phase.tokens / context * own.share / own.inner_epochs)
    judged = phase.checks * settings.judged_prompts
    seen = min(context, context // 2 + settings.max_new_tokens)
    drawn = [(student, 4, answers + judged)]
    if settings.method == "minillm" and own.teacher_share:
        drawn.append((teacher, held, answers))
    flops = sum(count * seen * model.flops_per_token(seen / 2) for model, _, count in drawn)
    caches = read = 0
    for model, value, count in drawn:
        cache = own.sample_rows * seen * model.kv_bytes_per_token(value)
        caches += cache
        read += -(-count // own.sample_rows) * settings.max_new_tokens * (value * model.parameters + cache)
    return Stage(
        "rounds",
        held * teacher.parameters + 16 * student.parameters + caches,
        round(flops),
        _compute_seconds(flops, rate) + read / rate.bytes_per_second,
        f"{answers:,} answers of the student's own, beside its training, and {judged:,} to judge it by",
    )


class Phase(NamedTuple):
    """One training: its tokens, its steps if every row is a whole context, and how often it is judged."""

    tokens: int
    steps: int
    checks: int


def _phase(tokens: int, section: Any, context: int) -> Phase:
    steps = -(-tokens // (section.batch * context))
    return Phase(tokens, steps, 1 + -(-steps // section.eval_every))


def _phases(recipe: Any) -> list[Phase]:
    """What the student learns by: a start and its own answers, or one phase."""
    from .recipe import ON_POLICY

    settings, own, context = recipe.distill, recipe.onpolicy, recipe.data.context
    if settings.method not in ON_POLICY:
        return [_phase(settings.tokens, settings, context)]
    begun = int(own.start_share * settings.tokens) if own.start != "none" else 0
    start = [_phase(begun, settings, context)] if begun else []
    return [*start, _phase(settings.tokens - begun, own, context)]


def _distill(recipe: Any, teacher: Shape, student: Shape, rate: Rate, value: int, held: int) -> Stage:
    """The teacher frozen beside the student in training, and held-out loss at every evaluation. No teacher is there
    for sft and seqkd, nor where what it said is read from a cache.

    Memory: teacher weights as they are held; 16 bytes per student weight (fp32 weight, gradient and
    the two moments of AdamW) and 2 more for the bf16 copy under autocast, and the same for what is trained of a teacher
    that is corrected beside it; activations of one micro-batch; and
    the larger of the teacher's forward pass and the fused loss, which holds `chunk_tokens` rows of logits of
    both models and their gradients in fp32 (four tensors of rows x vocab), a gradient of lm_head, and final
    hidden states of both models with the student's gradient. No tensor of tokens x vocab is ever whole.
    """
    settings, context = recipe.distill, recipe.data.context
    checkpointing = bool(settings.gradient_checkpointing)
    micro = settings.micro_batch * context
    beside = settings.method not in ("sft", "seqkd") and settings.signal == "online"
    per_token = distill_flops_per_token(teacher, student, context=context, checkpointing=checkpointing)
    if not beside:
        per_token -= teacher.flops_per_token(context / 2)
    elif recipe.correct.beside:  # its forward pass is there already
        per_token += (_passes(recipe) - 1) * teacher.flops_per_token(context / 2)
    phases = _phases(recipe)
    steps = sum(phase.steps for phase in phases)
    heldout = sum(phase.checks for phase in phases) * settings.heldout_rows * context
    both = beside * teacher.flops_per_token(context / 2) + student.flops_per_token(context / 2)
    flops = settings.tokens * per_token + heldout * both

    states = (18 if rate.precision == "bf16" else 16) * student.parameters
    kept = activation_bytes(student, tokens=micro, precision=rate.precision, checkpointing=checkpointing)
    loss = 4 * (4 * settings.chunk_tokens * teacher.vocab + student.vocab * student.hidden)
    loss += 4 * micro * (2 * student.hidden + teacher.hidden)
    passing = max(loss, beside * _forward_bytes(teacher, tokens=micro, value=value))
    taught = beside * held * teacher.parameters
    if beside and recipe.correct.beside:
        taught = _learning_bytes(recipe, teacher, rate, held)
        taught += 4 * teacher.vocab * teacher.hidden * (recipe.correct.mode == "full")  # the gradient of its head
        kept += activation_bytes(teacher, tokens=micro, precision=rate.precision, checkpointing=checkpointing)
    note = (
        f"{settings.tokens:,} tokens in at least {steps:,} steps, {per_token:,} FLOPs per token; "
        f"{f'teacher {size(taught)}' if beside else 'no teacher'}, student with AdamW {size(states)}, "
        f"activations {size(kept)}"
    )
    memory = taught + states + kept + passing
    return Stage("distill", memory, flops, _compute_seconds(flops, rate), note)


def _correct(recipe: Any, teacher: Shape, rate: Rate, held: int) -> Stage:
    """The teacher in training, as the student in `_distill`, but without another model beside it.

    full: 16 or 18 bytes a weight, 6 FLOPs a weight and token. lora and norms: the weights as they are held, as many
    bytes for each value that is trained, and 4 FLOPs, since no gradient of a frozen matrix is formed. Activations are
    counted as for full, an upper bound.
    """
    settings, context = recipe.correct, recipe.data.context
    training = settings.training(recipe.distill)
    trained = trained_parameters(teacher, settings)
    phase = _phase(settings.tokens, settings, context)
    heldout = phase.checks * training.heldout_rows * context
    flops = (_passes(recipe) * settings.tokens + heldout) * teacher.flops_per_token(context / 2)
    states = _learning_bytes(recipe, teacher, rate, held)
    micro = settings.micro_batch * context
    checkpointing = bool(training.gradient_checkpointing)
    kept = activation_bytes(teacher, tokens=micro, precision=rate.precision, checkpointing=checkpointing)
    loss = 4 * (4 * training.chunk_tokens * teacher.vocab + 2 * micro * teacher.hidden)
    if settings.mode == "full":
        loss += 4 * teacher.vocab * teacher.hidden
    note = f"{settings.mode}: {settings.tokens:,} tokens in {phase.steps:,} steps, {trained:,} weights trained"
    return Stage("correct", states + kept + loss, flops, _compute_seconds(flops, rate), note)


def _passes(recipe: Any) -> int:
    """Forward passes' worth of FLOPs that a teacher in training takes for a token."""
    return (3 if recipe.correct.mode == "full" else 2) + bool(recipe.distill.gradient_checkpointing)


def _learning_bytes(recipe: Any, teacher: Shape, rate: Rate, held: int) -> int:
    """A teacher in training: what is trained with AdamW, beside the weights that stay as they are."""
    states = (18 if rate.precision == "bf16" else 16) * trained_parameters(teacher, recipe.correct)
    return states if recipe.correct.mode == "full" else states + held * teacher.parameters


def trained_parameters(teacher: Shape, settings: Any) -> int:
    """How many values a correction (recipe.Correct) trains, by its mode."""
    matrices = [axes for name, axes in tensors(teacher) if "_proj." in name and len(axes) == 2]
    return {
        "full": teacher.parameters,
        "lora": settings.lora_rank * sum(teacher.size(axis) for axes in matrices for axis in axes),
        "norms": sum(teacher.size(axes[0]) for name, axes in tensors(teacher) if name.endswith("norm.weight")),
    }[settings.mode]


def _align(recipe: Any, teacher: Shape, student: Shape, rate: Rate, held: int) -> Stage:
    """Answers for pairs that are made, then training: an upper bound, with rows of a whole context.

    Every prompt is taken to give a pair; pairs from a data set are counted as `prompts`. A pair is two rows, read once
    more for the reference's log-probabilities. Memory: student with AdamW and the activations of one micro-batch, or
    both models with the answers' KV cache.
    """
    settings, context = recipe.align, recipe.data.context
    forward = student.flops_per_token(context / 2)
    flops = seconds = answering = 0
    if "sft" in settings.stages:
        flops += 3 * settings.sft_epochs * settings.examples * context * forward
    if "dpo" in settings.stages:
        flops += 2 * (3 * settings.dpo_epochs + 1) * settings.prompts * context * forward
    if "dpo" in settings.stages and settings.pairs is None:
        seen, together = context // 2 + settings.max_new_tokens, recipe.evaluate.batch_size
        for model, samples in ((teacher, 1), (student, settings.samples)):
            count = samples * settings.prompts
            flops += count * seen * model.flops_per_token(seen / 2)
            read = held * model.parameters + together * seen * model.kv_bytes_per_token(held)
            seconds += -(-count // together) * settings.max_new_tokens * read / rate.bytes_per_second
        cache = together * seen * teacher.kv_bytes_per_token(held)
        answering = held * teacher.parameters + 4 * student.parameters + cache
    rows = settings.micro_batch * context * (2 if "dpo" in settings.stages else 1)
    checkpointing = bool(recipe.distill.gradient_checkpointing)
    states = (18 if rate.precision == "bf16" else 16) * student.parameters
    kept = activation_bytes(student, tokens=rows, precision=rate.precision, checkpointing=checkpointing)
    note = f"{', then '.join(settings.stages)}; upper bound"
    return Stage("align", max(states + kept, answering), flops, _compute_seconds(flops, rate) + seconds, note)


def _evaluate(recipe: Any, teacher: Shape, student: Shape, rate: Rate, value: int) -> Stage:
    """Text and skills for teacher, pruned and student, the latter two with the teacher beside them for
    agreement.

    An upper bound: prompts are taken as half a context and every answer as `max_new_tokens` long. Decoding
    reads all weights and the KV cache once per token of a batch, and that bounds its time.
    """
    settings, context = recipe.evaluate, recipe.data.context
    answer = settings.max_new_tokens
    prompts = 4 * settings.prompts
    seen = context // 2 + answer
    models = (teacher, student, student, *([student] if recipe.align.stages else []))
    flops = settings.tokens * (
        len(models) * teacher.flops_per_token(context / 2) + (len(models) - 1) * student.flops_per_token(context / 2)
    ) + sum(prompts * seen * model.flops_per_token(seen / 2) for model in models)
    steps = -(-prompts // settings.batch_size) * answer
    read = sum(
        steps * (value * model.parameters + settings.batch_size * seen * model.kv_bytes_per_token(value))
        for model in models
    )
    text = _forward_bytes(teacher, tokens=TEXT_ROWS * context, value=value) + 2 * 4 * TEXT_CHUNK * teacher.vocab
    cache = settings.batch_size * seen * teacher.kv_bytes_per_token(value)
    memory = value * (teacher.parameters + student.parameters) + max(text, cache)
    seconds = _compute_seconds(flops, rate) + read / rate.bytes_per_second
    note = f"{settings.tokens:,} held-out tokens and {prompts:,} prompts, {len(models)} models; upper bound"
    return Stage("evaluate", memory, flops, seconds, note)


def _compute_seconds(flops: int, rate: Rate) -> float:
    return flops / (UTILISATION * rate.flops_per_second)


def _describe(shape: Shape) -> dict[str, Any]:
    return {
        "parameters": shape.parameters,
        "embedding_parameters": shape.embedding_parameters,
        "other_parameters": shape.parameters - shape.embedding_parameters,
        "bytes": {precision: shape.nbytes(precision) for precision in PRECISIONS},
        "kv_bytes_per_token": shape.kv_bytes_per_token(),
        "flops_per_token": shape.flops_per_token(),
        "shape": shape.to_dict(),
    }


def render(plan: Plan, console: Console) -> None:
    """Print the plan as three tables and the assumptions behind them."""
    from rich.table import Table

    from .recipe import derived

    teacher, student = plan.teacher, plan.student
    shapes = Table(title=f"{plan.source} to {plan.target}", title_justify="left")
    shapes.add_column("", no_wrap=True)
    for heading in ("teacher", "student", "student / teacher"):
        shapes.add_column(heading, justify="right", no_wrap=True)
    figures = [
        (label, getattr(teacher, name), getattr(student, name))
        for label, name in (
            ("layers", "num_layers"),
            ("hidden", "hidden"),
            ("ffn", "ffn"),
            ("heads", "num_heads"),
            ("KV heads", "num_kv_heads"),
            ("head_dim", "head_dim"),
            ("vocabulary", "vocab"),
            ("parameters", "parameters"),
            ("  embedding and head", "embedding_parameters"),
        )
    ]
    rest = [model.parameters - model.embedding_parameters for model in (teacher, student)]
    figures.append(("  the rest", rest[0], rest[1]))
    for precision in PRECISIONS:
        figures.append((f"bytes at {precision}", teacher.nbytes(precision), student.nbytes(precision)))
    figures.append(("KV bytes per token, bf16", teacher.kv_bytes_per_token(), student.kv_bytes_per_token()))
    figures.append(("FLOPs per token, forward", teacher.flops_per_token(), student.flops_per_token()))
    for label, before, after in figures:
        shapes.add_row(label, f"{before:,}", f"{after:,}", f"{after / before:.1%}")
    console.print(shapes)

    stages = Table(title="stages", title_justify="left")
    for heading in ("stage", "memory", "FLOPs", "time"):
        stages.add_column(heading, justify="left" if heading == "stage" else "right", no_wrap=True)
    stages.add_column("note", overflow="fold")
    for stage in plan.stages:
        work = f"{stage.flops:.3g}" if stage.flops else "-"
        stages.add_row(stage.name, size(stage.memory_bytes), work, duration(stage.seconds), stage.note)
    total = sum(stage.flops for stage in plan.stages)
    stages.add_row("in all", size(plan.memory_bytes), f"{total:.3g}", duration(plan.seconds), "largest; sums")
    console.print(stages)
    settings = Table(title="settings, each to be changed with --set", title_justify="left")
    settings.add_column("key", no_wrap=True)
    settings.add_column("value", justify="right", no_wrap=True)
    for key, value in derived(plan.recipe).items():
        settings.add_row(key, f"{value:,}" if isinstance(value, int) else f"{value:g}")
    console.print(settings)
    rate = plan.rate
    console.print(
        f"Time: {rate.flops_per_second:.3g} FLOP/s in {rate.precision} matmuls, measured now on "
        f"{rate.device}; assumed: {UTILISATION:.0%} of that in whole models, one device, disks at "
        f"{size(int(DISK_BYTES_PER_SECOND))}/s. Bytes are the weights alone; block "
        "scales add 6 % (int8) to 12 % (int4).",
        highlight=False,
    )
