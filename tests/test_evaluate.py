"""Evaluation: every measure against a plain computation, and the suites through the real checkers."""

import json
import math
from itertools import pairwise

import pytest
import torch
from models import save_tiny, tiny_tokenizer

from compressor import data
from compressor.errors import UserError
from compressor.evaluate import evaluate, recovery, run_skills, text
from compressor.runtime import TorchRuntime


class Plain:
    """A Runtime that has nothing but the Protocol: as an exported model will."""

    def __init__(self, inner: TorchRuntime) -> None:
        self.inner, self.tokenizer = inner, inner.tokenizer
        self.nbytes, self.parameters = inner.nbytes, inner.parameters

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner.logits(ids)

    def stream(self, messages, tools=None, **options):
        return self.inner.stream(messages, tools, **options)

    def complete(self, conversations, **options):
        return self.inner.complete(conversations, **options)


class Canned:
    """Answers that are known in advance, by the last message."""

    tokenizer = tiny_tokenizer()
    nbytes, parameters = 10, 5

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def complete(self, conversations, *, max_new_tokens=256):
        return [self.answers[c["messages"][-1]["content"]] for c in conversations]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[TorchRuntime, TorchRuntime]:
    """A student whose vocabulary is padded by five ids, and its teacher with other weights and sizes."""
    student = save_tiny(tmp_path_factory.mktemp("student"), vocab_size=264)
    teacher = save_tiny(tmp_path_factory.mktemp("teacher"), seed=1, intermediate_size=112)
    return TorchRuntime(student, device="cpu"), TorchRuntime(teacher, device="cpu")


@pytest.fixture(scope="module")
def batches(tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"caf\u00e9 {i} " + "y" * (3 * i)}) + "\n" for i in range(9)))
    return data.text_batches(str(path), tiny_tokenizer(), context=24, tokens=10_000, batch_size=3, fraction=1.0)


def plainly(student: TorchRuntime, teacher: TorchRuntime, batches: list[dict]) -> dict[str, float]:
    """All measures in float64, document by document, with whole logits."""
    nats, their_nats, agreed, tokens, size = 0.0, 0.0, 0, 0, 0
    kls: list[float] = []
    for batch in batches:
        for ids, labels, positions, mask, num_bytes in zip(
            *(batch[key] for key in ("input_ids", "labels", "position_ids", "attention_mask", "num_bytes")),
            strict=True,
        ):
            length = int(mask.sum())
            starts = [*[i for i in range(length) if positions[i] == 0], length]
            for a, b in pairwise(starts):
                log_q = student.logits(ids[a:b])[:, :259].double().log_softmax(-1)
                log_p = teacher.logits(ids[a:b])[:, :259].double().log_softmax(-1)
                for t in range(a + 1, b):
                    assert labels[t] == ids[t]
                    q, p = log_q[t - 1 - a], log_p[t - 1 - a]
                    nats -= float(q[ids[t]])
                    kls.append(float((p.exp() * (p - q)).sum()))
                    their_nats -= float(p[ids[t]])
                    agreed += int(q.argmax() == p.argmax())
                    size += int(num_bytes[t])
                    tokens += 1
    return {
        "perplexity": math.exp(nats / tokens),
        "bits": nats / math.log(2) / size,
        "kl": sum(kls) / tokens,
        "kl_median": sorted(kls)[tokens // 2],
        "kl_p99": sorted(kls)[int(0.99 * tokens)],
        "top1": agreed / tokens,
        "perplexity_ratio": math.exp((nats - their_nats) / tokens),
    }


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("chunk", [5, 1000])
def test_text_measures_equal_the_plain_computation(models, batches, plain, chunk):
    student, teacher = models
    expected = plainly(student, teacher, batches)
    judged = Plain(student) if plain else student
    found = text.measure(judged, batches, against=teacher, chunk_tokens=chunk)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(expected["bits"], rel=1e-4)
    assert found["agreement"]["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    assert found["agreement"]["top1"] == pytest.approx(expected["top1"])
    assert found["agreement"]["kl_median"] == pytest.approx(expected["kl_median"], rel=0.05)
    assert found["agreement"]["kl_p99"] == pytest.approx(expected["kl_p99"], rel=0.1)
    assert found["agreement"]["perplexity_ratio"] == pytest.approx(expected["perplexity_ratio"], rel=1e-4)
    assert 0 < expected["top1"] < 1


def test_a_model_agrees_with_itself(models, batches):
    _, teacher = models
    found = text.measure(teacher, batches, against=teacher)
    nothing = pytest.approx(0, abs=1e-9)
    assert found["agreement"] == {
        "kl": nothing,
        "kl_median": nothing,
        "kl_p99": nothing,
        "top1": 1.0,
        "perplexity_ratio": pytest.approx(1.0),
    }


def test_logits_exist_for_a_chunk_at_a_time(models, batches):
    student, _ = models
    seen = []
    head = student.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1].numel()))
    try:
        text.measure(student, batches, chunk_tokens=7)
    finally:
        hook.remove()
    assert max(seen) == 7


def test_nothing_to_measure_is_none_and_not_zero(models):
    found = evaluate(models[0])
    assert found["perplexity"] is found["bits_per_byte"] is found["agreement"] is found["overall"] is None
    assert found["parameters"] == models[0].parameters
    json.dumps(found, allow_nan=False)


def test_models_that_do_not_share_tokens_are_not_compared(models, batches):
    student, _ = models

    class Other:
        tokenizer = tiny_tokenizer()

    Other.tokenizer.add_tokens(["fox"])
    with pytest.raises(UserError, match="do not share token ids"):
        text.measure(student, batches, against=Other)


SUITES = {
    "instruction": [
        {
            "skill": "instruction",
            "messages": [{"role": "user", "content": f"shout {i}"}],
            "check": {"case": "upper"},
        }
        for i in range(4)
    ],
    "rag": [{"skill": "rag", "messages": [{"role": "user", "content": "end"}], "check": {"ends_with": "sea"}}],
}


def test_suites_are_scored_by_the_checkers_and_averaged_over_skills():
    answers = {"shout 0": "YES", "shout 1": "no", "shout 2": "OK", "shout 3": "FINE", "end": "by the sea."}
    steps = []
    found = evaluate(Canned(answers), suites=SUITES, samples=2, progress=lambda *step: steps.append(step))
    assert found["skills"]["instruction"]["score"] == 0.75
    assert found["skills"]["rag"] == {"score": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    assert found["overall"]["score"] == pytest.approx(0.875)
    assert found["overall"]["n"] == 5
    assert [(s["prompt"], s["passed"]) for s in found["samples"]] == [
        ("user: shout 0", True),
        ("user: shout 1", False),
        ("user: end", True),
    ]
    assert steps[-1] == ("skills", 5, 5)
    json.dumps(found, allow_nan=False)


def test_the_interval_is_the_percentile_bootstrap_and_repeats():
    import numpy

    outcomes = [True] * 83 + [False] * 17
    found = run_skills.interval([outcomes], seed=3)
    assert found == run_skills.interval([outcomes], seed=3)
    rng = numpy.random.default_rng(0)
    means = rng.choice(outcomes, (20_000, 100)).mean(1)
    low, high = numpy.quantile(means, [0.025, 0.975])
    assert found["low"] == pytest.approx(low, abs=0.011)
    assert found["high"] == pytest.approx(high, abs=0.011)
    assert found["low"] < 0.83 < found["high"]


def test_a_real_model_answers_a_suite_of_the_demo(models):
    from compressor.demo import tasks

    suites = {skill: tasks.suite(skill, 3) for skill in ("instruction", "tools")}
    context = models[0].context
    models[0].context = 4096
    try:
        found = evaluate(models[0], suites=suites, max_new_tokens=4)
    finally:
        models[0].context = context
    assert {name: entry["n"] for name, entry in found["skills"].items()} == {"instruction": 3, "tools": 3}
    assert found["overall"]["score"] == 0  # random weights know nothing


def test_recovery_is_a_ratio_and_none_where_there_is_nothing_to_recover():
    def result(a: float, b: float) -> dict:
        return {"skills": {"rag": {"score": a}, "tools": {"score": b}}, "overall": {"score": (a + b) / 2}}

    assert recovery(result(0.4, 0.9), result(0.5, 0.0)) == {
        "overall": pytest.approx(2.6),
        "skills": {"rag": pytest.approx(0.8), "tools": None},
    }


def test_suites_are_read_from_jsonl(tmp_path):
    path = tmp_path / "suite.jsonl"
    path.write_text("\n".join(json.dumps(task) for suite in SUITES.values() for task in suite) + "\n\n")
    assert run_skills.read_suite(path) == [*SUITES["instruction"], *SUITES["rag"]]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not valid JSON"),
        ("{}", 'a task needs "skill"'),
        ('{"skill": "rag", "messages": [{"role": "user", "content": "x"}]}', 'a task needs "check"'),
        ('{"skill": "rag", "messages": ["x"], "check": {"case": "upper"}}', 'a task needs "messages"'),
        (
            '{"skill": "rag", "messages": [{"role": "user", "content": "x"}], "check": {"starts_with": 5}}',
            "cannot be used",
        ),
    ],
)
def test_a_bad_suite_names_its_line(tmp_path, line, says):
    path = tmp_path / "suite.jsonl"
    path.write_text(json.dumps(SUITES["rag"][0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match="line 2") as raised:
        run_skills.read_suite(path)
    assert says in str(raised.value)


def test_an_empty_or_missing_suite_is_a_users_mistake(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no task"):
        run_skills.read_suite(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="cannot read the suite"):
        run_skills.read_suite(tmp_path / "gone.jsonl")
