"""Distillation end to end on tiny models: the loss against whole logits, the guard, and real SIGKILLs."""

import itertools
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from models import save_tiny, tiny_model
from safetensors.torch import load_file
from test_train import Rows, first_rows, lines, processes, settings
from torch.nn import functional
from transformers import AutoModelForCausalLM

from compressor import train as training
from compressor.data import collate, targets
from compressor.distill import distill, distillation_loss
from compressor.errors import UserError
from compressor.losses import HiddenLoss, Pair, balanced, paper_pairs
from compressor.signals import Online, check_head, observed, predicting
from compressor.teacher import load

TEACHER = {"hidden_size": 72, "seed": 5, "vocab_size": 270}  # wider than the student, padded further
STEPS = 12


def heldout():
    return [collate(first_rows(4, seed=9)), collate(first_rows(2, seed=8))]


def run(folder, *, rows=None, hidden=None, **changes):
    """Distill the student beside `folder` from the teacher beside it, in this process."""
    return distill(
        folder.parent / "student",
        signal=Online(load(folder.parent / "teacher")),
        batches=rows or Rows(),
        heldout=heldout(),
        settings=settings(**({"tokens": 64 * STEPS + 40, "batch": 8, "micro_batch": 4, "eval_every": 2} | changes)),
        folder=folder,
        seed=3,
        vocab=259,
        hidden=hidden,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "student")
    save_tiny(folder / "teacher", **TEACHER)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- the loss


def documents(batch):
    """The (ids, labels) of every document of a batch, on its own."""
    for ids, labels, mask, positions in zip(
        *(batch[key] for key in ("input_ids", "labels", "attention_mask", "position_ids")), strict=True
    ):
        length = int(mask.sum())
        starts = [*(positions[:length] == 0).nonzero().flatten().tolist(), length]
        for start, stop in itertools.pairwise(starts):
            yield ids[start:stop], labels[start:stop]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (2.0, 0.25)])
def test_loss_over_packed_and_padded_rows_equals_whole_logits_of_each_document(tied, temperature, ce_weight):
    # Ids from 250 on stand for padding of the vocabulary: fewer are real than either head has rows.
    student, teacher, vocab = tiny_model(tie_word_embeddings=tied), tiny_model(**TEACHER), 250
    batch = collate(first_rows(5))
    total = torch.zeros(())
    for ids, labels in documents(batch):
        counted = labels[1:] != -100
        logits, target = (model(ids[None]).logits[0, :-1, :vocab][counted] for model in (student, teacher))
        log_q, log_p = ((values / temperature).log_softmax(-1) for values in (logits, target.detach()))
        kl = functional.kl_div(log_q, log_p, reduction="sum", log_target=True) * temperature**2
        ce = functional.cross_entropy(logits, labels[1:][counted], reduction="sum")
        total = total + (1 - ce_weight) * kl + ce_weight * ce
    total.backward()
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad()
    options = settings(temperature=temperature, ce_weight=ce_weight, chunk_tokens=3)
    signal = Online(teacher)
    remembers = []
    teacher.register_forward_hook(lambda *_: remembers.append(True))
    teacher.model.register_forward_hook(lambda *_: remembers.append(torch.is_grad_enabled()))
    found = distillation_loss(signal, settings=options, vocab=vocab)(student, batch)
    torch.testing.assert_close(found.loss, total)
    found.loss.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].abs().max()), msg=name
        )
    # Asked once, through its decoder alone (no full logits), keeping nothing for a backward pass.
    assert remembers == [False]


def test_the_same_model_has_nothing_to_learn():
    loss = distillation_loss(Online(tiny_model()), settings=settings())(tiny_model(), collate(first_rows(3)))
    assert abs(float(loss.loss.detach())) < 1e-4
    assert float(loss.parts["ce"]) > 10


def test_heads_that_do_more_than_multiply_are_refused():
    check_head(tiny_model())
    with pytest.raises(UserError, match="logit scale"):
        check_head(tiny_model("granite", logits_scaling=4.0))


# -- the stage


def test_teacher_is_frozen(models):
    teacher = load(models / "teacher")
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in load(models / "teacher", dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


def test_distillation_lowers_the_heldout_divergence(models, tmp_path):
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path / "student")
    result = run(tmp_path / "checkpoints")
    assert result.status == "ok"
    assert result.best_heldout <= result.last_heldout < 0.97 * result.first_heldout
    first = lines(tmp_path / "checkpoints")[0]
    assert first["step"] == 0
    assert first["heldout_loss"] == first["heldout_kl"] == result.first_heldout
    assert contents(tmp_path / "student") == before
    best = AutoModelForCausalLM.from_pretrained(result.best_folder)
    loss = distillation_loss(Online(load(tmp_path / "teacher")), settings=settings(), vocab=259)
    with torch.no_grad():
        total = sum(float(loss(best, batch).loss) for batch in heldout())
    assert total / sum(int(targets(batch).sum()) for batch in heldout()) == pytest.approx(result.best_heldout, rel=1e-5)
    # Nothing pickled beside the stock files.
    assert not {path.name for path in result.best_folder.iterdir()} & {
        "pytorch_model.bin",
        "training_args.bin",
    }


def test_worse_than_found_keeps_the_untouched_student(models, tmp_path):
    """A student that is the teacher already can only lose at this learning rate."""
    save_tiny(tmp_path / "teacher")
    save_tiny(tmp_path / "student")
    result = run(tmp_path / "checkpoints", tokens=200, warmup_steps=0, lr=1e-2)
    assert result.status == "worse"
    assert result.best_folder == tmp_path / "student"
    assert result.best_heldout == result.first_heldout < result.last_heldout
    assert "worse than before" in result.describe()
    assert "\n" not in result.describe()


def test_not_finite_keeps_the_untouched_student(models, tmp_path):
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    result = run(tmp_path / "checkpoints", lr=1e30, warmup_steps=0, eval_every=50, save_every=50)
    assert result.status == "not_finite"
    assert result.steps < STEPS
    assert result.best_folder == tmp_path / "student"
    assert "not finite" in result.describe()


# -- kills


def session(folder, moment=None, save=0):
    """One life of a run; `moment` names where in its save number `save` it kills itself."""
    torch.set_num_threads(1)
    count = {"saves": 0}

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner, name, before):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            before(*args)
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    def due(*_):
        return count["saves"] == save

    wrap(training.Trainer, "_save_checkpoint", lambda *_: count.update(saves=count["saves"] + 1))
    if moment == "weights written":
        wrap(training.Trainer, "_save_optimizer_and_scheduler", lambda *_: due() and die())
    elif moment == "before the rename":
        wrap(
            Path,
            "rename",
            lambda path, target: due() and Path(target).name.startswith("checkpoint") and die(),
        )
    elif moment == "half removed":

        def remove_some(path, *_):
            if due() and Path(path).name.endswith(".old") and Path(path).exists():
                (Path(path) / "trainer_state.json").unlink()
                die()

        wrap(shutil, "rmtree", remove_some)
    run(folder)


def start(folder, *arguments):
    process = processes().Process(target=session, args=(folder, *arguments))
    process.start()
    return process


def killed_after(process, folder, step, seconds):
    """Kill a training so many seconds after it has logged the step; the step of its last checkpoint, or 0."""
    while process.is_alive():
        written = lines(folder) if (folder / "metrics.jsonl").exists() else []
        if written and written[-1]["step"] >= step:
            time.sleep(seconds)
            break
        time.sleep(0.002)
    process.kill()
    process.join()
    last = training.last_checkpoint(folder)
    return int(last.name.split("-")[1]) if last else 0


def outcome(folder):
    """Everything that has to be the same bits: weights, optimizer, and the metrics but for their clocks."""
    last = training.last_checkpoint(folder)
    optimizer = torch.load(last / "optimizer.pt")["state"]
    return last.name, load_file(last / "model.safetensors"), optimizer, lines(folder)


def assert_same(found, expected):
    assert found[0] == expected[0] == f"checkpoint-{STEPS}"
    assert found[3] == expected[3]
    assert all(torch.equal(found[1][name], weight) for name, weight in expected[1].items())
    for index, state in expected[2].items():
        assert all(torch.equal(found[2][index][name], value) for name, value in state.items())


@pytest.fixture(scope="module")
def undisturbed(models):
    process = start(models / "checkpoints")
    process.join(300)
    assert process.exitcode == 0
    return outcome(models / "checkpoints")


def test_kills_at_random_moments_end_in_the_same_bits(models, undisturbed, tmp_path):
    shutil.copytree(models / "student", tmp_path / "student")
    shutil.copytree(models / "teacher", tmp_path / "teacher")
    folder, rng = tmp_path / "checkpoints", random.Random()
    reached = []
    for step in (1, 4, 8):
        reached.append(killed_after(start(folder), folder, step, rng.uniform(0, 0.15)))
    process = start(folder)
    process.join(300)
    assert process.exitcode == 0
    assert reached[-1] > 0, f"no kill fell after a checkpoint: {reached}"
    assert_same(outcome(folder), undisturbed)


def test_kills_inside_a_save_leave_the_earlier_checkpoint(models, undisturbed, tmp_path):
    shutil.copytree(models / "student", tmp_path / "student")
    shutil.copytree(models / "teacher", tmp_path / "teacher")
    folder = tmp_path / "checkpoints"
    for moment, save, last in (
        ("weights written", 2, "checkpoint-2"),
        ("before the rename", 2, "checkpoint-4"),
        ("half removed", 2, "checkpoint-8"),
    ):
        process = start(folder, moment, save)
        process.join(300)
        assert process.exitcode == -signal.SIGKILL, moment
        assert training.last_checkpoint(folder).name == last, moment
        assert any(path.name.startswith(".checkpoint-") for path in folder.iterdir()), moment
    process = start(folder)
    process.join(300)
    assert process.exitcode == 0
    assert not any(path.name.startswith(".checkpoint-") for path in folder.iterdir())
    assert_same(outcome(folder), undisturbed)


# -- hidden states


def test_hidden_states_are_those_behind_the_norms():
    model, batch = tiny_model(), collate(first_rows(3))
    counted = targets(batch)
    final, inside = observed(model, batch, counted, [0, 2, 2, model.config.num_hidden_layers])
    torch.testing.assert_close(final, predicting(model, batch, counted))
    torch.testing.assert_close(inside[3], final)  # behind the last block stands the final norm
    assert torch.equal(inside[1], inside[2])
    embedded = model.model.layers[0].input_layernorm(model.model.embed_tokens(batch["input_ids"]))
    torch.testing.assert_close(inside[0], embedded[:, :-1][counted])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("measure", ["cosine", "mse"])
def test_the_hidden_loss_equals_its_formula_and_starts_as_the_choice_of_channels(measure):
    generator = torch.Generator().manual_seed(0)
    channels = (5, 0, 3)
    loss = HiddenLoss([Pair(0, 0), Pair(1, 2)], channels=channels, teacher_width=7, measure=measure).double()
    theirs = [torch.randn(11, 7, generator=generator) for _ in range(2)]
    for state in theirs:  # what the student keeps is all that there is
        state[:, [1, 2, 4, 6]] = 0
    ours = [state[:, list(channels)] for state in theirs]
    assert abs(loss.float()(ours, theirs).item()) < 1e-5
    ours = [torch.randn(11, 3, generator=generator) for _ in range(2)]
    theirs = [torch.randn(11, 7, generator=generator) for _ in range(2)]
    expected = 0.0
    for our, their in zip(ours, theirs, strict=True):
        found = torch.zeros(11, 7)
        for i, channel in enumerate(channels):
            found[:, channel] = our[:, i]
        for one, other in zip(found, their, strict=True):
            if measure == "cosine":
                expected += float(1 - one @ other / one.norm() / other.norm()) / 2
            else:
                expected += float(((one - other) ** 2).mean() / (their**2).mean()) / 2
    assert loss(ours, theirs).item() == pytest.approx(expected, rel=1e-5)


def test_the_papers_pairs():
    assert paper_pairs(16, 32) == (Pair(0, 0), Pair(14, 30))  # what block 13 and block 29 give out
    assert paper_pairs(2, 4) == (Pair(0, 0), Pair(1, 3))
    assert paper_pairs(1, 4) == (Pair(0, 0), Pair(1, 4))


def test_both_losses_weigh_the_same():
    logits, hidden = torch.tensor(3.0, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    total = balanced(logits, hidden)
    assert total.item() == 6.0
    total.backward()
    assert (logits.grad, hidden.grad) == (1.0, 6.0)


def hidden_loss():
    torch.manual_seed(0)
    return HiddenLoss([Pair(0, 0), Pair(2, 2)], channels=range(48), teacher_width=72)


def test_the_projection_is_trained_resumed_and_never_saved_with_the_student(models, tmp_path, monkeypatch):
    """A run that stops in its fifth step and goes on is the run that never stopped."""
    ends = {}
    for name in ("whole", "cut"):
        for model in ("student", "teacher"):
            shutil.copytree(models / model, tmp_path / name / model)
        folder = tmp_path / name / "checkpoints"
        if name == "cut":
            calls: list[bool] = []

            def killed(logits_loss, of_hidden, calls=calls):
                calls.append(True)
                if len(calls) == 9:  # two micro-batches a step
                    raise KeyboardInterrupt
                return balanced(logits_loss, of_hidden)

            with monkeypatch.context() as patched:
                patched.setattr(sys.modules["compressor.distill"], "balanced", killed)
                with pytest.raises(KeyboardInterrupt):
                    run(folder, hidden=hidden_loss())
        result = run(folder, hidden=hidden_loss())
        last = folder / f"checkpoint-{result.steps}"
        ends[name] = load_file(last / "model.safetensors"), load_file(last / "beside" / "model.safetensors")
        assert AutoModelForCausalLM.from_pretrained(last, local_files_only=True)
    for one, other in zip(ends["whole"], ends["cut"], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    student, projection = ends["whole"]
    assert not any("projection" in key for key in student)
    start = hidden_loss().projection.weight
    assert 1e-4 < (projection["projection.weight"] - start).abs().max() < 0.5


def test_hidden_states_are_matched_under_gradient_checkpointing_too():
    batch, teacher = collate(first_rows(3)), tiny_model(**TEACHER)
    grads = []
    for checkpointing in (False, True):
        student = tiny_model(seed=3).train()
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        loss = distillation_loss(Online(teacher), settings=settings(), vocab=259, hidden=hidden_loss())
        loss(student, batch).loss.backward()
        grads.append([parameter.grad for parameter in student.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_hidden_states_want_the_teacher_itself():
    with pytest.raises(UserError, match="wants the teacher itself; expected signal online"):
        distillation_loss(None, settings=settings(), hidden=hidden_loss())
