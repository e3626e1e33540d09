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
        ('[{"description": "x"}]', '{"description": "x"} is no function'),
        ('[{"name": "f", "parameters": 5}]', "is no function"),
        ('[{"name": "f", "parameters": {"properties": []}}]', "parameters of f are no JSON schema: [] is not of type"),
        ('[{"name": "f", "parameters": {"properties": {"a": 5}}}]', "parameters of f are no JSON schema: 5 is not"),
        ('[{"name": "f", "parameters": {"required": 5}}]', "parameters of f are no JSON schema: 5 is not of type"),
        ('[{"name": "f", "parameters": {"type": "banana"}}]', "parameters of f are no JSON schema: 'banana' is not"),
        ("[" * 15_000, "the schemas are no JSON"),
        ('[{"type": "function", "function": {"name": "f"}}]', None),
        ("", None),
    ],
)
def test_edited_schemas_are_checked(text, error):
    tools, found = presets.schema_errors(text)
    assert (found is None) == (error is None)
    assert error is None or (error in str(found) and tools == [])


def test_schemas_reach_the_template_in_the_form_that_it_knows():
    from compressor.checkpoint import load_tokenizer

    whole, _ = presets.schema_errors('[{"name": "f"}]')
    parameters = {"type": "object", "properties": {}}
    assert whole == [{"type": "function", "function": {"description": "", "name": "f", "parameters": parameters}}]
    assert load_tokenizer(DEMO_FOLDER).apply_chat_template(ASK, tools=whole, tokenize=False)


# --- marks ----------------------------------------------------------------------------------------------------------


def test_marks_say_each_requirement_in_words():
    found = marks.marks({"max_words": 3, "ends_mark": "!", "contains": ["owl"]}, "An owl!")
    assert [mark.words for mark in found] == ["at most 3 words", "last character “!”", "contains “owl”"]
    assert [mark.passed for mark in found] == [True, True, True]
    assert [mark.passed for mark in marks.marks({"max_words": 1, "cites": [1]}, "An owl [2].")] == [False, False]


def test_every_kind_of_check_has_words():
    assert marks.WORDS.keys() == marks.CHECKS.keys()


def test_sentences_are_cut_out_with_what_they_cite():
    found = marks.cited_spans("Yes. It is red [2][3], not blue [7]. Bye", 3)
    assert found == [("Yes.", []), (" It is red [2][3], ", [2, 3]), ("not blue [7]", [0]), (". Bye", [])]
    assert marks.cited_spans("no", 3) == [("no", [])]


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
        ({"seats": "2"}, ["book.seats: '2' is not of type 'integer'"]),
        ({"seats": True}, ["book.seats: True is not of type 'integer'"]),
        ({"class": "third", "seats": 1}, ["book.class: 'third' is not one of ['first', 'second']"]),
        ({"stops": ["a", 1]}, ["book: 'seats' is a required property", "book.stops.1: 1 is not of type 'string'"]),
        (
            {"seats": 1, "guest": {}, "colour": "red"},
            [
                "book: Additional properties are not allowed ('colour' was unexpected)",
                "book.guest: 'name' is a required property",
            ],
        ),
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
    ballot.cast("left", left="t", right="s", blind=False)  # is counted apart
    with (tmp_path / "votes.jsonl").open("a") as file:
        file.write('{"left": "t", "ri')  # a crash
    opened, row = votes.Ballot(tmp_path / "votes.jsonl").tally()
    assert (opened["blind"], opened["wins"]) == (False, (0, 1))
    assert (row["models"], row["wins"], row["ties"], row["both_bad"]) == (("s", "t"), (1, 2), 1, 1)
    assert row["share"] == pytest.approx(1.5 / 4)
    assert row["interval"][0] < row["share"] < row["interval"][1]
    rows = list(csv.DictReader(io.StringIO(ballot.as_csv())))
    assert [row["winner"] for row in rows] == ["t", "s", "", "", "t", "t"]
    assert {row["prompt"] for row in rows} == {"'=1+1", ""}  # which no spreadsheet computes
    assert len(json.loads(ballot.as_json())["votes"]) == 6
    with pytest.raises(UserError, match="vote 'maybe' is not known; expected one of left, right, tie, bad"):
        ballot.cast("maybe", left="t", right="s")
    with pytest.raises(UserError, match="both sides are t; expected two models"):
        ballot.cast("left", left="t", right="t")
    (tmp_path / "votes.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="is no list of votes"):
        votes.Ballot(tmp_path / "votes.jsonl")


def test_wilsons_interval_is_the_published_one():
    # Wilson's interval of 8 of 10: 0.490 to 0.943
    share, low, high = votes.wilson(8, 10)
    assert (share, round(low, 3), round(high, 3)) == (0.8, 0.490, 0.943)
    assert votes.wilson(0, 0) == (None, 0.0, 1.0)


# --- models ---------------------------------------------------------------------------------------------------------

STORY = [{"role": "user", "content": "Tell me a story about a fox, an owl and a bee."}]


def offer(name: str, what: Path = DEMO_FOLDER, *, weights: int = 10**6) -> models.Offer:
    return models.Offer(name, str(what), 10**6, weights)


@pytest.fixture(scope="module")
def every():
    found = models.Models([offer("teacher")], threads=1)
    yield found
    found.close()


@pytest.fixture
def model(every):
    return every["teacher"]


def begun(models_, name="teacher", messages=ASK, stop=None, **settings: Any):
    stop = stop or threading.Event()
    return models_[name].stream(messages, stop=stop, load=models_.load([name]), **SETTINGS | settings)


def answer(models_, messages: list[dict[str, str]] = ASK, **settings: Any) -> tuple[str, dict[str, Any]]:
    found = list(begun(models_, messages=messages, **settings))
    return "".join(part.get("text", "") for part in found), found[-1]["done"]


def test_a_model_answers_as_its_runtime_does_and_tells_how_fast(every, model):
    text, done = answer(every)
    runtime = TorchRuntime(DEMO_FOLDER)
    assert text == "".join(runtime.stream(ASK, max_new_tokens=24))
    assert model.awake
    assert model.facts["parameters"] == runtime.parameters
    assert done["tokens"] == len(done["ids"]) > 3
    assert 0 < done["ttft_s"] < 60
    assert done["tokens_per_s"] > 0
    assert not done["stopped"]
    rows = model.rate(ASK, None, done, load=every.load([]))
    assert [text for text, *_ in rows] == [runtime.tokenizer.decode([token]) for token in done["ids"]]
    assert all(agrees for *_, agrees in rows)  # greedy tokens are the model's own choice
    with pytest.raises(UserError, match="the other model has another tokenizer"):
        model.rate(ASK, None, done | {"tokenizer": "another"}, load=every.load([]))


def test_clients_take_turns_and_get_their_own_answers(every):
    prompts = [
        [{"role": "user", "content": f"Repeat the word {word} three times."}] for word in ("fox", "owl", "bee", "cat")
    ]
    alone = [answer(every, prompt)[0] for prompt in prompts]
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        found[i] = answer(every, prompts[i])[0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == alone


def held(model: models.Model):
    """The model's process, held in the middle of its answer: without that it might be done before it is stopped."""
    os.kill(int(str(model.pid)), signal.SIGSTOP)


def let_go(model: models.Model):
    os.kill(int(str(model.pid)), signal.SIGCONT)


@pytest.mark.parametrize("after", ["before the first word", "in the middle", "after the last"])
def test_an_answer_that_is_left_frees_the_model_and_meets_no_other(every, model, after):
    whole, _ = answer(every)
    stream = begun(every, messages=STORY, max_new_tokens=200)
    if after == "before the first word":
        next(stream)
    elif after == "in the middle":
        while "text" not in next(stream):
            pass
    else:
        while "done" not in next(stream):
            pass
    held(model)
    stream.close()  # waits for nothing, not even for a process that stands still
    assert model._turn.acquire(blocking=False)
    model._turn.release()
    let_go(model)
    assert answer(every)[0] == whole


def test_a_stopped_answer_ends_early_with_its_figures(every, model):
    answer(every)
    whole, _ = answer(every, STORY, max_new_tokens=200)
    stop = threading.Event()
    stream = begun(every, messages=STORY, stop=stop, max_new_tokens=200)
    while "text" not in (found := next(stream)):
        pass
    held(model)
    stop.set()
    text = found["text"] + "".join(part.get("text", "") for _ in range(2) for part in [next(stream)])
    let_go(model)
    rest = list(stream)
    assert rest[-1]["done"]["stopped"]
    said = text + "".join(part.get("text", "") for part in rest)
    assert whole.startswith(said)
    assert len(said) < len(whole)


def test_what_waits_or_loads_can_be_stopped():
    both = models.Models([offer("a")], threads=1)
    stop = threading.Event()
    stream = begun(both, "a", stop=stop)
    assert next(stream) == {"state": "loading"}
    next(stream)
    assert both["a"].pid
    stop.set()
    assert [part for part in stream if part != {"state": "loading"}] == []
    assert both["a"].pid is None  # what is half loaded takes no memory
    both["a"]._turn.acquire()
    stop.clear()
    stream = begun(both, "a", stop=stop)
    assert next(stream) == {"state": "waiting for its turn"}
    stop.set()
    assert list(stream) == []
    both.close()


def test_a_killed_process_is_told_and_started_anew(every, model):
    whole, _ = answer(every)
    stream = begun(every, messages=STORY, max_new_tokens=200)
    while "text" not in next(stream):
        pass
    held(model)
    os.kill(int(str(model.pid)), signal.SIGKILL)
    with pytest.raises(UserError, match="the process of teacher was killed by signal 9; expected it to answer"):
        list(stream)
    assert not model.awake
    assert answer(every)[0] == whole


def test_a_failing_model_says_why_and_can_be_asked_again(every, tmp_path):
    broken = models.Models([offer("teacher", tmp_path)])
    with pytest.raises(UserError, match=r"teacher: .* holds no weights"):
        answer(broken)
    assert broken["teacher"].pid is None
    long = [{"role": "user", "content": "fox " * 5000}]
    with pytest.raises(
        UserError, match=r"teacher: the conversation has .* tokens; expected fewer than the model's context"
    ):
        answer(every, long)
    assert answer(every)[0]


def test_a_model_too_large_for_memory_is_refused_before_it_is_loaded_and_costs_nobody_their_place():
    found = models.Models([offer("teacher"), offer("huge", weights=10**15)], threads=1)
    answer(found)
    with pytest.raises(UserError, match=r"huge needs about .* are free; expected room for it"):
        list(begun(found, "huge"))
    assert found["huge"].pid is None
    assert found["teacher"].awake
    found.close()


def test_models_rest_to_make_room_but_not_those_that_are_asked(monkeypatch):
    found = models.Models([offer(name, weights=10**9) for name in "abc"], threads=1)
    started: list[str] = []

    def opened(self):
        started.append(self.offer.name)
        self.facts, self._child = {"parameters": 1}, type("Child", (), {"pid": 1, "close": lambda self: None})()
        yield {"state": "loading"}

    monkeypatch.setattr(models.Model, "open", opened)
    awake = lambda: [name for name in "abc" if found[name].awake]  # noqa: E731
    monkeypatch.setattr(models, "available_memory", lambda: int(3e9 - 1.3e9 * len(awake())))  # room for two
    for now, (name, keep) in enumerate((("a", "a"), ("b", "ab"), ("c", "ac"))):
        list(found.load(list(keep))(found[name]))
        found[name].asked = now
    assert started == ["a", "b", "c"]
    assert awake() == ["a", "c"]  # b was asked after a, but a is part of the question
    list(found.load(["b"])(found["b"]))
    assert awake() == ["b", "c"]  # a had not been asked for longest


def test_what_a_model_takes_in_memory_is_told_by_how_it_is_run(tmp_path):
    from models import save_tiny

    [found] = models.offers([str(save_tiny(tmp_path / "tiny"))])
    stored = sum(file.stat().st_size for file in (tmp_path / "tiny").glob("*.safetensors"))
    parameters = TorchRuntime(tmp_path / "tiny").parameters
    assert (found.nbytes, found.weights) == (stored, 4 * parameters)  # small ones are widened to float32


def test_offers_are_a_runs_models_or_those_named(tmp_path):
    assert [offer.name for offer in models.offers([str(DEMO_FOLDER), "demo"])] == [DEMO_FOLDER.name, "demo"]
    twice = models.offers(["demo", "demo"])
    assert [(offer.name, offer.what) for offer in twice] == [
        ("demo (1)", str(DEMO_FOLDER)),
        ("demo (2)", str(DEMO_FOLDER)),
    ]
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=r"there is no .*/x/y; expected a run folder or a model; check the path"):
        models.offers([str(tmp_path / "x" / "y")])
    with pytest.raises(UserError, match="/no/such is not a folder"):
        models.offers(["demo", "/no/such"])
    (tmp_path / "run.json").write_text(json.dumps({"stages": {}}))
    with pytest.raises(UserError, match="has no student yet; expected a finished run"):
        models.offers([str(tmp_path)])
    assert Path(models.offers([str(DEMO_FOLDER)])[0].what) == DEMO_FOLDER
