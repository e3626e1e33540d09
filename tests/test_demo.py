"""The embedded teacher and its domain: checkable, varied, train and test disjoint by construction."""

import json
from itertools import islice, pairwise
from pathlib import Path

import pytest

from compressor import recipe as recipes
from compressor.checkpoint import DEMO_FOLDER, load_tokenizer
from compressor.demo import tasks
from compressor.demo.tasks.rag import TOLD
from compressor.demo.tasks.tools import DECLINE, SERVED
from compressor.errors import UserError
from compressor.evaluate.run_skills import run
from compressor.evaluate.skills import SKILLS, failures, parse_calls, validate
from compressor.runtime import TorchRuntime

SAMPLE = 3000


def sample(split: str, seed: int, count: int = SAMPLE, **options) -> list[dict]:
    return list(islice(tasks.generate(split=split, seed=seed, **options), count))


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


def test_the_splits_share_no_combination():
    train = {json.dumps(t.get("about") or t["text"]) for t in sample("train", 1, 20000)}
    test = {json.dumps(t.get("about") or t["text"]) for t in sample("test", 2)}
    validation = {json.dumps(t.get("about") or t["text"]) for t in sample("validation", 2)}
    assert not train & test
    assert not train & validation
    assert not test & validation
    assert len(test) > 1000


def test_no_exchange_of_a_training_conversation_is_a_test():
    """Earlier exchanges of a conversation count like its last one."""
    for skill in ("instruction", "tools"):  # their requests say all that they are about
        conversations = sample("train", 4, 4000, mix={skill: 1}, most_turns=tasks.MOST_TURNS)
        asked = {m["content"] for t in conversations for m in t["messages"] if m["role"] == "user"}
        assert len(asked) > 2000
        assert not asked & {t["messages"][-1]["content"] for t in tasks.suite(skill, 500)}


def test_conversations_go_on_about_one_scene():
    for task in sample("train", 6, 300, mix={"rag": 1}, most_turns=4):
        roles = [m["role"] for m in task["messages"]]
        assert roles == ["system"] + ["user", "assistant"] * (len(roles) // 2 - 1) + ["user"]
        assert sum("[1]" in m["content"] for m in task["messages"] if m["role"] == "user") == 1


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_split_has_the_share_that_it_says(split):
    drawn = [tasks.split_of(["rag", number]) for number in range(4000)]
    assert drawn.count(split) / 4000 == pytest.approx(tasks.SPLITS[split], abs=0.015)


def test_no_constant_answer_goes_far():
    constants = ["I do not know.", DECLINE, "[1]", "", "The passages do not tell. [1] [2]", "true", "- a"]
    for skill in SKILLS:
        suite = tasks.suite(skill, 400)
        for answer in constants:
            assert sum(failures(task, answer) == [] for task in suite) < 0.35 * len(suite), (skill, answer)


@pytest.mark.parametrize("split", tasks.SPLITS)
def test_every_split_refuses_as_often_as_it_says(split):
    told = [not task["check"]["refuses"] for task in sample(split, 8, 1200, mix={"rag": 1})]
    assert sum(told) / len(told) == pytest.approx(TOLD, abs=0.06)
    served = [task["check"]["calls"] != [] for task in sample(split, 8, 1200, mix={"tools": 1})]
    assert sum(served) / len(served) == pytest.approx(SERVED, abs=0.06)


def test_a_suite_that_asks_for_too_much_is_told_so():
    with pytest.raises(UserError, match=r"the tools suite has \d+ tasks; expected 2000"):
        tasks.suite("tools", 2000, draws=1)


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
    found = run(TorchRuntime(DEMO_FOLDER), suites, max_new_tokens=96)["skills"]
    for skill in SKILLS:  # both are samples of the same share: three standard errors of 50
        error = (recorded[skill] * (1 - recorded[skill]) / 50) ** 0.5
        assert found[skill]["score"] == pytest.approx(recorded[skill], abs=3 * max(error, 0.03)), skill


def test_the_teacher_has_learned_every_skill():
    recorded = json.loads((DEMO_FOLDER / "training.json").read_text())["exact"]
    assert all(recorded[skill] >= 0.95 for skill in SKILLS), recorded


def test_the_readme_gives_the_teachers_recorded_scores():
    training = json.loads((DEMO_FOLDER / "training.json").read_text())
    assert set(training["exact"]) == set(SKILLS)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for skill, score in training["exact"].items():
        assert f"{skill} {score:.1%}".replace("%", " %") in readme


def test_the_demo_takes_at_most_three_percent_of_the_teachers_tokens():
    training = json.loads((DEMO_FOLDER / "training.json").read_text())
    assert recipes.load_values("demo")["distill"]["tokens"] <= 0.03 * training["tokens"]


def test_the_template_shows_tools_and_every_role():
    tokenizer = load_tokenizer(DEMO_FOLDER)
    (task,) = tasks.suite("tools", 1)
    text = tokenizer.apply_chat_template(
        task["messages"], tools=task["tools"], tokenize=False, add_generation_prompt=True
    )
    function = task["tools"][0]["function"]
    assert text.startswith("<s><|tool|>")
    assert f'{function["name"]}("' in text
    assert text.endswith("<|end|><|assistant|>")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_the_template_renders_calls_as_the_checkers_read_them():
    call = {"type": "function", "function": {"name": "get_map", "arguments": {"town": "Oslo", "count": 2}}}
    for arguments in (call["function"]["arguments"], '{"town": "Oslo", "count": 2}'):
        call["function"]["arguments"] = arguments
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        text = load_tokenizer(DEMO_FOLDER).apply_chat_template(messages, tokenize=False)
        answer = text.split("<|assistant|>")[1].removesuffix("<|end|>")
        assert parse_calls(answer) == [{"name": "get_map", "arguments": {"town": "Oslo", "count": 2}}]
