"""Perplexity, bits per byte, KL to the teacher and top-1 agreement on held-out text, in one streaming pass.

Bits per byte = sum of -log2 q(token) / UTF-8 bytes of those tokens: it compares models across tokenizers.
KL(p || q) = sum p (log p - log q) with p the teacher and q the judged model, in nats per target token, over
the ids both really have (vocabularies padded to different sizes are cut to the tokenizer's).
Logits exist for `chunk_tokens` targets at a time. Suffixes: B rows, T positions, N targets of a chunk, V
vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy
import torch

from ..data import IGNORED, check_same_tokens, num_ids, position_ids
from ..runtime import Runtime, TorchRuntime


def measure(
    runtime: Runtime,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    against: Runtime | None = None,
    chunk_tokens: int = 256,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> dict[str, Any]:
    """perplexity, bits_per_byte, heldout_tokens and agreement over batches of `data.text_batches`.

    agreement with `against`: kl (mean), kl_median and kl_p99 over tokens, top1, and perplexity_ratio (ours over
    theirs). Values are None where there is nothing to measure (no batches, no byte counts, no `against`).
    Raises UserError when `against` does not share token ids.
    """
    vocab = num_ids(runtime.tokenizer)
    if against is not None:
        check_same_tokens(against.tokenizer, runtime.tokenizer)
    nats = their_nats = 0.0
    tokens = bytes_seen = agreed = 0
    divergences: list[torch.Tensor] = []
    total = len(batches) if isinstance(batches, list) else None
    for done, batch in enumerate(batches, start=1):
        targets_BT = next_tokens(batch)
        picked_BT = targets_BT != IGNORED
        if "num_bytes" in batch:
            bytes_seen += int(batch["num_bytes"][:, 1:][picked_BT[:, :-1]].sum())
        ours = pick(runtime, batch, picked_BT, chunk=chunk_tokens)
        theirs = pick(against, batch, picked_BT, chunk=chunk_tokens) if against is not None else None
        for targets_N in _targets(targets_BT, picked_BT, chunk=chunk_tokens):
            logits_NV = next(ours)
            log_q_NV = logits_NV[:, :vocab].log_softmax(-1)
            targets_N = targets_N.to(log_q_NV.device)
            nats -= log_q_NV.gather(1, targets_N.unsqueeze(1)).double().sum().item()
            tokens += len(targets_N)
            if theirs is not None:
                log_p_NV = next(theirs)[:, :vocab].log_softmax(-1).to(log_q_NV.device)
                their_nats -= log_p_NV.gather(1, targets_N.unsqueeze(1)).double().sum().item()
                shared = min(log_p_NV.shape[1], log_q_NV.shape[1])
                log_p_NV, log_q_NV = log_p_NV[:, :shared], log_q_NV[:, :shared]
                divergences.append(kl(log_p_NV, log_q_NV))
                agreed += int((log_p_NV.argmax(-1) == log_q_NV.argmax(-1)).sum())
        if progress is not None:
            progress("held-out text", done, total)
    mean = nats / tokens if tokens else None
    return {
        # JSON has no infinity: a model beyond 1e300, or with NaN logits, has no perplexity to speak of.
        "perplexity": math.exp(mean) if mean is not None and mean < 690 else None,
        "bits_per_byte": nats / math.log(2) / bytes_seen if bytes_seen and math.isfinite(nats) else None,
        "heldout_tokens": tokens,
        "agreement": _agreement(torch.cat(divergences), agreed / tokens, nats - their_nats) if divergences else None,
    }


def kl(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each row in nats, (N,) in float64 on the CPU, from log-probabilities over the same ids."""
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).double().sum(-1).cpu()


def _agreement(kl_N: torch.Tensor, top1: float, excess_nats: float) -> dict[str, float | None]:
    """Mean and quantiles of the KL divergence of every token; JSON has no place for one that is not finite."""
    median, p99 = numpy.quantile(kl_N.numpy(), [0.5, 0.99]).tolist()
    excess = excess_nats / len(kl_N)
    values = {
        "kl": kl_N.mean().item(),
        "kl_median": median,
        "kl_p99": p99,
        "top1": top1,
        "perplexity_ratio": math.exp(excess) if excess < 690 else math.inf,
    }
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def next_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The target at each position (B, T): the label of the next one, and -100 at the last."""
    return torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)


def pick(
    runtime: Runtime, batch: dict[str, torch.Tensor], picked_BT: torch.Tensor, *, chunk: int
) -> Iterator[torch.Tensor]:
    """Logits (N, V) at the picked positions, row after row, N <= chunk; the same order for every Runtime.

    A Runtime that only has `logits` sees each document of a packed row by itself, one row at a time.
    """
    if isinstance(runtime, TorchRuntime):
        yield from runtime.picked_logits(batch["input_ids"], position_ids(batch), picked_BT, chunk=chunk)
        return
    for ids_T, positions_T, mask_T, picked_T in zip(
        batch["input_ids"], batch["position_ids"], batch["attention_mask"], picked_BT, strict=True
    ):
        length = int(mask_T.sum())
        starts = (positions_T[:length] == 0).nonzero().flatten().tolist()
        documents = zip(starts, [*starts[1:], length], strict=True)
        parts = [runtime.logits(ids_T[a:b])[picked_T[a:b]] for a, b in documents if picked_T[a:b].any()]
        if parts:
            yield from torch.cat(parts).split(chunk)


def _targets(targets_BT: torch.Tensor, picked_BT: torch.Tensor, *, chunk: int) -> Iterator[torch.Tensor]:
    """Target ids in the chunks that `pick` yields."""
    for targets_T, picked_T in zip(targets_BT, picked_BT, strict=True):
        if picked_T.any():
            yield from targets_T[picked_T].split(chunk)
