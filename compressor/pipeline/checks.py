"""What is told of a recipe before anything is read or computed: settings that do not go together."""

from __future__ import annotations

from ..errors import UserError
from ..recipe import ON_POLICY, Correct, Distill, Recipe, Section
from ..run import rows_at_a_time
from .alignment import check_order


def check_recipe(recipe: Recipe) -> None:
    """Raise UserError for what can be told of the recipe as it was given."""
    _check_exports(recipe)
    _check_method(recipe.distill)
    _check_correction(recipe)
    check_order(recipe.align)


def check_numbers(recipe: Recipe) -> None:
    """Raise UserError for numbers that do not fit together, once all of them are known (`recipe.resolve`)."""
    settings, correct, align = recipe.distill, recipe.correct, recipe.align
    rows_at_a_time("distill", settings.batch, settings.micro_batch)
    if correct.before:
        rows_at_a_time("correct", correct.batch, correct.micro_batch)
    if align.stages:
        rows_at_a_time("align", align.batch, align.micro_batch)
    answers = settings.method in ("seqkd", *ON_POLICY) or settings.select == "rouge_l"
    if answers and settings.max_new_tokens >= recipe.data.context:
        raise UserError(
            f"distill.max_new_tokens is {settings.max_new_tokens} and data.context {recipe.data.context}; "
            "expected room for a prompt; lower distill.max_new_tokens"
        )
    if settings.method in ON_POLICY:
        from .. import onpolicy  # takes seconds to import

        onpolicy.check(settings, recipe.onpolicy)


def _check_method(settings: Distill) -> None:
    """Settings that do not go together, and those that would have no part, are told before anything is computed."""
    from ..losses import DIVERGENCES

    kl, labels = settings.method == "kl", settings.method in ("sft", "seqkd")
    cached, own = kl and settings.signal != "online", settings.method in ON_POLICY
    no_part = {
        "divergence": labels or settings.method == "minillm",
        "signal": labels,
        "cache": labels or not cached,
        "keep": labels or own or (kl and settings.signal in ("online", "hidden")),
        "mix": labels or settings.method == "minillm" or (kl and DIVERGENCES[settings.divergence].mix is None),
        "prompts": settings.method in ("kl", "sft"),
        "sampling_temperature": settings.method != "seqkd",
    }
    if settings.cache and kl and not cached:
        raise UserError(
            f"distill.cache is {settings.cache} and distill.signal online, which reads none; expected the signal that "
            "the cache was made with; give --signal topk, sampled or hidden"
        )
    for key, unused in no_part.items():
        if unused and _is_set(settings, key):
            raise UserError(
                f"distill.{key} is {getattr(settings, key)}, but has no part in distill.method {settings.method} "
                f"with signal {settings.signal} and divergence {settings.divergence}; expected it unset; leave it out"
            )
    online = settings.method == "kl" and settings.signal == "online"
    if own and settings.signal != "online":
        raise UserError(
            f"distill.method {settings.method} asks the teacher about answers that nobody knows beforehand and "
            f"distill.signal is {settings.signal}; expected online; leave --signal out"
        )
    if own and settings.select == "loss":
        raise UserError(
            f"distill.method {settings.method} lowers its loss even where its answers get worse and distill.select is "
            "loss; expected rouge_l or auto; leave it out"
        )
    if settings.hidden_loss in ("cosine", "mse") and not online:
        raise UserError(
            f"distill.hidden_loss {settings.hidden_loss} wants the teacher beside the student; expected method kl and "
            "signal online; leave hidden_loss out or choose those"
        )
    if settings.method == "kl" and settings.signal == "sampled" and settings.divergence != "forward_kl":
        raise UserError(
            f"distill.signal sampled is unbiased for forward_kl alone and distill.divergence is {settings.divergence}; "
            "expected forward_kl; choose another signal or that divergence"
        )


def _check_correction(recipe: Recipe) -> None:
    """Beside the student there is one training: the teacher has to be there, and settings of a second have no part."""
    settings, correct = recipe.distill, recipe.correct
    if correct.mode == "off" and (changed := [key for key in Correct.model_fields if _is_set(correct, key)]):
        raise UserError(
            f"correct.{changed[0]} is {getattr(correct, changed[0])}, but the teacher is not corrected; expected it "
            "unset; give --correct full, lora or norms, or leave it out"
        )
    if not correct.beside:
        return
    if settings.method != "kl" or settings.signal != "online":
        raise UserError(
            f"correct.when is beside, distill.method {settings.method} and distill.signal {settings.signal}; expected "
            "kl and online, where the teacher is there at every step; choose those or correct.when before"
        )
    for key in ("tokens", "batch", "micro_batch", "min_lr", "warmup_steps", "eval_every", "save_every"):
        if _is_set(correct, key):
            raise UserError(
                f"correct.{key} is {getattr(correct, key)}, but beside the student distill.{key} is for both; expected "
                "it unset; leave it out"
            )


def _is_set(section: Section, key: str) -> bool:
    """By value: a resolved recipe names every key."""
    return getattr(section, key) != type(section).model_fields[key].default


def _check_exports(recipe: Recipe) -> None:
    """A format or device that is not known is told before anything is computed."""
    if not recipe.export.formats and recipe.export.device is None:
        return
    import export

    for text in recipe.export.formats:
        export.parse(text)
    if recipe.export.device is not None:
        export.known_device(recipe.export.device)
        if not recipe.export.formats:
            raise UserError("export.device is set, but nothing is exported; expected --export FORMAT; name one")
