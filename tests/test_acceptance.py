"""What the project promises, run whole; minutes long, so it has its own target: `make acceptance`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compressor.checkpoint import DEMO_FOLDER
from compressor.evaluate.skills import SKILLS

pytestmark = pytest.mark.slow


def test_the_demo_gives_half_the_teacher_and_nearly_all_of_its_skills(tmp_path: Path):
    command = [sys.executable, "-m", "compressor.cli", "distill", "--teacher", "demo", "--target", "50%", "--json"]
    done = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    teacher, student = report["teacher"], report["student"]
    assert student["parameters"] == pytest.approx(0.5 * teacher["parameters"], rel=0.05)
    training = json.loads((DEMO_FOLDER / "training.json").read_text())
    assert report["tokens"]["distill"] <= 0.03 * training["tokens"]
    assert report["recovery"]["overall"] >= 0.97
    for skill in SKILLS:
        assert report["recovery"]["skills"][skill] >= 0.93, skill
        assert report["pruned"]["skills"][skill]["score"] < 0.5 * teacher["skills"][skill]["score"], skill
    (exported,) = report["exports"]
    assert (exported["format"], exported["precision"]) == ("onnx", "int4")
    assert exported["bytes"] < 0.45 * student["bytes"]
    assert exported["overall"] >= 0.97 * student["overall"]["score"]
