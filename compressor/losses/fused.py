"""A divergence fused with the lm_heads: no tokens x vocabulary tensor is whole.

Hidden states go through their heads a few rows at a time. For each chunk the gradient with respect to the student's
logits is formed in place in the forward pass and folded at once into the gradients of the student's hidden states and
head, so memory is a few chunk x vocabulary buffers, reused for every chunk. The sum over rows (Hinton et al., arXiv
1503.02531; Minitron trains on the first term alone):
    (1 - ce_weight) * tau^2 * weight * D(softmax(z_T / tau), softmax(z_S / tau)) + ce_weight * CE(z_S, label)
Shape suffixes: N rows, C rows of a chunk, D student width, E teacher width, V shared real ids, W ids of a teacher's
head, K ids that are kept of a teacher's distribution, L those and their tail, M ids drawn from the tail.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import UserError
from .divergences import DIVERGENCES, Divergence

# Rows of the head whose gradient is widened to float32 at a time when products are made in half precision.
HEAD_ROWS = 8192
LEAST = -80.0  # of a tail's logarithm: there may be no id left outside the top k


class LossParts(NamedTuple):
    """Sums over rows. Only `loss` carries gradients."""

    loss: Tensor
    kl: Tensor  # the divergence alone, times temperature^2
    ce: Tensor | None  # cross-entropy at temperature 1; None without labels


class Dense(NamedTuple):
    """The teacher's whole distributions, as its final hidden states and its head."""

    hidden_NE: Tensor
    head_WE: Tensor


class TopK(NamedTuple):
    """The teacher's K likeliest ids of each row, with log-probabilities at the loss's temperature.

    log_tail_N: the logarithm of what all others have together. drawn_NM: ids drawn from these others, with which
    forward KL is unbiased; drawn_log_p_N: their mean log-probability.
    """

    ids_NK: Tensor
    log_p_NK: Tensor
    log_tail_N: Tensor
    drawn_NM: Tensor | None = None
    drawn_log_p_N: Tensor | None = None

    def with_tail(self) -> Tensor:
        """Log-probabilities of the K ids and of the tail, (N, K + 1), summing to 1 whatever they were rounded to."""
        log_tail_N = self.log_tail_N.clamp(min=LEAST)
        return torch.cat([self.log_p_NK.to(log_tail_N.dtype), log_tail_N[:, None]], -1).log_softmax(-1)

    def sampled(self) -> Sampled:
        """The K ids with their own weights, which is exact, and the drawn ones with equal shares of the tail's."""
        assert self.drawn_NM is not None
        assert self.drawn_log_p_N is not None
        log_p_NL = self.with_tail()
        p_NL, draws = log_p_NL.exp(), self.drawn_NM.shape[1]
        weights = torch.cat([p_NL[:, :-1], (p_NL[:, -1:] / draws).expand(-1, draws)], -1)
        inside_N = (p_NL[:, :-1] * log_p_NL[:, :-1]).sum(-1)
        return Sampled(
            torch.cat([self.ids_NK, self.drawn_NM], -1), weights, -inside_N - p_NL[:, -1] * self.drawn_log_p_N
        )


class Sampled(NamedTuple):
    """Ids drawn from the teacher, with weights that sum to 1 a row and are unbiased for its distribution.

    Sparse Logit Sampling, arXiv 2503.16870. entropy_N: -sum weight log p over these ids, so that what is reported is a
    KL divergence whose noise is that of log p - log q alone.
    """

    ids_NK: Tensor
    weights_NK: Tensor
    entropy_N: Tensor


Teacher = Dense | TopK | Sampled


def fused_linear_divergence(
    student_ND: Tensor,
    student_head_VD: Tensor,
    teacher: Teacher | None,
    *,
    labels_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    divergence: str = "forward_kl",
    mix: float | None = None,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    vocab: int | None = None,
    chunk_tokens: int = 128,
) -> LossParts:
    """Sum of the distillation loss over N rows, with gradients for `student_ND` and `student_head_VD` only.

    Rows are those that count: the caller drops padding and masked targets first (N = 0 gives zero). Heads
    may have more rows than there are real ids, and not equally many; `vocab` (default: the smaller head)
    ids are shared, the rest is left out of both softmaxes. Labels are ids below `vocab`; `weights_N` scale the
    divergence of each row, `mix` is the divergence's own weight (default: its row's). Softmax, divergence and sums
    are float32 (float64 for float64 inputs); matrix products use the inputs' precision, or autocast's where it is on.

    Without a teacher there is cross-entropy alone. A `TopK` teacher is compared on its K ids and one more for all the
    rest, by any divergence; that is a lower bound (it does not see how the rest is spread), and so forward KL goes by
    the ids drawn from the rest where it has some. A `Sampled` one knows only forward KL, which is linear in p, so that
    an unbiased p gives an unbiased gradient.
    Raises UserError for an unknown divergence and for settings outside their range.
    """
    if divergence not in DIVERGENCES:
        raise UserError(
            f"unknown divergence {divergence!r}; expected one of {', '.join(DIVERGENCES)}; choose one of them"
        )
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}; expected more than 0; 1.0 is the usual choice")
    if not 0 <= ce_weight <= 1:
        raise UserError(f"ce_weight is {ce_weight}; expected 0 (teacher only) to 1 (labels only)")
    row = DIVERGENCES[divergence]
    mix = row.mix if mix is None else mix
    if row.mix is not None and not 0 < (mix or 0) < 1:
        raise UserError(f"mix is {mix}; expected between 0 and 1, exclusive; {row.mix} is the default of {divergence}")
    if isinstance(teacher, Sampled) and divergence != "forward_kl":
        raise UserError(f"sampled ids give no unbiased {divergence}; expected forward_kl; use another signal")
    heads = [len(student_head_VD)] + ([len(teacher.head_WE)] if isinstance(teacher, Dense) else [])
    smaller = min(heads)
    vocab = smaller if vocab is None else vocab
    if not 0 < vocab <= smaller:
        raise UserError(
            f"vocab is {vocab}, the heads have {' and '.join(map(str, heads))} rows; "
            f"expected 1 to {smaller}; pass the number of ids that both models know"
        )
    if teacher is None and ce_weight != 1:
        raise UserError(f"ce_weight is {ce_weight} without a teacher; expected 1; pass what is known of one")
    if ce_weight > 0 and labels_N is None:
        raise UserError("ce_weight is above 0 but there are no labels; pass labels or set ce_weight to 0")
    if isinstance(teacher, TopK) and teacher.drawn_NM is not None and divergence == "forward_kl":
        teacher = teacher.sampled()
    device = student_ND.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    numbers = (mix or 0.0, float(temperature), float(ce_weight), vocab, chunk_tokens)
    options = _Options(row, *numbers, product, torch.is_grad_enabled())
    loss, kl, ce = _FusedLinearDivergence.apply(student_ND, student_head_VD, teacher, labels_N, weights_N, options)
    return LossParts(loss, kl, None if labels_N is None else ce)


class _Options(NamedTuple):
    divergence: Divergence
    mix: float
    temperature: float
    ce_weight: float
    vocab: int
    chunk_tokens: int
    product: torch.dtype | None  # precision of the matrix products; None: that of each model's own tensors
    learning: bool  # needs_input_grad is True under no_grad too


class _FusedLinearDivergence(torch.autograd.Function):
    """Forward forms the gradients; backward only scales them by the gradient that arrives."""

    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        student_head_VD: Tensor,
        teacher: Teacher | None,
        labels_N: Tensor | None,
        weights_N: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_hidden, need_head = (options.learning and needed for needed in ctx.needs_input_grad[:2])
        # Autocast is already resolved in options.product; inside, it would round the float32 steps as well.
        autocast_off = (
            torch.autocast(student_ND.device.type, enabled=False) if options.product else contextlib.nullcontext()
        )
        with autocast_off:
            sums, ctx.grad_hidden_ND, ctx.grad_head_VD = _chunks(
                student_ND,
                student_head_VD,
                teacher,
                labels_N,
                weights_N,
                options,
                need_hidden,
                need_head,
            )
        ctx.spent = False
        ctx.mark_non_differentiable(sums[1], sums[2])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("the fused loss scales its gradients in place, so it can be backpropagated only once")
        ctx.spent = True
        grads = [ctx.grad_hidden_ND, ctx.grad_head_VD]
        # Our references go, so that autograd can take the buffers over as .grad without a copy.
        ctx.grad_hidden_ND = ctx.grad_head_VD = None
        for grad in grads:
            if grad is not None:
                grad.mul_(grad_loss)
        return grads.pop(0), grads.pop(0), None, None, None, None


def _chunks(
    student_ND: Tensor,
    student_head_VD: Tensor,
    teacher: Teacher | None,
    labels_N: Tensor | None,
    weights_N: Tensor | None,
    options: _Options,
    need_hidden: bool,
    need_head: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, Tensor | None]:
    """The loop over chunks: (loss, kl, ce) sums and the gradients of the student's hidden states and head."""
    _, _, tau, ce_weight, vocab, chunk_tokens, product, _ = options
    num_rows = len(student_ND)
    wide = torch.promote_types(torch.promote_types(student_ND.dtype, student_head_VD.dtype), torch.float32)
    student_dtype = product or student_head_VD.dtype
    head_VD = student_head_VD[:vocab].to(student_dtype)
    if isinstance(teacher, Dense):
        teacher_dtype = product or teacher.head_WE.dtype
        teacher = Dense(teacher.hidden_NE, teacher.head_WE[:vocab].to(teacher_dtype))
    else:
        teacher_dtype = student_dtype

    def buffer(dtype: torch.dtype = wide) -> Tensor:
        return torch.empty(min(chunk_tokens, num_rows), vocab, dtype=dtype, device=student_ND.device)

    log_q, log_p, scratch = buffer(), buffer(), buffer()
    ce_grad = buffer() if ce_weight > 0 else None
    narrow = {dtype: buffer(dtype) for dtype in {student_dtype, teacher_dtype} - {wide}}
    grad_hidden_ND = torch.zeros_like(student_ND) if need_hidden else None
    # Sums over many chunks need float32 even where the head itself is kept in less.
    grad_head_VD = torch.zeros_like(student_head_VD, dtype=wide) if need_head else None
    kl_N = torch.zeros(num_rows, dtype=wide, device=student_ND.device)
    ce_N = torch.zeros_like(kl_N)

    for start in range(0, num_rows, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, num_rows))
        size = rows.stop - start
        log_q_CV, log_p_CV, scratch_CV = log_q[:size], log_p[:size], scratch[:size]
        hidden_CD = student_ND[rows].to(student_dtype)

        _logits(hidden_CD, head_VD, scratch_CV, narrow)
        if labels_N is not None:
            labels_C1 = labels_N[rows, None]
            torch.log_softmax(scratch_CV, -1, out=log_q_CV)
            ce_N[rows] = -log_q_CV.gather(1, labels_C1).squeeze(1)
            if ce_grad is not None:
                torch.exp(log_q_CV, out=ce_grad[:size])
                ce_grad[:size].scatter_add_(1, labels_C1, ce_N.new_full((size, 1), -1.0))
        if labels_N is None or tau != 1:
            torch.log_softmax(scratch_CV.div_(tau), -1, out=log_q_CV)
        if isinstance(teacher, Dense):
            _logits(teacher.hidden_NE[rows].to(teacher_dtype), teacher.head_WE, scratch_CV, narrow)
            torch.log_softmax(scratch_CV.div_(tau), -1, out=log_p_CV)
            kl_N[rows] = options.divergence.function(log_q_CV, log_p_CV, scratch_CV, options.mix)
        elif isinstance(teacher, TopK):
            kl_N[rows] = _top_k(options, log_q_CV, TopK(*(values[rows] for values in teacher[:3])))
        elif teacher is None:
            log_q_CV.zero_()  # no divergence, no gradient of one
        else:
            kl_N[rows] = _sampled(log_q_CV, *(values[rows] for values in teacher))
        grad_logits_CV = log_q_CV
        if not (need_hidden or need_head):
            continue
        # tau^2 of the loss, 1/tau from z -> z / tau.
        grad_logits_CV.mul_((1 - ce_weight) * tau)
        if weights_N is not None:
            grad_logits_CV.mul_(weights_N[rows, None])
        if ce_grad is not None:
            grad_logits_CV.add_(ce_grad[:size], alpha=ce_weight)
        if student_dtype != wide:
            grad_logits_CV = narrow[student_dtype][:size].copy_(grad_logits_CV)
        if grad_hidden_ND is not None:
            grad_hidden_ND[rows] = grad_logits_CV @ head_VD
        if grad_head_VD is not None:
            _add_head_gradient(grad_head_VD[:vocab], grad_logits_CV, hidden_CD)

    kl_N = kl_N if weights_N is None else kl_N * weights_N
    kl = kl_N.sum() * tau**2
    ce = ce_N.sum()
    loss = kl * (1 - ce_weight) + ce * ce_weight
    grad_head_VD = None if grad_head_VD is None else grad_head_VD.to(student_head_VD.dtype)
    return (loss, kl, ce), grad_hidden_ND, grad_head_VD


def _top_k(options: _Options, log_q_CV: Tensor, teacher: TopK) -> Tensor:
    """The divergence over K ids and the tail; leaves dL/dz in the first buffer, as a divergence does.

    With z' = (z_K, logsumexp of the others), softmax(z') is the student's distribution over these K + 1, so an id in K
    has dL/dz' of its own and one in the tail its share q / q_tail of the tail's. The tail is summed, not what the K
    leave of 1: that would be rounding where they are nearly all.
    """
    ids_CK, log_p_CL = teacher.ids_NK, teacher.with_tail().to(log_q_CV.dtype)
    log_q_CK = log_q_CV.gather(1, ids_CK)
    log_q_tail_C1 = log_q_CV.scatter_(1, ids_CK, -torch.inf).logsumexp(-1, keepdim=True).clamp(min=LEAST)
    log_q_CL = torch.cat([log_q_CK, log_q_tail_C1], -1)
    rows_C = options.divergence.function(log_q_CL, log_p_CL, torch.empty_like(log_p_CL), options.mix)
    gradient_CL = log_q_CL
    log_q_CV.sub_(log_q_tail_C1).exp_().mul_(gradient_CL[:, -1:])
    log_q_CV.scatter_(1, ids_CK, gradient_CL[:, :-1])
    return rows_C


def _sampled(log_q_CV: Tensor, ids_CK: Tensor, weights_CK: Tensor, entropy_C: Tensor) -> Tensor:
    """sum w (log p - log q), an unbiased KL(p || q); leaves q - w in the first buffer. An id may be drawn twice."""
    weights_CK = weights_CK.to(log_q_CV.dtype)
    rows_C = -(weights_CK * log_q_CV.gather(1, ids_CK)).sum(-1) - entropy_C
    log_q_CV.exp_().scatter_add_(1, ids_CK, -weights_CK)
    return rows_C


def _logits(hidden_CD: Tensor, head_VD: Tensor, out_CV: Tensor, narrow: dict[torch.dtype, Tensor]) -> None:
    """hidden @ head^T into `out_CV`, by way of a half-precision buffer where the product is made in that."""
    if hidden_CD.dtype == out_CV.dtype:
        torch.mm(hidden_CD, head_VD.t(), out=out_CV)
    else:
        logits_CV = narrow[hidden_CD.dtype][: len(out_CV)]
        torch.mm(hidden_CD, head_VD.t(), out=logits_CV)
        out_CV.copy_(logits_CV)


def _add_head_gradient(grad_head_VD: Tensor, grad_logits_CV: Tensor, hidden_CD: Tensor) -> None:
    """grad_head += grad_logits^T @ hidden, accumulated in the precision of `grad_head_VD`."""
    if grad_logits_CV.dtype == grad_head_VD.dtype:
        grad_head_VD.addmm_(grad_logits_CV.t(), hidden_CD)
        return
    for first in range(0, len(grad_head_VD), HEAD_ROWS):
        ids = slice(first, first + HEAD_ROWS)
        grad_head_VD[ids].add_(grad_logits_CV[:, ids].t() @ hidden_CD)
