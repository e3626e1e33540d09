"""Data: what is read, what is held out, which tokens count, and that the stream is the same every time."""

import json
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import save_tiny, tiny_tokenizer

from compressor import data
from compressor.data import blocks, encoding, sources
from compressor.errors import UserError

CHAT = {
    "messages": [
        {"role": "user", "content": "hi \U0001f600"},
        {"role": "assistant", "content": "yo \u00e9 "},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "ok"},
    ]
}
# History drops what the last turn shows; the prompt opens a mark of its own.
THINKING_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
TOOLS_TEMPLATE = "{% for t in tools or [] %}[{{ t['name'] }}]{% endfor %}" + tiny_tokenizer().chat_template


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def texts(tmp_path) -> str:
    return str(jsonl(tmp_path / "texts.jsonl", [{"text": f"document {i} " + "x" * (i % 37)} for i in range(300)]))


def everything(source: str, **options) -> list[dict]:
    return list(data.records(source, part="train", fraction=0, **options))


def trained_text(record: dict, tokenizer) -> str:
    example = data.encode(record, tokenizer)
    return tokenizer.decode([i for i, yes in zip(example.ids, example.trained, strict=True) if yes])


# --- sources


def test_every_kind_of_file_gives_the_same_records(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": "one"}, {"text": "two \u6df1"}]
    jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    jsonl(tmp_path / "lines.json", rows)
    (tmp_path / "c.txt").write_text("one\n<|endoftext|>\ntwo \u6df1\n<|endoftext|>\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json", "lines.json", "c.txt", "d.parquet"):
        assert everything(str(tmp_path / name)) == rows, name
    assert everything(str(tmp_path)) == rows * 5


def test_text_without_separators_is_cut_at_paragraphs_and_loses_nothing(tmp_path):
    paragraphs = [f"paragraph {i} " + "word " * 60 for i in range(40)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    documents = [record["text"] for record in everything(str(path))]
    assert len(documents) > 3
    assert all(len(document) < 3 * sources.DOCUMENT_CHARACTERS for document in documents)
    assert " ".join(documents).split() == " ".join(paragraphs).split()


def test_parquet_chats_keep_tools_and_drop_the_columns_nulls(tmp_path):
    import pyarrow
    import pyarrow.parquet

    tools = [{"name": "look", "parameters": {}}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "a", "name": None},
                {"role": "assistant", "content": "b", "name": "x"},
            ]
        },
    ]
    rows[0]["tools"] = json.dumps(tools)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chats.parquet")
    (record,) = everything(str(tmp_path / "chats.parquet"))
    assert record["messages"][0] == {"role": "user", "content": "a"}
    assert record["tools"] == tools


def test_sharegpt_and_openai_calls_are_normalised(tmp_path):
    sharegpt = {
        "system": "be kind",
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}],
    }
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    openai = {
        "messages": [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
    }
    first, second = everything(str(jsonl(tmp_path / "a.jsonl", [sharegpt, openai])))
    assert [m["role"] for m in first["messages"]] == ["system", "user", "assistant"]
    assert second["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert second["messages"][1]["content"] == ""


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{not json", "not valid JSON"),
        ('["a list"]', "found a list"),
        ('{"txt": "x"}', "found the keys txt"),
        ('{"text": 5}', '"text" is a number'),
        ('{"messages": []}', "an empty list"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no message has the role assistant"),
        ('{"messages": [{"role": "user"}]}', 'message 1: found the keys role; expected "role" and "content"'),
        ('{"messages": [{"from": "martian", "value": "x"}]}', '"from" must be one of'),
        ('{"prompt": "x", "completion": ["y"]}', "both be text or both lists"),
        ('{"messages": [{"role": "assistant", "content": "x"}], "tools": "x"}', "not valid JSON"),
    ],
)
def test_a_wrong_record_names_file_line_and_what_was_expected(tmp_path, row, says):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n\n' + row + "\n")
    with pytest.raises(UserError) as raised:
        everything(str(path))
    assert f"{path}, line 3" in str(raised.value)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read_say_so_in_one_line(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"not parquet at all")
    (tmp_path / "x.txt").write_bytes(b"caf\xe9")
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    cases = {
        "x.parquet": "as parquet",
        "x.txt": "not UTF-8",
        "x.csv": "unknown kind",
        "empty": "no data in the folder",
        "gone.jsonl": "does not exist",
    }
    for name, says in cases.items():
        with pytest.raises(UserError, match=says):
            everything(str(tmp_path / name))


def test_a_hub_data_set_is_streamed_with_its_config_and_split(tmp_path, monkeypatch):
    """datasets' own loader runs, on a local repository in the place of the Hub."""
    import datasets

    repository = tmp_path / "owner_name"
    for config in ("small", "large"):
        (repository / config).mkdir(parents=True)
        jsonl(repository / config / "validation.jsonl", [{"text": f"{config} {i}"} for i in range(3)])
    (repository / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {c}\n  data_files:\n  - split: validation\n    path: {c}/validation.jsonl\n"
            for c in ("small", "large")
        )
        + "---\n"
    )
    load, asked = datasets.load_dataset, []

    def local(name, config, **options):
        asked.append((name, config, options))
        return load(str(repository), config, **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    assert everything("owner/name:large", split="validation") == [{"text": f"large {i}"} for i in range(3)]
    assert asked == [("owner/name", "large", {"split": "validation", "streaming": True})]
    with pytest.raises(UserError, match="cannot read the data set owner/name:large"):
        everything("owner/name:large", split="nowhere")


def test_demo_records_of_both_sides_are_disjoint():
    sides = [islice(data.records("demo", part=part, seed=3), 200) for part in ("train", "heldout")]
    train, heldout = ({json.dumps(record, sort_keys=True) for record in side} for side in sides)
    assert len(train) > 150
    assert len(heldout) > 100
    assert not train & heldout


# --- held-out split


def test_the_split_is_a_partition_of_about_the_fraction(tmp_path):
    rows = [{"text": f"document {i}"} for i in range(2000)]
    source = str(jsonl(tmp_path / "a.jsonl", rows))
    train = list(data.records(source, part="train", fraction=0.1))
    heldout = list(data.records(source, part="heldout", fraction=0.1))
    assert 140 < len(heldout) < 260
    assert sorted(r["text"] for r in train + heldout) == sorted(r["text"] for r in rows)
    shuffled = str(jsonl(tmp_path / "b.jsonl", rows[::-1]))
    assert sorted(r["text"] for r in data.records(shuffled, part="heldout", fraction=0.1)) == sorted(
        r["text"] for r in heldout
    )


def test_nothing_held_out_is_ever_trained_on(texts, tokenizer):
    heldout = {r["text"] for r in data.records(texts, part="heldout", fraction=0.2)}
    rows = islice(data.Blocks(texts, tokenizer, context=64, fraction=0.2), 400)
    seen = tokenizer.decode(torch.cat([row["input_ids"] for row in rows]))
    documents = set(seen.split("<s>")[1:-1])
    assert len(documents) > 200
    assert heldout
    assert not documents & heldout


def test_the_hash_ignores_the_order_of_keys():
    one, two = {"prompt": "a", "completion": "b"}, {"completion": "b", "prompt": "a"}
    for fraction in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert data.heldout(one, fraction=fraction) == data.heldout(two, fraction=fraction)


# --- encoding


def test_only_the_assistant_and_its_end_of_turn_count(tokenizer):
    example = data.encode(CHAT, tokenizer)
    rendered = tokenizer.apply_chat_template(CHAT["messages"], tokenize=True)["input_ids"]
    assert example.ids == rendered
    assert trained_text(CHAT, tokenizer) == "yo \u00e9 <|end|>ok<|end|>"


def test_templates_that_rewrite_history_still_find_every_turn(tokenizer):
    thinking = tiny_tokenizer()
    thinking.chat_template = THINKING_TEMPLATE
    assert trained_text(CHAT, thinking) == "yo \u00e9 <|end|></think>ok<|end|>"


def test_tools_reach_the_template(tokenizer):
    with_tools = tiny_tokenizer()
    with_tools.chat_template = TOOLS_TEMPLATE
    example = data.encode(CHAT | {"tools": [{"name": "look"}]}, with_tools)
    assert with_tools.decode(example.ids).startswith("[look]<|user|>")
    assert trained_text(CHAT | {"tools": [{"name": "look"}]}, with_tools) == "yo \u00e9 <|end|>ok<|end|>"


def test_prompt_and_completion_with_and_without_a_template(tokenizer):
    record = {"prompt": "two and two", "completion": " four"}
    assert trained_text(record, tokenizer) == " four<|end|>"
    plain = tiny_tokenizer()
    plain.chat_template = None
    example = data.encode(record, plain)
    assert plain.decode(example.ids) == "<s>two and two four</s>"
    assert trained_text(record, plain) == " four</s>"
    with pytest.raises(UserError, match="no chat template"):
        data.encode(CHAT, plain)


def test_documents_get_the_ends_their_tokenizer_is_used_to():
    from tokenizers.processors import TemplateProcessing

    bos = tiny_tokenizer()
    assert encoding.document_ends(bos) == ([0], [])
    only_eos = tiny_tokenizer()
    only_eos.bos_token = None
    assert encoding.document_ends(only_eos) == ([], [1])
    assert data.encode({"text": "ab"}, only_eos).trained == [False, True, True]
    adds_both = tiny_tokenizer()
    adds_both.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert encoding.document_ends(adds_both) == ([0], [1])
    assert data.encode({"text": "ab"}, adds_both).ids == [0, *bos("ab")["input_ids"], 1]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60).filter(str.strip))
def test_the_bytes_of_a_document_are_counted_exactly(text):
    text = text.encode("utf-8", "ignore").decode()
    tokenizer = tiny_tokenizer_once()
    if any(mark in text for mark in tokenizer.all_special_tokens):
        return
    example = data.encode({"text": text}, tokenizer, count_bytes=True)
    assert sum(example.num_bytes) == len(text.encode())
    assert len(example.ids) == len(example.trained) == len(example.num_bytes)


def tiny_tokenizer_once(kept=[]):  # noqa: B006 - one tokenizer for all of hypothesis's examples
    if not kept:
        kept.append(tiny_tokenizer())
    return kept[0]


def test_same_tokens_compares_ids_and_not_sizes(tokenizer):
    from tokenizers import Tokenizer

    data.check_same_tokens(tokenizer, tiny_tokenizer())
    padded = tiny_tokenizer()
    padded.add_tokens(["<|never seen 1|>", "<|never seen 2|>"])
    data.check_same_tokens(tokenizer, padded)
    swapped = tiny_tokenizer()
    state = json.loads(swapped.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab["q"], vocab["z"] = vocab["z"], vocab["q"]
    swapped._tokenizer = Tokenizer.from_str(json.dumps(state))
    assert len(swapped) == len(tokenizer)
    with pytest.raises(UserError, match=r"quick brown.*from token 4"):
        data.check_same_tokens(tokenizer, swapped)


# --- rows and batches


def test_text_is_packed_whole_into_rows_of_exactly_the_context(texts, tokenizer):
    rows = list(islice(data.Blocks(texts, tokenizer, context=50, seed=1), 100))
    assert {len(row["input_ids"]) for row in rows} == {50}
    stream = torch.cat([row["input_ids"] for row in rows])
    documents = tokenizer.decode(stream).split("<s>")[1:-1]
    known = {r["text"] for r in everything(texts)}
    assert set(documents) <= known
    for row in rows:
        starts = (row["input_ids"] == 0).nonzero().flatten().tolist()
        for i, position in enumerate(row["position_ids"].tolist()):
            assert position == i - max([0, *(s for s in starts if s <= i)])
            hidden = i == 0 or i in starts
            assert row["labels"][i] == (-100 if hidden else row["input_ids"][i])


def test_the_stream_is_endless_reshuffled_and_the_same_for_the_same_seed(texts, tokenizer):
    def documents(seed: int, count: int) -> list[str]:
        rows = islice(data.Blocks(texts, tokenizer, context=50, seed=seed), count)
        return tokenizer.decode(torch.cat([row["input_ids"] for row in rows])).split("<s>")[1:]

    once, again, other = documents(5, 400), documents(5, 400), documents(6, 400)
    assert once == again
    assert once != other
    size = sum(1 for _ in data.records(texts))
    first, second = once[:size], once[size : 2 * size]
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_small_shuffle_buffer_keeps_every_record():
    stream = ({"text": str(i)} for i in range(100))
    out = [int(r["text"]) for r in blocks.shuffled(stream, buffer=8, seed=0)]
    assert sorted(out) == list(range(100))
    assert out != list(range(100))


def test_rows_of_like_length_come_in_runs_and_none_is_lost(tmp_path, tokenizer):
    chats = [{"prompt": f"{i:03}" + "x" * (i * 7 % 60), "completion": "y"} for i in range(256)]
    source = str(jsonl(tmp_path / "chats.jsonl", chats))

    def stream(group: int) -> list[torch.Tensor]:
        blocks = data.Blocks(source, tokenizer, context=128, fraction=0, group=group)
        return [row["input_ids"] for row in islice(blocks, 256)]

    def padded(rows: list[torch.Tensor]) -> int:
        return sum(8 * max(map(len, rows[i : i + 8])) for i in range(0, len(rows), 8))

    plain, runs = stream(1), stream(8)
    assert sorted(row.tolist() for row in plain) == sorted(row.tolist() for row in runs)
    assert all(torch.equal(a, b) for a, b in zip(runs, stream(8), strict=True))
    real = sum(map(len, plain))
    assert padded(plain) > 1.3 * real
    assert padded(runs) < 1.03 * real
    lengths = [len(row) for row in runs[::8]]
    assert lengths not in (sorted(lengths), sorted(lengths, reverse=True))


def test_processes_and_loader_workers_share_the_rows_out(texts, tokenizer):
    from accelerate.data_loader import IterableDatasetShard

    whole = data.Blocks(texts, tokenizer, context=40, seed=2)
    rows = [row["input_ids"].tolist() for row in islice(whole, 16)]
    shards = [IterableDatasetShard(whole, batch_size=2, num_processes=2, process_index=i) for i in range(2)]
    dealt = [[row["input_ids"].tolist() for row in islice(shard, 8)] for shard in shards]
    assert dealt[0] == [*rows[0:2], *rows[4:6], *rows[8:10], *rows[12:14]]
    assert dealt[1] == [*rows[2:4], *rows[6:8], *rows[10:12], *rows[14:16]]
    loader = torch.utils.data.DataLoader(whole, batch_size=None, num_workers=2)
    assert [row["input_ids"].tolist() for row in islice(loader, 16)] == rows


def test_chats_keep_a_row_each_and_long_ones_are_counted(tmp_path, tokenizer, caplog):
    long = {"messages": [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "y"}]}
    source = str(jsonl(tmp_path / "chats.jsonl", [CHAT, long, {"prompt": "a", "completion": "b"}]))
    with caplog.at_level("WARNING"):
        rows = list(islice(data.Blocks(source, tokenizer, context=128, fraction=0), 5))
    assert len({len(row["input_ids"]) for row in rows}) == 2
    assert "2 used, 1 longer than the context" in caplog.text
    batch = data.collate(rows)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["input_ids"].shape[1] == max(len(r["input_ids"]) for r in rows)
        assert batch["attention_mask"][i].sum() == length
        assert (batch["labels"][i, length:] == -100).all()
        assert torch.equal(batch["labels"][i, :length], row["labels"])


def test_packed_documents_do_not_see_each_other(texts, tokenizer):
    """What `Blocks` promises of position_ids: a packed row's logits are those of its documents alone."""
    from models import tiny_model

    model = tiny_model()
    row = next(iter(data.Blocks(texts, tokenizer, context=60)))
    ids, positions = row["input_ids"], row["position_ids"]
    with torch.no_grad():
        packed = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        assert len(starts) > 2
        alone = [model(input_ids=ids[None, a:b]).logits[0] for a, b in pairwise(starts)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": "  "}\n'])
def test_empty_data_is_a_users_mistake_everywhere(tmp_path, tokenizer, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="nothing to train on"):
        next(iter(data.Blocks(str(path), tokenizer, context=8)))
    with pytest.raises(UserError, match="nothing held out"):
        data.heldout_batches(str(path), tokenizer, context=8, limit=4, batch_size=2)
    with pytest.raises(UserError, match="nothing held out"):
        data.text_batches(str(path), tokenizer, context=8, tokens=4)
    with pytest.raises(UserError, match="nothing to calibrate on"):
        list(data.calibration_batches(data.records(str(path)), tokenizer, samples=4, context=8))


def test_nothing_held_out_and_only_long_chats_are_errors(tmp_path, tokenizer, texts):
    with pytest.raises(UserError, match="heldout_fraction"):
        data.heldout_rows(texts, tokenizer, context=8, limit=4, fraction=0)
    source = str(jsonl(tmp_path / "chats.jsonl", [CHAT]))
    with pytest.raises(UserError, match="1 longer than the context"):
        next(iter(data.Blocks(source, tokenizer, context=8, fraction=0)))


def test_calibration_rows_do_not_depend_on_batching(tmp_path, tokenizer):
    pairs = [{"prompt": "x" * (i % 7), "completion": f"y{i}"} for i in range(300)]
    texts = str(jsonl(tmp_path / "pairs.jsonl", pairs))

    def rows(size):
        stream = data.records(texts)
        batches = data.calibration_batches(stream, tokenizer, samples=10, context=64, batch_size=size)
        return [
            ids[mask.bool()].tolist()
            for b in batches
            for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
        ]

    assert rows(1) == rows(3) == rows(10)
    assert len(rows(4)) == 10


def test_perplexity_text_prefers_plain_text_and_counts_its_bytes(tmp_path, tokenizer):
    rows = [{"text": f"plain \u00e9 {i}"} for i in range(50)] + [CHAT]
    source = str(jsonl(tmp_path / "mix.jsonl", rows))
    batches = data.text_batches(source, tokenizer, context=128, tokens=10_000, batch_size=4, fraction=1.0)
    text = "".join(tokenizer.decode(batch["input_ids"][batch["attention_mask"].bool()]) for batch in batches)
    assert "<|user|>" not in text
    assert sum(int(batch["num_bytes"].sum()) for batch in batches) == sum(len(r["text"].encode()) for r in rows[:50])
    few = data.text_batches(source, tokenizer, context=30, tokens=40, batch_size=4, fraction=1.0)
    assert sum(len(batch["input_ids"]) for batch in few) == 2
    chats = str(jsonl(tmp_path / "chats.jsonl", [CHAT]))
    (batch,) = data.text_batches(chats, tokenizer, context=128, tokens=10, fraction=1.0)
    assert batch["num_bytes"].sum() == len(data.encode(CHAT, tokenizer).ids)


def test_the_trainers_skipping_lands_on_the_same_batch(texts, tokenizer, tmp_path):
    from accelerate import skip_first_batches

    save_tiny(tmp_path / "unused")  # the folder form of the tokenizer gives the same ids
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path / "unused")

    def loader(tok):
        blocks = data.Blocks(texts, tok, context=40, seed=4)
        return torch.utils.data.DataLoader(blocks, batch_size=3, collate_fn=data.collate)

    whole = [batch["input_ids"] for batch in islice(loader(tokenizer), 6)]
    rest = [batch["input_ids"] for batch in islice(skip_first_batches(loader(loaded), 4), 2)]
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))
