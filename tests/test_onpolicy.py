"""The on-policy core: its objective against every sequence there is, its sampling against whole forward passes."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import tiny_model
from torch.nn import functional

from compressor.data import hidden_states, targets
from compressor.distill import distillation_loss
from compressor.errors import UserError
from compressor.losses import Dense, token_log_probs
from compressor.onpolicy import Rollouts, Tricks, advantages, importance_weights, minillm_loss, sample, score
from compressor.signals import Online

VOCAB, LENGTH, EOS = 3, 3, 0
PLAIN = Tricks(single_step=False, length_norm=False, alpha=0.0, importance="off", clip=None)


# --- the objective against an exact enumeration -----------------------------------------------------------------------


class World:
    """Two models small enough to write out: each prefix of at most two tokens has a hidden state of its own.

    `eos`: id 0 ends an answer, so that lengths differ. Everything is float64.
    """

    def __init__(self, *, eos: bool, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        prefixes = [p for n in range(LENGTH) for p in itertools.product(range(VOCAB), repeat=n)]
        self.states = {prefix: i for i, prefix in enumerate(prefixes)}
        self.student = [normal(len(prefixes), 4).requires_grad_(), normal(VOCAB, 4).requires_grad_()]
        self.teacher = [normal(len(prefixes), 5) * 0.8, normal(VOCAB, 5) * 0.8]
        every = itertools.product(range(VOCAB), repeat=LENGTH)
        self.answers = sorted({y[: y.index(EOS) + 1] if eos and EOS in y else y for y in every})

    def rows(self, model, answer):
        return model[0][[self.states[answer[:t]] for t in range(len(answer))]]

    def log_probs(self, model, answer):
        """(T,)"""
        log_TV = (self.rows(model, answer) @ model[1].t()).log_softmax(-1)
        return log_TV.gather(1, torch.tensor(answer)[:, None])[:, 0]

    def exact(self):
        """The gradient of KL(q || p) over whole answers, by autograd through their sum."""
        total = torch.zeros((), dtype=torch.float64)
        for answer in self.answers:
            log_q = self.log_probs(self.student, answer).sum()
            total = total + log_q.exp() * (log_q - self.log_probs(self.teacher, answer).sum())
        return flat(torch.autograd.grad(total, self.student))

    def estimate(self, answer, tricks):
        """(probability of being sampled, gradient of the objective on this answer alone)."""
        log_q, log_p = (self.log_probs(model, answer).detach()[None] for model in (self.student, self.teacher))
        log_mix = torch.log(tricks.alpha * log_p.exp() + (1 - tricks.alpha) * log_q.exp())
        mask = torch.ones_like(log_q, dtype=torch.bool)
        found = minillm_loss(
            self.rows(self.student, answer),
            self.student[1],
            Dense(self.rows(self.teacher, answer), self.teacher[1]),
            ids_BT=torch.tensor([answer]),
            mask_BT=mask,
            log_mix_BT=log_mix,
            advantages_BT=advantages(log_p - log_q, mask, tricks),
            tricks=tricks,
            chunk_tokens=2,
        )
        return log_mix.sum().exp(), flat(torch.autograd.grad(found.loss, self.student))

    def moments(self, tricks):
        """Expectation of the estimator and its total variance, exact: no sampling, so no luck."""
        chances, gradients = zip(*(self.estimate(answer, tricks) for answer in self.answers), strict=True)
        chances, gradients = torch.stack(chances), torch.stack(gradients)
        assert abs(chances.sum() - 1) < 1e-12
        mean = chances @ gradients
        return mean, float(chances @ (gradients - mean).square().sum(1))


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def bias(world, tricks):
    """Distance of the expectation from the exact gradient, relative to its norm."""
    exact = world.exact()
    return float((world.moments(tricks)[0] - exact).norm() / exact.norm())


@pytest.fixture(params=[False, True], ids=["cut off at length 3", "with EOS"])
def world(request):
    return World(eos=request.param)


@pytest.mark.parametrize("single_step", [True, False])
@pytest.mark.parametrize(
    "sampling",
    [
        {"alpha": 0.0, "importance": "off"},
        {"alpha": 0.0, "importance": "token"},
        {"alpha": 0.2, "importance": "sequence"},
        {"alpha": 0.7, "importance": "sequence"},
    ],
)
def test_the_expected_gradient_is_that_of_the_divergence_over_sequences(world, sampling, single_step):
    assert bias(world, replace(PLAIN, single_step=single_step, **sampling)) < 1e-12


def test_the_clip_does_nothing_where_the_student_is_the_one_that_answered(world):
    on_policy = replace(PLAIN, single_step=True, importance="token")
    torch.testing.assert_close(world.moments(replace(on_policy, clip=0.2)), world.moments(on_policy))


def test_one_tokens_weight_is_a_bias_that_vanishes_with_mixing_and_no_weight_is_a_larger_one(world):
    """Per-token weights leave the prefix and the later rewards distributed as p~; that is what is measured here."""
    paper = Tricks(length_norm=False, clip=None)
    found = [bias(world, replace(paper, alpha=alpha)) for alpha in (0.02, 0.2, 0.5)]
    assert found == sorted(found)
    assert found[0] < 0.06
    assert 0.3 < found[1] < 0.5  # two unrelated models; linear in alpha at first
    assert bias(world, replace(paper, importance="off")) > found[1]


def test_a_tokens_weight_on_the_single_step_term_changes_no_expectation(world):
    """w_t has mean 1 after any prefix and KL(q_t || p_t) depends on the prefix alone: w_t is mere noise there."""

    def gradient_of_single_step(importance):
        tricks = Tricks(length_norm=False, clip=None, importance=importance)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{__name__}.advantages", lambda rewards, mask, tricks: torch.zeros_like(rewards))
            return world.moments(tricks)

    (weighed, variance), (plain, less) = map(gradient_of_single_step, ("token", "off"))
    torch.testing.assert_close(weighed, plain)
    assert variance > less


def test_each_trick_shows_in_the_variance(world):
    unbiased = replace(PLAIN, single_step=True)
    assert world.moments(unbiased)[1] < 0.8 * world.moments(PLAIN)[1]
    assert world.moments(replace(unbiased, length_norm=True))[1] < world.moments(unbiased)[1]
    exact_weights = [replace(unbiased, alpha=alpha, importance="sequence") for alpha in (0.0, 0.2, 0.5)]
    variances = [world.moments(tricks)[1] for tricks in exact_weights]
    assert variances == sorted(variances)  # the price of answers that are not the student's own
    assert bias(world, replace(exact_weights[1], clip=0.2)) > 1e-3  # and clipping them is a bias


def test_length_norm_is_another_objective(world):
    """With rewards per token still to come, answers of 3 tokens lose half of their first token's reward."""
    assert bias(world, replace(PLAIN, single_step=True, length_norm=True)) > 0.05


def test_the_reference_code_counts_the_current_token_twice(world):
    """Its advantage holds r_t although the single-step term has it: biased even with every switch off."""
    assert bias(world, Tricks(alpha=0.0, length_norm=False, clip=None, variant="reference")) > 0.2


def test_inner_epochs_keep_the_weights_honest_and_the_clip_bounds_them(world):
    """A student that has moved since it answered: token weights stay those of the moved one over p~."""
    answer = max(world.answers, key=len)
    log_mix = world.log_probs(world.student, answer).detach()[None] - torch.tensor([[0.5, -0.5, 0.05]])
    mask = torch.ones_like(log_mix, dtype=torch.bool)
    rewards = torch.tensor([[1.0, 1.0, -1.0]], dtype=torch.float64)

    def loss(clip):
        tricks = Tricks(single_step=False, clip=clip)
        rows = Dense(world.rows(world.teacher, answer), world.teacher[1])
        parts = minillm_loss(
            world.rows(world.student, answer),
            world.student[1],
            rows,
            ids_BT=torch.tensor([answer]),
            mask_BT=mask,
            log_mix_BT=log_mix,
            advantages_BT=rewards,
            tricks=tricks,
        )
        return parts, flat(torch.autograd.grad(parts.loss, world.student))

    ratios = torch.tensor([0.5, -0.5, 0.05]).double().exp()
    free, gradient = loss(None)
    torch.testing.assert_close(free.loss, -(ratios * rewards[0]).sum())
    torch.testing.assert_close(free.weight, ratios.sum())
    log_q = world.log_probs(world.student, answer)
    torch.testing.assert_close(gradient, flat(torch.autograd.grad(-(ratios * rewards[0] * log_q).sum(), world.student)))
    capped, gradient = loss(0.2)
    torch.testing.assert_close(capped.loss, -(1.2 + ratios[1] - ratios[2]))
    assert int(capped.clipped) == 1
    log_q = world.log_probs(world.student, answer)
    wanted = -(ratios * rewards[0] * log_q)[1:].sum()
    torch.testing.assert_close(gradient, flat(torch.autograd.grad(wanted, world.student)))


def test_sequence_weights_are_whole_products_and_padding_weighs_nothing():
    log_q, log_mix = torch.randn(2, 4).double(), torch.randn(2, 4).double()
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    log_q[1, 2:] = torch.nan
    ratio = (log_q - log_mix).exp()
    found = {name: importance_weights(log_q, log_mix, mask, name) for name in ("token", "sequence", "off")}
    torch.testing.assert_close(found["token"], ratio.where(mask, 0))
    products = torch.stack([ratio[0].prod(), ratio[1, :2].prod()])[:, None]
    torch.testing.assert_close(found["sequence"], products.where(mask, 0))
    assert torch.equal(found["off"], mask.double())


# --- advantages -------------------------------------------------------------------------------------------------------


def summed(rewards, *, gamma, inclusive, length_norm):
    """The sums of one row's rewards (T,), written out."""
    length = len(rewards)
    out = []
    for t in range(1, length + 1):
        first = t if inclusive else t + 1
        total = sum(gamma ** (u - first) * float(rewards[u - 1]) for u in range(first, length + 1))
        out.append(total / max(1, length - first + 1) if length_norm else total)
    return torch.tensor(out, dtype=torch.float64)


LENGTHS = (7, 4, 1)


def padded_rewards(filling=0.0):
    rewards = torch.randn(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    return rewards.where(mask, filling), mask


@pytest.mark.parametrize("length_norm", [True, False])
@pytest.mark.parametrize("single_step", [True, False])
def test_paper_advantages_are_the_sums(single_step, length_norm):
    rewards, mask = padded_rewards()
    found = advantages(rewards, mask, Tricks(single_step=single_step, length_norm=length_norm))
    for row, length, reward in zip(found, LENGTHS, rewards, strict=True):
        expected = summed(reward[:length], gamma=1.0, inclusive=not single_step, length_norm=length_norm)
        torch.testing.assert_close(row[:length], expected)
        assert not row[length:].any()


@pytest.mark.parametrize("length_norm", [True, False])
def test_reference_advantages_are_the_whitened_sums_of_scaled_and_clipped_rewards(length_norm):
    rewards, mask = padded_rewards()
    rewards[0, 3] = 70.0  # 140 after scaling, 100 after the clip
    found = advantages(rewards, mask, Tricks(variant="reference", length_norm=length_norm))
    scaled = (rewards / 0.5).clamp(-100, 100)
    rows = [
        summed(row[:length], gamma=0.95, inclusive=True, length_norm=length_norm)
        for row, length in zip(scaled, LENGTHS, strict=True)
    ]
    together = torch.cat(rows)
    expected = (together - together.mean()) / together.std(correction=0)
    torch.testing.assert_close(found[mask], expected, rtol=1e-6, atol=1e-6)
    assert not found[~mask].any()


@pytest.mark.parametrize("variant", ["paper", "reference"])
@pytest.mark.parametrize("filling", [1e6, float("nan")])
def test_what_stands_in_the_padding_takes_no_part(variant, filling):
    (rewards, mask), tricks = padded_rewards(), Tricks(variant=variant)
    expected = advantages(rewards, mask, tricks)
    assert torch.equal(advantages(padded_rewards(filling)[0], mask, tricks), expected)
    wider = [functional.pad(values, (2, 3), value=fill) for values, fill in ((rewards, filling), (mask, False))]
    torch.testing.assert_close(advantages(*wider, tricks)[:, 2:-3], expected)


# --- sampling ---------------------------------------------------------------------------------------------------------

TEACHER = {"hidden_size": 72, "seed": 5, "vocab_size": 270}  # wider than the student, padded further


def prompts(lengths=(6, 2, 9), vocab=250):
    """Left-padded ids and mask; padding is an id of its own, so that a model that reads it shows."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    ids = torch.randint(3, vocab, mask.shape, generator=generator)
    return ids.where(mask, 2), mask


def rollouts(*, seed=0, teacher=None, eos_ids=(1,), max_new_tokens=12, given=None, **options):
    ids, mask = given or prompts()
    generator = torch.Generator().manual_seed(seed)
    return sample(
        tiny_model(),
        ids,
        mask,
        teacher=teacher,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        generator=generator,
        **options,
    )


def whole_log_probs(model, found, vocab, temperature=1.0):
    """Every row on its own, unpadded, in one forward pass without a cache: [(T, V)] at the answer's positions."""
    out = []
    for prompt, prompt_mask, answer, mask in zip(
        found.prompt_ids_BP, found.prompt_mask_BP, found.ids_BT, found.mask_BT, strict=True
    ):
        ids = torch.cat([prompt[prompt_mask], answer[mask]])
        start = int(prompt_mask.sum())
        with torch.no_grad():
            logits = model(ids[None], use_cache=False).logits[0, start - 1 : -1, :vocab]
        out.append((logits / temperature).log_softmax(-1))
    return out


def taken(log_probs, found):
    rows = zip(log_probs, found.ids_BT, found.mask_BT, strict=True)
    return torch.cat([log.gather(1, ids[mask][:, None])[:, 0] for log, ids, mask in rows])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_through_caches_and_padding_are_those_of_each_row_alone(temperature):
    teacher = tiny_model(**TEACHER)
    found = rollouts(teacher=teacher, alpha=0.4, temperature=temperature, vocab=255)
    log_q, log_p = (whole_log_probs(model, found, 255) for model in (tiny_model(), teacher))
    hot_q, hot_p = (whole_log_probs(model, found, 255, temperature) for model in (tiny_model(), teacher))
    mixed = [(0.4 * p.exp() + 0.6 * q.exp()).log() for q, p in zip(hot_q, hot_p, strict=True)]
    mask = found.mask_BT
    for values, expected in ((found.log_q_BT, log_q), (found.log_p_BT, log_p), (found.log_mix_BT, mixed)):
        torch.testing.assert_close(values[mask], taken(expected, found), rtol=1e-4, atol=1e-4)
        assert not values[~mask].any()
    torch.testing.assert_close(found.rewards, found.log_p_BT - found.log_q_BT)
    assert found.ids_BT.max() < 255


def test_a_student_alone_is_never_mixed_and_the_teacher_never_read():
    class Silent(torch.nn.Module):
        def forward(self, *_, **__):
            raise AssertionError("the teacher was asked")

    found, without = rollouts(teacher=Silent()), rollouts()
    assert torch.equal(found.ids_BT, without.ids_BT)
    assert torch.equal(found.log_mix_BT, found.log_q_BT)
    assert found.log_p_BT is None
    with pytest.raises(UserError, match="call score first"):
        _ = found.rewards


def test_scoring_afterwards_is_what_sampling_would_have_noted():
    teacher = tiny_model(**TEACHER)
    found = rollouts(teacher=teacher, alpha=0.4, vocab=255)
    again = score(replace(found, log_p_BT=None), teacher, vocab=255, chunk_tokens=5)
    torch.testing.assert_close(again.log_p_BT, found.log_p_BT, rtol=1e-4, atol=1e-4)
    assert not again.log_p_BT.requires_grad


def test_tokens_come_from_the_mixture():
    """First tokens of 4,000 answers to one prompt against alpha p + (1 - alpha) q: Pearson's chi-square, 7 degrees."""
    student, teacher = tiny_model(vocab_size=8), tiny_model(vocab_size=9, hidden_size=72, seed=5)
    alpha, count = 0.35, 4000
    ids, mask = torch.tensor([[3, 4, 5]]).expand(count, -1), torch.ones(count, 3)
    found = sample(
        student,
        ids,
        mask,
        teacher=teacher,
        alpha=alpha,
        max_new_tokens=1,
        eos_ids=(1,),
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        q, p = (model(ids[:1]).logits[0, -1, :8].softmax(-1) for model in (student, teacher))
    counts = found.ids_BT.flatten().bincount(minlength=8)

    def chi_square(expected):
        return float(((counts - count * expected).square() / (count * expected)).sum())

    assert chi_square(alpha * p + (1 - alpha) * q) < 18.5  # 1 in 100 by chance, and the seed is fixed
    assert min(chi_square(q), chi_square(p), chi_square((1 - alpha) * p + alpha * q)) > 100


def test_the_same_generator_state_gives_the_same_bits_and_another_does_not():
    teacher = tiny_model(**TEACHER)
    one, same, other = (rollouts(seed=seed, teacher=teacher, alpha=0.2) for seed in (3, 3, 4))
    assert all(torch.equal(*pair) for pair in zip(vars(one).values(), vars(same).values(), strict=True))
    assert not torch.equal(one.ids_BT, other.ids_BT)


def test_an_answer_ends_with_its_end_of_sequence_token_and_counts_it():
    found = rollouts(eos_ids=range(60, 110), max_new_tokens=20, given=prompts((4,) * 12))
    lengths = found.mask_BT.sum(1)
    assert len(set(lengths.tolist())) > 3
    assert lengths.max() == found.ids_BT.shape[1]
    for ids, mask, length in zip(found.ids_BT, found.mask_BT, lengths, strict=True):
        stops = [60 <= token < 110 for token in ids.tolist()]
        assert stops[: length - 1] == [False] * (int(length) - 1)
        assert stops[length - 1] or length == 20
        assert mask[:length].all()
        assert not mask[length:].any()
        assert not ids[length:].any()
    assert rollouts(eos_ids=range(259)).ids_BT.shape[1] == 1
    assert rollouts(eos_ids=()).mask_BT.all()


def test_sampling_reads_in_eval_mode_with_positions_that_count_real_tokens_and_leaves_no_trace():
    student, seen = tiny_model(), []
    student.train()
    student.register_forward_pre_hook(
        lambda module, _, given: seen.append((module.training, given["position_ids"].clone())), with_kwargs=True
    )
    ids, mask = prompts((6, 2))
    found = sample(student, ids, mask, max_new_tokens=3, eos_ids=(), generator=torch.Generator().manual_seed(0))
    assert not any(training for training, _ in seen)
    assert torch.cat([positions for _, positions in seen], 1).tolist() == [[*range(8)], [0, 0, 0, 0, 0, 1, 2, 3]]
    assert student.training
    assert not found.log_q_BT.requires_grad


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 1.0}, "alpha is 1.0"),
        ({"alpha": 0.2}, "there is no teacher"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"given": (torch.zeros(2, 0).long(), torch.zeros(2, 0))}, "prompts have 0 positions"),
        ({"given": (torch.zeros(1, 3).long(), torch.tensor([[1, 1, 0]]))}, "padding on the left only"),
        ({"given": (torch.zeros(1, 3).long(), torch.tensor([[1, 0, 1]]))}, "padding on the left only"),
    ],
)
def test_sampling_out_of_range_is_one_line(options, words):
    with pytest.raises(UserError, match=words) as error:
        rollouts(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"importance": "none"}, "token, sequence, off"),
        ({"variant": "trl"}, "paper, reference"),
        ({"alpha": 1.0}, "alpha is 1.0"),
        ({"clip": 0.0}, "clip is 0.0"),
    ],
)
def test_unknown_tricks_are_one_line(options, words):
    with pytest.raises(UserError, match=words) as error:
        Tricks(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_rollouts_come_back_bit_for_bit(tmp_path, alpha):
    found = rollouts(teacher=tiny_model(**TEACHER), alpha=alpha)
    found.save(tmp_path / "rollouts.safetensors")
    again = Rollouts.load(tmp_path / "rollouts.safetensors")
    assert (again.log_p_BT is None) is (alpha == 0)
    for ours, theirs in zip(vars(again).values(), vars(found).values(), strict=True):
        assert (ours is None and theirs is None) or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))


def test_a_file_of_another_kind_is_one_line(tmp_path):
    path = tmp_path / "rollouts.safetensors"
    with pytest.raises(UserError, match="cannot read rollouts"):
        Rollouts.load(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot read rollouts"):
        Rollouts.load(path)


# --- sampling, objective and a real model together --------------------------------------------------------------------


def gradient_of(student, teacher, found, tricks):
    batch = found.batch()
    counted = targets(batch)
    assert torch.equal(batch["labels"][:, 1:][counted], found.ids_BT[found.mask_BT])
    with torch.no_grad():
        teacher_rows = Dense(hidden_states(teacher, batch)[:, :-1][counted], teacher.lm_head.weight)
    parts = minillm_loss(
        hidden_states(student, batch)[:, :-1][counted],
        student.lm_head.weight,
        teacher_rows,
        ids_BT=found.ids_BT,
        mask_BT=found.mask_BT,
        log_mix_BT=found.log_mix_BT,
        advantages_BT=advantages(found.rewards, found.mask_BT, tricks),
        tricks=tricks,
    )
    return flat(torch.autograd.grad(parts.loss / len(found.ids_BT), list(student.parameters())))


@pytest.mark.parametrize(
    "tricks",
    [
        Tricks(alpha=0.0, length_norm=False),
        Tricks(alpha=0.3, length_norm=False, importance="sequence", clip=None),
    ],
    ids=["student alone", "mixed"],
)
def test_sampled_answers_of_a_real_model_give_the_exact_gradient_within_their_error(tricks):
    """40 batches of 64 answers of a tiny Llama; with no bias, the mean's squared distance from the exact gradient is
    the batches' variance / 40 on average, and a bias of a tenth of the gradient would show as several times that."""
    sizes = {"vocab_size": 3, "num_hidden_layers": 1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    student, teacher = tiny_model(**sizes).double(), tiny_model(**sizes, hidden_size=72, seed=5).double()
    prompt = torch.tensor([[2, 1]])
    total = torch.zeros((), dtype=torch.float64)
    answers = sorted({y[: y.index(EOS) + 1] if EOS in y else y for y in itertools.product(range(VOCAB), repeat=LENGTH)})
    for answer in answers:
        ids = torch.cat([prompt, torch.tensor([answer])], 1)
        log_q, log_p = (
            model(ids).logits[0, 1:-1].log_softmax(-1).gather(1, ids[0, 2:, None]).sum() for model in (student, teacher)
        )
        total = total + log_q.exp() * (log_q - log_p.detach())
    exact = flat(torch.autograd.grad(total, list(student.parameters())))
    generator, gradients = torch.Generator().manual_seed(0), []
    for _ in range(40):
        found = sample(
            student,
            prompt.expand(64, -1),
            torch.ones(64, 2),
            teacher=teacher,
            alpha=tricks.alpha,
            max_new_tokens=LENGTH,
            eos_ids=(EOS,),
            generator=generator,
        )
        found = found if found.log_p_BT is not None else score(found, teacher)
        gradients.append(gradient_of(student, teacher, found, tricks))
    gradients = torch.stack(gradients)
    error = (gradients.mean(0) - exact).square().sum()
    expected_error = gradients.var(0).sum() / len(gradients)
    assert expected_error < 0.01 * exact.square().sum()
    assert error < 2 * expected_error


def test_on_policy_gkd_is_the_offline_loss_on_the_students_own_answers():
    """JSD over answer tokens only, against whole logits of each row alone."""
    student, teacher = tiny_model(), tiny_model(**TEACHER)
    found = rollouts(eos_ids=range(60, 110))
    settings = SimpleNamespace(divergence="jsd", mix=0.5, temperature=1.0, ce_weight=0.0, chunk_tokens=7)
    total = distillation_loss(Online(teacher), settings=settings, vocab=255)(student, found.batch()).loss
    expected = torch.zeros(())
    for log_q, log_p in zip(*(whole_log_probs(model, found, 255) for model in (student, teacher)), strict=True):
        log_m = ((log_q.exp() + log_p.exp()) / 2).log()
        expected += sum(0.5 * (log.exp() * (log - log_m)).sum() for log in (log_q, log_p))
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


# --- log-probabilities in chunks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_tokens", [1, 4, 64])
@pytest.mark.parametrize("vocab", [None, 19])
def test_chunked_log_probabilities_and_their_gradients_are_the_plain_ones(chunk_tokens, vocab):
    generator = torch.Generator().manual_seed(0)
    hidden, head = (
        torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_() for size in ((11, 6), (23, 6))
    )
    ids, upstream = torch.randint(19, (11,), generator=generator), torch.randn(11, generator=generator).double()
    found = token_log_probs(hidden, head, ids, vocab=vocab, chunk_tokens=chunk_tokens)
    plain = (hidden @ head[:vocab].t()).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(found, plain)
    pairs = (torch.autograd.grad((values * upstream).sum(), (hidden, head)) for values in (found, plain))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_rows_have_no_log_probabilities():
    hidden, head = torch.randn(0, 6, requires_grad=True), torch.randn(23, 6, requires_grad=True)
    found = token_log_probs(hidden, head, torch.zeros(0).long())
    assert found.shape == (0,)
    found.sum().backward()
    assert not head.grad.any()


def test_the_objective_makes_no_tensor_of_tokens_times_vocabulary():
    """Every tensor that forward and backward allocate, counted by torch's own dispatcher."""
    from torch.utils._python_dispatch import TorchDispatchMode

    tokens, vocab, chunk = 64, 1000, 8
    largest = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            outs = out if isinstance(out, (tuple, list)) else [out]
            largest.extend(value.numel() for value in outs if isinstance(value, torch.Tensor))
            return out

    student = [torch.randn(tokens, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)]
    ids, mask = torch.randint(vocab, (4, 16)), torch.ones(4, 16)
    with Largest():
        parts = minillm_loss(
            *student,
            Dense(torch.randn(tokens, 5), torch.randn(vocab, 5)),
            ids_BT=ids,
            mask_BT=mask,
            log_mix_BT=-7 * mask,
            advantages_BT=torch.randn(4, 16),
            tricks=Tricks(),
            chunk_tokens=chunk,
        )
        parts.loss.backward()
    assert max(largest) == chunk * vocab
