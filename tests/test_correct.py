"""The teacher's correction: what each mode trains and writes, kills, and how a run learns from what came out."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from models import save_tiny, tiny_model
from safetensors.torch import load_file
from test_pipeline import read_lines, recipe, same, weights, without, write_texts
from test_train import Rows, become_rank, first_rows, in_two_processes, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

import compressor
from compressor import recipe as recipes
from compressor import teacher
from compressor.checkpoint import Checkpoint
from compressor.data import collate, targets
from compressor.distill import distill, distillation_loss
from compressor.errors import UserError
from compressor.losses import HiddenLoss, Pair
from compressor.recipe import Correct
from compressor.run import read_json
from compressor.signals import Online

MODES = ("full", "lora", "norms")
LR = {"full": 3e-3, "lora": 3e-2, "norms": 3e-2}
STEPS = 12


def heldout():
    return [collate(first_rows(4, seed=9)), collate(first_rows(2, seed=8))]


def run(home, mode, *, dies_after=None, model="teacher", **changes):
    """Correct the teacher in `home`, in this process; `dies_after` so many losses it is interrupted."""
    usual = {"tokens": 64 * STEPS + 40, "batch": 8, "micro_batch": 4, "eval_every": 2, "lr": LR[mode]}
    training = settings(**(usual | changes))
    plain, calls = distillation_loss(None, settings=training, vocab=259), []

    def loss(model, batch):
        calls.append(True)
        if len(calls) == dies_after:
            raise KeyboardInterrupt
        return plain(model, batch)

    return teacher.correct(
        home / model,
        loss=loss,
        batches=Rows(),
        heldout=heldout(),
        settings=Correct(mode=mode, lora_rank=4, lora_alpha=8.0),
        training=training,
        folder=home / "correction",
        out=home / "corrected",
        seed=3,
    )


@pytest.fixture(scope="module", params=MODES)
def corrected(request, tmp_path_factory):
    """(mode, result, home) of one complete correction."""
    home = tmp_path_factory.mktemp(request.param)
    save_tiny(home / "teacher")
    return request.param, run(home, request.param), home


def trains(mode, name):
    """Whether a mode changes the tensor of this name."""
    norm, linear = name.endswith("norm.weight"), "_proj." in name
    return {"full": True, "lora": linear, "norms": norm}[mode]


def test_each_mode_trains_what_it_says_and_the_teacher_gets_better(corrected):
    mode, result, home = corrected
    assert result.status == "ok"
    assert result.best_heldout < 0.98 * result.first_heldout
    before, after = weights(home / "teacher"), weights(home / "corrected")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) != trains(mode, name), name


def test_the_corrected_teacher_is_a_stock_folder_as_good_as_the_best_checkpoint(corrected):
    _, result, home = corrected
    model = AutoModelForCausalLM.from_pretrained(home / "corrected", trust_remote_code=False)
    loss = distillation_loss(None, settings=settings(), vocab=259)
    with torch.no_grad():
        total = sum(float(loss(model, batch).loss) for batch in heldout())
    assert total / sum(int(targets(batch).sum()) for batch in heldout()) == pytest.approx(result.best_heldout, rel=1e-5)
    before, after = (AutoTokenizer.from_pretrained(home / name) for name in ("teacher", "corrected"))
    assert before.get_vocab() == after.get_vocab()
    assert (home / "corrected" / "generation_config.json").exists()
    assert not [path.name for path in home.iterdir() if path.name.endswith((".part", ".old"))]


def test_checkpoints_hold_no_frozen_weight(corrected):
    mode, result, home = corrected
    saved = load_file(home / "correction" / f"checkpoint-{result.steps}" / "model.safetensors")
    all_of_it = sum(tensor.numel() for tensor in weights(home / "teacher").values())
    count = sum(tensor.numel() for tensor in saved.values())
    if mode == "full":
        assert count == all_of_it
        return
    # rank 4 on every projection of 3 layers: rank x (in + out); two norms a layer and the last one
    assert count == {"lora": 3 * 4 * (2 * (48 + 96) + 2 * (48 + 32) + 3 * (48 + 80)), "norms": 7 * 48}[mode]
    assert all("lora_" in name or name.endswith("norm.weight") for name in saved)


def test_a_correction_that_was_cut_ends_in_the_same_bits(corrected, tmp_path):
    mode, result, home = corrected
    shutil.copytree(home / "teacher", tmp_path / "teacher")
    for dies_after in (15, 15):  # a held-out loss is two calls, a step two more
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, mode, dies_after=dies_after)
    assert (tmp_path / "correction" / "metrics.jsonl").exists()
    assert not (tmp_path / "corrected").exists()
    again = run(tmp_path, mode)
    assert again.best_heldout == result.best_heldout
    assert same(weights(home / "corrected"), weights(tmp_path / "corrected"))
    assert run(tmp_path, mode).steps == STEPS  # finished: nothing is trained again
    assert same(weights(home / "corrected"), weights(tmp_path / "corrected"))


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_is_written_as_it_came_and_trained_in_bf16_beside_float32(mode, tmp_path):
    save_tiny(tmp_path / "teacher")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "teacher")
    result = run(tmp_path, mode, precision="bf16")
    assert result.best_folder is not None
    assert {tensor.dtype for tensor in weights(tmp_path / "corrected").values()} == {torch.bfloat16}
    saved = load_file(result.best_folder / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize(("mode", "lr"), [("full", 30.0), ("lora", 1e30), ("norms", 1e3)])
def test_what_gets_worse_is_not_written(mode, lr, tmp_path):
    save_tiny(tmp_path / "teacher")
    result = run(tmp_path, mode, lr=lr, min_lr=0.0, warmup_steps=0)
    assert result.status in ("worse", "not_finite")
    assert result.best_folder is None
    assert not (tmp_path / "corrected").exists()


def test_a_tied_head_is_corrected_with_its_embedding(tmp_path):
    save_tiny(tmp_path / "teacher", tie_word_embeddings=True)
    for mode in ("full", "lora"):
        shutil.rmtree(tmp_path / "correction", ignore_errors=True)
        result = run(tmp_path, mode)
        assert result.best_folder is not None
        assert "lm_head.weight" not in weights(tmp_path / "corrected")


# --- beside the student -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_hidden", [False, True])
def test_beside_the_student_each_model_has_the_gradient_it_has_alone(with_hidden):
    student, taught = tiny_model(seed=1), tiny_model(seed=2)
    batch, wanted = collate(first_rows(4)), settings(temperature=2.0)
    pairs = ((1, 1), (3, 3))
    hidden = HiddenLoss([Pair(*pair) for pair in pairs], channels=range(48), teacher_width=48) if with_hidden else None
    total, parts = distillation_loss(Online(taught, learns=True), settings=wanted, hidden=hidden)(student, batch)
    total.backward()
    found = [{name: value.grad for name, value in model.named_parameters()} for model in (student, taught)]
    for model in (student, taught):
        model.zero_grad()
    alone = distillation_loss(Online(taught), settings=wanted, hidden=hidden)(student, batch)
    own = distillation_loss(None, settings=wanted)(taught, batch)
    for loss, model, gradients in ((alone, student, found[0]), (own, taught, found[1])):
        loss.loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
    assert float(parts["teacher_ce"]) == pytest.approx(own.loss.item())
    with torch.no_grad():  # what is held out and compared is the student's alone
        judged = distillation_loss(Online(taught, learns=True), settings=wanted)(student, batch)
    assert float(judged.loss) == pytest.approx(float(judged.parts["kl"]))


def beside(home, mode="full", *, dies_after=None, lr=None, **changes):
    """Distill the student in `home` beside the correction of its teacher; `dies_after` so many losses it is cut."""
    training = settings(**({"tokens": 64 * STEPS + 40, "micro_batch": 4, "eval_every": 2} | changes))
    given = Correct(mode=mode, when="beside", lora_rank=4, lora_alpha=8.0)
    learner = teacher.to_correct(home / "teacher", settings=given, precision=training.precision, seed=3)
    signal, calls = Online(learner, learns=True), []
    plain = signal.__call__

    def counted(batch, counted_BT):
        calls.append(True)
        if len(calls) == dies_after:
            raise KeyboardInterrupt
        return plain(batch, counted_BT)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Online, "__call__", lambda self, *args: counted(*args))
        result = distill(
            home / "student",
            signal=signal,
            batches=Rows(),
            heldout=heldout(),
            settings=training,
            folder=home / "checkpoints",
            seed=3,
            teacher_lr=LR[mode] if lr is None else lr,
        )
    return result, dict(learner.named_parameters())


@pytest.fixture(scope="module", params=MODES)
def both(request, tmp_path_factory):
    """(mode, result, the teacher's parameters in the end, home) of one whole distillation beside a correction."""
    home = tmp_path_factory.mktemp(f"beside-{request.param}")
    save_tiny(home / "teacher")
    save_tiny(home / "student", seed=5)
    return request.param, *beside(home, request.param), home


def test_beside_the_student_the_teacher_gets_better_and_its_checkpoints_hold_what_is_trained(both):
    mode, result, _, home = both
    found = [line["heldout_teacher_ce"] for line in result.history if "heldout_teacher_ce" in line]
    assert found[-1] < 0.98 * found[0]
    assert result.best_folder == home / "checkpoints" / f"checkpoint-{result.steps}"
    heldout_ce = {line["step"]: line["heldout_ce"] for line in result.history if "heldout_ce" in line}
    state = read_json(result.best_folder / "trainer_state.json")
    assert (state["best_global_step"], state["best_metric"]) == (result.steps, min(heldout_ce.values()))
    saved = load_file(result.best_folder / "beside" / "model.safetensors")
    whole = weights(home / "teacher")
    assert len(saved) == {"full": len(whole), "lora": 3 * 7 * 2, "norms": 7}[mode]
    assert weights(result.best_folder).keys() == whole.keys()  # the student's folder has no trace of it
    if mode != "lora":
        assert all(not torch.equal(saved[name], whole[name]) for name in saved)


def test_a_distillation_beside_a_correction_that_was_cut_ends_in_the_same_bits(both, tmp_path):
    mode, result, trained, home = both
    for name in ("teacher", "student"):
        shutil.copytree(home / name, tmp_path / name)
    for dies_after in (15, 15):
        with pytest.raises(KeyboardInterrupt):
            beside(tmp_path, mode, dies_after=dies_after)
    again, after = beside(tmp_path, mode)
    assert again.best_heldout == result.best_heldout
    assert same(weights(result.best_folder), weights(again.best_folder))
    assert same(trained, after)


def test_the_teachers_learning_rate_is_its_own(both, tmp_path):
    mode, result, _, home = both
    for name in ("teacher", "student"):
        shutil.copytree(home / name, tmp_path / name)
    still, after = beside(tmp_path, mode, lr=0.0, weight_decay=0.0, max_grad_norm=0.01)
    before = teacher.to_correct(home / "teacher", settings=Correct(mode=mode, lora_rank=4), precision="fp32", seed=3)
    assert same(dict(before.named_parameters()), after)
    assert still.last_heldout < still.first_heldout
    assert still.last_heldout != result.last_heldout
    # and so is the clip: beside a teacher that stands still, the student is as beside one that is not trained
    alone = distill(
        home / "student",
        signal=Online(teacher.load(home / "teacher")),
        batches=Rows(),
        heldout=heldout(),
        settings=settings(tokens=64 * STEPS + 40, micro_batch=4, eval_every=2, weight_decay=0.0, max_grad_norm=0.01),
        folder=tmp_path / "alone",
        seed=3,
    )
    for name in ("loss", "grad_norm"):
        found, theirs = (
            [line["kl" if name == "loss" else name] for line in one.history if "lr" in line] for one in (still, alone)
        )
        assert found == pytest.approx(theirs, rel=1e-4), name


def rank(index, port, folder, queue):
    become_rank(index, port)
    result, after = beside(folder, "lora", tokens=64 * 4 + 40, micro_batch=2)
    queue.put((index, result.history, {name: value.tolist() for name, value in after.items() if value.requires_grad}))


def test_two_processes_correct_beside_the_student_as_one(tmp_path):
    for name in ("one", "two"):
        save_tiny(tmp_path / name / "teacher")
        save_tiny(tmp_path / name / "student", seed=5)
    result, after = beside(tmp_path / "one", "lora", tokens=64 * 4 + 40, micro_batch=2)
    reports = in_two_processes(rank, tmp_path / "two")
    assert reports[0][2] == reports[1][2]
    for name in ("loss", "kl", "teacher_ce", "grad_norm", "heldout_teacher_ce"):
        found, ours = ([line[name] for line in history if name in line] for history in (reports[0][1], result.history))
        assert found == pytest.approx(ours, rel=1e-3), name
    for name, value in reports[0][2].items():
        torch.testing.assert_close(torch.tensor(value), after[name].detach(), rtol=0, atol=2e-4, msg=name)


def test_gradient_checkpointing_is_the_teachers_too(both, tmp_path):
    mode, _, _, home = both
    for name in ("teacher", "student"):
        shutil.copytree(home / name, tmp_path / name)
    counts = []
    to_correct = teacher.to_correct

    def watched(*args, **options):
        model = to_correct(*args, **options)
        norm = model.get_decoder().layers[0].input_layernorm
        norm.register_forward_hook(lambda *_: counts.append(torch.is_grad_enabled()))
        return model

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(teacher, "to_correct", watched)
        result, _ = beside(tmp_path, mode, gradient_checkpointing=True, tokens=200)
    assert sum(counts) == 2 * 2 * result.steps  # two micro-batches, each once more in the backward pass


# --- the recipe -------------------------------------------------------------------------------------------------------


def resolved(**correct):
    from compressor.shape import Shape

    shape = Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256, False)
    values = {"target": "50%", "correct": correct, "distill": {"tokens": 400_000_000}}
    return recipes.resolve(recipes.build(values), teacher=shape, student=shape, max_positions=4096)


def test_the_defaults_are_the_papers_at_this_size():
    found = resolved(mode="full").correct
    distill = resolved(mode="full").distill
    assert (found.peak_lr, found.lr, found.min_lr) == (1e-4, pytest.approx(2e-5), pytest.approx(1e-5))
    assert (found.batch, found.tokens) == (distill.batch, 100_000_000)
    assert found.warmup_steps == min(120, round(100_000_000 / (found.batch * 4096)) // 10)
    lr = {mode: resolved(mode=mode).correct.lr for mode in MODES}
    assert lr == pytest.approx({"full": 2e-5, "lora": 2e-4, "norms": 5e-4})
    assert resolved(mode="full", tokens=10**12).correct.warmup_steps == 120
    assert resolved(mode="full", warmup_steps=7, lr=1e-6).correct.warmup_steps == 7
    assert resolved(mode="full", lr=1e-6).correct.min_lr == 1e-6
    assert resolved(mode="full", peak_lr=1e-3).correct.lr == pytest.approx(2e-4)
    assert resolved(mode="full", batch=6).correct.batch % resolved(mode="full", batch=6).correct.micro_batch == 0


def test_without_a_correction_nothing_is_derived_for_one():
    assert resolved().correct == Correct()
    assert not any(key.startswith("correct.") for key in recipes.derived(resolved()))
    assert "correct.lr" in recipes.derived(resolved(mode="norms"))


def test_a_bare_off_is_off_and_another_word_is_refused():
    values: dict = {"target": "50%"}
    recipes.set_value(values, "correct.mode=off")
    assert recipes.build(values).correct.mode == "off"
    with pytest.raises(UserError, match=r"correct\.mode.*'all'"):
        recipes.build({"target": "50%", "correct": {"mode": "all"}})


# --- the run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "teacher")
    write_texts(folder / "data.jsonl")
    return folder


def wanted(world, mode="full", **changes):
    correct = {"mode": mode, "tokens": 2000, "micro_batch": 2, "lr": 3e-3, "warmup_steps": 1}
    correct |= {"eval_every": 4, "save_every": 3}
    little = {"tokens": 100, "prompts": 1}
    return recipe(world, evaluate=little, **changes) | {"correct": correct}


@pytest.fixture(scope="module")
def finished(world):
    """A run with a correction, its report, its lines, and which teacher each stage loaded."""
    loaded, lines = [], []
    load = teacher.load
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(teacher, "load", lambda folder, **options: loaded.append(folder) or load(folder, **options))
        report = compressor.distill(wanted(world), out=world / "run", say=lines.append)
    return world / "run", report, lines, loaded


def test_importance_asks_the_teacher_as_it_was_and_the_student_learns_from_the_corrected_one(world, finished):
    folder, report, lines, loaded = finished
    assert [line.split()[0] for line in lines][:4] == ["importance", "surgery", "correct", "distill"]
    assert loaded == [world / "teacher", folder / "corrected"]
    assert report["fingerprints"]["teacher"] == Checkpoint(world / "teacher").fingerprint()
    assert report["status"] == "done"


def test_the_report_says_what_the_correction_did_and_compares_with_the_teacher_as_it_was(world, finished):
    folder, report, _, _ = finished
    found = report["correction"]
    assert found["mode"] == "full"
    assert found["used"] is True
    assert found["after"] < 0.97 * found["before"]
    assert 1500 <= found["tokens"] <= 2500
    first = read_lines(folder / "correction" / "metrics.jsonl")[0]
    assert found["before"] == first["heldout_loss"] == first["heldout_ce"]
    again = compressor.evaluate(str(world / "teacher"), data=str(world / "data.jsonl"), tokens=500, prompts=1)
    assert report["teacher"]["parameters"] == again["result"]["parameters"]
    for page in ("report.md", "report.html"):
        text = (folder / page).read_text()
        assert "Teacher correction" in text
        assert f"{found['before']:.4f}" in text


def test_a_run_goes_on_after_its_correction_without_another(world, finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    (folder / "run.json").write_text(without(folder / "run.json", "correct", "distill", "evaluate", "report"))
    shutil.rmtree(folder / "checkpoints")
    monkeypatch.setattr(teacher, "correct", lambda *args, **options: pytest.fail("the teacher was corrected again"))
    compressor.distill(wanted(world), out=folder)
    assert same(weights(folder / "student"), weights(finished[0] / "student"))


def test_a_correction_that_does_not_help_is_said_and_not_used(world, tmp_path):
    values = wanted(world)
    values["correct"] |= {"lr": 30.0, "min_lr": 30.0}
    lines: list[str] = []
    report = compressor.distill(values, out=tmp_path / "run", say=lines.append)
    assert report["correction"]["used"] is False
    assert any("the teacher stays as it was; lower correct.lr" in line for line in lines)
    assert not (tmp_path / "run" / "corrected").exists()
    del values["correct"]
    compressor.distill(values, out=tmp_path / "plain")
    assert same(weights(tmp_path / "run" / "student"), weights(tmp_path / "plain" / "student"))


def test_a_cache_is_made_of_the_corrected_teacher_and_learned_from_without_another_correction(
    world, tmp_path, monkeypatch
):
    values = wanted(world, "norms", distill={"signal": "topk"})
    compressor.cache(values, out=tmp_path / "said")
    about = read_json(tmp_path / "said" / "index.json")["about"]
    assert about["teacher"] == Checkpoint(tmp_path / "said-corrected").fingerprint()
    monkeypatch.setattr(teacher, "correct", lambda *args, **options: pytest.fail("the teacher was corrected again"))
    values["distill"]["cache"] = str(tmp_path / "said")
    report = compressor.distill(values, out=tmp_path / "run")
    assert report["correction"]["used"] is True
    values["correct"]["lr"] = 1e-3
    with pytest.raises(UserError, match="made with another correct"):
        compressor.distill(values, out=tmp_path / "other")


def test_the_corrected_teacher_answers(world, tmp_path):
    values = wanted(world, distill={"method": "seqkd", "prompts": 60, "max_new_tokens": 8})
    compressor.distill(values, out=tmp_path / "run")
    about = read_json(tmp_path / "run" / "answers" / "index.json")["about"]
    assert about["teacher"] == Checkpoint(tmp_path / "run" / "corrected").fingerprint()
    assert about["teacher"] != Checkpoint(world / "teacher").fingerprint()


def test_settings_that_cannot_be_trained_with_are_told_by_their_own_names(world, tmp_path):
    values = wanted(world)
    values["correct"] |= {"batch": 3, "micro_batch": 2}
    with pytest.raises(UserError, match=r"correct\.batch is 3 rows"):
        compressor.distill(values, out=tmp_path / "run")
    values = wanted(world)
    values["correct"]["tokens"] = 10
    with pytest.raises(UserError, match=r"correct\.tokens is 10"):
        compressor.distill(values, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["full", *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[1:])])
def test_killed_for_good_in_the_middle_it_ends_in_the_same_bits(world, tmp_path, mode):
    """A process that is killed while it corrects, and another one that goes on."""
    values = wanted(world, mode)
    code = (
        "import json, sys, torch; torch.set_num_threads(1); import compressor\n"
        f"compressor.distill(json.loads({json.dumps(json.dumps(values))}), out=sys.argv[1])"
    )

    def start(name):
        return subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name)], stderr=subprocess.PIPE)

    calm, killed = start("calm"), start("killed")
    while not list((tmp_path / "killed" / "correction").glob("checkpoint-*")) and killed.poll() is None:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert "correct" not in read_json(tmp_path / "killed" / "run.json")["stages"]
    again = start("killed")
    for child in (calm, again):
        _, errors = child.communicate(timeout=300)
        assert child.returncode == 0, errors.decode()
    for part in ("corrected", "student"):
        assert same(weights(tmp_path / "calm" / part), weights(tmp_path / "killed" / part)), part


def test_two_launched_processes_correct_as_one(world, finished, tmp_path):
    import yaml

    values = wanted(world)
    del values["correct"]["micro_batch"]  # half a batch follows from there being two processes
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "compressor.cli"]
    line += ["distill", "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *line], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(
        *(read_lines(folder / "correction" / "metrics.jsonl") for folder in (tmp_path / "run", finished[0])),
        strict=True,
    ):
        for key in {"loss", "heldout_loss", "tokens"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), theirs["step"]
    assert (tmp_path / "run" / "corrected" / "model.safetensors").exists()
    assert json.loads(done.stdout)["correction"]["tokens"] == finished[1]["correction"]["tokens"]


# --- a run with a correction beside -----------------------------------------------------------------------------------


def wanted_beside(world, mode="norms", **changes):
    return recipe(world, evaluate={"tokens": 100, "prompts": 1}, **changes) | {
        "correct": {"mode": mode, "when": "beside", "lr": 3e-2}
    }


def test_a_run_corrects_beside_the_student_and_reports_it(world, tmp_path):
    lines: list[str] = []
    report = compressor.distill(wanted_beside(world), out=tmp_path / "run", say=lines.append)
    assert "correct" not in [line.split()[0] for line in lines]
    assert not (tmp_path / "run" / "corrected").exists()
    found = report["correction"]
    assert (found["mode"], found["when"], found["used"]) == ("norms", "beside", True)
    assert found["after"] < found["before"]
    assert found["tokens"] == report["tokens"]["distill"]
    assert "while the student learned from it" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    ("correct", "distill", "message"),
    [
        ({}, {"method": "sft"}, r"correct\.when is beside, distill\.method sft .* expected kl and online"),
        ({}, {"signal": "topk"}, r"distill\.signal topk; expected kl and online"),
        ({"mode": "off"}, {}, r"correct\.when is beside, but the teacher is not corrected; .* give --correct full"),
        ({"tokens": 2000}, {}, r"correct\.tokens is 2000, but beside the student distill\.tokens is for both"),
    ],
)
def test_what_cannot_be_corrected_beside_the_student_is_told_first(world, tmp_path, correct, distill, message):
    values = wanted_beside(world, distill=distill)
    values["correct"] |= correct
    with pytest.raises(UserError, match=message):
        compressor.distill(values, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
