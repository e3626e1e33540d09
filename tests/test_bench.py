"""Benchmarks in child processes, budgets with their margins, device profiles and the rooflines of other devices."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from models import save_tiny

import compressor
import export
from compressor.cli import run
from compressor.errors import CheckFailed, UserError
from compressor.shape import Shape
from export.bench import bench, best_fit
from export.devices import BUDGETS, Budget, Device, Workload, device, names, parse_budget, parse_bytes

PROFILES = Path(export.__file__).parent / "profiles"
LLAMA = Shape("llama", 16, 2048, 8192, 32, 8, 64, 128_256, tied=True)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    export.export(save_tiny(folder / "student"), export.parse("onnx-int8"), folder / "onnx-int8")
    return folder / "onnx-int8"


# --- devices and budgets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_every_profile_is_whole_and_every_figure_has_its_source(name):
    values = yaml.safe_load((PROFILES / f"{name}.yaml").read_text())
    figures = {"ram", "reserved", "disk", "memory_bandwidth", "cores", "compute"}
    assert set(values) == figures | {"name", "title", "unit", "sources"}
    assert set(values["sources"]) == figures
    assert all(values["sources"].values())
    found = device(name)
    assert found.name == name
    assert 0 < found.reserved < found.ram
    assert 1e9 < found.memory_bandwidth < 2e12
    assert 1e10 < found.compute < 2e14


def test_the_devices_that_were_promised_are_there():
    promised = {"raspberry-pi-5-4gb", "raspberry-pi-5-8gb", "android-midrange", "laptop-8gb", "laptop-16gb"}
    assert promised | {"jetson-orin-nano", "gpu-6gb", "gpu-24gb"} <= set(names())


def test_host_is_measured():
    found = device("host", threads=1)
    assert found.ram > 2**30
    assert 1e8 < found.memory_bandwidth < 1e12
    assert 1e9 < found.compute < 1e14


@pytest.mark.parametrize(
    ("text", "key", "limit"),
    [
        ("memory=1GiB", "memory", 2**30),
        ("disk=2.5GB", "disk", 2_500_000_000),
        ("ttft=500ms", "ttft", 0.5),
        ("load=2 s", "load", 2.0),
        ("decode=20", "decode", 20.0),
        ("prefill=100 tok/s", "prefill", 100.0),
    ],
)
def test_budgets_are_read_with_their_units(text, key, limit):
    assert parse_budget(text) == Budget(key, limit)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("memory", "expected KEY=VALUE"),
        ("speed=3", "budget 'speed=3' is not known"),
        ("ttft=500", "is no time"),
        ("ttft=1.2.3s", "is no number"),
        ("memory=1", "is no size"),
        ("decode=fast", "is no number"),
        ("decode=0", "leaves nothing"),
    ],
)
def test_a_budget_that_cannot_be_read_is_one_line(text, says):
    with pytest.raises(UserError, match=says):
        parse_budget(text)


def test_margins_are_positive_where_there_is_room():
    assert Budget("memory", 100).check(80)["margin"] == pytest.approx(0.2)
    assert Budget("memory", 100).check(101)["passed"] is False
    assert Budget("memory", 100).check(100)["passed"] is True
    assert Budget("decode", 20).check(30)["margin"] == pytest.approx(0.5)
    assert Budget("decode", 20).check(19)["passed"] is False
    assert Budget("ttft", 1.0).check(None)["passed"] is False  # what could not be measured is not met
    assert set(BUDGETS) >= {"memory", "ttft", "decode", "disk"}


def test_sizes_in_both_systems():
    assert parse_bytes("1.5GiB") == 1_610_612_736
    assert parse_bytes("1.5GB") == 1_500_000_000
    for text in ("GiB", "1", "1.2.3GB", "1 GiBs", ".GB", "-1GB"):
        with pytest.raises(UserError):
            parse_bytes(text)


# --- rooflines ------------------------------------------------------------------------------------------------------

PI = Device("pi", "a board", 8 * 2**30, 2**30, 32 * 10**9, 10e9, 4, 100e9, "cpu")


def test_decoding_waits_for_memory_and_reading_a_prompt_for_arithmetic():
    work = Workload(LLAMA, nbytes=700_000_000, kv_bytes_per_value=2)
    assert work.kv_bytes_per_token == 2 * 16 * 8 * 64 * 2
    assert work.decode_seconds(PI, 0) == pytest.approx(0.07)
    assert work.decode_seconds(PI, 1000) == pytest.approx((700e6 + 1000 * work.kv_bytes_per_token) / 10e9)
    flops = 512 * LLAMA.flops_per_token(256) - 511 * 2 * LLAMA.vocab * LLAMA.hidden  # logits of the last token alone
    assert work.prefill_seconds(PI, 512) == pytest.approx(flops / 100e9)
    every = Workload(LLAMA, nbytes=700_000_000, kv_bytes_per_value=2, every_logit=True)
    assert every.prefill_seconds(PI, 512) == pytest.approx(512 * LLAMA.flops_per_token(256) / 100e9)
    assert work.prefill_seconds(PI, 1) == pytest.approx(0.07)  # one token moves as many weights as it can


def test_an_embedding_of_its_own_is_not_moved_for_a_token():
    from dataclasses import replace

    untied = replace(LLAMA, tied=False)
    work = Workload(untied, nbytes=untied.parameters, kv_bytes_per_value=2)
    assert work.moved_bytes == pytest.approx(untied.parameters - untied.vocab * untied.hidden)


def test_predicted_memory_is_the_sum_of_its_parts():
    found = Workload(LLAMA, nbytes=700, kv_bytes_per_value=2).memory(context=10, prompt=3, baseline=50)
    assert found["kv_cache"] == 10 * 32_768
    assert found["total"] == found["weights"] + found["kv_cache"] + found["activations"] + found["runtime"]
    assert 4 * LLAMA.vocab < found["activations"] < 4 * 3 * LLAMA.vocab


# --- measuring ------------------------------------------------------------------------------------------------------


def test_an_artifact_is_measured_in_a_process_of_its_own(artifact):
    result = bench(
        [str(artifact)], repeats=2, points=(8, 40), on="raspberry-pi-5-4gb", budgets=[parse_budget("ttft=10s")]
    )
    (found,) = result["artifacts"]
    assert found["runtime"] == "onnxruntime-genai"
    assert (found["format"], found["precision"]) == ("onnx", "int8")
    assert found["bytes"] == export.read_manifest(artifact)["bytes"]
    assert found["kv_bytes_per_token"] == 2 * 3 * 32 * 4
    assert [point["prompt"] for point in found["points"]] == [8, 40]
    for point in found["points"]:
        assert 0 < point["ttft_p50_s"] <= point["ttft_p95_s"] < 10
        assert point["decode_low"] <= point["decode_tokens_per_s"] <= point["decode_high"]
    memory = found["memory"]
    assert 50e6 < memory["peak_rss_bytes"] < 4e9
    assert memory["predicted"]["runtime"] <= memory["predicted"]["total"] < 2 * memory["peak_rss_bytes"]
    assert memory["predicted_at_context"]["context"] == 128
    here = found["estimate"]["host"]
    assert here["measured_over_roofline"]["decode_s"] == pytest.approx(
        here["measured"]["decode_s"] / here["roofline"]["decode_s"]
    )
    assert [line["budget"] for line in found["budget"]] == ["ttft", "memory", "disk"]
    assert found["budget"][0]["estimate"] is True
    assert found["passed"] is True
    assert result["machine"]["threads"] >= 1
    assert result["machine"]["processor"]


def test_artifacts_are_compared_run_beside_run(artifact):
    student = artifact.parent / "student"
    result = bench([str(artifact), str(student)], repeats=2, points=(8,), versus=True)
    assert [(r["measure"], r["prompt"]) for r in result["ratios"]] == [("decode", 8), ("ttft", 8)]
    decode = result["ratios"][0]
    assert decode["low"] <= decode["speed_up"] <= decode["high"]
    assert decode["speed_up"] > 1  # ONNX int8 against eager torch


def test_a_missed_budget_is_exit_1_with_the_margin(artifact, capsys):
    assert run(["bench", str(artifact), "--budget", "memory=1MiB", "--repeats", "1"]) == 1
    out, err = capsys.readouterr()
    assert "MISSED memory" in out
    assert "budget missed: memory of" in err
    assert "margin -" in err
    assert run(["bench", str(artifact), "--budget", "memory=64GiB", "--repeats", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["artifacts"][0]["passed"] is True


def fake(name: str, *, nbytes: int, kl: float | None, passed: bool, student: str = "s", teacher: float | None = None):
    quality = None if kl is None else {"kl_student": kl, "kl_teacher": teacher, "student": student}
    return {
        "what": name,
        "bytes": nbytes,
        "bits_per_weight": nbytes / 100 if nbytes < 10_000 else 5.0,
        "quality": quality,
        "passed": passed,
        "memory": {"peak_rss_bytes": nbytes + 300 * 2**20},
    }


def test_the_best_that_fits_is_the_nearest_to_the_student():
    some = [fake("int4", nbytes=400, kl=0.2, passed=True), fake("int8", nbytes=800, kl=0.01, passed=True)]
    assert best_fit(some, [])["what"] == "int8"
    assert best_fit([*some, fake("fp32", nbytes=3200, kl=0.0, passed=False)], [])["what"] == "int8"
    assert best_fit([*some, fake("torch", nbytes=1600, kl=None, passed=True)], [])["what"] == "torch"  # by its bits


def test_artifacts_of_two_students_are_ranked_by_the_teacher_or_by_their_bits():
    one = fake("int4", nbytes=400, kl=0.2, passed=True, student="a", teacher=0.3)
    two = fake("int8", nbytes=800, kl=0.01, passed=True, student="b", teacher=0.9)
    assert best_fit([one, two], [])["what"] == "int4"
    two["quality"]["kl_teacher"] = None
    assert best_fit([one, two], [])["what"] == "int8"


def test_where_nothing_fits_a_target_is_named_whose_int4_export_would():
    large = [fake("int4", nbytes=2 * 2**30, kl=0.2, passed=False)]
    limit = parse_bytes("1GiB")
    named = best_fit(large, [Budget("disk", limit)])["target"]
    weights = parse_bytes(named.removesuffix("@int4")) * 2  # 4 bits each
    assert 0.95 * limit < weights * 5.0 / 8 <= limit * 1.001  # 5 bits each with their scales
    assert best_fit(large, [Budget("memory", limit)])["target"] == "579MiB@int4"  # besides the 300 MiB of the runtime
    assert best_fit(large, [Budget("memory", 2**20)])["target"] is None
    assert best_fit(large, [Budget("decode", 20)])["target"] is None


def test_no_target_is_named_for_what_is_too_slow():
    slow = fake("int4", nbytes=400, kl=0.2, passed=False)
    slow["budget"] = [Budget("decode", 1e6).check(10.0), Budget("memory", 2**30).check(400)]
    found = best_fit([slow], [Budget("decode", 1e6), Budget("memory", 2**30)])
    assert found == {"what": None, "target": None, "why": "even the smallest misses its decode tokens/s"}


def test_the_faster_of_two_is_named_first():
    from export.tables import ratio_line

    ratio = {"first": "a", "second": "b", "prompt": 8, "measure": "decode", "speed_up": 0.5, "low": 0.25, "high": 1.0}
    assert ratio_line(ratio) == "decode at 8 tokens: b is 2.00 times as fast as a (1.00 to 4.00, pair by pair)"


def test_this_machine_can_be_the_device(artifact):
    (found,) = bench([str(artifact)], repeats=1, points=(8,), on="host", budgets=[parse_budget("ttft=60s")])[
        "artifacts"
    ]
    assert [line["budget"] for line in found["budget"]] == ["ttft", "memory", "disk"]
    assert not any(line["estimate"] for line in found["budget"])
    with pytest.raises(UserError, match="load time on laptop-8gb cannot be estimated"):
        bench([str(artifact)], on="laptop-8gb", budgets=[parse_budget("load=1s")])


def test_a_gpu_is_held_to_what_the_model_takes_there(artifact):
    (found,) = bench([str(artifact)], repeats=1, points=(8,), on="gpu-6gb")["artifacts"]
    memory = found["budget"][0]
    predicted = found["memory"]["predicted_at_context"]
    assert memory["estimate"] is True
    assert memory["value"] == predicted["total"] - predicted["runtime"] < 10e6


def test_what_another_runtime_stood_in_for_is_not_passed_off_as_measured():
    manifest = {
        **{"format": "gguf", "precision": "q8_0", "bytes": 9, "perplexity": None, "skills": {}, "overall": None},
        **{"agreement": {"student": None, "teacher": None}, "warnings": []},
    }
    headline = {"prompt": 8, "ttft_p50_s": 1, "decode_tokens_per_s": 2}
    timed = {
        **{"runtime": "transformers", "load_s": 1.0, "headline": headline, "memory": {"peak_rss_bytes": 3}},
        **{"estimate": {}, "budget": [], "stand_in": True},
    }
    found = export.record(manifest, timed, path="export/gguf-q8_0")
    assert (found["ttft_ms"], found["decode_tokens_per_s"], found["peak_rss_bytes"]) == (None, None, None)
    assert "no times" in export.describe(found)
    assert export.record(manifest, timed | {"stand_in": False}, path="")["ttft_ms"] == 1000


def test_fit_with_nothing_that_fits_fails_with_the_result(artifact):
    with pytest.raises(CheckFailed, match="nothing fits") as failed:
        compressor.bench([str(artifact)], budgets=["memory=1MiB"], fit=True, repeats=1)
    assert failed.value.result["fit"]["what"] is None


def test_a_child_that_dies_is_one_line(artifact, tmp_path, monkeypatch):
    from shutil import copytree

    broken = tmp_path / "broken"
    copytree(artifact, broken)
    (broken / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(UserError, match=r"broken: onnxruntime-genai cannot open"):
        bench([str(broken)], repeats=1)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="ended with code 1"):
        bench([str(artifact)], repeats=1)


def test_python_dash_m_export_is_the_same_command(artifact, tmp_path):
    command = [sys.executable, "-m", "export", "onnx", str(artifact.parent / "student"), "--precision", "fp32"]
    done = subprocess.run(
        [*command, "--no-measure", "--out", str(tmp_path / "a")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(str(tmp_path / "a"))
    assert (tmp_path / "a" / "export.json").exists()
