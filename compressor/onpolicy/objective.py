"""The MiniLLM objective (arXiv 2306.08543) over sampled answers: pure functions of tensors.

For an answer y of T tokens; p the teacher, q_old the student that answered, q the student now, p~ what was drawn from:
    r_t = log p(y_t) - log q_old(y_t)
    A_t = sum over t' > t of r_t' / max(1, T - t)        the reward still to come, per token (equation 6)
    L   = sum over t of w_t KL(q_t || p_t) - min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)         (equation 7)
w_t = q / p~ as a constant, and rho_t the same with its gradient. The first term is the next token's divergence over the
whole vocabulary, free of sampling noise (equation 3). Equation 6 is printed with T - t - 1, which is 0 for the last
token but one; its sum has T - t terms.
Shape suffixes: B rows, T positions, N valid tokens (the order of mask_BT), D student width, V rows of its head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..losses import Teacher, fused_linear_divergence, token_log_probs

IMPORTANCE = ("token", "sequence", "off")


class Variant(NamedTuple):
    """How the paper and its reference code differ."""

    counts_current: bool  # A_t includes r_t itself, although the single-step term has it too
    gamma: float
    reward_scale: float  # rewards are divided by it ...
    reward_clip: float  # ... then clipped to +-
    whitens: bool  # advantages get mean 0 and deviation 1 over the valid tokens of the batch
    weighs_single_step: bool  # w_t on the single-step term


VARIANTS = {
    "paper": Variant(False, 1.0, 1.0, float("inf"), False, True),
    "reference": Variant(True, 0.95, 0.5, 100.0, True, False),
}


@dataclass(frozen=True)
class Tricks:
    """What MiniLLM adds to the policy gradient; each can be switched off. Raises UserError for unknown values.

    single_step: the next token's divergence exactly, instead of r_t in the advantage; same expectation, less variance.
    length_norm: advantages per token still to come; another expectation, in which long answers weigh less.
    alpha: the teacher's share in sampling (0: off).
    importance: how answers drawn from p~ stand for the student's own. "sequence" is exact: the product of q / p~ over
    the whole answer, whose variance grows with length. "token", the paper's choice, is q / p~ of this token alone: the
    prefix before it and the rewards after it stay distributed as p~, a bias linear in alpha. "off" takes the answers as
    the student's own. (Equation 5's product up to t is not exact either: A_t's later rewards stay unweighted.)
    clip: PPO's eps, None: off. With alpha > 0 it cuts from the first step, as rho lies between 0 and 1 / (1 - alpha).
    variant: a row of VARIANTS.
    """

    single_step: bool = True
    length_norm: bool = True
    alpha: float = 0.2
    importance: str = "token"
    clip: float | None = 0.2
    variant: str = "paper"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("importance", self.importance, IMPORTANCE),
            ("variant", self.variant, tuple(VARIANTS)),
        ):
            if value not in known:
                raise UserError(f"unknown {name} {value!r}; expected one of {', '.join(known)}; choose one of them")
        if not 0 <= self.alpha < 1:
            raise UserError(f"alpha is {self.alpha}; expected 0 (student alone) up to below 1; 0.2 is the paper's")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"clip is {self.clip}; expected more than 0, or none; 0.2 is the paper's choice")


class MiniLLMLoss(NamedTuple):
    """Sums over the valid tokens, to be divided once by their number. Only `loss` carries gradients."""

    loss: Tensor
    single_step: Tensor  # KL(q_t || p_t) with its weights; 0 where switched off
    weight: Tensor  # w_t
    clipped: Tensor  # tokens whose gradient the clip took away


def advantages(rewards_BT: Tensor, mask_BT: Tensor, tricks: Tricks) -> Tensor:
    """A_t of every token (equation 6 and Algorithm 1), 0 where the mask is; whatever stands there takes no part.

    A row's valid tokens stand side by side. With the paper's variant and the single-step term, A_t is what follows t;
    without that term, and in the reference variant, r_t counts too: sum over t' >= t, divided by T - t + 1.
    """
    variant = VARIANTS[tricks.variant]
    mask_BT = mask_BT.bool()
    rewards_BT = (rewards_BT / variant.reward_scale).clamp(-variant.reward_clip, variant.reward_clip)
    rewards_BT = rewards_BT.where(mask_BT, 0)
    sums_BT = torch.zeros_like(rewards_BT)
    following_B = rewards_BT.new_zeros(len(rewards_BT))
    for t in reversed(range(rewards_BT.shape[1])):
        following_B = sums_BT[:, t] = rewards_BT[:, t] + variant.gamma * following_B
    counts_BT = mask_BT.flip(1).cumsum(1).flip(1)
    if tricks.single_step and not variant.counts_current:
        sums_BT, counts_BT = (torch.nn.functional.pad(values[:, 1:], (0, 1)) for values in (sums_BT, counts_BT))
    if tricks.length_norm:
        sums_BT = sums_BT / counts_BT.clamp(min=1)
    if variant.whitens:
        valid_N = sums_BT[mask_BT]
        sums_BT = (sums_BT - valid_N.mean()) * (valid_N.var(correction=0) + 1e-8).rsqrt()
    return sums_BT.where(mask_BT, 0)


@torch.no_grad()
def importance_weights(log_q_BT: Tensor, log_mix_BT: Tensor, mask_BT: Tensor, importance: str) -> Tensor:
    """w_t of every token, a constant; 0 where the mask is. See Tricks for `importance`, equation 5 for the paper's."""
    log_BT = (log_q_BT - log_mix_BT).where(mask_BT, 0)
    if importance == "sequence":
        log_BT = log_BT.sum(1, keepdim=True).expand_as(log_BT)
    elif importance == "off":
        log_BT = torch.zeros_like(log_BT)
    return log_BT.exp().where(mask_BT, 0)


def minillm_loss(
    student_ND: Tensor,
    student_head_VD: Tensor,
    teacher: Teacher,
    *,
    ids_BT: Tensor,
    mask_BT: Tensor,
    log_mix_BT: Tensor,
    advantages_BT: Tensor,
    tricks: Tricks,
    vocab: int | None = None,
    chunk_tokens: int = 128,
) -> MiniLLMLoss:
    """The surrogate loss whose gradient is that of equation 7, summed over valid tokens; L_PT is the caller's to add.

    `student_ND` are the student's final hidden states that predict the N tokens of `mask_BT`, in its order, and
    `teacher` speaks of the same rows. The student may have moved since it answered (inner epochs): ids, log_mix and
    advantages are as sampled. Gradients reach `student_ND` and `student_head_VD`; nothing (N, V) is made.
    Raises what the fused loss raises.
    """
    variant = VARIANTS[tricks.variant]
    mask_BT = mask_BT.bool()
    log_q_N = token_log_probs(student_ND, student_head_VD, ids_BT[mask_BT], vocab=vocab, chunk_tokens=chunk_tokens)
    log_q_BT = torch.zeros_like(log_mix_BT, dtype=log_q_N.dtype).masked_scatter(mask_BT, log_q_N.detach())
    weights_N = importance_weights(log_q_BT, log_mix_BT, mask_BT, tricks.importance)[mask_BT]
    # The weight's value, with the gradient that a policy gradient wants of it: w grad log q.
    ratio_N = weights_N * (log_q_N - log_q_N.detach()).exp()
    advantages_N = advantages_BT[mask_BT]
    gain_N = ratio_N * advantages_N
    clipped = torch.zeros_like(mask_BT.sum())
    if tricks.clip is not None:
        capped_N = ratio_N.clamp(1 - tricks.clip, 1 + tricks.clip) * advantages_N
        clipped = (capped_N < gain_N).sum()
        gain_N = torch.minimum(gain_N, capped_N)
    loss, single_step = -gain_N.sum(), torch.zeros_like(gain_N.sum().detach())
    if tricks.single_step:
        parts = fused_linear_divergence(
            student_ND,
            student_head_VD,
            teacher,
            weights_N=weights_N if variant.weighs_single_step else None,
            divergence="reverse_kl",
            vocab=vocab,
            chunk_tokens=chunk_tokens,
        )
        loss, single_step = loss + parts.loss, parts.kl
    return MiniLLMLoss(loss, single_step, weights_N.sum(), clipped)
