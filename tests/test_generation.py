"""What a model writes by itself: every formula by hand or in float64, exposure bias against a chain that is known."""

import json
import math

import pytest
import torch
from models import save_tiny, tiny_tokenizer

import compressor
from compressor import data
from compressor.errors import UserError
from compressor.evaluate import generation as g
from compressor.runtime import TorchRuntime, prompt_ids
from compressor.runtime.face import Speaker
from compressor.runtime.prompts import ids_of, plain_ids


def ask(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}]}


PROMPTS: list[g.Prompt] = [ask("hello"), ask("a much longer question"), "once upon a", ask("why?")]
REFERENCES = ["good morning", "the answer", " time there was", "because it is so"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[TorchRuntime, TorchRuntime]:
    """A student with some ids of padding, and its teacher with other weights and sizes."""
    student = save_tiny(tmp_path_factory.mktemp("student"), vocab_size=264)
    teacher = save_tiny(tmp_path_factory.mktemp("teacher"), seed=1, intermediate_size=112)
    return TorchRuntime(student, device="cpu", batch_size=3), TorchRuntime(teacher, device="cpu", batch_size=3)


# --- formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("the cat is on a mat", ["the cats sat on the mat"], 2 / 3),  # the, cat(s), on, mat: 4 of 6, both ways
        ("one two three", ["one two three"], 1.0),
        ("three two one", ["one two three"], 1 / 3),  # order counts
        ("a b c d", ["a b", "x y"], 2 * 0.5 * 1 / 1.5),  # the best of several
        ("running dogs", ["run dog"], 1.0),  # by their stems
        ("", ["anything"], 0.0),
    ],
)
def test_rouge_l_on_pairs_worked_by_hand(answer, references, score):
    assert g.rouge_l([answer], [references]) == pytest.approx(score)
    assert g.rouge_l([answer, "same"], [references, ["same"]]) == pytest.approx((score + 1) / 2)


def test_distinct_4_pools_the_answers():
    assert g.distinct([[1, 2, 3, 4, 5], [1, 2, 3, 4, 9]]) == pytest.approx(3 / 4)  # 1234 twice, 2345, 2349
    assert g.distinct([[7] * 9]) == pytest.approx(1 / 6)
    assert g.distinct([[1, 2, 3], []]) is None


def test_repetition_is_the_share_of_4_grams_seen_before():
    assert g.repetition([1, 2, 3, 4, 5, 6]) == 0
    assert g.repetition([1, 2] * 4) == pytest.approx(3 / 5)  # 1212 2121 1212 2121 1212
    assert g.repetition([7] * 10) == pytest.approx(6 / 7)
    assert g.repetition([1, 1, 1]) == 0


def test_ece_by_hand():
    confidence = torch.tensor([0.05, 0.05, 0.95, 0.99, 0.5])
    correct = torch.tensor([False, True, True, False, True])
    # bins of 1/15: (0.05, 0.05), (0.95, 0.99), (0.5); 0.95 > 14/15, so the last bin holds two
    expected = (2 / 5) * abs(0.5 - 0.05) + (2 / 5) * abs(0.5 - 0.97) + (1 / 5) * abs(1 - 0.5)
    assert g.calibration_error(confidence, correct) == pytest.approx(expected)
    assert g.calibration_error(torch.tensor([1.0, 1.0]), torch.tensor([True, True])) == 0
    assert g.calibration_error(torch.tensor([0.0, 1.0]), torch.tensor([True, False])) == 1


def test_ece_bins_are_fifteen_and_closed_above():
    edges = torch.tensor([1 / 15 - 1e-6, 1 / 15 + 1e-6], dtype=torch.float64)
    apart = g.calibration_error(edges, torch.tensor([True, False]))
    together = g.calibration_error(edges - 1e-4, torch.tensor([True, False]))
    assert apart == pytest.approx(0.5 * (1 - 1 / 15) + 0.5 / 15, abs=1e-5)
    assert together == pytest.approx(0.5 - 1 / 15, abs=2e-4)
    on_the_edge = torch.tensor([0.5, 0.5 - 1e-6], dtype=torch.float64)
    assert g.calibration_error(on_the_edge, torch.tensor([True, False]), bins=2) == pytest.approx(0, abs=1e-5)


def test_exposure_bias_is_told_at_doublings_and_at_the_end():
    student, teacher = torch.arange(1.0, 21) * 3, torch.arange(1.0, 21) * 2
    rows = g.exposure_bias(student.double(), teacher.double())
    assert [row["length"] for row in rows] == [8, 16, 20]
    assert rows[1] == {"length": 16, "student": 48.0, "teacher": 32.0, "ex_acc_err": 50.0}
    nothing = g.exposure_bias(torch.full((8,), 1e-12), torch.zeros(8))
    assert abs(nothing[0]["ex_acc_err"]) < 1e-3  # rounding over rounding is no excess


def test_collapse_is_told_in_words():
    assert g.collapsed(repetition=g.REPETITION_LIMIT, length_drift=g.LENGTH_LIMIT) is None
    assert g.collapsed(repetition=0.0, length_drift=g.SHORTEST) is None
    assert "repeat" in (g.collapsed(repetition=0.31, length_drift=1.0) or "")
    assert "2.1 times as long" in (g.collapsed(repetition=0.0, length_drift=2.1) or "")
    assert "0.2 times as long" in (g.collapsed(repetition=0.0, length_drift=0.2) or "")


# --- sampling -------------------------------------------------------------------------------------------------------


def test_sampled_answers_repeat_with_their_seed_and_differ_between_rows_and_seeds(models):
    student, _ = models
    prompts = [prompt_ids(ask("hello"), student.tokenizer)] * 5  # in two batches: each has draws of its own
    once, again, other = (student.answers(prompts, max_new_tokens=12, temperature=1.0, seed=s) for s in (3, 3, 4))
    assert once == again
    assert len({tuple(answer) for answer in once + other}) == 10


def test_answers_one_by_one_have_independent_draws_too(models):
    student, _ = models

    class OneByOne(Speaker):
        tokenizer, context = student.tokenizer, student.context

        def tokens(self, ids, **options):
            return student.tokens(ids, **options)

    prompts = [prompt_ids(ask("hello"), student.tokenizer)] * 3
    once, again = (OneByOne().answers(prompts, max_new_tokens=12, temperature=1.0, seed=3) for _ in range(2))
    assert once == again
    assert len({tuple(answer) for answer in once}) == 3
    assert OneByOne().answers(prompts, max_new_tokens=6) == student.answers(prompts, max_new_tokens=6)


def test_batched_samples_follow_the_models_distribution(models):
    """The first token of 4,000 answers against the softmax it is drawn from, at a temperature of 1.5."""
    student, _ = models
    ids = prompt_ids(ask("hello"), student.tokenizer)
    chances = (student.logits(torch.tensor(ids))[-1].double() / 1.5).softmax(-1)
    student.batch_size = 500
    try:
        answers = student.answers([ids] * 4000, max_new_tokens=1, temperature=1.5, seed=0)
    finally:
        student.batch_size = 3
    likely = chances.topk(5).indices
    seen = torch.tensor([sum(answer == [token] for answer in answers) for token in likely.tolist()]) / 4000
    assert ((seen - chances[likely]).abs() < 4 * (chances[likely] / 4000).sqrt()).all()


# --- the whole ------------------------------------------------------------------------------------------------------


def plainly(student: TorchRuntime, teacher: TorchRuntime, answers_of: TorchRuntime, seeds, length: int) -> list[float]:
    """Accumulated error in float64, answer by answer, from whole logits."""
    sums = [0.0] * length
    ids = [ids_of(prompt, student.tokenizer) for prompt in PROMPTS]
    for seed in seeds:
        answers = answers_of.answers(ids, max_new_tokens=length, temperature=1.0, seed=seed)
        for prompt, answer in zip(ids, answers, strict=True):
            whole = torch.tensor(prompt + answer)
            log_p = teacher.logits(whole)[:, :259].double().log_softmax(-1)
            log_q = student.logits(whole)[:, :259].double().log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)[len(prompt) - 1 :]
            for t, value in enumerate(kl.tolist()):
                if t < length:  # the last token of a full answer predicts one too many
                    sums[t] += value / (len(seeds) * len(ids))
    return torch.tensor(sums, dtype=torch.float64).cumsum(0).tolist()


@pytest.mark.parametrize("chunk", [5, 1000])
def test_a_student_judged_against_its_teacher_equals_the_plain_computation(models, chunk):
    student, teacher = models
    early = student.answers([ids_of(PROMPTS[0], student.tokenizer)], max_new_tokens=12, temperature=1.0, seed=10)[0][3]
    for model in models:
        model.stops.add(early)  # so that some answers end early
    try:
        found = g.generation(
            student,
            PROMPTS,
            references=REFERENCES,
            against=teacher,
            seeds=(10, 20),
            max_new_tokens=12,
            chunk_tokens=chunk,
        )
        ours = plainly(student, teacher, student, (10, 20), 12)
        theirs = plainly(student, teacher, teacher, (10, 20), 12)
    finally:
        for model in models:
            model.stops.discard(early)
    assert found["length"] < 12
    assert [row["length"] for row in found["exposure_bias"]] == [8, 12]
    for row in found["exposure_bias"]:
        assert row["student"] == pytest.approx(ours[row["length"] - 1], rel=1e-4)
        assert row["teacher"] == pytest.approx(theirs[row["length"] - 1], rel=1e-4)
        assert row["ex_acc_err"] == pytest.approx(100 * (row["student"] / row["teacher"] - 1))
    sure, right = [], []
    for prompt, reference in zip(PROMPTS, REFERENCES, strict=True):
        before, told = (ids_of(prompt, student.tokenizer), plain_ids(reference, student.tokenizer)[:12])
        chances = student.logits(torch.tensor(before + told))[:, :259].double().softmax(-1)
        for t, token in enumerate(told):
            sure.append(float(chances[len(before) - 1 + t].max()))
            right.append(int(chances[len(before) - 1 + t].argmax()) == token)
    assert found["reference_tokens"] == len(sure) == sum(min(12, len(text)) for text in REFERENCES)
    assert found["confidence"] == pytest.approx(sum(sure) / len(sure), rel=1e-4)
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["ece"] == pytest.approx(g.calibration_error(torch.tensor(sure), torch.tensor(right)), abs=1e-4)
    assert list(found["rouge_l"]["seeds"]) == ["10", "20"]
    assert found["length_drift"] == pytest.approx(found["length"] / found["references"]["length"])
    json.dumps(found, allow_nan=False)


def test_a_model_has_no_excess_error_against_itself_and_repeats(models):
    student, _ = models
    given = {"references": REFERENCES, "against": student, "seeds": (1, 2), "max_new_tokens": 10}
    found = g.generation(student, PROMPTS, **given)
    assert [row["ex_acc_err"] for row in found["exposure_bias"]] == pytest.approx([0, 0], abs=1e-3)
    assert found == g.generation(student, PROMPTS, **given)
    assert {key: found[key] for key in found["teacher"]} == found["teacher"]


class Chain:
    """A Runtime whose next token depends on the last one only: tokens 0 and 1 are states, every answer runs its room.

    rows[s][t] is the chance of t after s.
    """

    context = 10_000

    def __init__(self, rows: list[list[float]]) -> None:
        self.tokenizer, self.rows = tiny_tokenizer(), torch.tensor(rows).double()

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(ids), 259), -60.0)
        logits[:, :2] = self.rows[ids].log().float()
        return logits

    def answers(self, prompts, *, max_new_tokens, temperature, seed):
        draw = torch.Generator().manual_seed(seed)
        states = torch.tensor([prompt[-1] for prompt in prompts])
        steps = []
        for _ in range(max_new_tokens):
            states = torch.multinomial(self.rows[states], 1, generator=draw).flatten()
            steps.append(states)
        return torch.stack(steps, 1).tolist()


def test_accumulated_error_of_a_known_chain_and_a_student_that_leaves_the_path():
    """State 0 is the teacher's path, where both nearly agree; the student leaves it more often, and in state 1 they
    disagree. E KL at position t is the state distribution after t - 1 steps times the KL of each state.
    """
    p, q = [[0.95, 0.05], [0.9, 0.1]], [[0.85, 0.15], [0.2, 0.8]]
    teacher, student = Chain(p), Chain(q)
    kl = torch.tensor([sum(a * math.log(a / b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)])
    prompts, length = [[0]] * 1000, 16

    def expected(rows: list[list[float]]) -> torch.Tensor:
        place, steps = torch.tensor([1.0, 0.0]).double(), []
        for _ in range(length):
            steps.append(place @ kl.double())
            place = place @ torch.tensor(rows).double()
        return torch.stack(steps).cumsum(0)

    errors = []
    for model, rows in ((student, q), (teacher, p)):
        answers = model.answers(prompts, max_new_tokens=length, temperature=1.0, seed=0)
        errors.append(g.accumulated_error(teacher, student, prompts, answers, max_new_tokens=length))
        visited = torch.tensor([[0, *answer[:-1]] for answer in answers])
        torch.testing.assert_close(errors[-1], kl[visited].double().mean(0).cumsum(0), rtol=0, atol=1e-5)
        torch.testing.assert_close(errors[-1], expected(rows), rtol=0.15, atol=1e-5)  # sampling noise
    found = g.exposure_bias(*errors)[-1]["ex_acc_err"]
    exact = g.exposure_bias(expected(q), expected(p))[-1]["ex_acc_err"]
    assert exact > 200
    assert found == pytest.approx(exact, rel=0.15)


def test_the_embedded_teacher_writes_well_and_a_damaged_copy_of_it_does_not():
    teacher = compressor.runtime.load("demo", batch_size=16)
    damaged = compressor.runtime.load("demo", batch_size=16)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in damaged.model.parameters():
            if weights.dim() > 1:
                weights += 0.3 * weights.std() * torch.randn(weights.shape, generator=noise)
    sizes = {"count": 12, "context": 512, "max_new_tokens": 40}
    prompts, references = g.heldout_prompts(data.records("demo", part="heldout"), teacher.tokenizer, **sizes)
    given = {"references": references, "seeds": (10, 20), "max_new_tokens": 40}
    good = g.generation(teacher, prompts, **given)
    assert good["rouge_l"]["mean"] > 0.85
    assert good["ece"] < 0.05
    assert 0.8 < good["length_drift"] < 1.2
    assert good["collapsed"] is None
    bad = g.generation(damaged, prompts, against=teacher, **given)
    assert bad["rouge_l"]["mean"] < 0.5
    assert bad["ece"] > good["ece"]
    assert bad["exposure_bias"][-1]["ex_acc_err"] > 20


# --- prompts --------------------------------------------------------------------------------------------------------


def test_heldout_records_become_prompts_and_references():
    tokenizer = tiny_tokenizer()
    chat = [*ask("one")["messages"], {"role": "assistant", "content": "two"}, *ask("three")["messages"]]
    records = [
        {"messages": [*chat, {"role": "assistant", "content": "four"}], "tools": [{"name": "f"}]},
        {"messages": [*chat[:1], {"role": "assistant", "content": " "}]},  # nothing said
        {"messages": [{"role": "assistant", "content": "nobody asked"}]},
        {"prompt": "2+2", "completion": "4"},
        {"text": "abcdefghij"},
        {"text": "x" * 400},
        {"messages": [*ask("y" * 400)["messages"], {"role": "assistant", "content": "too long"}]},
        {"text": "never reached"},
    ]
    sizes = {"context": 200, "max_new_tokens": 20}
    found = g.heldout_prompts(iter(records), tokenizer, count=99, **sizes)
    assert list(zip(*found, strict=True)) == [
        ({"messages": chat, "tools": [{"name": "f"}]}, "four"),
        (ask("2+2"), "4"),
        ("abcde", "fghij"),
        ("x" * 20, "x" * 20),
        ("never ", "reached"),
    ]
    assert g.heldout_prompts(iter(records), tokenizer, count=2, **sizes)[1] == ["four", "4"]
    tokenizer.chat_template = None
    assert g.heldout_prompts(iter(records[3:4]), tokenizer, count=1, **sizes) == (["2+2"], ["4"])
    with pytest.raises(UserError, match="no chat template"):
        g.heldout_prompts(iter(records), tokenizer, count=1, **sizes)


def test_chats_that_the_template_refuses_are_left_out():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') if messages | length > 1 }}" + tokenizer.chat_template
    asked = [{"role": "system", "content": "be brief"}, *ask("one")["messages"], {"role": "assistant", "content": "1"}]
    records = [{"messages": asked}, {"messages": asked[1:]}]
    assert g.heldout_prompts(records, tokenizer, count=5, context=90, max_new_tokens=9) == ([ask("one")], ["1"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"references": REFERENCES[:3]}, "4 prompts and 3 references; expected as many"),
        ({"references": ["a", "b", [], "d"]}, "prompt 3 has an empty reference"),
        ({"references": ["a", " ", "c", "d"]}, "prompt 2 has an empty reference"),
        ({"seeds": ()}, "expected at least one, none twice"),
        ({"seeds": (1, 1)}, "expected at least one, none twice"),
        ({"temperature": 0.0}, "expected more than 0"),
        ({"max_new_tokens": 0}, "expected at least 1 and less than the context of 128"),
        ({"max_new_tokens": 100}, "expected at most 28, the model's context less max_new_tokens"),
    ],
)
def test_what_cannot_be_judged_is_told_in_one_line(models, changes, says):
    given = {"references": REFERENCES, "max_new_tokens": 4} | changes
    with pytest.raises(UserError) as raised:
        g.generation(models[0], PROMPTS, **given)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_models_of_other_tokens_and_prompts_that_never_fit_are_told(models):
    class Other:
        tokenizer = tiny_tokenizer()

    Other.tokenizer.add_tokens(["fox"])
    with pytest.raises(UserError, match="do not share token ids"):
        g.generation(models[0], PROMPTS, references=REFERENCES, against=Other, max_new_tokens=4)  # pyright: ignore
    with pytest.raises(UserError, match="no record gives a prompt of at most -8 tokens"):
        g.heldout_prompts([{"text": "some words"}], tiny_tokenizer(), count=1, context=120, max_new_tokens=128)


def test_the_command_adds_generation_to_its_result_and_a_table(tmp_path, capsys):
    from compressor.cli import run
    from compressor.report import render_evaluation

    folder = save_tiny(tmp_path / "model", max_position_embeddings=512, num_hidden_layers=1)
    lines = [json.dumps({"text": f"the lamp {i} is near the river {i * 7}"}) for i in range(300)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "mine.jsonl").write_text(
        json.dumps({"skill": "rag", "messages": ask("Q")["messages"], "check": {"max_words": 1000}})
    )
    common = ["evaluate", str(folder), "--suite", str(tmp_path / "mine.jsonl"), "--prompts", "2", "--tokens", "50"]
    with_data = [*common, "--data", str(tmp_path / "data.jsonl"), "--against", str(folder), "--generation"]
    assert run([*with_data, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = told["result"]["generation"]
    assert found["seeds"] == [10, 20, 30, 40, 50]
    assert found["prompts"] == 2
    assert found["exposure_bias"][-1] == {"length": 128, "student": 0.0, "teacher": 0.0, "ex_acc_err": 0.0}
    render_evaluation(told)
    out = capsys.readouterr().out
    folded = " ".join(out.split())  # the width is the terminal's
    for words in ("Rouge-L", "references", "expected calibration error", "excess accumulated error"):
        assert words in folded
    assert "collapsed: answers are" in out
    assert run([*common, "--generation"]) == 2
    assert "--generation has no prompts" in capsys.readouterr().err
