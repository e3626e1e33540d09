"""Divergences between the teacher's distribution p and the student's q, with their gradients, one function each.

A divergence takes the log-probabilities of student and teacher and a scratch buffer, all (C, V) and all its own to
overwrite, and its mixing weight. It returns the loss of each row (C,) and leaves dL/dz, z being the student's logits
(already divided by the temperature), in the first buffer. With g = dL/dq, dL/dz = q (g - <q, g>).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def forward_kl(log_q_CV: Tensor, log_p_CV: Tensor, scratch_CV: Tensor, mix: float) -> Tensor:
    """KL(p || q) = sum p (log p - log q); dL/dz = q - p. Hinton et al., arXiv 1503.02531; Minitron's loss."""
    torch.sub(log_p_CV, log_q_CV, out=scratch_CV)
    p_CV = log_p_CV.exp_()
    rows_C = scratch_CV.mul_(p_CV).sum(-1)
    log_q_CV.exp_().sub_(p_CV)
    return rows_C


def reverse_kl(log_q_CV: Tensor, log_p_CV: Tensor, scratch_CV: Tensor, mix: float) -> Tensor:
    """KL(q || p) = sum q (log q - log p), MiniLLM's objective (arXiv 2306.08543); dL/dz = q (log q - log p - L)."""
    gradient_CV = torch.sub(log_q_CV, log_p_CV, out=scratch_CV)
    q_CV = log_q_CV.exp_()
    rows_C = _dot(q_CV, gradient_CV)
    _to_logits(q_CV, gradient_CV)
    return rows_C


def skew_forward_kl(log_q_CV: Tensor, log_p_CV: Tensor, scratch_CV: Tensor, mix: float) -> Tensor:
    """KL(p || m), m = mix p + (1 - mix) q (DistiLLM, arXiv 2402.03898); dL/dq = -(1 - mix) p / m."""
    log_m_CV = _mixture(log_p_CV, log_q_CV, mix, scratch_CV)
    q_CV = log_q_CV.exp_()
    ratio_CV = log_p_CV.sub(log_m_CV)
    rows_C = _dot(log_p_CV.exp_(), ratio_CV)
    _to_logits(q_CV, ratio_CV.exp_().mul_(mix - 1))
    return rows_C


def skew_reverse_kl(log_q_CV: Tensor, log_p_CV: Tensor, scratch_CV: Tensor, mix: float) -> Tensor:
    """KL(q || m), m = mix q + (1 - mix) p (DistiLLM, arXiv 2402.03898); dL/dq = log(q/m) + 1 - mix q/m."""
    log_m_CV = _mixture(log_q_CV, log_p_CV, mix, scratch_CV)
    ratio_CV = torch.sub(log_q_CV, log_m_CV, out=log_p_CV)
    q_CV = log_q_CV.exp_()
    rows_C = _dot(q_CV, ratio_CV)
    gradient_CV = ratio_CV.sub_(torch.exp(ratio_CV, out=scratch_CV).mul_(mix))  # the 1 falls out of q (g - <q, g>)
    _to_logits(q_CV, gradient_CV)
    return rows_C


def jsd(log_q_CV: Tensor, log_p_CV: Tensor, scratch_CV: Tensor, mix: float) -> Tensor:
    """mix KL(p || m) + (1 - mix) KL(q || m), m = mix p + (1 - mix) q: GKD's (arXiv 2306.13649), as printed.

    dL/dq = (1 - mix) log(q/m). Divided by mix it tends to forward KL for mix -> 0, by 1 - mix to reverse KL for 1.
    """
    log_m_CV = _mixture(log_p_CV, log_q_CV, mix, scratch_CV)
    theirs_CV = log_p_CV.sub(log_m_CV)
    rows_C = mix * _dot(log_p_CV.exp_(), theirs_CV)
    ours_CV = torch.sub(log_q_CV, log_m_CV, out=theirs_CV).mul_(1 - mix)
    q_CV = log_q_CV.exp_()
    rows_C += _dot(q_CV, ours_CV)
    _to_logits(q_CV, ours_CV)
    return rows_C


def total_variation(log_q_CV: Tensor, log_p_CV: Tensor, scratch_CV: Tensor, mix: float) -> Tensor:
    """1/2 sum |p - q|, at most 1; dL/dq = -sign(p - q) / 2."""
    q_CV = log_q_CV.exp_()
    torch.sub(log_p_CV.exp_(), q_CV, out=scratch_CV)
    rows_C = scratch_CV.abs().sum(-1) / 2
    _to_logits(q_CV, scratch_CV.sign_().mul_(-0.5))
    return rows_C


class Divergence(NamedTuple):
    """A row of the table. mix: the weight inside its mixture, where it has one and none is given."""

    function: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    mix: float | None = None


DIVERGENCES = {
    "forward_kl": Divergence(forward_kl),
    "reverse_kl": Divergence(reverse_kl),
    "skew_forward_kl": Divergence(skew_forward_kl, 0.1),
    "skew_reverse_kl": Divergence(skew_reverse_kl, 0.1),
    "jsd": Divergence(jsd, 0.5),
    "total_variation": Divergence(total_variation),
}


def _dot(one_CV: Tensor, other_CV: Tensor) -> Tensor:
    """Products summed over the vocabulary, (C,), with no tensor of them."""
    return torch.einsum("cv,cv->c", one_CV, other_CV)


def _mixture(log_one_CV: Tensor, log_other_CV: Tensor, mix: float, out: Tensor) -> Tensor:
    """log(mix one + (1 - mix) other)."""
    other_CV = log_other_CV + math.log(1 - mix)
    return torch.logaddexp(log_one_CV + math.log(mix), other_CV, out=out)


def _to_logits(q_CV: Tensor, gradient_CV: Tensor) -> None:
    """q (g - <q, g>), left in q's buffer."""
    gradient_CV.sub_(_dot(q_CV, gradient_CV).unsqueeze(-1))
    q_CV.mul_(gradient_CV)


__all__ = ["DIVERGENCES", "Divergence"]
