"""Runtime: the same answers batched, streamed and by transformers' own generate; whole characters."""

import pytest
import torch
from models import CHAT_TEMPLATE, save_tiny, tiny_tokenizer

from compressor import runtime
from compressor.errors import UserError
from compressor.runtime import Runtime, TorchRuntime, face

QUESTIONS = [
    "hi",
    "what is the longest word here?",
    "b",
    "count to three \U0001f600",
    "go on",
    "why?",
    "x" * 40,
]


def ask(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TorchRuntime:
    return TorchRuntime(save_tiny(tmp_path_factory.mktemp("tiny")), device="cpu")


def by_transformers(tiny: TorchRuntime, question: str, count: int) -> str:
    prompt = runtime.prompt_ids(ask(question), tiny.tokenizer)
    ids = torch.tensor([prompt])
    out = tiny.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=sorted(tiny.stops),
    )
    answer = [token for token in out[0, len(prompt) :].tolist() if token not in tiny.stops]
    return tiny.tokenizer.decode(answer, skip_special_tokens=True)


def test_it_is_a_runtime_and_counts_itself(tiny):
    assert isinstance(tiny, Runtime)
    assert tiny.nbytes == (tiny.folder / "model.safetensors").stat().st_size
    assert tiny.parameters == sum(p.numel() for p in tiny.model.parameters())
    assert tiny.model.dtype == torch.float32


def test_logits_are_the_models_in_float32(tiny):
    ids = torch.tensor([5, 9, 20, 7])
    expected = tiny.model(input_ids=ids[None]).logits[0]
    assert tiny.logits(ids).dtype == torch.float32
    torch.testing.assert_close(tiny.logits(ids), expected)


def test_picked_logits_come_in_chunks_and_in_order(tiny):
    ids = torch.randint(3, 259, (3, 11), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(11).expand(3, 11)
    picked = torch.rand(3, 11, generator=torch.Generator().manual_seed(1)) < 0.6
    chunks = list(tiny.picked_logits(ids, positions, picked, chunk=2))
    assert max(len(chunk) for chunk in chunks) == 2
    expected = torch.cat([tiny.logits(row)[mask] for row, mask in zip(ids, picked, strict=True)])
    torch.testing.assert_close(torch.cat(chunks), expected, atol=1e-4, rtol=1e-4)


def test_batched_answers_equal_transformers_generate_one_by_one(tiny):
    """A stop token is put where the untrained model will meet it, so that some rows end early."""
    free = by_transformers(tiny, QUESTIONS[0], 12)
    early = tiny.tokenizer(free, add_special_tokens=False)["input_ids"][4]
    tiny.stops.add(early)
    try:
        answers = tiny.complete([ask(q) for q in QUESTIONS], max_new_tokens=24)
        expected = [by_transformers(tiny, q, 24).strip() for q in QUESTIONS]
    finally:
        tiny.stops.discard(early)
    assert answers == expected
    assert len({len(answer) for answer in answers}) > 1


def test_batch_size_does_not_change_the_answers(tiny):
    conversations = [ask(q) for q in QUESTIONS]
    whole = tiny.complete(conversations, max_new_tokens=10)
    tiny.batch_size = 2
    try:
        assert tiny.complete(conversations, max_new_tokens=10) == whole
    finally:
        tiny.batch_size = 64


def test_the_stream_joins_up_to_the_greedy_answer_and_draws_by_seed(tiny):
    messages = ask(QUESTIONS[1])["messages"]
    pieces = list(tiny.stream(messages, max_new_tokens=20))
    assert "".join(pieces) == by_transformers(tiny, QUESTIONS[1], 20)
    warm = ["".join(tiny.stream(messages, max_new_tokens=20, temperature=1.5, seed=s)) for s in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


def test_characters_of_several_tokens_come_whole():
    tokenizer = tiny_tokenizer()
    text = "a \U0001f600\u6df1\ne\u0301 done"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = list(face._pieces(iter(ids), tokenizer))
    assert "".join(pieces) == text
    assert "\U0001f600" in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    broken = list(face._pieces(iter(ids[:4]), tokenizer))
    assert "".join(broken) == tokenizer.decode(ids[:4])


def test_every_configured_stop_token_ends_an_answer(tiny):

    assert runtime.stop_ids([7, 9], tiny.tokenizer) == {1, 7, 9}
    assert runtime.stop_ids(8, tiny.tokenizer) == {1, 8}
    assert runtime.stop_ids(None, tiny.tokenizer) == {1}


def test_a_model_without_a_template_continues_a_transcript_and_stops_at_the_next_turn():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    ids = runtime.prompt_ids(ask("hi") | {"tools": [{"name": "look"}]}, tokenizer)
    assert tokenizer.decode(ids) == '<s>Tools:\n{"name": "look"}\n\nUser: hi\n\nAssistant:'
    pieces = list(face._cut(iter([" ye", "s\n", "\nUs", "er: and", " then"]), face.TRANSCRIPT_STOPS))
    assert "".join(pieces) == " yes"
    held = list(face._cut(iter(["one\n\nU", "nion"]), face.TRANSCRIPT_STOPS))
    assert "".join(held) == "one\n\nUnion"


def test_conversations_beyond_the_context_are_said_to_be(tiny, caplog):
    long = "x" * 200
    with pytest.raises(UserError, match="expected fewer than the model's context of 128"):
        list(tiny.stream(ask(long)["messages"]))
    with caplog.at_level("WARNING"):
        answers = tiny.complete([ask(long), ask("hi")], max_new_tokens=4)
    assert answers[0] == ""
    assert answers[1]
    assert "1 conversations exceed the context" in caplog.text


def test_a_refusing_template_is_a_users_mistake(tiny):
    tiny.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    try:
        with pytest.raises(UserError, match="no system role"):
            tiny.complete([ask("hi")])
    finally:
        tiny.tokenizer.chat_template = CHAT_TEMPLATE
