"""Is this artifact the student? Every check reads the finished files; the first one that fails says where they differ.

Weights are compared with the student's block by block, within the rounding of the format, so that one changed block
shows. Logits are compared with the student holding exactly the artifact's weights, so that rope, biases, norms and
the KV cache are held to the noise of the runtime's arithmetic, however coarse the weights are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoint import load_tokenizer
from compressor.errors import CheckFailed
from compressor.families import attention_window
from compressor.runtime import Runtime, TorchRuntime, name_of
from compressor.units import size

from .formats import Format, Model
from .probes import CONVERSATIONS, TEXTS
from .settings import Settings

SIZE_TOLERANCE = 0.03
# (tokens in all, tokens read at once) of the logit checks; cut to the model's context
LENGTHS = ((1, 1), (7, 7), (64, 64), (200, 200), (12, 1), (40, 17))
SPIKE = 5  # times the tolerance of all tokens: what one token's logits may differ by
GREEDY_TOKENS = 24
TIE = 10  # times the RMS error of a token's logits: how far two of them may be drawn apart by it
EQUAL = 1e-3  # of the spread: two logits this near are a tie
LONGEST = 1024  # tokens whose logits are compared


def verify(student: Path, folder: Path, settings: Settings, format: Format) -> tuple[list[dict[str, Any]], Runtime]:
    """Run every check; return what each found, [{"check", "detail", ...figures}], and the artifact's open runtime.

    Raises CheckFailed at the first that fails, and UserError where the artifact cannot be opened at all.
    """
    reference = TorchRuntime(student, dtype=torch.float32, device="cpu")
    results = [_sizes(student, folder, settings, format)]
    described = format.check_metadata(student, folder)
    results += [{"check": "metadata", "detail": described}] if described else []
    lengths = LENGTHS + _past_window(reference, results)
    for number, model in enumerate(format.models(student, folder, settings)):
        if number:  # the one before holds the weights of another file
            del reference
            reference = TorchRuntime(student, dtype=torch.float32, device="cpu")
        results.append(_weights(reference, model))
        for name, (start, tolerance) in model.runtimes.items():
            results.append(_logits(f"{model.name} in {name}", start(), reference, tolerance, lengths))
    results += [_tokenizer(folder, reference, settings, format), _template(folder, reference)]
    runtime = format.open(folder)
    if runtime.context != reference.context:
        raise CheckFailed(f"the context is {runtime.context} in the artifact and {reference.context} in the student")
    if runtime.stops != reference.stops:
        raise CheckFailed(
            f"an answer ends at {sorted(runtime.stops)} in the artifact, {sorted(reference.stops)} in the student"
        )
    tolerance = format.tolerance(settings.precision)
    results.append(_logits(name_of(runtime), runtime.cached_logits, reference, tolerance, lengths))
    results.append(_greedy(runtime, reference, tolerance))
    return results, runtime


def _past_window(reference: TorchRuntime, results: list[dict[str, Any]]) -> tuple[tuple[int, int], ...]:
    """A length beyond the window of attention, where there is one; told where it is too long to be checked."""
    window = attention_window(reference.model.config)
    if window is None:
        return ()
    length = min(window + 16, reference.context - 1)
    if length <= LONGEST:
        return ((length, length), (length, window // 2))
    words = f"attention beyond its window of {window} tokens was not compared: that takes more than {LONGEST} tokens"
    results.append({"check": "window", "detail": "not compared", "warning": words})
    return ()


def _sizes(student: Path, folder: Path, settings: Settings, format: Format) -> dict[str, Any]:
    """Bytes of weights on disk against arithmetic, file by file."""
    found, sizes = {}, []
    for name, (stored, expected) in format.sizes(student, folder, settings).items():
        if abs(stored / expected - 1) > SIZE_TOLERANCE:
            raise CheckFailed(
                f"{name} holds {stored:,} bytes of weights where arithmetic says {expected:,}; "
                f"expected them within {SIZE_TOLERANCE:.0%}"
            )
        found[name] = stored / expected
        sizes.append(f"{name} {size(stored)}")
    worst = max(found.values(), key=lambda ratio: abs(ratio - 1))
    return {"check": "size", "detail": f"{', '.join(sizes)}: {worst:.4f} of arithmetic", "ratio": worst}


def _weights(reference: TorchRuntime, model: Model) -> dict[str, Any]:
    """Every tensor is there, and every weight is one that rounds to what is stored; the reference takes them over."""
    file = model.name
    parameters = dict(reference.model.named_parameters())
    missing = set(parameters if model.required is None else model.required)
    squares = total = 0.0
    for name, value, low, high in model.weights:
        if name not in parameters or parameters[name].shape != value.shape:
            raise CheckFailed(f"{file} holds {name} of shape {tuple(value.shape)}, which the student does not have")
        weight = parameters[name].detach()
        outside = (weight < low) | (weight > high) | ~value.isfinite()
        if outside.any():
            at = tuple(int(i) for i in outside.nonzero()[0])
            raise CheckFailed(
                f"{name}{list(at)} is {weight[at]:.6g} in the student and {value[at]:.6g} in the artifact, more than "
                f"rounding explains ({low[at]:.6g} to {high[at]:.6g}), as are {int(outside.sum()) - 1} more weights"
            )
        squares += float((value - weight).double().square().sum())
        total += float(weight.double().square().sum())
        missing.discard(name)
        with torch.no_grad():
            parameters[name].copy_(value)
    if missing:
        raise CheckFailed(f"the artifact lacks {sorted(missing)[0]} and {len(missing) - 1} more tensors of the student")
    error = (squares / total) ** 0.5
    return {"check": f"weights of {file}", "detail": f"all within rounding, RMS error {error:.2%}", "rms_error": error}


def _tokenizer(folder: Path, reference: TorchRuntime, settings: Settings, format: Format) -> dict[str, Any]:
    """The same ids as the student's on every probe; a runtime that splits text by rules of its own is told apart."""
    student = reference.tokenizer
    wanted = [list(student(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    tokenizer = load_tokenizer(folder)
    for text, ids in zip(TEXTS, wanted, strict=True):
        found = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if found != ids:
            at = next(i for i, (one, two) in enumerate(zip([*ids, None], [*found, None], strict=False)) if one != two)
            raise CheckFailed(
                f"the tokenizer reads {text[:40]!a} otherwise from token {at}: {ids[at : at + 4]} in the student, "
                f"{found[at : at + 4]} in the artifact"
            )
    result: dict[str, Any] = {"check": "tokenizer", "detail": f"the same ids on {len(TEXTS)} texts"}
    for name, (encode, advice) in format.own_tokenizers(folder, settings).items():
        other = [text for text, ids in zip(TEXTS, wanted, strict=True) if encode(text) != ids]
        result[name] = 1 - len(other) / len(TEXTS)
        if other:
            differs = f"{name} splits {len(other)} of {len(TEXTS)} texts otherwise, first {other[0][:40]!a}"
            if advice is not None:
                raise CheckFailed(f"{differs}; {advice}")
            result["warning"] = f"{differs}; give it token ids, not text"
    return result


def _template(folder: Path, reference: TorchRuntime) -> dict[str, Any]:
    """The chat template's text, token for token."""
    student, tokenizer = reference.tokenizer, load_tokenizer(folder)
    if not student.chat_template:
        return {"check": "chat template", "detail": "the student has none"}
    for conversation in CONVERSATIONS:
        one, two = (
            list(t.apply_chat_template(conversation["messages"], add_generation_prompt=True, return_dict=False))
            for t in (student, tokenizer)
        )
        if one != two:
            raise CheckFailed(f"the chat template gives other ids for {conversation['messages'][0]['content']!a}")
    return {"check": "chat template", "detail": f"the same ids on {len(CONVERSATIONS)} conversations"}


def _probe_ids(reference: TorchRuntime, count: int) -> torch.Tensor:
    """Token ids drawn once and for all, of those the model knows."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, reference.model.config.vocab_size, (count,), generator=generator)


def _logits(
    name: str,
    forward: Callable[..., torch.Tensor],
    reference: TorchRuntime,
    tolerance: float,
    lengths: tuple[tuple[int, int], ...],
) -> dict[str, Any]:
    """Logits of whole prompts and of steps from the KV cache against torch, at several lengths."""
    worst = 0.0
    for length, prefill in lengths:
        length = min(length, reference.context - 1)
        prefill = min(prefill, length)
        ids = _probe_ids(reference, length)
        expected = reference.logits(ids)
        found = forward(ids, prefill=prefill)[:, : expected.shape[1]]
        error = _rms(found - expected) / float(expected.std())
        errors_T = (found - expected).square().mean(-1).sqrt() / expected.std(-1)
        place = int(errors_T.nan_to_num(nan=math.inf).argmax())
        spike = float(errors_T[place])
        if not (error <= tolerance and spike <= SPIKE * tolerance):
            allowed = f"at most {tolerance:g} expected, {SPIKE * tolerance:g} at one token"
            raise CheckFailed(
                f"logits of {name} differ from torch by {error:.3g} of their spread, by {spike:.3g} at token {place} "
                f"({allowed}), with {prefill} of {length} tokens read at once"
            )
        worst = max(worst, error)
    detail = f"{worst:.2g} of their spread at most, {tolerance:g} allowed"
    return {"check": f"logits of {name}", "detail": detail, "error": worst, "tolerance": tolerance}


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def _greedy(runtime: Runtime, reference: TorchRuntime, tolerance: float) -> dict[str, Any]:
    """The same greedy tokens as torch, until the runtime's own logits, within tolerance there, prefer another."""
    prompt = _probe_ids(reference, min(16, reference.context // 2)).tolist()
    count = min(GREEDY_TOKENS, reference.context - len(prompt))
    wanted = list(reference.tokens(prompt, max_new_tokens=count, ignore_eos=True))
    found = list(runtime.tokens(prompt, max_new_tokens=count, ignore_eos=True))
    if len(found) != count:
        raise CheckFailed(f"{name_of(runtime)} decoded {len(found)} of {count} tokens")
    for place, (one, two) in enumerate(zip(wanted, found, strict=True)):
        if one == two:
            continue
        context = torch.tensor(prompt + wanted[:place])
        logits = reference.logits(context)[-1]
        own = runtime.cached_logits(context, prefill=len(prompt))[-1, : len(logits)]
        gap = float((logits[one] - logits[two]) / logits.std())
        preferred = float((own[two] - own[one]) / logits.std()) >= -EQUAL
        error = _rms(own - logits) / float(logits.std())
        if not (preferred and error <= SPIKE * tolerance and gap <= max(TIE * error, EQUAL)):
            raise CheckFailed(
                f"greedy token {place} is {two} in {name_of(runtime)} and {one} in torch, whose logits tell them "
                f"apart by {gap:.3g} of their spread"
            )
        detail = f"the same until token {place}, which its logits decide by {gap:.2g} of their spread"
        return {"check": "greedy tokens", "detail": detail, "tokens": place}
    return {"check": "greedy tokens", "detail": f"{count} of {count} the same", "tokens": count}
