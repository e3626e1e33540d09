"""Recipe: every dial of a run, strict YAML in and out.

One dial, `target`, decides the rest; a field left out takes a default that fits the teacher (`resolve`), and the
resolved recipe is saved in the run folder before anything else happens. A stage is handed its own section only.
"""

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .errors import UserError
from .shape import Shape

Aggregation = Literal["l2", "mean", "var"]
# YAML 1.1 reads a bare off as false
Correction = Annotated[
    Literal["off", "full", "lora", "norms"], BeforeValidator(lambda value: "off" if value is False else value)
]


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values are checked and never coerced silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Section):
    """What the student learns from."""

    source: str | None = Field(
        None, description="Hub dataset id, JSONL, text or parquet file, a folder of them, or `demo`"
    )
    split: str = Field("train", description="split of a Hub dataset")
    context: int = Field(4096, gt=1, description="tokens per row")
    heldout_fraction: float = Field(0.01, gt=0, lt=0.5, description="share of the documents set aside, by hash")


class Importance(Section):
    """How the teacher's parts are ranked (Minitron, arXiv 2407.14679, section 2.2)."""

    samples: int = Field(1024, gt=0, description="calibration rows")
    batch_size: int = Field(1, gt=0, description="calibration rows per forward pass")
    batch: Aggregation = Field("l2", description="aggregation over rows")
    sequence: Aggregation = Field("mean", description="aggregation over the tokens of a row")
    depth: Literal["perplexity", "block_influence"] = Field(
        "block_influence", description="how a block of layers is judged"
    )
    scores: str | None = Field(None, description="scores.safetensors of an earlier run of the same teacher, to reuse")
    depth_samples: int = Field(64, gt=0, description="calibration rows for perplexity-on-removal")


class Correct(Section):
    """Whether the whole teacher is trained on the data that the student learns from (arXiv 2408.11796).

    What both trainings have and this section has not, such as precision, is as in distill. Beside the student, a step
    is one of distill's for both, and of these keys only mode, lr, peak_lr and lora_* have a part.
    """

    mode: Correction = Field(
        "off", description="full: every weight; lora: low-rank updates of the layers, merged; norms: their norms alone"
    )
    when: Literal["before", "beside"] = Field(
        "before", description="before the student learns, or beside it, from a teacher that gets better at each step"
    )
    tokens: int = Field(25_000_000, gt=0, description="training budget in tokens")
    batch: int = Field(64, gt=0, description="rows per optimizer step, over all processes")
    micro_batch: int = Field(1, gt=0, description="rows per forward pass")
    peak_lr: float = Field(1e-4, gt=0, description="peak learning rate that the teacher was once trained with")
    lr: float = Field(2e-5, gt=0, description="peak learning rate of the correction")
    min_lr: float = Field(1e-5, ge=0, description="learning rate at the end of the cosine")
    warmup_steps: int = Field(120, ge=0, description="steps of linear warm-up")
    eval_every: int = Field(50, gt=0, description="steps between held-out losses; the best checkpoint is kept")
    save_every: int = Field(50, gt=0, description="steps between checkpoints to resume from")
    lora_rank: int = Field(16, gt=0, description="rank of each update, for lora")
    lora_alpha: float = Field(32.0, gt=0, description="updates are scaled by lora_alpha / lora_rank")

    @property
    def before(self) -> bool:
        """Whether it is a training of its own."""
        return self.mode != "off" and self.when == "before"

    @property
    def beside(self) -> bool:
        """Whether it goes on while the student learns."""
        return self.mode != "off" and self.when == "beside"

    def training(self, distill: "Distill") -> "Distill":
        """All settings of the correction's training: these, and distill's where there are none here."""
        shared = type(self).model_fields.keys() & type(distill).model_fields.keys()
        return distill.model_copy(update={key: getattr(self, key) for key in shared})


class Distill(Section):
    """How the student learns from the teacher: forward KL on logits, alone, as in arXiv 2408.11796, unless told so."""

    method: Literal["kl", "sft", "seqkd", "gkd", "minillm"] = Field(
        "kl",
        description="kl: the teacher's distributions on the data; sft: the data alone; seqkd: the teacher's answers; "
        "gkd and minillm: the student's own answers, see onpolicy",
    )
    signal: Literal["online", "topk", "sampled", "hidden"] = Field(
        "online",
        description="the teacher beside the student, or what a cache keeps of it: its likeliest ids, drawn ids, "
        "its final hidden states",
    )
    cache: str | None = Field(None, description="folder of the cache; cache/ in the run folder unless given")
    prompts: int = Field(
        10_000, gt=0, description="prompts answered by the teacher (seqkd) or the student (gkd, minillm)"
    )
    max_new_tokens: int = Field(256, gt=0, description="longest answer to them")
    sampling_temperature: float = Field(0.0, ge=0, description="of the teacher's answers, for seqkd; 0 is greedy")
    keep: int = Field(64, gt=0, description="ids that a cache keeps of each token's distribution")
    tokens: int = Field(100_000_000, gt=0, description="training budget in tokens")
    batch: int = Field(64, gt=0, description="rows per optimizer step, over all processes")
    micro_batch: int = Field(1, gt=0, description="rows per forward pass")
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    min_lr: float = Field(1e-5, ge=0, description="learning rate at the end of the cosine")
    warmup_steps: int = Field(40, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    hidden_loss: Literal["auto", "off", "cosine", "mse"] = Field(
        "auto", description="hold hidden states to the teacher's too; auto: cosine where a third of the layers is cut"
    )
    divergence: Literal["forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "jsd", "total_variation"] = (
        Field("forward_kl", description="how the student's distribution is held to the teacher's")
    )
    mix: float | None = Field(
        None, gt=0, lt=1, description="weight inside a skew divergence (0.1 unless given) or the JSD (0.5)"
    )
    temperature: float = Field(
        1.0, gt=0, description="softens teacher and student alike; the loss is scaled by its square"
    )
    ce_weight: float = Field(
        0.0, ge=0, le=1, description="share of cross-entropy on the data; the rest is KL divergence"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, fp32 elsewhere")
    gradient_checkpointing: bool = Field(False, description="trade a third more compute for the memory of activations")
    eval_every: int = Field(50, gt=0, description="steps between held-out losses; the best checkpoint is kept")
    save_every: int = Field(50, gt=0, description="steps between checkpoints to resume from")
    heldout_rows: int = Field(64, gt=0, description="rows of the held-out loss")
    select: Literal["auto", "loss", "rouge_l"] = Field(
        "auto",
        description="chooses the best checkpoint; rouge_l: of sampled answers to held-out prompts, and training ends "
        "where these run away in length or repetition; auto: rouge_l for gkd and minillm",
    )
    judged_prompts: int = Field(64, gt=0, description="held-out prompts answered for it")
    chunk_tokens: int = Field(128, gt=0, description="tokens whose logits exist at one time")


class OnPolicy(Section):
    """How the student learns from its own answers (gkd: arXiv 2306.13649; minillm: arXiv 2306.08543)."""

    start: Literal["sft", "kl", "none"] = Field("sft", description="how the student is trained beforehand")
    start_share: float = Field(0.5, gt=0, lt=1, description="of distill.tokens, for that start")
    share: float = Field(0.5, gt=0, le=1, description="of a step's rows that are its answers; the rest are the data")
    batch: int = Field(128, gt=0, description="rows per optimizer step, answers and data, over all processes")
    lr: float = Field(5e-6, gt=0, description="learning rate, constant after the warm-up")
    warmup_steps: int = Field(10, ge=0, description="steps of linear warm-up")
    eval_every: int = Field(20, gt=0, description="steps between judgements; each leaves a checkpoint")
    answers: int = Field(256, gt=0, description="answers of a round, which are trained on before others are sampled")
    inner_epochs: int = Field(4, gt=0, description="how often a round's answers are trained on")
    sample_rows: int = Field(64, gt=0, description="answers sampled together")
    temperature: float = Field(1.0, gt=0, description="of the answers")
    teacher_share: float = Field(0.2, ge=0, lt=1, description="minillm: of the teacher, in sampling")
    importance: Literal["token", "sequence", "off"] = Field(
        "token", description="minillm: how answers that the teacher had a share in are weighed"
    )
    single_step: bool = Field(True, description="minillm: the next token's divergence exactly")
    length_norm: bool = Field(True, description="minillm: rewards per token still to come")
    clip: float | None = Field(0.2, gt=0, description="minillm: PPO's bound within a round; null: none")
    anchor: float = Field(1.0, ge=0, description="minillm: weight of the language-modelling loss on the data")
    variant: Literal["paper", "reference"] = Field(
        "paper", description="minillm: as printed, or as in the authors' code, where the two differ"
    )


class Align(Section):
    """What follows distillation: fine-tuning on chats, then preference tuning; nothing unless asked for."""

    stages: list[Literal["sft", "dpo"]] = Field([], description="sft, dpo, or both in that order; empty: no alignment")
    data: str | None = Field(None, description="chats for sft, as data.source, which they are unless given")
    examples: int = Field(10_000, gt=0, description="chats that sft reads")
    sft_epochs: int = Field(1, gt=0, description="times that sft reads them")
    sft_lr: float = Field(1e-5, gt=0, description="peak learning rate of sft")
    pairs: str | None = Field(
        None, description="prompt, chosen, rejected: Hub id, JSONL, parquet; made from the models' answers unless given"
    )
    tasks: str | None = Field(
        None, description="JSONL of tasks with checks that made pairs start from; the built-in ones unless given"
    )
    prompts: int = Field(4000, gt=0, description="tasks that made pairs start from")
    samples: int = Field(
        4, gt=0, description="answers that the student draws to each of them, beside the teacher's one"
    )
    temperature: float = Field(1.0, gt=0, description="at which it draws them")
    max_new_tokens: int = Field(128, gt=0, description="longest answer; one that is cut is never preferred")
    dpo_epochs: int = Field(1, gt=0, description="times that dpo reads the pairs")
    dpo_lr: float = Field(5e-7, gt=0, description="peak learning rate of dpo")
    beta: float = Field(0.1, gt=0, description="how tightly dpo holds the student to what it was")
    nll_weight: float = Field(
        0.1, ge=0, description="of the preferred answers' own loss beside dpo's, so that they do not become less likely"
    )
    batch: int = Field(32, gt=0, description="chats or pairs per optimizer step, over all processes")
    micro_batch: int = Field(1, gt=0, description="chats or pairs per forward pass")
    heldout: int = Field(128, gt=0, description="chats or pairs held out; of pairs a tenth at most")


class Evaluate(Section):
    """How teacher, pruned model and student are judged."""

    tokens: int = Field(100_000, gt=0, description="held-out tokens for perplexity, KL divergence and top-1 agreement")
    prompts: int = Field(100, gt=0, description="tasks per skill")
    batch_size: int = Field(32, gt=0, description="prompts answered together")
    max_new_tokens: int = Field(128, gt=0, description="longest answer")


class Export(Section):
    """What the finished student is turned into, and the device it is held to."""

    formats: list[str] = Field([], description="such as onnx-int4 or gguf-q8_0; each is verified and measured")
    device: str | None = Field(None, description="a device profile, see docs/bench.md; a missed budget is exit code 1")


class Recipe(Section):
    """A whole run. `teacher` and `target` are enough; the sections fill themselves."""

    teacher: str = Field("meta-llama/Llama-3.1-8B", description="Hub id, folder, or `demo` (embedded)")
    target: str = Field(description="4b, 350m, 50%, 2GiB@int4, layers=16, hidden=3072,ffn=9216, or a published shape")
    seed: int = Field(0, ge=0, description="of shuffling, sampling and initialisation")
    data: Data = Field(default_factory=Data)  # pyright: ignore[reportArgumentType] - every field has a default
    importance: Importance = Field(default_factory=Importance)  # pyright: ignore[reportArgumentType]
    correct: Correct = Field(default_factory=Correct)  # pyright: ignore[reportArgumentType]
    distill: Distill = Field(default_factory=Distill)  # pyright: ignore[reportArgumentType]
    onpolicy: OnPolicy = Field(default_factory=OnPolicy)  # pyright: ignore[reportArgumentType]
    align: Align = Field(default_factory=Align)  # pyright: ignore[reportArgumentType]
    evaluate: Evaluate = Field(default_factory=Evaluate)  # pyright: ignore[reportArgumentType]
    export: Export = Field(default_factory=Export)  # pyright: ignore[reportArgumentType]

    def to_yaml(self) -> str:
        """The whole recipe, keys in the order of the story."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            names += _keys(inner, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


KEYS = _keys(Recipe)


def reference_page() -> str:
    """docs/recipe.md: every key, its default, and what it means."""
    lines = [
        "# Recipe keys",
        "",
        "Written by `make docs` from `compressor/recipe.py`; a test holds the two equal. A number that is not set is",
        "fitted to the teacher and the target (see `resolve` there): the defaults below suit an 8B teacher.",
        "",
        "| key | default | meaning |",
        "|---|---|---|",
    ]
    for key in KEYS:
        section: type[BaseModel] = Recipe
        *path, last = key.split(".")
        for name in path:
            section = section.model_fields[name].annotation  # pyright: ignore[reportAssignmentType] - a Section
        field = section.model_fields[last]
        default = "required" if field.is_required() else field.default
        lines.append(f"| `{key}` | {default} | {field.description or ''} |")
    return "\n".join(lines) + "\n"


def _explain(error: ValidationError, origin: str) -> UserError:
    # a misspelt key first: it often is why another one is missing
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, [*KEYS, *Recipe.model_fields], n=1, cutoff=0.0)
        return UserError(f"{origin}: unknown key `{key}`; the nearest valid one is `{near[0]}`; rename or remove it")
    if first["type"] == "missing":
        return UserError(f"{origin}: `{key}` is missing; give it there or on the command line (--{key} ...)")
    return UserError(f"{origin}: `{key}` is {first.get('input')!r}; {first['msg']}; correct it")


def build(values: dict[str, Any], *, origin: str = "recipe") -> Recipe:
    """A checked Recipe from nested values. UserError names the bad key, and the nearest to an unknown one."""
    try:
        return Recipe.model_validate(_numbers(values))
    except ValidationError as error:
        raise _explain(error, origin) from None


def load_values(source: str) -> dict[str, Any]:
    """The nested values of a YAML file, or of a recipe shipped under that name. UserError where there is neither."""
    path = Path(source)
    shipped = resources.files("compressor") / "recipes"
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"could not read {source}: {error}; expected a YAML file in UTF-8") from None
    elif (named := shipped / f"{source}.yaml").is_file():
        text = named.read_text(encoding="utf-8")
    else:
        names = sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
        raise UserError(f"no recipe {source}; expected a YAML file or one of {', '.join(names)}")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML: {' '.join(str(error).split())}; correct it") from None
    if not isinstance(values, dict):
        raise UserError(f"{source} holds no recipe; expected keys such as `target: 50%`")
    return values


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested values of `over` laid over `base`; neither is changed."""
    both = {k: merged(base[k], over[k]) for k in over if isinstance(base.get(k), dict) and isinstance(over[k], dict)}
    return base | over | both


def set_value(values: dict[str, Any], assignment: str) -> None:
    """Apply one `section.key=value` (the value read as YAML) to nested values, in place."""
    key, equals, text = assignment.partition("=")
    if not equals:
        raise UserError(f"--set {assignment}: expected key=value, for example --set distill.lr=2e-4")
    *sections, last = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {assignment}: `{section}` is no section; expected one of {', '.join(KEYS)}")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {assignment}: {text!r} is not a value; quote it") from None


def _numbers(value: Any) -> Any:
    """Nested values, with 2e-3 a number wherever it stands."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        number = float(value)  # YAML 1.1 reads 2e-3 as a word
        return int(number) if number.is_integer() else number
    return value


ON_POLICY = ("gkd", "minillm")  # methods that learn from the student's own answers
_TRAINING = ("tokens", "batch", "micro_batch", "lr", "min_lr", "warmup_steps", "eval_every", "save_every")
BESIDE = ("peak_lr", "lr")  # of a correction, what is derived where it goes on beside the student
DERIVED = (
    ("data", "context"),
    ("importance", "batch_size"),
    *(("correct", key) for key in ("peak_lr", *_TRAINING)),
    *(("distill", key) for key in _TRAINING),
    *(("onpolicy", key) for key in ("batch", "lr", "warmup_steps", "eval_every", "answers", "inner_epochs")),
    *(("align", key) for key in ("sft_lr", "dpo_lr", "micro_batch")),
)
# of the teacher's own peak learning rate: the paper's fifth for all weights; what is fewer moves further, as measured
CORRECTION_LR = {"full": 0.2, "lora": 2.0, "norms": 5.0}


def resolve(recipe: Recipe, *, teacher: Shape, student: Shape, max_positions: int, processes: int = 1) -> Recipe:
    """Fill every number that was not set by hand with one that fits the models; what was set stays.

    tokens: half a token per parameter of the student, as Minitron's short retraining (1.8B tokens for 4B), a million
    at least. batch: so that there are 400 steps, also theirs, between 8 and 768 rows, an equal share for each of the
    processes. lr: 1e-4 at hidden 4096, inversely proportional to the hidden size (arXiv 2203.03466), 2e-3 at most.
    max_new_tokens of every section: half a context at most, so that a prompt has room.
    onpolicy: a step holds `batch` answers and as many rows of data, a round the answers of four steps, read four times,
    as MiniLLM's (256 of 64); GKD reads them once, and its divergence is the JSD. A correction: see `_correction`.
    Alignment: SFT goes on at the rate that distillation ended with, since a higher one undoes part of it; DPO's follows
    the same rule of width from 5e-7, what 7B models are tuned with (Zephyr, arXiv 2310.16944).
    """
    context = _chosen(recipe.data, "context", min(4096, max_positions))
    if context > max_positions:
        raise UserError(
            f"data.context is {context}, but the teacher knows {max_positions} positions; "
            "expected no more; lower data.context"
        )
    tokens = _chosen(recipe.distill, "tokens", max(1_000_000, student.parameters // 2))
    rows = min(768, max(8, round(tokens / context / 400)))
    batch = _chosen(recipe.distill, "batch", -(-rows // processes) * processes)
    steps = max(1, round(tokens / (batch * context)))
    lr = _chosen(recipe.distill, "lr", _usual_lr(student))
    fitting = max(1, 2**23 // (teacher.hidden * context))  # activations of a forward pass stay small beside the weights
    distill = {
        "tokens": tokens,
        "batch": batch,
        "micro_batch": _micro_batch(batch, processes, fitting),
        "max_new_tokens": min(recipe.distill.max_new_tokens, context // 2),
        "lr": lr,
        "min_lr": lr / 10,
        "warmup_steps": min(40, steps // 10),
        "eval_every": max(1, min(500, steps // 10)),
        "save_every": max(1, min(500, steps // 10)),
    }
    if recipe.distill.method == "gkd":
        distill["divergence"] = "jsd"
    rows = processes * _chosen(recipe.distill, "micro_batch", distill["micro_batch"])
    both = _chosen(recipe.onpolicy, "batch", batch if recipe.onpolicy.share == 1 else 2 * batch)
    own = max(1, round(recipe.onpolicy.share * (both // rows))) * rows  # answers of a step
    spent = 1 - recipe.onpolicy.start_share if recipe.onpolicy.start != "none" else 1
    own_steps = max(1, round(spent * tokens / (both * context)))
    onpolicy = {
        "batch": both,
        "lr": lr / 10,
        "warmup_steps": min(10, own_steps // 10),
        "eval_every": max(1, min(500, own_steps // 10)),
        "answers": 4 * own,
        "inner_epochs": 4 if recipe.distill.method == "minillm" else 1,
    }
    correct = {}
    if recipe.correct.mode != "off":
        correct = _correction(recipe.correct, teacher, tokens=tokens, batch=batch, context=context)
        correct["micro_batch"] = _micro_batch(_chosen(recipe.correct, "batch", batch), processes, fitting)
        if recipe.correct.beside:
            correct = {key: correct[key] for key in BESIDE}
    align = {
        "sft_lr": _chosen(recipe.distill, "min_lr", lr / 10) or lr / 10,
        "dpo_lr": min(1e-4, round(5e-7 * 4096 / student.hidden, 9)),
        "micro_batch": _micro_batch(recipe.align.batch, processes, max(1, fitting // 2)),
        "max_new_tokens": min(recipe.align.max_new_tokens, context // 2),
    }
    recipe = recipe.model_copy(
        update={
            "data": _filled(recipe.data, {"context": context}),
            "importance": _filled(recipe.importance, {"batch_size": fitting}),
            "correct": _filled(recipe.correct, correct),
            "distill": _filled(recipe.distill, distill),
            "onpolicy": _filled(recipe.onpolicy, onpolicy if recipe.distill.method in ON_POLICY else {}),
            "align": _filled(recipe.align, align if recipe.align.stages else {}),
            "evaluate": _filled(recipe.evaluate, {"max_new_tokens": min(recipe.evaluate.max_new_tokens, context // 2)}),
        }
    )
    for name in ("distill", "correct") if recipe.correct.before else ("distill",):
        section = getattr(recipe, name)
        if section.min_lr > section.lr:
            raise UserError(
                f"{name}.min_lr is {section.min_lr}; expected at most {name}.lr, {section.lr}; lower {name}.min_lr"
            )
    return recipe


def _correction(correct: Correct, teacher: Shape, *, tokens: int, batch: int, context: int) -> dict[str, Any]:
    """The numbers of a correction, after arXiv 2408.11796, from tokens and batch of the distillation.

    peak_lr: a checkpoint does not tell; the house's rule, at the teacher's hidden size. lr: a share of it, by mode.
    min_lr: a tenth of peak_lr, as a first training ends. tokens: a quarter of the distillation's, about the paper's
    100B of 380B. warmup_steps: 120, fewer where that were more than a tenth of the steps.
    """
    peak = _chosen(correct, "peak_lr", _usual_lr(teacher))
    lr = _chosen(correct, "lr", peak * CORRECTION_LR[correct.mode])
    tokens = _chosen(correct, "tokens", max(1, tokens // 4))
    batch = _chosen(correct, "batch", batch)
    steps = max(1, round(tokens / (batch * context)))
    return {
        "peak_lr": peak,
        "tokens": tokens,
        "batch": batch,
        "lr": lr,
        "min_lr": min(lr, peak / 10),
        "warmup_steps": min(120, steps // 10),
        "eval_every": max(1, min(500, steps // 10)),
        "save_every": max(1, min(500, steps // 10)),
    }


def _usual_lr(shape: Shape) -> float:
    return min(2e-3, round(1e-4 * 4096 / shape.hidden, 6))


def _micro_batch(batch: int, processes: int, fitting: int) -> int:
    share = max(1, batch // processes)  # rows of a step for each process
    return max(rows for rows in range(1, share + 1) if share % rows == 0 and rows <= fitting)


def derived(recipe: Recipe) -> dict[str, Any]:
    """The numbers that `resolve` fills, by their dotted keys, of the sections that have a part in the run."""
    wanted = {
        "correct": recipe.correct.mode != "off",
        "onpolicy": recipe.distill.method in ON_POLICY,
        "align": bool(recipe.align.stages),
    }
    shown = [(section, key) for section, key in DERIVED if wanted.get(section, True)]
    if recipe.correct.beside:
        shown = [(section, key) for section, key in shown if section != "correct" or key in BESIDE]
    return {f"{section}.{key}": getattr(getattr(recipe, section), key) for section, key in shown}


def _chosen(section: Section, key: str, derived: Any) -> Any:
    return getattr(section, key) if key in section.model_fields_set else derived


def _filled(section: Any, derived: dict[str, Any]) -> Any:
    return section.model_copy(update={k: v for k, v in derived.items() if k not in section.model_fields_set})


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The dotted keys in which two recipes differ."""

    def flat(section: BaseModel, prefix: str = "") -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name in type(section).model_fields:
            value = getattr(section, name)
            values |= flat(value, f"{prefix}{name}.") if isinstance(value, Section) else {prefix + name: value}
        return values

    before, after = flat(old), flat(new)
    return [key for key in before if before[key] != after[key]]
