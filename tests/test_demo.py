"""The embedded teacher and its domain: checkable, varied, train and test disjoint by construction."""

import json
from itertools import islice, pairwise
from pathlib import Path

import pytest

from compressor.checkpoint import DEMO_FOLDER, load_tokenizer
from compressor.demo import tasks
from compressor.evaluate.run_skills import run
from compressor.evaluate.skills import SKILLS, failures, validate
from compressor.runtime import TorchRuntime

SAMPLE = 3000


def sample(split: str, seed: int, count: int = SAMPLE) -> list[dict]:
    return list(islice(tasks.generate(split=split, seed=seed), count))


def test_every_task_is_checkable_and_its_own_answer_passes():
    for task in sample("train", 1):
        if "text" not in task:
            validate(task)
            assert failures(task, task["answer"]) == [], task


def test_no_task_passes_with_the_answer_of_another():
    for skill in SKILLS:
        drawn = list(islice(tasks.generate(split="train", seed=5, mix={skill: 1}), 300))
        wrong = sum(failures(a, b["answer"]) != [] for a, b in pairwise(drawn))
        assert wrong > 0.85 * len(drawn), skill


def test_train_and_test_share_no_combination():
    train = {json.dumps(t.get("about") or t["text"]) for t in sample("train", 1, 20000)}
    test = {json.dumps(t.get("about") or t["text"]) for t in sample("test", 2)}
    assert not train & test
    assert len(test) > 1000


def test_the_test_share_is_what_it_says():
    drawn = (tasks.rag(__import__("random").Random(seed)) for seed in range(2000))
    share = sum(tasks.split_of(task) == "test" for task in drawn) / 2000
    assert share == pytest.approx(tasks.TEST_SHARE, abs=0.03)


def test_suites_are_the_same_every_time_and_hold_no_answer():
    for skill in SKILLS:
        suite = tasks.suite(skill, 50)
        assert suite == tasks.suite(skill, 50)
        assert len(suite) == 50
        assert all(set(task) <= {"skill", "messages", "tools", "check"} for task in suite)
    assert tasks.suite("rag", 50, seed=1) != tasks.suite("rag", 50, seed=2)


def test_the_domain_is_varied():
    prompts = {t["messages"][-1]["content"] for t in sample("train", 3) if "messages" in t}
    assert len(prompts) > 0.6 * SAMPLE


def test_the_demo_model_is_small_bf16_and_stock():
    config = json.loads((DEMO_FOLDER / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["dtype"] == "bfloat16"
    assert (DEMO_FOLDER / "model.safetensors").stat().st_size < 12e6
    assert not [path for path in Path(DEMO_FOLDER).iterdir() if path.suffix in (".bin", ".pt", ".py")]


def test_the_recorded_scores_are_those_of_the_weights_that_ship():
    recorded = json.loads((DEMO_FOLDER / "training.json").read_text())["exact"]
    suites = {skill: tasks.suite(skill, 50, seed=7) for skill in SKILLS}
    found = run(TorchRuntime(DEMO_FOLDER), suites, max_new_tokens=72)["skills"]
    for skill in SKILLS:  # both are samples of the same share: three standard errors of 50
        error = (recorded[skill] * (1 - recorded[skill]) / 50) ** 0.5
        assert found[skill]["score"] == pytest.approx(recorded[skill], abs=3 * max(error, 0.03)), skill


def test_the_template_shows_tools_and_every_role():
    tokenizer = load_tokenizer(DEMO_FOLDER)
    (task,) = tasks.suite("tools", 1)
    text = tokenizer.apply_chat_template(
        task["messages"], tools=task["tools"], tokenize=False, add_generation_prompt=True
    )
    function = task["tools"][0]["function"]
    assert text.startswith("<s><|tool|>")
    assert f"{function['name']}(" in text
    assert text.endswith("<|end|><|assistant|>")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
