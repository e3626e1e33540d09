"""Losses: divergences between teacher and student, fused with their lm_heads.

`divergences` is the table, `fused` the chunked computation and what it may know of the teacher.
"""

from .divergences import DIVERGENCES
from .fused import Dense, LossParts, Sampled, Teacher, TopK, fused_linear_divergence

__all__ = ["DIVERGENCES", "Dense", "LossParts", "Sampled", "Teacher", "TopK", "fused_linear_divergence"]
