"""Losses: divergences between teacher and student, fused with their lm_heads.

`divergences` is the table, `fused` the chunked computation and what it may know of the teacher, `hidden` Minitron's
loss on states inside the models, `log_probs` the chunked log-probabilities of given tokens.
"""

from .divergences import DIVERGENCES
from .fused import Dense, LossParts, Sampled, Teacher, TopK, fused_linear_divergence
from .hidden import HiddenLoss, Pair, balanced, paper_pairs
from .log_probs import token_log_probs

__all__ = [
    "DIVERGENCES",
    "Dense",
    "HiddenLoss",
    "LossParts",
    "Pair",
    "Sampled",
    "Teacher",
    "TopK",
    "balanced",
    "fused_linear_divergence",
    "paper_pairs",
    "token_log_probs",
]
