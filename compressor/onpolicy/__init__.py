"""On-policy distillation (MiniLLM, arXiv 2306.08543): the student answers, the teacher judges every token.

`rollouts` samples the answers, `objective` makes a loss of them. On-policy GKD (arXiv 2306.13649) needs no more
than `Rollouts.batch` of answers by the student alone: any divergence of the fused loss on its targets.
"""

from .objective import IMPORTANCE, VARIANTS, MiniLLMLoss, Tricks, advantages, importance_weights, minillm_loss
from .rollouts import Rollouts, sample, score

__all__ = [
    "IMPORTANCE",
    "VARIANTS",
    "MiniLLMLoss",
    "Rollouts",
    "Tricks",
    "advantages",
    "importance_weights",
    "minillm_loss",
    "sample",
    "score",
]
