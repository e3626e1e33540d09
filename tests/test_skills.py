"""The checkers: each accepts the right answer and refuses the near miss."""

import pytest

from compressor.errors import UserError
from compressor.evaluate.skills import CHECKS, failures, parse_calls, passes, validate

RIGHT_AND_WRONG = {
    "case": [
        ("upper", "A LAMP!", "A Lamp!"),
        ("lower", "a lamp", "a Lamp"),
        ("title", "A Lamp", "A lamp"),
        ("title", "Lamp", ""),
    ],
    "list": [
        ({"items": ["lamp", "river"], "layout": "numbered"}, "1. lamp\n2. river", "1. lamp\n3. river"),
        ({"items": ["lamp", "river"], "layout": "bullets"}, "- Lamp\n* river", "lamp\nriver"),
        ({"items": ["LAMP", "INK"], "layout": "commas", "case": "upper"}, "LAMP, INK.", "Lamp, INK"),
        ({"items": ["a", "b"], "layout": "json"}, '["a", "b"]', '["b", "a"]'),
        ({"items": ["a", "b"], "layout": "json"}, '["a", "b"]', '{"a": "b"}'),
        ({"items": ["lamp", "key"], "layout": "hyphens"}, "lamp-key", "lamp key"),
    ],
    "json": [({"age": 7}, '{"age": 7}', '{"age": "7"}'), ({"age": 7}, ' {"age":7}\n', "age 7")],
    "word_count": [(3, "The old lamp.", "The lamp."), (2, "mother-in-law's lamp", "mother in law's lamp")],
    "max_words": [(3, "The lamp.", "The lamp is old.")],
    "repeat": [
        ({"word": "key", "times": 2}, "Key key", "key key key"),
        ({"word": "key", "times": 2}, "key, key", "key lamp"),
    ],
    "starts_with": [("Ahoy", "ahoy, I am Mara.", "I say ahoy"), ("Here", "Here it is.", "Hereby it is.")],
    "ends_with": [
        ("so it goes", "I am Mara, so it goes!", "so it goes, I am Mara"),
        ("hat", "I see the hat.", "I see that."),
        ("hat", "hat", ""),
    ],
    "ends_mark": [("!", "Yes! ", "Yes.")],
    "contains": [
        (["Oslo"], "I live in OSLO.", "I live in Osloer"),
        (["so it goes"], "well, so it goes", "so it went"),
    ],
    "excludes": [(["I"], "Mara lives here", "I live here")],
    "cites": [
        ([2], "In Oslo [2].", "In Oslo [1]."),
        ([2], "In Oslo [2]", "In Oslo [1][2]"),
        ([], "No.", "No [1]."),
    ],
    "refuses": [(True, "The passages do not tell.", "Oslo."), (False, "Oslo [1].", "I don't know.")],
    "calls": [
        (
            [{"name": "f", "arguments": {"n": 2}}],
            '<tool_call>{"name": "f", "arguments": {"n": 2}}</tool_call>',
            '<tool_call>{"name": "f", "arguments": {"n": "2"}}</tool_call>',
        ),
        (
            [{"name": "f", "arguments": {}}],
            '{"name": "f", "parameters": {}}',
            '{"name": "g", "parameters": {}}',
        ),
        ([], "None of the functions can do that.", '{"name": "f", "arguments": {}}'),
        (
            [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}],
            '[\n  {"name": "g", "arguments": {}},\n  {"name": "f", "arguments": {}}\n]',
            '{"name": "f", "arguments": {}}',
        ),
    ],
}


def test_every_checker_is_tried():
    assert set(RIGHT_AND_WRONG) == set(CHECKS)


@pytest.mark.parametrize(
    ("kind", "value", "right", "wrong"),
    [(kind, *case) for kind, cases in RIGHT_AND_WRONG.items() for case in cases],
)
def test_a_checker_tells_right_from_wrong(kind, value, right, wrong):
    task = {"skill": "instruction", "messages": [{"role": "user", "content": "?"}], "check": {kind: value}}
    validate(task)
    assert passes(task, right)
    assert failures(task, wrong) == [kind]


@pytest.mark.parametrize("answer", ["", "   ", "\x00", "[1", "{", "<tool_call>", "-", "\n\n"])
def test_no_checker_trips_over_an_odd_answer(answer):
    for kind, cases in RIGHT_AND_WRONG.items():
        for value, *_ in cases:
            assert CHECKS[kind](answer, value) in (True, False)


@pytest.mark.parametrize(
    ("answer", "calls"),
    [
        ("no call", []),
        ('<tool_call>{"name": "f"</tool_call>', None),
        ('<tool_call>{"name": "f", "arguments": {}}', None),
        ('{"name": 3, "arguments": {}}', None),
        ('[{"name": "f", "arguments": []}]', None),
        ("[1] is what I cite", []),
        (
            'Sure. <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
            [{"name": "f", "arguments": {"a": 1}}],
        ),
    ],
)
def test_calls_are_read_or_called_malformed(answer, calls):
    assert parse_calls(answer) == calls


@pytest.mark.parametrize(
    "task",
    [
        None,
        {"skill": "sewing", "messages": [{"role": "user", "content": "?"}], "check": {"case": "upper"}},
        {"skill": "rag", "messages": [], "check": {"case": "upper"}},
        {"skill": "rag", "messages": [{"role": "user"}], "check": {"case": "upper"}},
        {"skill": "rag", "messages": [{"role": "user", "content": "?"}], "check": {}},
        {"skill": "rag", "messages": [{"role": "user", "content": "?"}], "check": {"sings": True}},
        {"skill": "rag", "messages": [{"role": "user", "content": "?"}], "check": {"cites": [1]}, "tools": ["f"]},
    ],
)
def test_a_task_that_cannot_be_checked_is_refused(task):
    with pytest.raises(UserError, match="a task needs"):
        validate(task)
