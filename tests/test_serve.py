"""The comparison app without its page: prompts, marks, differences, votes, and models in processes of their own."""

import csv
import io
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from compressor.checkpoint import DEMO_FOLDER
from compressor.errors import UserError
from compressor.evaluate.skills import SKILLS, passes, validate
from compressor.runtime import TorchRuntime
from serve import difference, marks, models, presets, votes

ASK = [{"role": "user", "content": "Write the words fox, owl and bee in capitals, separated by commas."}]
SETTINGS: dict[str, Any] = {"tools": None, "max_new_tokens": 24, "temperature": 0.0, "seed": 0}


def task_of(skill: str, preset: presets.Preset) -> dict[str, Any]:
    messages = presets.conversation(preset.prompt, system=preset.system, turns=preset.turns, passages=preset.passages)
    return {"skill": skill, "messages": messages, "tools": list(preset.tools) or None, "check": preset.check}


# --- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skill", SKILLS)
def test_the_demos_presets_are_tasks(skill):
    found = presets.demo_library(skill)
    assert len({preset.title for preset in found}) == len(found) >= 25
    for preset in found:
        validate(task_of(skill, preset))


@pytest.mark.parametrize("skill", SKILLS)
def test_every_preset_is_a_task_that_its_own_answer_passes(skill):
    found = presets.library(skill)
    assert len(found) >= 25
    assert len({preset.title for preset in found}) == len(found)
    assert [preset.level for preset in found] == sorted((p.level for p in found), key=presets.LEVELS.index)
    for preset in found:
        task = task_of(skill, preset)
        validate(task)
        assert passes(task, preset.answer), preset.title
        if preset.check.get("calls") != [] and "refuses" not in preset.check:
            assert not passes(task, "I like bananas, thank you very much."), preset.title
        assert not any(marks.call_errors(call, task["tools"] or []) for call in preset.check.get("calls", []))


def test_passages_are_numbered_before_the_question():
    messages = presets.conversation("Who?", system="Be brief.", passages=("One.", "Two."))
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "[1] One.\n[2] Two.\n\nWho?"},
    ]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[", "the schemas are no JSON"),
        ("{}", "the schemas are no list"),
        ("[1]", "1 is no function"),
        ('[{"description": "x"}]', "a function has no name"),
        ('[{"name": "f", "parameters": {"properties": []}}]', "parameters of f are no JSON schema"),
        ('[{"type": "function", "function": {"name": "f"}}]', None),
        ("", None),
    ],
)
def test_edited_schemas_are_checked(text, error):
    tools, found = presets.schema_errors(text)
    assert (found is None) == (error is None)
    assert error is None or (error in str(found) and tools == [])


# --- marks ----------------------------------------------------------------------------------------------------------


def test_marks_say_each_requirement_in_words():
    found = marks.marks({"max_words": 3, "ends_mark": "!", "contains": ["owl"]}, "An owl!")
    assert [mark.words for mark in found] == ["at most 3 words", "last character “!”", "contains “owl”"]
    assert [mark.passed for mark in found] == [True, True, True]
    assert [mark.passed for mark in marks.marks({"max_words": 1, "cites": [1]}, "An owl [2].")] == [False, False]


def test_every_kind_of_check_has_words():
    assert marks.WORDS.keys() == marks.CHECKS.keys()


def test_citations_are_cut_out_and_unknown_passages_told():
    assert marks.cited_spans("It is red [2], not blue [7].", 3) == [
        ("It is red ", None),
        ("[2]", "passage 2"),
        (", not blue ", None),
        ("[7]", "no such passage"),
        (".", None),
    ]


TOOLS = [
    {
        "name": "book",
        "parameters": {
            "type": "object",
            "properties": {
                "seats": {"type": "integer"},
                "class": {"type": "string", "enum": ["first", "second"]},
                "stops": {"type": "array", "items": {"type": "string"}},
                "guest": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
            },
            "required": ["seats"],
        },
    }
]


@pytest.mark.parametrize(
    ("arguments", "errors"),
    [
        ({"seats": 2, "class": "first", "stops": ["a"], "guest": {"name": "b"}}, []),
        ({"seats": "2"}, ['book.seats is "2", no integer']),
        ({"seats": True}, ["book.seats is true, no integer"]),
        ({"class": "third", "seats": 1}, ['book.class is "third", none of ["first", "second"]']),
        ({"stops": ["a", 1]}, ["book lacks seats", "book.stops[1] is 1, no string"]),
        ({"seats": 1, "guest": {}, "colour": "red"}, ["book.guest lacks name", "book has no colour"]),
    ],
)
def test_calls_are_held_to_their_schemas(arguments, errors):
    assert marks.call_errors({"name": "book", "arguments": arguments}, TOOLS) == errors


def test_calls_are_compared_with_the_teachers_in_any_order():
    one = '<tool_call>{"name": "book", "arguments": {"seats": 1}}</tool_call>'
    two = '<tool_call>{"name": "book", "arguments": {"seats": 2}}</tool_call>'
    assert marks.call_report(one + two, TOOLS, two + one)["same_as_teacher"] is True
    assert marks.call_report(one, TOOLS, two)["same_as_teacher"] is False
    assert marks.call_report(one, TOOLS) == {
        "calls": [{"name": "book", "arguments": {"seats": 1}}],
        "errors": [],
        "same_as_teacher": None,
    }
    broken = marks.call_report("<tool_call>{", TOOLS, one)
    assert (broken["calls"], broken["errors"], broken["same_as_teacher"]) == (None, ["a call is malformed"], False)
    assert marks.call_report('{"name": "fly", "arguments": {}}', TOOLS)["errors"] == ["fly is not on offer"]


# --- differences ----------------------------------------------------------------------------------------------------


def test_the_first_divergence_is_marked_and_nothing_is_lost():
    left, right = "The fox runs  fast today.\nBye", "The fox walks fast\ntoday. Bye now"
    found = difference.difference(left, right)
    assert "".join(piece.text for piece in found if piece.side != "right") == left
    assert [piece for piece in found if piece.first] == [difference.Piece("runs  ", "left", True)]
    assert [piece.text for piece in found if piece.side == "right"] == ["walks ", "now"]
    assert [piece.side for piece in difference.difference("same words", "same words")] == ["same"]
    assert difference.difference("", "") == []


def test_heat_goes_by_decades():
    assert [difference.heat(p) for p in (0.9, 0.5, 0.2, 0.02, 0.002, 0.0)] == [0, 0, 1, 2, 3, 4]


# --- votes ----------------------------------------------------------------------------------------------------------


def test_votes_are_kept_tallied_and_exported(tmp_path):
    ballot = votes.Ballot(tmp_path / "votes.jsonl")
    for choice, left, right in [
        ("left", "t", "s"),
        ("left", "s", "t"),
        ("tie", "t", "s"),
        ("bad", "t", "s"),
        ("left", "t", "s"),
    ]:
        ballot.cast(choice, left=left, right=right, prompt="=1+1", blind=True)
    [row] = votes.Ballot(tmp_path / "votes.jsonl").tally()
    assert (row["models"], row["wins"], row["ties"], row["both_bad"]) == (("s", "t"), (1, 2), 1, 1)
    assert row["share"] == pytest.approx(1.5 / 4)
    assert row["interval"][0] < row["share"] < row["interval"][1]
    rows = list(csv.DictReader(io.StringIO(ballot.as_csv())))
    assert [row["winner"] for row in rows] == ["t", "s", "", "", "t"]
    assert {row["prompt"] for row in rows} == {"'=1+1"}  # which no spreadsheet computes
    assert len(json.loads(ballot.as_json())["votes"]) == 5
    with pytest.raises(UserError, match="vote 'maybe' is not known; expected one of left, right, tie, bad"):
        ballot.cast("maybe", left="t", right="s")
    (tmp_path / "votes.jsonl").write_text("no json")
    with pytest.raises(UserError, match="is no list of votes"):
        votes.Ballot(tmp_path / "votes.jsonl")


def test_wilsons_interval_is_the_published_one():
    # Wilson's interval of 8 of 10: 0.490 to 0.943
    share, low, high = votes.wilson(8, 10)
    assert (share, round(low, 3), round(high, 3)) == (0.8, 0.490, 0.943)
    assert votes.wilson(0, 0) == (None, 0.0, 1.0)


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    found = models.Model(models.Offer("teacher", str(DEMO_FOLDER), 10**6), threads=1)
    yield found
    found.close()


def answer(model: models.Model, messages: list[dict[str, str]] = ASK, **settings: Any) -> tuple[str, dict[str, Any]]:
    found = list(model.stream(messages, **SETTINGS | settings))
    return "".join(part.get("text", "") for part in found), found[-1]["done"]


def test_a_model_answers_as_its_runtime_does_and_tells_how_fast(model):
    text, done = answer(model)
    runtime = TorchRuntime(DEMO_FOLDER)
    assert text == "".join(runtime.stream(ASK, max_new_tokens=24))
    assert (model.state, model.facts["parameters"]) == ("ready", runtime.parameters)
    assert done["tokens"] == len(done["ids"]) > 3
    assert 0 < done["ttft_s"] < 60
    assert done["tokens_per_s"] > 0
    assert not done["stopped"]
    [row] = [model.rate(ASK, None, done["ids"])]
    assert [text for text, *_ in row] == [runtime.tokenizer.decode([token]) for token in done["ids"]]
    assert all(agrees for *_, agrees in row)  # greedy tokens are the model's own choice


def test_clients_take_turns_and_get_their_own_answers(model):
    prompts = [
        [{"role": "user", "content": f"Repeat the word {word} three times."}] for word in ("fox", "owl", "bee", "cat")
    ]
    alone = [answer(model, prompt)[0] for prompt in prompts]
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        found[i] = answer(model, prompts[i])[0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == alone


def test_an_answer_that_is_left_frees_the_model(model):
    whole, _ = answer(model)
    stream = model.stream(ASK, **SETTINGS | {"max_new_tokens": 200})
    assert any("text" in next(stream) for _ in range(2))
    stream.close()
    assert answer(model)[0] == whole


def test_a_killed_process_is_told_and_started_anew(model):
    whole, _ = answer(model)
    stream = model.stream(ASK, **SETTINGS | {"max_new_tokens": 200})
    assert "text" in next(stream)
    os.kill(int(str(model.pid)), signal.SIGKILL)
    with pytest.raises(UserError, match="the process of teacher ended with code -9"):
        list(stream)
    assert model.state == "asleep"
    assert answer(model)[0] == whole


def test_a_failing_model_says_why_and_can_be_asked_again(model, tmp_path):
    broken = models.Model(models.Offer("broken", str(tmp_path), 1))
    with pytest.raises(UserError, match=r"broken: .* holds no weights"):
        answer(broken)
    assert broken.state == "asleep"
    long = [{"role": "user", "content": "fox " * 5000}]
    with pytest.raises(
        UserError, match=r"teacher: the conversation has .* tokens; expected fewer than the model's context"
    ):
        answer(model, long)
    assert answer(model)[0]


def test_a_model_too_large_for_memory_is_refused_before_it_is_loaded():
    huge = models.Model(models.Offer("huge", str(DEMO_FOLDER), 10**15))
    with pytest.raises(UserError, match=r"huge needs about .* are free; expected room for it"):
        answer(huge)
    assert huge.pid is None
    huge.close()


def test_offers_are_a_runs_models_or_those_named(tmp_path):
    assert [offer.name for offer in models.offers([str(DEMO_FOLDER), "demo"])] == [DEMO_FOLDER.name, "demo"]
    twice = models.offers(["demo", "demo"])
    assert [(offer.name, offer.what) for offer in twice] == [
        ("demo (1)", str(DEMO_FOLDER)),
        ("demo (2)", str(DEMO_FOLDER)),
    ]
    with pytest.raises(UserError, match="/no/such is not a folder"):
        models.offers(["demo", "/no/such"])
    (tmp_path / "run.json").write_text(json.dumps({"stages": {}}))
    with pytest.raises(UserError, match="has no student yet; expected a finished run"):
        models.offers([str(tmp_path)])
    assert Path(models.offers([str(DEMO_FOLDER)])[0].what) == DEMO_FOLDER
