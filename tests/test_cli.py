"""The command line: exit codes, one-line errors, data on stdout and talk on stderr."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from models import save_tiny

from compressor.cli import run

ROOT = Path(__file__).parents[1]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()  # what the test itself had the libraries say
    code = run(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "--teacher", "llama-3.1-8b"], "no target"),
        (["plan", "--teacher", "llama-3.1-8b", "--target", "4q"], "4q"),
        (["plan", "--teacher", "no/such/folder", "--target", "50%"], "no/such/folder"),
        (["plan", "--teacher", "llama-3.1-8b", "--target", "9b"], "smaller than the teacher"),
        (["plan", "--target", "50%", "--set", "distill.tokns=3"], "distill.tokens"),
        (["plan", "--target", "50%", "--recipe", "nowhere.yaml"], "no recipe nowhere.yaml"),
        (["plan", "--nonsense"], "No such option"),
        (["dance"], "No such command"),
        (["evaluate"], "Missing argument"),
        (["evaluate", "no-such-folder"], "no-such-folder"),
        (["package", "no-such-folder"], "no finished run"),
        (["export", "tflite", "demo"], "format 'tflite' is not known"),
        (["export", "onnx", "demo", "--precision", "int3"], "precision of onnx 'int3' is not known"),
        (
            ["export", "onnx", "demo", "--precision", "fp16", "--block-size", "32"],
            "--block-size is no option of onnx-fp16",
        ),
        (["export", "gguf", "demo", "--web"], "--web is no option of gguf-q8_0"),
        (["export", "onnx", "demo", "--sensitive", "tail"], "sensitive part 'tail' is not known"),
        (["export", "onnx", "no-such-folder"], "no-such-folder"),
        (["bench", "no-such-folder"], "no-such-folder"),
        (["bench", "demo", "--budget", "memory=lots"], "'lots' is no size"),
        (["bench", "demo", "--budget", "speed=3"], "budget 'speed=3' is not known"),
        (["bench", "demo", "--device", "toaster"], "device 'toaster' is not known"),
        (["bench", "demo", "--vs"], "expected two or more"),
        (["bench", "demo", "--fit"], "--fit has nothing to fit"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_2(capsys, arguments, says):
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_debug_keeps_the_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "compressor.cli", "plan", "--target", "4q", "--debug"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert "Traceback" in done.stderr


def test_plan_as_json_is_one_document(capsys):
    code, out, _ = call(
        capsys, "plan", "--teacher", "llama-3.1-8b", "--target", "llama-3.1-minitron-4b-width", "--json"
    )
    assert code == 0
    planned = json.loads(out)
    assert planned["teacher"]["parameters"] == 8_030_261_248
    assert planned["student"]["parameters"] == 4_512_746_496
    assert planned["stages"]


def test_a_dry_run_only_plans(capsys, tmp_path):
    arguments = ["--teacher", "demo", "--target", "50%", "--out", str(tmp_path / "run")]
    code, out, _ = call(capsys, "distill", *arguments, "--dry-run")
    assert code == 0
    assert "student" in out
    assert not (tmp_path / "run").exists()


def test_a_regression_is_exit_1_and_a_done_run_is_exit_0(capsys, tmp_path):
    save_tiny(tmp_path / "teacher")
    lines = [json.dumps({"text": f"the lamp {i} is near the river {i * 7}"}) for i in range(60)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    common = ["--teacher", str(tmp_path / "teacher"), "--target", "ffn=48", "--data", str(tmp_path / "data.jsonl")]
    for setting in (
        "data.context=32",
        "data.heldout_fraction=0.2",
        "importance.samples=4",
        "importance.batch_size=4",
        "distill.tokens=1500",
        "distill.batch=4",
        "distill.micro_batch=4",
        "distill.warmup_steps=1",
        "distill.heldout_rows=4",
        "evaluate.tokens=200",
        "evaluate.prompts=1",
        "evaluate.max_new_tokens=2",
    ):
        common += ["--set", setting]
    code, out, err = call(capsys, "distill", *common, "--out", str(tmp_path / "good"), "--set", "distill.lr=1e-3")
    assert code == 0, err
    assert out == f"{tmp_path / 'good' / 'report.html'}\n"
    stages = [line.split()[0] for line in err.splitlines() if "exceed the context" not in line]
    assert stages == ["importance", "surgery", "distill", "evaluate", "report"]
    code, out, _ = call(
        capsys, "distill", *common, "--out", str(tmp_path / "good"), "--set", "distill.lr=1e-3", "--json"
    )
    assert code == 0
    assert json.loads(out)["files"]["student"] == str(tmp_path / "good" / "student")
    code, out, err = call(
        capsys,
        "distill",
        *common,
        "--out",
        str(tmp_path / "bad"),
        "--set",
        "distill.lr=0.5",
        "--set",
        "distill.min_lr=0.5",
    )
    assert code == 1
    assert out == ""
    assert err.splitlines()[-1].startswith("error: ")
    code, out, _ = call(capsys, "evaluate", str(tmp_path / "good"), "--prompts", "1", "--tokens", "100", "--json")
    assert code == 0
    assert json.loads(out)["result"]["agreement"]["top1"] <= 1
    code, out, _ = call(capsys, "evaluate", str(tmp_path / "good"), "--prompts", "1", "--tokens", "100")
    assert code == 0
    assert "perplexity" in out


def test_an_interrupt_is_told_and_is_no_success(monkeypatch, capsys):
    def interrupted(recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr("compressor.pipeline.plan", interrupted)
    assert run(["plan", "--teacher", "demo", "--target", "50%"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_tables_are_not_folded_where_nobody_has_a_terminal(monkeypatch):
    from compressor import progress

    monkeypatch.delenv("COLUMNS", raising=False)
    assert progress.stdout().width == progress.PIPED_COLUMNS
    monkeypatch.setenv("COLUMNS", "90")
    assert progress.stdout().width == 90
