"""The fused loss against float64 arithmetic written out plainly, and against finite differences."""

import itertools
import math

import pytest
import torch
from models import tiny_model
from torch.nn import functional

from compressor.errors import UserError
from compressor.losses import DIVERGENCES, Dense, Sampled, TopK, fused_linear_divergence

ROWS, WIDTH, TEACHER_WIDTH, VOCAB, IDS = 11, 6, 9, 23, 19  # heads padded from 19 real ids to 23 and 29


def inputs(dtype=torch.float64, *, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    student = [normal(ROWS, WIDTH).requires_grad_(), normal(VOCAB, WIDTH).requires_grad_()]
    teacher = Dense(normal(ROWS, TEACHER_WIDTH), normal(VOCAB + 6, TEACHER_WIDTH))
    labels = torch.randint(IDS, (ROWS,), generator=generator)
    return student, teacher, labels


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def between(log_one, log_other, mix):
    return torch.logaddexp(log_one + math.log(mix), log_other + math.log(1 - mix))


REFERENCES = {
    "forward_kl": lambda p, q, mix: kl(p, q),
    "reverse_kl": lambda p, q, mix: kl(q, p),
    "skew_forward_kl": lambda p, q, mix: kl(p, between(p, q, mix)),
    "skew_reverse_kl": lambda p, q, mix: kl(q, between(q, p, mix)),
    "jsd": lambda p, q, mix: mix * kl(p, between(p, q, mix)) + (1 - mix) * kl(q, between(p, q, mix)),
    "total_variation": lambda p, q, mix: (p.exp() - q.exp()).abs().sum(-1) / 2,
}  # of log-probabilities


def plain(student, teacher, *, labels, vocab, divergence="forward_kl", mix=None, temperature=1.0, ce_weight=0.0):
    """The formulas of the papers, in the inputs' precision, with whole logits."""
    logits = student[0] @ student[1][:vocab].t()
    p = (teacher[0] @ teacher[1][:vocab].t() / temperature).log_softmax(-1)
    q = (logits / temperature).log_softmax(-1)
    rows = REFERENCES[divergence](p, q, mix or DIVERGENCES[divergence].mix)
    total = rows.sum() * temperature**2
    ce = functional.cross_entropy(logits, labels, reduction="sum")
    return (1 - ce_weight) * total + ce_weight * ce, total, ce


def test_every_divergence_has_a_reference():
    assert REFERENCES.keys() == DIVERGENCES.keys()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 64])
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (2.5, 0.0), (1.0, 0.3), (0.7, 0.6), (1.0, 1.0)])
@pytest.mark.parametrize("vocab", [None, IDS])
def test_equals_the_plain_formula(divergence, chunk_tokens, temperature, ce_weight, vocab):
    student, teacher, labels = inputs()
    options = {"temperature": temperature, "ce_weight": ce_weight}
    expected = plain(student, teacher, labels=labels, vocab=vocab or VOCAB, divergence=divergence, **options)
    wanted = torch.autograd.grad(3.0 * expected[0], student)
    found = fused_linear_divergence(
        *student,
        teacher,
        labels_N=labels,
        divergence=divergence,
        vocab=vocab,
        chunk_tokens=chunk_tokens,
        **options,
    )
    grads = torch.autograd.grad(3.0 * found.loss, student)
    for ours, theirs in zip([*found, *grads], [*expected, *wanted], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (1.7, 0.4)])
def test_gradients_equal_finite_differences(divergence, temperature, ce_weight):
    student, teacher, labels = inputs()

    def loss():
        options = {"temperature": temperature, "ce_weight": ce_weight, "vocab": IDS, "chunk_tokens": 4}
        return fused_linear_divergence(*student, teacher, labels_N=labels, divergence=divergence, **options).loss

    for values, grad in zip(student, torch.autograd.grad(loss(), student), strict=True):
        numeric, step = torch.zeros_like(values), 1e-6
        with torch.no_grad():
            for index in itertools.product(*map(range, values.shape)):
                kept = values[index].clone()
                values[index] = kept + step
                above = loss()
                values[index] = kept - step
                numeric[index] = (above - loss()) / (2 * step)
                values[index] = kept
        torch.testing.assert_close(grad, numeric, rtol=1e-6, atol=1e-7)


def test_padded_ids_take_no_part():
    student, teacher, labels = inputs()
    with torch.no_grad():
        student[1][IDS:] = 100.0
        teacher[1][IDS:] = -100.0
    parts = fused_linear_divergence(*student, teacher, labels_N=labels, vocab=IDS)
    expected = plain([student[0], student[1][:IDS]], teacher, labels=labels, temperature=1.0, ce_weight=0.0, vocab=IDS)
    torch.testing.assert_close(parts.loss, expected[0])
    parts.loss.backward()
    assert student[1].grad[:IDS].abs().sum() > 0
    assert torch.equal(student[1].grad[IDS:], torch.zeros_like(student[1].grad[IDS:]))


def test_same_distributions_lose_nothing_and_teacher_gets_no_gradient():
    student, _, _ = inputs()
    teacher = Dense(*[values.detach().clone().requires_grad_() for values in student])
    loss = fused_linear_divergence(*student, teacher).loss
    assert loss.abs() < 1e-12
    loss.backward()
    assert student[0].grad.abs().max() < 1e-12
    assert teacher[0].grad is None
    assert teacher[1].grad is None


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_float32_stays_close_to_float64(scale):
    student, teacher, labels = inputs(scale=scale**0.5)
    expected = plain(student, teacher, labels=labels, temperature=1.0, ce_weight=0.0, vocab=VOCAB)[0]
    wanted = torch.autograd.grad(expected, student)
    narrow = [values.detach().float().requires_grad_() for values in student]
    loss = fused_linear_divergence(*narrow, Dense(*[values.float() for values in teacher])).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, narrow), wanted, strict=True):
        assert (ours - theirs).norm() < 2e-5 * theirs.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_keeps_sums_and_softmax_in_float32(autocast):
    """Inputs exact in bf16; what is left is one rounding of logits and products, not of sums over chunks."""
    student, teacher, labels = inputs(torch.bfloat16)
    exact = [values.detach().double().requires_grad_() for values in student]
    expected = plain(
        exact,
        [values.double() for values in teacher],
        labels=labels,
        temperature=1.0,
        ce_weight=0.25,
        vocab=VOCAB,
    )[0]
    wanted = torch.autograd.grad(expected, exact)
    if autocast:  # float32 weights, products in bf16
        student = [values.detach().float().requires_grad_() for values in student]
        teacher = Dense(*[values.float() for values in teacher])
    with torch.autocast("cpu", enabled=autocast, dtype=torch.bfloat16):
        parts = fused_linear_divergence(*student, teacher, labels_N=labels, ce_weight=0.25, chunk_tokens=2)
    assert parts.loss.dtype == torch.float32
    torch.testing.assert_close(parts.loss.double(), expected, rtol=5e-3, atol=0)
    for ours, theirs, values in zip(torch.autograd.grad(parts.loss, student), wanted, student, strict=True):
        assert ours.dtype == values.dtype
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()


def test_autocast_changes_the_products():
    """Guards the test above: under autocast the products really are bf16."""
    student, teacher, _ = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = fused_linear_divergence(*student, teacher).loss
    assert rounded != fused_linear_divergence(*student, teacher).loss


def test_many_small_chunks_do_not_wear_the_head_gradient_down():
    rows = 512
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16)
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    teacher_head = torch.tensor([[0.0], [0.1]], dtype=torch.bfloat16)
    fused_linear_divergence(hidden, head, Dense(hidden, teacher_head), chunk_tokens=1).loss.backward()
    step = 0.5 - 1 / (1 + torch.tensor(0.1).exp())  # one row's gradient; bf16 sums would stall near 256 of them
    assert abs(head.grad[0, 0] / (rows * step) - 1) < 2e-2


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_reach_a_model_through_its_head(tied):
    """With tied embeddings the head's gradient and the embedding's meet in one tensor."""
    model = tiny_model(tie_word_embeddings=tied)
    ids = torch.randint(259, (2, 9), generator=torch.Generator().manual_seed(0))
    teacher_hidden, teacher_head = torch.randn(18, 40), torch.randn(259, 40) * 0.3

    def gradients(loss_of):
        model.zero_grad()
        hidden = model.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
        loss_of(hidden, model.lm_head.weight).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    fused = gradients(lambda h, w: fused_linear_divergence(h, w, Dense(teacher_hidden, teacher_head)).loss)
    plain = gradients(
        lambda h, w: functional.kl_div(
            (h @ w.t()).log_softmax(-1),
            (teacher_hidden @ teacher_head.t()).log_softmax(-1),
            reduction="sum",
            log_target=True,
        )
    )
    assert ("lm_head.weight" in fused) is not tied
    for name, grad in plain.items():
        torch.testing.assert_close(fused[name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()), msg=name)


def test_gradients_accumulate_over_calls():
    student, teacher, _ = inputs()
    fused_linear_divergence(*student, teacher).loss.backward()
    once = [values.grad.clone() for values in student]
    fused_linear_divergence(*student, teacher).loss.backward()
    for values, grad in zip(student, once, strict=True):
        torch.testing.assert_close(values.grad, 2 * grad)


def test_no_rows_is_zero_with_zero_gradients():
    student, teacher, labels = inputs()
    parts = fused_linear_divergence(student[0][:0], student[1], Dense(teacher[0][:0], teacher[1]), labels_N=labels[:0])
    assert [value.item() for value in parts] == [0, 0, 0]
    parts.loss.backward()
    assert torch.equal(student[1].grad, torch.zeros_like(student[1]))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_tensor_of_rows_times_vocabulary_is_made(divergence):
    """Every tensor that the forward and backward allocate, counted by torch's own dispatcher."""
    from torch.utils._python_dispatch import TorchDispatchMode

    rows, vocab, chunk = 64, 1000, 8
    largest = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(value.numel() for value in ([out] if isinstance(out, torch.Tensor) else []))
            return out

    student = [torch.randn(rows, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)]
    teacher = Dense(torch.randn(rows, 5), torch.randn(vocab, 5))
    with Largest():
        fused_linear_divergence(*student, teacher, divergence=divergence, chunk_tokens=chunk).loss.backward()
    assert max(largest) == chunk * vocab


def test_a_second_backward_is_refused():
    student, teacher, _ = inputs()
    loss = fused_linear_divergence(*student, teacher).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"divergence": "forwardkl"}, "forward_kl"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"ce_weight": 1.5}, "ce_weight is 1.5"),
        ({"ce_weight": 0.5}, "no labels"),
        ({"vocab": 24}, "expected 1 to 23"),
    ],
)
def test_settings_out_of_range_are_one_line(options, words):
    student, teacher, _ = inputs()
    with pytest.raises(UserError, match=words) as error:
        fused_linear_divergence(*student, teacher, **options)
    assert "\n" not in str(error.value)


# --- what is known of the teacher, and how rows weigh ---------------------------------------------------------------


def log_p_of(teacher, vocab=VOCAB):
    return (teacher.hidden_NE @ teacher.head_WE[:vocab].t()).log_softmax(-1)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_weigh_as_told_and_labels_do_not(divergence):
    student, teacher, labels = inputs()
    weights = torch.rand(ROWS, dtype=torch.float64) + 0.5
    options = {"labels_N": labels, "ce_weight": 0.25, "divergence": divergence, "chunk_tokens": 3}
    found = fused_linear_divergence(*student, teacher, weights_N=weights, **options)
    q = (student[0] @ student[1].t()).log_softmax(-1)
    rows = REFERENCES[divergence](log_p_of(teacher), q, DIVERGENCES[divergence].mix)
    expected = 0.75 * (weights * rows).sum() + 0.25 * functional.nll_loss(q, labels, reduction="sum")
    torch.testing.assert_close(found.loss, expected)
    wanted = torch.autograd.grad(expected, student)
    for ours, theirs in zip(torch.autograd.grad(found.loss, student), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("divergence", [name for name, row in DIVERGENCES.items() if row.mix])
def test_the_mixing_weight_is_the_callers(divergence):
    student, teacher, labels = inputs()
    expected = plain(student, teacher, labels=labels, vocab=VOCAB, divergence=divergence, mix=0.3)[0]
    torch.testing.assert_close(
        fused_linear_divergence(*student, teacher, divergence=divergence, mix=0.3).loss, expected
    )
    with pytest.raises(UserError, match=r"mix is 1\.0; expected between 0 and 1, exclusive"):
        fused_linear_divergence(*student, teacher, divergence=divergence, mix=1.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, VOCAB])
def test_the_top_k_are_compared_with_a_bucket_for_the_rest(divergence, temperature, k):
    student, teacher, _ = inputs()
    kept, _ = top(teacher, k, temperature)
    found = fused_linear_divergence(*student, kept, divergence=divergence, temperature=temperature, chunk_tokens=4)
    log_q = (student[0] @ student[1].t() / temperature).log_softmax(-1)
    log_p = (log_p_of(teacher) / temperature).log_softmax(-1)
    order = log_p.argsort(-1, descending=True)

    def bucketed(some):
        some = some.gather(1, order)
        return some if k == VOCAB else torch.cat([some[:, :k], some[:, k:].logsumexp(-1, keepdim=True)], -1)

    rows = REFERENCES[divergence](bucketed(log_p), bucketed(log_q), DIVERGENCES[divergence].mix)
    expected = rows.sum() * temperature**2
    torch.testing.assert_close(found.loss, expected)
    wanted = torch.autograd.grad(expected, student)
    for ours, theirs in zip(torch.autograd.grad(found.loss, student), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def top(teacher, k, temperature=1.0, *, confidence=1.0, dtype=torch.float64):
    """The teacher's top k with their tail, and the ids."""
    log_p = (log_p_of(teacher) * confidence / temperature).log_softmax(-1)
    inside, ids = log_p.topk(k)
    rest = log_p.scatter(1, ids, -torch.inf).logsumexp(-1)
    return TopK(ids, inside.to(dtype), rest.to(torch.promote_types(dtype, torch.float32))), ids


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("confidence", [1.0, 8.0])  # of the teacher: its tail is large and the student's small, or both
def test_a_tail_of_a_billionth_is_told_in_float32(divergence, confidence):
    """What the top k leave of 1 is then all rounding; both tails have to be sums of their own."""
    student, teacher, _ = inputs()
    kept, _ = top(teacher, 3, confidence=confidence)
    assert (kept.log_tail_N.median() < -10) == (confidence > 1)
    sure = (student[0].detach() * 30).requires_grad_()
    log_q = (sure @ student[1].t()).log_softmax(-1)
    tail = log_q.scatter(1, kept.ids_NK, -torch.inf).logsumexp(-1, keepdim=True)
    assert tail.min() < -16  # below what float32 leaves of 1
    log_q, log_p = torch.cat([log_q.gather(1, kept.ids_NK), tail], -1), kept.with_tail()
    expected = REFERENCES[divergence](log_p, log_q, DIVERGENCES[divergence].mix).sum()
    wanted = torch.autograd.grad(expected, sure)[0]
    narrow = sure.detach().float().requires_grad_()
    kept, _ = top(teacher, 3, confidence=confidence, dtype=torch.float32)
    found = fused_linear_divergence(narrow, student[1].float(), kept, divergence=divergence).loss
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found, narrow)[0].double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_the_slope_of_the_top_k_is_that_of_its_value(divergence):
    student, teacher, _ = inputs()
    kept, _ = top(teacher, 5)
    for values, grad in zip(student, torch.autograd.grad(top_loss(student, kept, divergence), student), strict=True):
        way = torch.randn(values.shape, dtype=values.dtype, generator=torch.Generator().manual_seed(values.numel()))
        step = 1e-5
        with torch.no_grad():
            values.add_(step * way)
            above = top_loss(student, kept, divergence)
            values.sub_(2 * step * way)
            numeric = (above - top_loss(student, kept, divergence)) / (2 * step)
            values.add_(step * way)
        torch.testing.assert_close((grad * way).sum(), numeric, rtol=1e-6, atol=1e-7)


def top_loss(student, kept, divergence):
    return fused_linear_divergence(*student, kept, divergence=divergence, chunk_tokens=4).loss


def test_ids_drawn_from_the_tail_make_forward_kl_unbiased():
    student, teacher, _ = inputs(scale=0.5)
    log_p = log_p_of(teacher)
    exact = fused_linear_divergence(*student, teacher).loss
    wanted = torch.autograd.grad(exact, student)
    kept, ids = top(teacher, 5)
    bucket = fused_linear_divergence(*student, kept).loss
    assert bucket < 0.9 * exact  # grouped, two distributions can only come closer
    rest = log_p.scatter(1, ids, -torch.inf).softmax(-1)
    drawn = torch.multinomial(rest, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    kept = kept._replace(drawn_NM=drawn, drawn_log_p_N=log_p.gather(1, drawn).mean(-1))
    found = fused_linear_divergence(*student, kept, chunk_tokens=4).loss
    torch.testing.assert_close(found, exact, rtol=5e-3, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found, student), wanted, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
    rough = kept._replace(log_p_NK=kept.log_p_NK.half())  # what a cache keeps: its weights still sum to 1
    torch.testing.assert_close(rough.sampled().weights_NK.sum(-1), torch.ones(ROWS, dtype=torch.float64))
    torch.testing.assert_close(fused_linear_divergence(*student, rough).loss, found, rtol=1e-3, atol=0)
    for divergence in ("reverse_kl", "jsd"):  # not linear in p: they know the bucket alone
        with_draws = fused_linear_divergence(*student, kept, divergence=divergence).loss
        without = fused_linear_divergence(*student, top(teacher, 5)[0], divergence=divergence).loss
        assert torch.equal(with_draws, without)


def test_all_ids_but_one_kept_lose_nothing():
    student, teacher, labels = inputs(scale=0.5)
    kept, _ = top(teacher, VOCAB - 1)  # the bucket then is the last id itself
    for divergence in DIVERGENCES:
        expected = plain(student, teacher, labels=labels, vocab=VOCAB, divergence=divergence)[0]
        found = fused_linear_divergence(*student, kept, divergence=divergence).loss
        torch.testing.assert_close(found, expected)


def test_sampled_ids_are_unbiased_and_may_repeat():
    student, teacher, _ = inputs()
    p = log_p_of(teacher).exp()
    entropy = -(p * p.log()).sum(-1)
    exact = torch.autograd.grad(fused_linear_divergence(*student, teacher).loss, student)
    generator = torch.Generator().manual_seed(0)
    draws = 20_000
    ids = torch.multinomial(p, draws, replacement=True, generator=generator)
    found = fused_linear_divergence(*student, Sampled(ids, torch.full(ids.shape, 1 / draws), entropy), chunk_tokens=4)
    torch.testing.assert_close(found.loss, plain(student, teacher, labels=ids[:, 0], vocab=VOCAB)[0], rtol=2e-2, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found.loss, student), exact, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
    with pytest.raises(UserError, match="sampled ids give no unbiased reverse_kl"):
        fused_linear_divergence(*student, Sampled(ids, ids.float(), entropy), divergence="reverse_kl")


def test_the_recipe_knows_every_divergence():
    from typing import get_args

    from compressor.recipe import Distill

    assert set(get_args(Distill.model_fields["divergence"].annotation)) == set(DIVERGENCES)


def test_where_nothing_is_learned_no_gradient_is_formed(monkeypatch):
    from compressor.losses import fused

    asked, chunks = [], fused._chunks
    monkeypatch.setattr(fused, "_chunks", lambda *given: asked.append(given[-2:]) or chunks(*given))
    hidden, head = torch.randn(4, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    for learning in (True, False):
        with torch.set_grad_enabled(learning):
            fused_linear_divergence(hidden, head, Dense(torch.randn(4, 5), torch.randn(9, 5)))
    assert asked == [(True, True), (False, False)]
