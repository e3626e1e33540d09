"""Training on the student's own answers: rounds, their place in a step's loss, choice by writing, and real SIGKILLs."""

import os
import random
import shutil
import signal

import pytest
import torch
from models import save_tiny, tiny_model, tiny_tokenizer
from test_distill import TEACHER, assert_same, contents, heldout, killed_after, outcome
from test_train import Rows, become_rank, first_rows, in_two_processes, lines, settings
from test_train import processes as launcher

from compressor import onpolicy
from compressor import train as training
from compressor.data import collate, targets
from compressor.distill import distillation_loss
from compressor.errors import UserError
from compressor.onpolicy import Losses, Rounds, Tricks, check
from compressor.recipe import OnPolicy
from compressor.signals import Online
from compressor.teacher import load
from compressor.train import Judge

PROMPTS = [[0, 5 + 7 * i, 9, *range(20, 20 + i % 4)] for i in range(10)]
STEPS = 12


def options(**changes):
    values = {"batch": 8, "answers": 8, "inner_epochs": 3, "lr": 1e-2, "warmup_steps": 1, "sample_rows": 3}
    return OnPolicy.model_validate(values | changes)


def rounds(*, tricks=None, prompts=PROMPTS, **changes):
    given = {"own": 2, "micro_batch": 2, "answers": 8, "inner_epochs": 2, "weights": (1.0, 1.0), "seed": 3}
    sampled = {"max_new_tokens": 6, "temperature": 1.0, "eos_ids": (1,), "vocab": 259, "sample_rows": 3}
    return Rounds(prompts, tricks=tricks, teacher=tiny_model(**TEACHER), **(given | sampled | changes))


def step(supply, number, student=None):
    """The micro-batches of a step whose data are two batches of two rows."""
    rows = first_rows(8, seed=number)
    batches = [collate(rows[i : i + 2]) for i in range(0, 8, 2)]
    return supply.of_step(student or tiny_model(), number, batches, list)


def told(batch):
    """The rows of a batch as tuples of ids."""
    pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [tuple(ids[mask.bool()].tolist()) for ids, mask in pairs]


# --- rounds -----------------------------------------------------------------------------------------------------------


def test_every_answer_is_read_once_an_epoch_and_a_round_ends_after_its_epochs():
    supply = rounds()
    seen = [[row for batch in step(supply, number) if "own" in batch for row in told(batch)] for number in range(8)]
    epochs = [sorted(seen[i] + seen[i + 1]) for i in range(0, 8, 2)]
    assert epochs[0] == epochs[1] != epochs[2] == epochs[3]
    assert seen[0] != seen[2]  # in another order
    assert len(set(epochs[0])) == 8


def test_rounds_ask_all_prompts_before_any_again():
    supply, asked = rounds(answers=4, inner_epochs=1), []
    for number in range(5):
        step(supply, number)
        asked += [tuple(ids[mask].tolist()) for ids, mask in zip(*prompts_of(supply.found), strict=True)]
    assert sorted(asked) == sorted([tuple(ids) for ids in PROMPTS] * 2)


def prompts_of(found):
    return found.prompt_ids_BP, found.prompt_mask_BP


def test_an_answer_is_the_target_and_its_prompt_is_not():
    supply = rounds(tricks=Tricks())
    for batch in step(supply, 0)[:2]:
        counted = targets(batch)
        assert torch.equal(counted, batch["own"][:, 1:].bool())
        assert torch.equal(batch["labels"][:, 1:][counted], batch["input_ids"][:, 1:][counted])
        assert bool((batch["log_mix"][:, 1:][counted] < 0).all())
        assert not batch["log_mix"][:, 1:][~counted].any()
        assert {ids[: len(prompt)] for ids in told(batch) for prompt in PROMPTS if ids[: len(prompt)] == tuple(prompt)}


@pytest.mark.parametrize("weights", [(1.0, 0.25), (0.5, 0.5)])
def test_the_mean_of_each_kind_has_its_weight(weights):
    """Whatever the numbers of tokens are: the trainer divides the sum by the targets of both kinds."""
    batches = step(rounds(weights=weights), 0)
    kinds = [[batch for batch in batches if ("own" in batch) is own] for own in (True, False)]
    counts = [sum(int(targets(batch).sum()) for batch in group) for group in kinds]
    assert counts[0] != counts[1]
    per_token = 3.0, 11.0  # of each kind
    sums = sum(
        loss * float(batch["weight"]) * int(targets(batch).sum())
        for group, loss in zip(kinds, per_token, strict=True)
        for batch in group
    )
    expected = sum(weight * loss for weight, loss in zip(weights, per_token, strict=True))
    assert sums / sum(counts) == pytest.approx(expected)


def test_a_saved_round_goes_on_in_the_same_bits(tmp_path):
    """The answers come from the file: the student that reads it is another one."""
    first, second = rounds(tricks=Tricks()), rounds(tricks=Tricks())
    step(first, 0)
    step(first, 1)
    first.save(tmp_path)
    second.load(tmp_path, step=2)
    for number in (2, 3):
        for one, two in zip(step(first, number), step(second, number, tiny_model(seed=9)), strict=True):
            assert one.keys() == two.keys()
            assert all(torch.equal(one[name], two[name]) for name in one)


def test_between_rounds_nothing_has_to_be_read(tmp_path):
    supply = rounds()
    supply.load(tmp_path, step=4)
    assert supply.found is None


def test_a_checkpoint_without_its_answers_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot read rollouts"):
        rounds().load(tmp_path, step=5)


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_rewards_are_known_whether_or_not_the_teacher_took_part_in_sampling(alpha):
    supply = rounds(tricks=Tricks(alpha=alpha))
    batches = step(supply, 0)
    assert supply.notes()["answer_reward"] == pytest.approx(float(supply.found.rewards[supply.found.mask_BT].mean()))
    assert supply.notes()["answer_reward"] < 0  # minus a divergence, but for chance
    assert any(bool(batch["advantages"].any()) for batch in batches[:2])


def test_advantages_are_whitened_over_the_round():
    supply = rounds(tricks=Tricks(variant="reference"))
    found = [batch for number in range(2) for batch in step(supply, number) if "own" in batch]
    advantages = torch.cat([batch["advantages"][:, 1:][targets(batch)] for batch in found])
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-5)
    assert float(advantages.std(correction=0)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"micro_batch": 8}, "1 micro-batches"),
        ({"batch": 9}, "expected a multiple"),
        ({"answers": 6}, "expected a multiple of 4"),
        ({"share": 0.05}, "expected at least one of answers"),
    ],
)
def test_shares_and_rounds_that_do_not_fit_are_one_line(changes, words):
    rows = {name: changes.pop(name) for name in ("micro_batch",) if name in changes}
    with pytest.raises(UserError, match=words) as error:
        check(settings(**({"batch": 8, "micro_batch": 2} | rows)), options(**changes))
    assert "\n" not in str(error.value)


# --- training ---------------------------------------------------------------------------------------------------------


def run(folder, *, judge=None, method="minillm", **changes):
    """Train the student beside `folder`, as the pipeline does."""
    teacher = load(folder.parent / "teacher")
    asked = options(**{name: changes.pop(name) for name in [*changes] if name in OnPolicy.model_fields})
    sizes = {"tokens": 75 * STEPS + 10, "batch": 8, "micro_batch": 2, "eval_every": 2, "max_new_tokens": 6}
    given = settings(**(sizes | changes))
    signal = Online(teacher)
    kl = distillation_loss(signal, settings=given, vocab=259)
    jsd = distillation_loss(signal, settings=given.model_copy(update={"divergence": "jsd"}), vocab=259)
    tricks = onpolicy.tricks_of(asked) if method == "minillm" else None
    objective = onpolicy.minillm_objective(signal, tricks, 259, 16) if tricks else jsd
    plain = distillation_loss(None, settings=given, vocab=259)
    return onpolicy.distill(
        folder.parent / "student",
        teacher=teacher,
        losses=Losses(objective, plain if tricks else jsd, kl),
        tricks=tricks,
        prompts=PROMPTS,
        answer_tokens=6,
        tokenizer=tiny_tokenizer(),
        batches=Rows(),
        heldout=heldout(),
        settings=given,
        options=asked,
        folder=folder,
        judge=judge,
        seed=3,
        vocab=259,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "student")
    save_tiny(folder / "teacher", **TEACHER)
    return folder


def copy(models, folder):
    for name in ("student", "teacher"):
        shutil.copytree(models / name, folder / name)


@pytest.mark.parametrize("method", ["minillm", "gkd"])
def test_learning_from_its_own_answers_brings_the_student_nearer_to_the_teacher(models, tmp_path, method):
    copy(models, tmp_path)
    before = contents(tmp_path / "student")
    result = run(tmp_path / "checkpoints", method=method, share=1.0)  # no data beside them
    assert result.status == "ok"
    assert result.last_heldout < result.first_heldout - 0.02
    assert contents(tmp_path / "student") == before
    assert "answer_length" in lines(tmp_path / "checkpoints")[1]
    assert ("answer_reward" in lines(tmp_path / "checkpoints")[1]) is (method == "minillm")
    assert not [file for file in result.best_folder.glob("*.safetensors") if file.name != "model.safetensors"]


def session(folder):
    torch.set_num_threads(1)
    run(folder)


def dying(folder):
    """A session that is killed in the middle of its first round."""
    torch.set_num_threads(1)
    of_step = onpolicy.Rounds.of_step

    def killed(self, student, step, *rest):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return of_step(self, student, step, *rest)

    onpolicy.Rounds.of_step = killed
    run(folder)


@pytest.fixture(scope="module")
def undisturbed(models):
    process = launcher().Process(target=session, args=(models / "checkpoints",))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    return outcome(models / "checkpoints")


def test_kills_at_random_moments_of_rounds_end_in_the_same_bits(models, undisturbed, tmp_path):
    copy(models, tmp_path)
    folder, rng = tmp_path / "checkpoints", random.Random()
    process = launcher().Process(target=dying, args=(folder,))  # one inside a round for certain: rounds take 6 steps
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert training.last_checkpoint(folder).name == "checkpoint-2"
    for at in (3, 6, 9):
        process = launcher().Process(target=session, args=(folder,))
        process.start()
        killed_after(process, folder, at, rng.uniform(0, 0.3))
    process = launcher().Process(target=session, args=(folder,))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    assert_same(outcome(folder), undisturbed)


def rank(index, port, folder, queue):
    become_rank(index, port)
    result = run(folder, tokens=10 * 8 * 5)
    names = sorted(path.name for path in (training.last_checkpoint(folder) / "beside").iterdir())
    queue.put((index, result.last_heldout, result.tokens, names))


def test_two_processes_answer_prompts_of_their_own(models, tmp_path):
    copy(models, tmp_path)
    folder = tmp_path / "checkpoints2"
    reports = in_two_processes(rank, folder)
    assert reports[0][1:] == reports[1][1:]
    assert reports[0][3] == ["answers-0.safetensors", "answers-1.safetensors"]
    asked = []
    for number in range(2):
        found = onpolicy.Rollouts.load(training.last_checkpoint(folder) / "beside" / f"answers-{number}.safetensors")
        asked += [tuple(ids[mask].tolist()) for ids, mask in zip(*prompts_of(found), strict=True)]
    assert len(set(asked)) == 8  # no prompt twice


# --- judged by its writing --------------------------------------------------------------------------------------------


def judge(figures, limit=0.5):
    """Figures in turn, as if answers had been judged; repetition above the limit has run away."""
    found = iter(figures)

    def measure(student):
        assert not student.training
        rouge_l, repetition = next(found)
        return {"rouge_l": rouge_l, "repetition": repetition}

    return Judge(measure, lambda line: "it repeats itself" if line["repetition"] > limit else None, "rouge_l")


def test_the_best_checkpoint_is_the_one_that_writes_best(models, tmp_path):
    copy(models, tmp_path)
    figures = [(0.1, 0.0), (0.2, 0.0), (0.5, 0.0), (0.3, 0.0), (0.4, 0.0), (0.1, 0.0), (0.2, 0.0)]
    result = run(tmp_path / "checkpoints", judge=judge(figures))
    assert result.best_folder == tmp_path / "checkpoints" / "checkpoint-4"
    assert result.status == "ok"
    assert result.last_heldout < result.best_heldout  # the loss would have chosen the last
    assert "rouge_l 0.1000 -> 0.2000 (best 0.5000)" in result.describe()


def test_nothing_that_writes_better_keeps_the_student_as_it_was(models, tmp_path):
    copy(models, tmp_path)
    result = run(tmp_path / "checkpoints", judge=judge([(0.5, 0.0)] + [(0.4, 0.0)] * 6))
    assert result.status == "worse"
    assert result.best_folder == tmp_path / "student"


def test_writing_that_runs_away_ends_training_for_good(models, tmp_path):
    copy(models, tmp_path)
    figures = [(0.1, 0.9), (0.2, 0.9), (0.4, 0.1), (0.6, 0.8)]  # a pruned model may begin that way
    for _ in range(2):  # the second time, nothing is trained
        result = run(tmp_path / "checkpoints", judge=judge(figures))
        assert result.status == "collapsed"
        assert result.steps == 6
        assert result.best_folder == tmp_path / "checkpoints" / "checkpoint-4"  # though the last has more rouge_l
        assert "run away (it repeats itself)" in result.describe()
        assert "\n" not in result.describe()
        figures = []


def test_what_never_wrote_well_is_trained_on(models, tmp_path):
    copy(models, tmp_path)
    result = run(tmp_path / "checkpoints", judge=judge([(0.1 * i, 0.9) for i in range(7)]))
    assert result.status == "ok"
    assert result.steps == STEPS
