"""The whole story on a tiny teacher: every artifact, resuming, real kills, and bad input that loses nothing."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import save_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import compressor
from compressor.errors import CheckFailed, UserError
from compressor.run import read_json
from compressor.scores import Scores

SMALL = {
    "data": {"context": 48, "heldout_fraction": 0.2},
    "importance": {"samples": 8, "batch_size": 4, "depth_samples": 4},
    "distill": {
        "tokens": 4000,
        "batch": 4,
        "micro_batch": 2,
        "lr": 1e-3,
        "warmup_steps": 1,
        "eval_every": 5,
        "save_every": 3,
        "heldout_rows": 4,
    },
    "evaluate": {"tokens": 500, "prompts": 2, "batch_size": 8, "max_new_tokens": 4},
}


def write_texts(path: Path, count: int = 120) -> Path:
    rng = random.Random(0)
    words = ["the", "lamp", "of", "river", "stone", "boat", "garden", "window", "bridge", "candle"]
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=12))}) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny teacher and its data."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "teacher", "llama")
    write_texts(folder / "data.jsonl")
    return folder


def recipe(world: Path, target: str = "ffn=48,hidden=36", **changes) -> dict:
    values = json.loads(json.dumps(SMALL))
    for section, keys in changes.items():
        values[section] |= keys
    values["data"]["source"] = str(world / "data.jsonl")
    return values | {"teacher": str(world / "teacher"), "target": target, "seed": 1}


@pytest.fixture(scope="module")
def finished(world):
    lines: list[str] = []
    report = compressor.distill(recipe(world), out=world / "run", say=lines.append)
    return world / "run", report, lines


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_run_folder_holds_what_the_design_says(finished):
    folder, _, lines = finished
    names = {path.name for path in folder.iterdir()}
    expected = {
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "scores.safetensors",
        "shape.json",
        "pruned",
        "checkpoints",
    }
    expected |= {"student", "evaluation.json", "report.json", "report.md", "report.html"}
    assert expected <= names
    assert not [name for name in names if name.endswith((".part", ".old"))]
    assert [line.split()[0] for line in lines] == ["importance", "surgery", "distill", "evaluate", "report"]
    student = {path.name for path in (folder / "student").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "README.md",
        "SHA256SUMS",
    } <= student
    assert (folder / "student" / "chat_template.jinja").exists()
    card = (folder / "student" / "README.md").read_text()
    assert str(folder.parent) not in card  # a card may be published: no path on this machine
    assert "data.jsonl" in card


def test_the_report_says_what_was_measured(finished):
    folder, report, _ = finished
    assert read_json(folder / "report.json") == {key: value for key, value in report.items() if key != "files"}
    assert report["teacher"]["parameters"] > report["student"]["parameters"] == report["pruned"]["parameters"]
    assert report["shape"]["student"]["hidden"] == 36
    assert set(report["student"]["skills"]) == {"instruction", "roleplay", "rag", "tools"}
    assert report["agreement"]["kl"] == report["student"]["agreement"]["kl"] < report["pruned"]["agreement"]["kl"]
    assert 3500 <= report["tokens"]["distill"] <= 4500
    assert set(report["seconds"]) == {"importance", "surgery", "distill", "evaluate"}
    assert report["fingerprints"].keys() == {"teacher", "calibration"}


def test_the_student_loads_with_stock_transformers_and_speaks(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _, _ = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "student", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 3
    assert model.config.head_dim == 16


def test_running_again_does_nothing_and_another_recipe_is_refused(world, finished):
    folder, report, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    lines: list[str] = []
    again = compressor.distill(recipe(world), out=folder, say=lines.append)
    assert all("done before" in line for line in lines)
    assert again == report
    with pytest.raises(UserError, match=r"another recipe, different in distill\.lr"):
        compressor.distill(recipe(world, distill={"lr": 3e-3, "min_lr": 1e-4}), out=folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_scores_are_reused_for_another_size_but_not_for_another_teacher(world, finished, tmp_path):
    folder, _, _ = finished
    scores = {"scores": str(folder / "scores.safetensors")}
    lines: list[str] = []
    compressor.distill(recipe(world, "ffn=32", importance=scores), out=tmp_path / "run", say=lines.append)
    assert "reused" in lines[0]
    report = compressor.distill(recipe(world, "layers=2", importance=scores), out=tmp_path / "depth")
    assert report["kept"]["layers"]["kept"] == [0, 2]
    save_tiny(tmp_path / "other", "llama", seed=5)
    values = recipe(world, "ffn=32", importance=scores) | {"teacher": str(tmp_path / "other")}
    with pytest.raises(UserError, match="another teacher"):
        compressor.distill(values, out=tmp_path / "run2")


def test_reused_scores_do_not_decide_by_what_the_recipe_did_not_ask_for(world, tmp_path):
    """Scores with losses on removal, reused for block influence: as if they were measured for it."""
    values = recipe(world, "layers=2", importance={"depth": "perplexity"})
    compressor.distill(values, out=tmp_path / "losses")
    influence = {"depth": "block_influence"}
    compressor.distill(recipe(world, "layers=2", importance=influence), out=tmp_path / "influence")
    reused = influence | {"scores": str(tmp_path / "losses" / "scores.safetensors")}
    compressor.distill(recipe(world, "layers=2", importance=reused), out=tmp_path / "reused")
    found, expected = (Scores.load(tmp_path / name / "scores.safetensors") for name in ("reused", "influence"))
    assert found.removal == expected.removal == {}


@pytest.mark.parametrize("depth", ["perplexity", "block_influence"])
def test_a_depth_target_drops_the_block_that_does_least(world, tmp_path, depth):
    teacher = save_tiny(tmp_path / "teacher", "llama", num_hidden_layers=6)
    tensors = weights(teacher)
    for name, tensor in tensors.items():
        if re.search(r"layers\.[23]\..*(o_proj|down_proj)", name):
            tensor.zero_()  # layers 2 and 3 pass on what they are given
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    values = recipe(world, "layers=4", importance={"depth": depth}) | {"teacher": str(teacher)}
    report = compressor.distill(values, out=tmp_path / "run")
    removal = Scores.load(tmp_path / "run" / "scores.safetensors").removal
    if depth == "perplexity":  # random layers may well do harm: the lowest loss decides, whatever it is
        first, stop = min(removal, key=lambda block: removal[block])
        assert set(removal) == {(1, 3), (2, 4), (3, 5)}
    else:
        first, stop = 2, 4
        assert report["pruned"]["agreement"]["kl"] == pytest.approx(0, abs=1e-6)
    assert report["kept"]["layers"]["kept"] == [i for i in range(6) if not first <= i < stop]


def test_a_worse_student_exits_1_and_keeps_the_pruned_model(world, tmp_path):
    values = recipe(world, distill={"lr": 0.5, "min_lr": 0.5, "tokens": 2000})
    with pytest.raises(CheckFailed, match=r"worse than before distillation|not finite"):
        compressor.distill(values, out=tmp_path / "run")
    assert read_json(tmp_path / "run" / "report.json")["status"] in ("worse", "not_finite")
    best = weights(tmp_path / "run" / "student")
    assert all(torch.isfinite(tensor).all() for tensor in best.values())
    with pytest.raises(CheckFailed):  # and says so again when it is run again
        compressor.distill(values, out=tmp_path / "run")


def run_in_child(world: Path, out: Path, values: dict | None = None) -> subprocess.Popen:
    code = (
        "import json, sys, torch; torch.set_num_threads(1); import compressor\n"
        f"compressor.distill(json.loads({json.dumps(json.dumps(values or recipe(world)))}), out={str(out)!r})"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, cwd=Path(__file__).parents[1])


def test_kills_at_random_moments_resume_to_the_same_bits(world, tmp_path):
    calm = run_in_child(world, tmp_path / "calm")
    _, errors = calm.communicate()
    assert calm.returncode == 0, errors.decode()
    out = tmp_path / "killed"
    rng = random.Random(1)

    def logged() -> int:
        return len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").exists() else 0

    # a moment inside each stage: before any scores, in surgery or just after, in training, in evaluation
    for reached in (
        lambda: (out / "recipe.yaml").exists(),
        lambda: (out / "scores.safetensors").exists(),
        lambda: logged() >= 3,
        lambda: "distill" in read_json(out / "run.json")["stages"],
    ):
        child = run_in_child(world, out)
        while not reached() and child.poll() is None:
            time.sleep(0.01)
        time.sleep(0.1 * rng.random())
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL, "the run was over before it was killed"
    last = run_in_child(world, tmp_path / "killed")
    _, errors = last.communicate()
    assert last.returncode == 0, errors.decode()
    for part in ("pruned", "student"):
        assert same(weights(tmp_path / "calm" / part), weights(tmp_path / "killed" / part))
    assert same(load_file(tmp_path / "calm/scores.safetensors"), load_file(tmp_path / "killed/scores.safetensors"))
    calm_report, killed_report = (read_json(tmp_path / name / "report.json") for name in ("calm", "killed"))
    for key in ("teacher", "pruned", "student", "tokens", "agreement", "recovery"):
        assert calm_report[key] == killed_report[key], key


# --- bad input ------------------------------------------------------------------------------------------------------


def broken_teacher(world: Path, folder: Path, break_it) -> str:
    shutil.copytree(world / "teacher", folder)
    break_it(folder / "model.safetensors")
    return str(folder)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def garble(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


def poison(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (truncate, "model.safetensors"),
        (garble, "model.safetensors"),
        (Path.unlink, "safetensors"),
        (poison, "down_proj"),
    ],
)
def test_a_broken_teacher_is_one_line_and_leaves_no_half_run(world, tmp_path, break_it, says):
    values = recipe(world) | {"teacher": broken_teacher(world, tmp_path / "teacher", break_it)}
    with pytest.raises(UserError, match=says) as caught:
        compressor.distill(values, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "pruned").exists()
    assert not (tmp_path / "run" / "student").exists()


def test_empty_data_is_one_line(world, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    values = recipe(world)
    values["data"]["source"] = str(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match=r"empty\.jsonl.*held out") as caught:
        compressor.distill(values, out=tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_mistake_that_is_found_at_once_does_not_bind_the_folder(world, tmp_path):
    """What could not start is no run: the corrected command uses the same folder."""
    wrong = recipe(world)
    wrong["data"]["source"] = str(tmp_path / "typo.jsonl")
    with pytest.raises(UserError, match=r"typo\.jsonl"):
        compressor.distill(wrong, out=tmp_path / "run")
    with pytest.raises(UserError, match="warmup_steps"):
        compressor.distill(recipe(world, distill={"warmup_steps": 10**6}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert compressor.distill(recipe(world), out=tmp_path / "run")["status"] == "done"


def missing(tensors):
    del tensors["model.layers.1.mlp.down_proj.weight"]


def unknown(tensors):
    tensors["model.layers.1.mlp.extra.weight"] = torch.zeros(3)


def of_another_size(tensors):
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(48, 79)


@pytest.mark.parametrize("change", [missing, unknown, of_another_size])
def test_a_teacher_with_other_tensors_than_its_config_is_one_line(world, tmp_path, change):
    teacher = save_tiny(tmp_path / "teacher", "llama")
    tensors = weights(teacher)
    change(tensors)
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp") as caught:
        compressor.distill(recipe(world) | {"teacher": str(teacher)}, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    if change is not unknown:  # judging does not go on with weights that were never there either
        with pytest.raises(UserError, match=r"layers\.1\.mlp"):
            compressor.evaluate(str(teacher), data=str(world / "data.jsonl"))


@pytest.mark.parametrize("target", ["4b", "hidden=64", "llama-3.1-minitron-4b-width", "layers=3"])
def test_a_teacher_no_larger_than_the_target_is_one_line(world, tmp_path, target):
    with pytest.raises(UserError) as caught:
        compressor.distill(recipe(world, target), out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_during_surgery_is_one_line_and_the_run_resumes(world, tmp_path, monkeypatch):
    from compressor import surgery

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(surgery, "prune", full)
        with pytest.raises(UserError, match="the disk is full"):
            compressor.distill(recipe(world), out=tmp_path / "run")
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".pruned")]
    assert compressor.distill(recipe(world), out=tmp_path / "run")["status"] == "done"


# --- the other commands ---------------------------------------------------------------------------------------------


def test_evaluate_a_run_and_a_folder(world, finished, tmp_path):
    folder, _, _ = finished
    found = compressor.evaluate(str(folder), prompts=2, tokens=500)
    assert found["result"]["agreement"]["kl"] > 0
    assert found["against"] == str(world / "teacher")
    suite = tmp_path / "mine.jsonl"
    task = {"skill": "rag", "messages": [{"role": "user", "content": "Q"}], "check": {"max_words": 1000}}
    suite.write_text(json.dumps(task) + "\n")
    found = compressor.evaluate(str(folder / "student"), suites=[str(suite)])
    assert found["result"]["skills"]["rag"]["score"] == 1.0
    assert found["result"]["perplexity"] is None


def test_evaluating_a_run_repeats_its_own_judgement(finished):
    folder, report, _ = finished
    found = compressor.evaluate(str(folder))["result"]
    for key in ("perplexity", "bits_per_byte", "agreement"):
        assert found[key] == pytest.approx(report["student"][key])
    assert found["skills"] == report["student"]["skills"]
    assert [s["prompt"] for s in found["samples"]] == [s["prompt"] for s in report["samples"]]  # the run's own seed


def test_suites_of_one_skill_add_up_in_any_order(finished, tmp_path):
    folder, _, _ = finished
    task = {"skill": "rag", "messages": [{"role": "user", "content": "?"}], "check": {"cites": [1]}, "tools": None}
    (tmp_path / "mine.jsonl").write_text(json.dumps(task) + "\n")
    for suites in (["rag", str(tmp_path / "mine.jsonl")], [str(tmp_path / "mine.jsonl"), "rag"]):
        found = compressor.evaluate(str(folder), suites=suites)["result"]
        assert found["skills"]["rag"]["n"] == SMALL["evaluate"]["prompts"] + 1


def test_a_lost_run_json_is_one_line(world, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(UserError, match=r"run\.json is gone"):
        compressor.distill(recipe(world), out=tmp_path / "run")


def test_data_with_ids_that_the_teacher_does_not_know_are_told_before_anything_is_computed(world, tmp_path):
    shutil.copytree(world / "teacher", tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    tokenizer.add_tokens(["lamp"])
    tokenizer.save_pretrained(tmp_path / "teacher")
    values = recipe(world) | {"teacher": str(tmp_path / "teacher")}
    with pytest.raises(UserError, match="but the teacher knows"):
        compressor.distill(values, out=tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_other_weights_under_the_same_name_do_not_resume(world, finished, tmp_path):
    shutil.copytree(world / "teacher", tmp_path / "teacher")
    values = recipe(world) | {"teacher": str(tmp_path / "teacher")}
    compressor.distill(values, out=tmp_path / "run")
    shutil.rmtree(tmp_path / "teacher")
    save_tiny(tmp_path / "teacher", "llama", seed=9)
    with pytest.raises(UserError, match="other weights"):
        compressor.distill(values, out=tmp_path / "run")


def test_package_writes_card_and_checksums_again(finished, monkeypatch):
    folder, _, _ = finished
    monkeypatch.setattr("compressor.checkpoint.resolve", None)  # the teacher may be gone by now
    (folder / "student" / "README.md").write_text("changed")
    result = compressor.package(folder)
    assert result["url"] is None
    assert "library_name: transformers" in (folder / "student" / "README.md").read_text()
    sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder / "student", capture_output=True, check=False)
    assert sums.returncode == 0


def test_an_unfinished_run_is_no_model(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"stages": {}}')
    (tmp_path / "run" / "recipe.yaml").write_text("target: 50%\n")
    with pytest.raises(UserError, match="no finished run"):
        compressor.evaluate(str(tmp_path / "run"))
    with pytest.raises(UserError, match="no finished run"):
        compressor.package(tmp_path / "run")


def test_two_launched_processes_make_the_student_of_one(world, finished, tmp_path):
    """`torchrun compressor distill`: both train, the first one alone keeps the folder and reports."""
    import yaml

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(world)))
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "compressor.cli"]
    line += ["distill", "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *line], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == finished[1]["tokens"]
    assert [text.split()[0] for text in done.stderr.splitlines() if " s  " in text] == [
        "importance",
        "surgery",
        "distill",
        "evaluate",
        "report",
    ]
    ours, theirs = weights(tmp_path / "run" / "student"), weights(finished[0] / "student")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=5e-4, msg=name)


def test_a_run_can_end_in_exports_held_to_a_device(world, tmp_path):
    values = recipe(world) | {"export": {"formats": ["onnx-int8", "bitsandbytes-int8"], "device": "raspberry-pi-5-8gb"}}
    lines: list[str] = []
    result = compressor.distill(values, out=tmp_path / "run", say=lines.append)
    assert [line.split()[0] for line in lines if not line.startswith(" ")][-2:] == ["export", "report"]
    assert [one["path"] for one in result["exports"]] == ["export/onnx-int8", "export/bitsandbytes-int8"]
    for one in result["exports"]:
        assert one["bytes"] == read_json(tmp_path / "run" / one["path"] / "export.json")["bytes"]
        assert 0 <= one["kl_student"] < 0.05
        assert one["kl_teacher"] > one["kl_student"]
        assert one["ttft_ms"] > 0 < one["decode_tokens_per_s"]
        assert [line["budget"] for line in one["budget"]] == ["memory", "disk"]
        assert all(line["passed"] for line in one["budget"])
        assert one["estimate"]["expected"]["ttft_s"] >= one["estimate"]["roofline"]["ttft_s"] > 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Exports: size against quality" in page
    assert "onnx-int8" in (tmp_path / "run" / "report.md").read_text()
    found = compressor.evaluate(str(tmp_path / "run" / "export" / "onnx-int8"), prompts=2)  # the run's data and teacher
    assert found["result"]["perplexity"] == pytest.approx(result["exports"][0]["perplexity"], rel=0.2)
    fit = compressor.bench([str(tmp_path / "run")], budgets=["memory=100GiB"], fit=True, repeats=1)
    assert {Path(one["what"]).name for one in fit["artifacts"]} == {"student", "onnx-int8", "bitsandbytes-int8"}


def test_exports_can_be_asked_of_a_finished_run_and_are_in_its_report_then(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    values = recipe(finished[0].parent) | {"export": {"formats": ["onnx-fp32"]}}
    lines: list[str] = []
    result = compressor.distill(values, out=tmp_path / "run", say=lines.append)
    assert [line.split()[1] for line in lines if not line.startswith(" ")][:4] == ["done"] * 4
    assert [one["path"] for one in result["exports"]] == ["export/onnx-fp32"]
    with pytest.raises(UserError, match=r"has its exports already, by another export\.formats"):
        compressor.distill(recipe(finished[0].parent), out=tmp_path / "run")


def test_an_export_that_cannot_be_made_costs_the_run_nothing_else(world, tmp_path):
    values = recipe(world) | {"export": {"formats": ["gguf-q8_0"]}}  # the tiny tokenizer has no merges
    with pytest.raises(CheckFailed, match="no merges") as failed:
        compressor.distill(values, out=tmp_path / "run")
    assert "no merges" in failed.value.result["exports"][0]["failed"]
    assert (tmp_path / "run" / "report.html").exists()


def test_an_export_that_fails_verification_is_in_the_report_and_is_exit_1(world, tmp_path, monkeypatch):
    from dataclasses import replace

    from export.formats import FORMATS

    row = FORMATS["onnx"]

    def truncated(student: Path, folder: Path, settings, **options) -> None:
        row.write(student, folder, settings, **options)
        data = folder / "model.onnx.data"
        data.write_bytes(data.read_bytes()[:-64] + bytes(64))

    monkeypatch.setitem(FORMATS, "onnx", replace(row, write=truncated))
    values = recipe(world) | {"export": {"formats": ["onnx-fp32", "bitsandbytes-int8"]}}
    with pytest.raises(CheckFailed, match=r"onnx-fp32 .* is not the student") as failed:
        compressor.distill(values, out=tmp_path / "run")
    one, two = failed.value.result["exports"]
    assert one["path"] is None
    assert "is not the student" in one["failed"]
    assert two["path"] == "export/bitsandbytes-int8"
    assert not (tmp_path / "run" / "export" / "onnx-fp32").exists()


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"formats": ["onnx-int5"]}, "precision of onnx 'int5' is not known"),
        (
            {"formats": ["onnx-int4"], "device": "toaster"},
            "device 'toaster' is not known; expected one of host, android",
        ),
        ({"device": "laptop-8gb"}, "nothing is exported"),
    ],
)
def test_a_bad_export_is_told_before_anything_is_computed(world, tmp_path, section, says):
    with pytest.raises(UserError, match=says):
        compressor.distill(recipe(world) | {"export": section}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- what the student learns from ------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", ["topk", "sampled", "hidden"])
def test_a_student_learns_from_a_cache_and_no_teacher_is_loaded_for_it(world, tmp_path, signal, monkeypatch):
    values = recipe(world, distill={"signal": signal} | ({} if signal == "hidden" else {"keep": 100}))
    if signal == "hidden":
        made = compressor.cache(values, out=tmp_path / "cache")
        assert made["bytes_per_token"] == made["bytes"] / made["tokens"] > 0
        again = compressor.cache(values, out=tmp_path / "cache")
        assert again == made
        values["distill"]["cache"] = str(tmp_path / "cache")
    loaded: list[str] = []
    from compressor import teacher
    from compressor.pipeline import stages

    load = teacher.load
    monkeypatch.setattr(teacher, "load", lambda folder, **options: loaded.append(stage[0]) or load(folder, **options))
    stage = [""]
    for name, run_stage in stages.STAGES.items():

        def watched(job, name=name, run_stage=run_stage):
            stage[0] = name
            return run_stage(job)

        monkeypatch.setitem(stages.STAGES, name, watched)
    lines: list[str] = []
    report = compressor.distill(values, out=tmp_path / "run", say=lines.append)
    assert report["status"] == "done"
    assert "distill" not in loaded
    assert ("cache" in loaded) == (signal != "hidden")  # that one was made before
    assert any("bytes a token" in line for line in lines)
    mark = read_json(tmp_path / "run" / "run.json")["stages"]["cache"]
    if signal == "topk":  # 100 of 259 ids, and the rest drawn from
        assert 0 < abs(mark["gap"]) < 0.01
        assert any(f"{mark['gap']:+.3%} off the teacher's own" in line for line in lines)
    assert ("gap" in mark) == (signal != "hidden")  # where the teacher was at hand
    if signal == "hidden":
        online = compressor.distill(recipe(world), out=tmp_path / "online")
        for ours, theirs in zip(
            *(read_lines(tmp_path / name / "metrics.jsonl") for name in ("run", "online")), strict=True
        ):
            for key in {"loss", "heldout_loss"} & theirs.keys():
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
        assert online["status"] == "done"


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_data_alone_are_learned_without_a_teacher(world, tmp_path, monkeypatch):
    from compressor import teacher

    values = recipe(world, distill={"method": "sft"})
    report = compressor.distill(values, out=tmp_path / "run")
    assert report["status"] == "done"
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert all(line["heldout_loss"] == line["heldout_ce"] for line in lines if "heldout_loss" in line)
    monkeypatch.setattr(teacher, "load", lambda *args, **options: pytest.fail("the teacher was loaded"))
    (tmp_path / "run" / "run.json").write_text(without(tmp_path / "run" / "run.json", "distill", "evaluate", "report"))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    compressor.distill(values, out=tmp_path / "run")


def without(path: Path, *stages: str) -> str:
    facts = json.loads(path.read_text())
    facts["stages"] = {name: mark for name, mark in facts["stages"].items() if name not in stages}
    return json.dumps(facts)


def test_a_cache_is_asked_for_what_can_be_kept(world, tmp_path):
    with pytest.raises(UserError, match=r"signal is online and distill\.method kl; expected kl by topk"):
        compressor.cache(recipe(world), out=tmp_path / "cache")


def test_a_student_learns_the_teachers_own_answers(world, tmp_path):
    values = recipe(world, distill={"method": "seqkd", "prompts": 60, "max_new_tokens": 8})
    lines: list[str] = []
    report = compressor.distill(values, out=tmp_path / "run", say=lines.append)
    assert report["status"] == "done"
    assert any(line.startswith("answers") and "of 60 prompts answered" in line for line in lines)
    written = [json.loads(line) for file in (tmp_path / "run/answers/data").iterdir() for line in file.open()]
    assert all(record.keys() == {"text"} for record in written)
    assert any("heldout_ce" in line for line in read_lines(tmp_path / "run" / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "sft", "hidden_loss": "cosine"}, "hidden_loss cosine wants the teacher beside the student"),
        ({"signal": "sampled", "divergence": "jsd"}, "signal sampled is unbiased for forward_kl alone"),
        ({"mix": 0.3}, r"distill\.mix is 0\.3, but has no part"),
        ({"method": "sft", "signal": "topk"}, r"distill\.signal is topk, but has no part"),
        ({"cache": "said"}, r"distill\.cache is said and distill\.signal online"),
        ({"signal": "hidden", "keep": 5}, r"distill\.keep is 5, but has no part"),
        ({"prompts": 5}, r"distill\.prompts is 5, but has no part"),
        ({"method": "seqkd", "max_new_tokens": 48}, r"max_new_tokens is 48 and data\.context 48; expected room for a"),
        ({"method": "seqkd", "max_new_tokens": 8, "micro_batch": 3}, r"distill\.batch is 4 rows"),
    ],
)
def test_settings_that_do_not_go_together_are_told_at_once(world, tmp_path, settings, says):
    with pytest.raises(UserError, match=says):
        compressor.distill(recipe(world, distill=settings), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
