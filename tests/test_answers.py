"""SeqKD's answers: what is asked once, what is left out, and kills."""

import json

import pytest
from models import tiny_tokenizer

from compressor.answers import generate
from compressor.checkpoint import DEMO_FOLDER
from compressor.data import Blocks, encode
from compressor.errors import UserError
from compressor.run import outcome_counts
from compressor.runtime import TorchRuntime


def chat(words):
    return {"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": "?"}]}


class Scripted:
    """A runtime that gives each prompt the answer its last word asks for."""

    def __init__(self, tokenizer):
        self.tokenizer, self.seeds, self.stops = tokenizer, [], {tokenizer.eos_token_id}

    def answers(self, prompts, *, max_new_tokens, temperature, seed):
        self.seeds.append((seed, temperature))
        written = {"loop": "a b c d " * 12, "long": "one two three four five six seven eight nine ten", "none": " "}
        found = []
        for ids in prompts:
            asked = self.tokenizer.decode(ids)
            text = next((answer for word, answer in written.items() if word in asked), "Yes, I do.")
            found.append(self.tokenizer(text, add_special_tokens=False)["input_ids"][:max_new_tokens])
        return found


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def made(folder, runtime, records, **changes):
    options = {"about": {"teacher": "t"}, "count": 50, "context": 128, "max_new_tokens": 30} | changes
    return generate(folder, lambda: runtime, records, runtime.tokenizer, **options)


def lines(folder):
    return [json.loads(line) for file in sorted(folder.glob("data/*.jsonl")) for line in file.read_text().splitlines()]


def test_each_prompt_is_asked_once_and_bad_answers_are_left_out(tokenizer, tmp_path):
    runtime = Scripted(tokenizer)
    words = ["good", "good", "loop", "none", "long", "fine"]
    index = made(tmp_path, runtime, [*map(chat, words), chat("x" * 200)])
    assert outcome_counts(index) == {"kept": 2, "repetitive": 1, "empty": 1, "too long": 1}
    assert [record["messages"][0]["content"] for record in lines(tmp_path)] == ["good", "fine"]
    assert lines(tmp_path)[0]["messages"][-1] == {"role": "assistant", "content": "Yes, I do."}
    again = Scripted(tokenizer)
    assert made(tmp_path, again, map(chat, words)) == index
    assert not again.seeds  # nothing is missing, so nobody is asked


def test_what_asks_nothing_and_what_the_template_refuses_are_left_out(tmp_path, monkeypatch):
    from compressor.runtime.prompts import ids_of

    def refusing(prompt, tokenizer):
        if prompt["messages"][0]["role"] == "judge":
            raise UserError("the chat template refuses a conversation")
        return ids_of(prompt, tokenizer)

    monkeypatch.setattr("compressor.runtime.prompts.ids_of", refusing)
    runtime = TorchRuntime(DEMO_FOLDER)
    first = {"messages": [{"role": "assistant", "content": "I begin."}]}
    strange = {"messages": [{"role": "judge", "content": "x"}, {"role": "assistant", "content": "?"}]}
    index = made(tmp_path, runtime, [first, strange, chat("Repeat the word fox three times.")], context=256)
    assert outcome_counts(index).total() == 1


def test_texts_go_on_and_tools_stay(tokenizer, tmp_path):
    runtime = Scripted(tokenizer)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    made(tmp_path, runtime, [{"text": "abcdefgh"}, chat("call") | {"tools": tools}])
    text, call = lines(tmp_path)
    assert text == {"text": "abcdYes, I do."}
    assert call["tools"] == tools


def test_a_prompt_without_a_template_is_answered_and_ends(tmp_path):
    """Its answer alone is learned, with the end of it; one that was cut has none."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    runtime = Scripted(tokenizer)
    records = [{"prompt": f"Q: {word}\nA:", "completion": "?"} for word in ("good", "long")]
    index = made(tmp_path, runtime, records)
    assert outcome_counts(index) == {"kept": 1, "too long": 1}
    [record] = lines(tmp_path)
    assert record == {"prompt": "Q: good\nA:", "completion": "Yes, I do."}
    learned = encode(record, tokenizer)
    trained = [token for token, counts in zip(learned.ids, learned.trained, strict=True) if counts]
    assert trained[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(trained[:-1]) == "Yes, I do."


def test_special_tokens_of_the_answer_stay_and_its_end_does_not(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>", "</call>"]})

    class Calling(Scripted):
        def answers(self, prompts, **options):
            ids = tokenizer('<call>{"name": "f"}</call>', add_special_tokens=False)["input_ids"]
            return [[*ids, tokenizer.eos_token_id] for _ in prompts]

    made(tmp_path, Calling(tokenizer), [chat("call")])
    assert lines(tmp_path)[0]["messages"][-1]["content"] == '<call>{"name": "f"}</call>'


def test_a_build_that_was_killed_ends_in_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("compressor.answers.SHARD_PROMPTS", 4)
    runtime = TorchRuntime(DEMO_FOLDER)
    records = [chat(f"Repeat the word {word} three times.") for word in ("fox", "owl", "bee", "cat", "dog", "hen") * 2]
    records += [chat(f"Write {word} in capitals.") for word in ("fox", "owl", "bee", "cat", "dog", "hen")]
    options = {"temperature": 1.0, "seed": 5, "context": 256}
    made(tmp_path / "whole", runtime, records, **options)
    for stop in (1, 2):
        done = []

        def killed(count, done=done, stop=stop):
            done.append(count)
            if len(done) == stop + 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / "cut", runtime, records, progress=killed, **options)
    made(tmp_path / "cut", runtime, records, **options)
    whole, cut = (
        {file.name: file.read_bytes() for file in (tmp_path / name).rglob("*.json*")} for name in ("whole", "cut")
    )
    assert whole == cut
    assert len(whole) == 4  # three shards of four prompts and the index


def test_answers_can_be_trained_on(tmp_path):
    runtime = TorchRuntime(DEMO_FOLDER)
    records = [chat(f"Repeat the word {word} three times.") for word in ("fox", "owl", "bee")]
    made(tmp_path, runtime, records, context=256)
    row = next(iter(Blocks(str(tmp_path / "data"), runtime.tokenizer, context=256, fraction=1e-9)))
    answer = lines(tmp_path)[0]["messages"][-1]["content"]
    trained = row["input_ids"][row["labels"] != -100]
    assert answer in {record["messages"][-1]["content"] for record in lines(tmp_path)}
    assert runtime.tokenizer.decode(trained, skip_special_tokens=True).strip()


def test_other_answers_and_none_at_all_are_told(tokenizer, tmp_path):
    runtime = Scripted(tokenizer)
    made(tmp_path / "a", runtime, [chat("good")])
    with pytest.raises(UserError, match=r"was made with another teacher \(t\); expected other"):
        made(tmp_path / "a", runtime, [chat("good")], about={"teacher": "other"})
    with pytest.raises(UserError, match=r"another seed \(0\); expected 1"):
        made(tmp_path / "a", runtime, [chat("good")], seed=1)
    with pytest.raises(UserError, match=r"leave nothing to learn from .*'repetitive': 1"):
        made(tmp_path / "b", runtime, [chat("loop")])
