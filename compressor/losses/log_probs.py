"""Log-probabilities of given tokens through an lm_head, with no tensor of tokens x vocabulary.

Shape suffixes: N rows, C rows of a chunk, D width, V rows of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


def token_log_probs(
    hidden_ND: Tensor, head_VD: Tensor, ids_N: Tensor, *, vocab: int | None = None, chunk_tokens: int = 128
) -> Tensor:
    """log softmax(hidden @ head^T)[ids], (N,) in nats, with gradients for `hidden_ND` and `head_VD`.

    Logits are formed `chunk_tokens` rows at a time and again in the backward pass. `vocab` (default: all) ids take
    part in the softmax, and ids are below it. The softmax is float32, float64 for float64 inputs; products use the
    inputs' precision, or autocast's.
    """

    def chunk(hidden_CD: Tensor, head_VD: Tensor, ids_C: Tensor) -> Tensor:
        logits_CV = hidden_CD @ head_VD.t()
        wide = torch.promote_types(logits_CV.dtype, torch.float32)
        return -functional.cross_entropy(logits_CV.to(wide), ids_C, reduction="none")

    head_VD = head_VD[:vocab]
    pieces = zip(hidden_ND.split(chunk_tokens), ids_N.split(chunk_tokens), strict=True)
    rows = [
        checkpoint(chunk, hidden_CD, head_VD, ids_C, use_reentrant=False, preserve_rng_state=False)
        for hidden_CD, ids_C in pieces
    ]
    return torch.cat(rows)  # pyright: ignore[reportArgumentType] - checkpoint's result has no type


__all__ = ["token_log_probs"]
