"""The whole story with methods that learn from the student's own answers: stages, resuming, what is refused."""

import json
import os
import subprocess
import sys
import time

import pytest
import yaml
from test_pipeline import recipe, run_in_child, same, weights, world  # noqa: F401 - a fixture

import compressor
from compressor.errors import CheckFailed, UserError
from compressor.run import read_json

OWN = {"distill": {"max_new_tokens": 8, "judged_prompts": 6}, "onpolicy": {"batch": 4, "answers": 4, "inner_epochs": 2}}


def own(world, method="minillm", distill=(), **onpolicy):  # noqa: F811
    values = recipe(world, distill=OWN["distill"] | {"method": method} | dict(distill))
    return values | {"onpolicy": OWN["onpolicy"] | onpolicy}


def distilled(values, out, **options):
    """A tiny random student may write no better than it did: its report is what is asked for here."""
    try:
        return compressor.distill(values, out=out, **options)
    except CheckFailed as failed:
        return failed.result


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("method", "start"), [("minillm", "sft"), ("gkd", "kl")])
def test_a_student_learns_from_its_own_answers_after_a_start(world, tmp_path, method, start):  # noqa: F811
    lines: list[str] = []
    report = distilled(own(world, method, start=start), tmp_path / "run", say=lines.append)
    stages = [line.split()[0] for line in lines]
    assert stages == ["importance", "surgery", "start", "distill", "evaluate", "report"]
    marks = read_json(tmp_path / "run" / "run.json")["stages"]
    assert 3500 <= marks["start"]["tokens"] + marks["distill"]["tokens"] <= 4500  # the budget holds both
    assert (tmp_path / "run" / marks["start"]["best"] / "model.safetensors").exists()
    assert report["tokens"]["distill"] == marks["start"]["tokens"] + marks["distill"]["tokens"]
    history = logged(tmp_path / "run")
    judged = [line for line in history if "rouge_l" in line]
    assert judged[0]["step"] == 0
    assert all(0 <= line["rouge_l"] <= 1 and line["length_drift"] > 0 for line in judged)
    assert all(line["answer_length"] > 0 for line in history if "loss" in line)
    parts = {"minillm": {"single_step", "importance_weight", "clipped", "data_ce"}, "gkd": {"kl", "data_kl", "data_ce"}}
    assert all(parts[method] < line.keys() for line in history if "loss" in line)
    assert all(0 <= line.get("clipped", 0) <= 1 and line.get("importance_weight", 1) > 0 for line in history)
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert saved["distill"]["divergence"] == ("jsd" if method == "gkd" else "forward_kl")


def test_the_first_loss_is_that_of_the_starts_best_checkpoint(world, tmp_path):  # noqa: F811
    distilled(own(world), tmp_path / "run")
    start = [json.loads(line) for line in (tmp_path / "run/checkpoints/start/metrics.jsonl").read_text().splitlines()]
    best = min(line["heldout_ce"] for line in start if "heldout_ce" in line)
    assert logged(tmp_path / "run")[0]["heldout_ce"] == pytest.approx(best, rel=1e-5)


def test_without_a_start_the_pruned_model_answers(world, tmp_path):  # noqa: F811
    lines: list[str] = []
    distilled(own(world, start="none", variant="reference"), tmp_path / "run", say=lines.append)
    assert "start" not in [line.split()[0] for line in lines]


def test_a_run_killed_in_either_phase_makes_the_same_student(world, tmp_path):  # noqa: F811
    values = own(world)
    distilled(values, tmp_path / "whole")
    folder = tmp_path / "killed"
    for place in ("checkpoints/start/checkpoint-3", "checkpoints/checkpoint-3"):
        process = run_in_child(world, folder, values)
        while process.poll() is None and not (folder / place).exists():
            time.sleep(0.01)
        assert process.poll() is None, "it ended before the kill"
        process.kill()
        process.wait()
    distilled(values, folder)
    assert same(weights(folder / "student"), weights(tmp_path / "whole" / "student"))


def test_two_launched_processes_both_answer(world, tmp_path):  # noqa: F811
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(own(world, share=1.0)))
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "compressor.cli"]
    line += ["distill", "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *line], capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode in (0, 1), done.stderr  # 1: it wrote no better than before
    assert (tmp_path / "run" / "report.json").exists(), done.stderr
    last = max((tmp_path / "run" / "checkpoints").glob("checkpoint-*/beside"))
    assert sorted(path.name for path in last.iterdir()) == ["answers-0.safetensors", "answers-1.safetensors"]


@pytest.mark.parametrize(
    ("distill", "onpolicy", "words"),
    [
        ({"signal": "topk"}, {}, "expected online"),
        ({"select": "loss"}, {}, "expected rouge_l or auto"),
        ({"hidden_loss": "cosine"}, {}, "hidden_loss cosine"),
        ({"micro_batch": 4}, {}, "expected at least one of answers and one of data"),
        ({}, {"answers": 3}, "onpolicy.answers is 3"),
        ({}, {"warmup_steps": 500}, "lower onpolicy.warmup_steps"),
        ({"warmup_steps": 12}, {"start_share": 0.01}, "expected at least one step"),
        ({"max_new_tokens": 48}, {}, "max_new_tokens"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_is(world, tmp_path, distill, onpolicy, words):  # noqa: F811
    with pytest.raises(UserError, match=words) as error:
        compressor.distill(own(world, distill=distill, **onpolicy), out=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "scores.safetensors").exists()


@pytest.mark.parametrize(
    ("distill", "onpolicy", "words"),
    [
        ({"micro_batch": 4}, {}, "expected at least one of answers and one of data"),
        ({}, {"answers": 3}, "onpolicy.answers is 3"),
        ({"max_new_tokens": 48}, {}, "max_new_tokens"),
    ],
)
def test_what_the_numbers_tell_is_told_by_the_plan_too(world, distill, onpolicy, words):  # noqa: F811
    with pytest.raises(UserError, match=words):
        compressor.plan(own(world, distill=distill, **onpolicy))


def test_choosing_by_writing_works_for_other_methods_too(world, tmp_path):  # noqa: F811
    distilled(own(world, "kl", distill={"select": "rouge_l"}), tmp_path / "run")
    assert any("rouge_l" in line for line in logged(tmp_path / "run"))


def test_the_prompts_that_choose_the_checkpoint_are_not_those_that_judge_the_student(world, tmp_path):  # noqa: F811
    from compressor.pipeline import _job

    job = _job(own(world), tmp_path / "run", lambda line: None)
    first, _ = job.prompts("heldout", 2)
    chosen_by, references = job.prompts("heldout", 3, after=2)
    assert len(chosen_by) == len(references) == 3
    assert not {tuple(ids) for ids in first} & {tuple(ids) for ids in chosen_by}
    every, _ = job.prompts("heldout", 10_000)
    assert len(job.prompts("heldout", 3, after=10_000)[0]) == 3 < len(every)  # too few to leave any out


def test_an_answer_of_the_student_is_no_label(world, tmp_path, monkeypatch):  # noqa: F811
    """GKD with cross-entropy on the data: its weight is not that of the student's own answers."""
    from compressor import onpolicy
    from compressor.pipeline import _job, learning

    seen = {}

    def caught(student, **given):
        seen.update(given)
        raise UserError("seen")

    monkeypatch.setattr(onpolicy, "distill", caught)
    with pytest.raises(UserError, match="seen"):
        compressor.distill(own(world, "gkd", distill={"ce_weight": 1.0}, start="none"), out=tmp_path / "run")
    job = _job(own(world, "gkd", distill={"ce_weight": 1.0}, start="none"), tmp_path / "run", lambda line: None)
    student = learning.teacher_of(job)  # the same as the teacher: no divergence is left
    batch = job.heldout[0]
    assert float(seen["losses"].own(student, batch).loss) == pytest.approx(0, abs=1e-3)
    assert float(seen["losses"].fixed(student, batch).loss) > 1
