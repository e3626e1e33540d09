"""On-policy distillation (MiniLLM, arXiv 2306.08543): the student answers, the teacher judges every token.

`rollouts` samples the answers, `objective` makes a loss of them, `rounds` feeds them to the one training loop, and
`training` is the whole. On-policy GKD (arXiv 2306.13649) is the same loop with another loss on the answers.
"""

from .objective import IMPORTANCE, VARIANTS, MiniLLMLoss, Tricks, advantages, importance_weights, minillm_loss
from .rollouts import Rollouts, sample, score
from .rounds import Rounds
from .training import Losses, check, distill, minillm_objective, tricks_of

__all__ = [
    "IMPORTANCE",
    "VARIANTS",
    "Losses",
    "MiniLLMLoss",
    "Rollouts",
    "Rounds",
    "Tricks",
    "advantages",
    "check",
    "distill",
    "importance_weights",
    "minillm_loss",
    "minillm_objective",
    "sample",
    "score",
    "tricks_of",
]
