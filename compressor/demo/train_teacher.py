"""Trains the embedded teacher and its tokenizer from nothing, on two cores of a laptop in an hour:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m compressor.demo.train_teacher --out DIR --tokens 13000000

A 3.1M-parameter Llama (hidden 192, 6 layers, 8 heads) learns the four generated skills. What matters at this size: every
word is one token in every form; induction heads from the start, with drills and a rate low enough to keep them; and
conversations of several questions about one scene, so that a third of the tokens are answers, which alone are learned.
docs/lab-notes.md has the figures.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from . import lexicon, tasks
from .functions import FUNCTIONS

ROLES = ("system", "user", "assistant", "tool")
SPECIAL = ["<s>", "<|end|>", "<pad>", *(f"<|{role}|>" for role in ROLES)]
CALL_TAGS = ["<tool_call>", "</tool_call>"]  # ordinary tokens: decoding keeps them
# How Llama 3 splits text before it merges, as tokenizer.json has it; llama.cpp calls it llama-bpe.
LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
VOCAB = 2560
CONTEXT = 512
STRATA = 2  # micro-batches of a step: short rows and long rows
INIT_STD = 0.07  # about 1 / sqrt(hidden); the usual 0.02 starts attention so flat that it takes twice as long to form
WORDS = 64  # channels that words start in
EMBEDDING_LR = 0.3  # of the others': words must stay apart while everything moves
POOL = 12  # steps whose rows are sorted together
MIX = {"instruction": 28, "roleplay": 14, "rag": 28, "tools": 22, "prose": 8}  # of the records
PROSE_WEIGHT = 0.1  # what cannot be known must not drown the answers

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}
<|tool|>
{%- for tool in tools -%}
{%- set f = tool.function -%}
{{ f.name }}("{% for key, schema in f.parameters.properties.items() %}{{ key }}": {{ schema.type }}{% if not loop.last %}, \
"{% endif %}{% endfor %}) {{ f.description }}{% if not loop.last %}{{ '\\n' }}{% endif %}
{%- endfor -%}
<|end|>
{%- endif -%}
{%- for message in messages -%}
<|{{ message.role }}|>{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}
{%- set f = call.function or call -%}
<tool_call>{"name": "{{ f.name }}", "arguments": \
{{ f.arguments if f.arguments is string else f.arguments | tojson }}}</tool_call>
{%- endfor -%}
<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def train_tokenizer(records: list[dict[str, Any]]):
    """A byte-level BPE of VOCAB entries over the domain, in which copying is one token for one token.

    Citations, functions' names, numbers below 100 and every word in every form are one token each: a model this small
    learns to copy far sooner so.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\[\d\]|\d\d?| ?[\p{L}_]+|\s*[^\s\p{L}\d_]+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    texts = []
    for record in records:
        contents = [record["text"]] if "text" in record else [m["content"] for m in record["messages"]]
        texts += [part for text in contents for part in re.split("|".join(CALL_TAGS), text)]
        for tool in record.get("tools", []):
            f = tool["function"]
            pairs = ", ".join(f'"{k}": {s["type"]}' for k, s in f["parameters"]["properties"].items())
            texts.append(f"{f['name']}({pairs}) {f['description']}\n")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(CALL_TAGS),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    for word in lexicon.ALL:
        forms = [word, word.upper()] + ([word.title()] if word in lexicon.NOUNS else [])
        texts += [space + form for form in forms for space in ("", " ")] * 200
    texts += [str(number) for number in range(100)] * 200
    core.train_from_iterator(texts, trainer)
    core.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in CALL_TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=split_as_llama(core),
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def split_as_llama(core: Any) -> Any:
    """The same token ids over the domain, from text split by Llama 3's expression.

    llama.cpp and onnxruntime-genai split by the few expressions they were built with. Llama's cuts citations, list
    items and functions' names in pieces, so these are added tokens, which every runtime looks for before it splits.
    """
    from tokenizers import Tokenizer

    whole = {f" [{digit}]" for digit in range(10)} | {"\n-"}
    whole |= {space + name for function in FUNCTIONS for name in function.names for space in ("", " ")}
    state = json.loads(core.to_str())
    vocab = state["model"]["vocab"]
    found = {
        text.translate({32: "\u0120", 10: "\u010a"}): text for text in whole
    }  # space and newline in byte-level BPE
    found = {entry: text for entry, text in found.items() if entry in vocab}
    state["model"]["vocab"] = {found.get(entry, entry): number for entry, number in vocab.items()}
    state["model"]["merges"] = [m for m in state["model"]["merges"] if not {"".join(m), *m} & found.keys()]
    state["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": LLAMA_SPLIT}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    state["added_tokens"] += [{"id": vocab[entry], "content": text, **flags} for entry, text in found.items()]
    state["added_tokens"].sort(key=lambda token: token["id"])
    return Tokenizer.from_str(json.dumps(state))


def encode(record: dict[str, Any], tokenizer) -> tuple[list[int], list[float]]:
    """Token ids of one record and the weight of each as a target."""
    if "text" in record:
        ids = tokenizer.encode(tokenizer.bos_token + record["text"] + tokenizer.eos_token, add_special_tokens=False)
        return ids, [PROSE_WEIGHT] * len(ids)
    text = tokenizer.apply_chat_template(record["messages"], tools=record.get("tools"), tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assistant, weights, weight = tokenizer.convert_tokens_to_ids("<|assistant|>"), [], 0.0
    for token in ids:
        weights.append(weight)
        if token in (assistant, tokenizer.eos_token_id):
            weight = float(token == assistant)
    return ids, weights


@torch.no_grad()
def relate_forms(model, tokenizer) -> None:
    """Start the forms of a word ("lamp", " lamp", "LAMP") from one vector plus one for each trait of the form.

    Copying a word in another form is then a shift that is the same for all words, not a table to be learned by heart.
    """
    embedding = model.get_input_embeddings().weight
    std = model.config.initializer_range
    traits = torch.randn(3, embedding.shape[1]) * std
    roots: dict[str, torch.Tensor] = {}
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        word = text.removeprefix(" ")
        if word.replace("_", "").isalpha():
            root = roots.setdefault(word.lower(), embedding[token].clone())
            has = torch.tensor([text != word, word[0].isupper(), word.isupper() and len(word) > 1], dtype=root.dtype)
            embedding[token] = root + has @ traits


@torch.no_grad()
def start_with_induction(model) -> None:
    """Set four heads so that the untrained model can already continue a sequence that it has seen before.

    An induction head (arXiv 2209.11895) looks for what followed an earlier copy of the current token; found by training
    alone, it takes millions of tokens. Here words keep to the first WORDS channels and one channel is the same for all.
    In layer 0 two heads attend one position back, which rotary embeddings can do from that constant alone (a query
    turned by one step), and write half of that token's word each into the next WORDS channels. In layer 1 two heads match
    that with the current word, in the slowly turning pairs only, and each adds a half of the word it finds to the stream.
    All of it fits a student of two thirds of the width. Everything else starts near zero and every weight is trained.
    (In the spirit of mimetic initialization, arXiv 2305.09828.)
    """
    config, embedding = model.config, model.get_input_embeddings().weight
    dim, pairs, constant = config.head_dim, config.head_dim // 2, config.hidden_size - 1
    group = config.num_attention_heads // config.num_key_value_heads  # query heads that share a key and a value
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(pairs) / pairs)
    fast, slow = torch.arange(6), torch.cat([torch.arange(7, pairs), torch.arange(7, pairs) + pairs])
    embedding[:, WORDS:], embedding[:, constant] = 0.0, 1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= 0.05
        layer.mlp.down_proj.weight *= 0.05
    size = embedding[:, :WORDS].norm(dim=1).mean()
    normed = (config.hidden_size / (size**2 + 1)) ** 0.5  # what the norm makes of the constant 1
    reach = (8 * dim**0.5 / (1 - frequency[fast].cos()).sum()) ** 0.5  # a step to either side costs 8 in the logits
    bases = torch.linalg.qr(torch.randn(WORDS, WORDS)).Q.T.split(dim)
    back, find = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    for pair, (half, found) in enumerate([(bases[0], bases[1]), (bases[1], bases[0])]):
        shared, head = pair * dim, pair * group * dim  # first rows of this pair's keys and values, and of its query
        room = WORDS + shared  # where the previous word's half goes
        for attention in (back, find):
            attention.k_proj.weight[shared : shared + dim] = 0.0
            attention.v_proj.weight[shared : shared + dim] = 0.0
            attention.q_proj.weight[head : head + dim] = 0.0
            attention.o_proj.weight[:, head : head + dim] = 0.0
        back.k_proj.weight[shared + fast, constant] = reach / normed
        back.q_proj.weight[head + fast, constant] = reach / normed * frequency[fast].cos()
        back.q_proj.weight[head + fast + pairs, constant] = -reach / normed * frequency[fast].sin()
        back.v_proj.weight[shared : shared + dim, :WORDS] = half
        rows = torch.arange(dim)
        back.o_proj.weight[room + rows, head + rows] = (WORDS / dim) ** 0.5 / (normed * size)
        find.k_proj.weight[shared + slow, room + slow] = 6.0
        find.q_proj.weight[head + slow, :WORDS] = 6.0 * half[slow]
        find.v_proj.weight[shared : shared + dim, :WORDS] = found
        find.o_proj.weight[:WORDS, head : head + dim] = found.T


def drill(rng: Random, tokenizer) -> tuple[list[int], list[float]]:
    """Ids and weights of words to say again in some form, or of a table to look up by one key or by two.

    An answer can be known only by finding it in the question. The tasks alone would unlearn what
    `start_with_induction` sets: much of an answer can be guessed from the kind of word that is wanted.
    """
    form = rng.choice([str, str, str.upper])
    parts: list[tuple[str, float]] = []
    if rng.random() < 0.5:
        words = rng.sample(lexicon.ALL, rng.randint(4, 16))
        given = ", ".join(words)
        parts.append((rng.choice([", ", ", ", "-", "\n- ", '", "']).join(map(form, words)), 1.0))
    else:
        keys = [(word,) for word in rng.sample(lexicon.ALL, rng.randint(2, 6))]
        if rng.random() < 0.5:
            whats = rng.sample(lexicon.NOUNS, 3)
            keys = rng.sample([(who, what) for who in rng.sample(lexicon.NAMES, 3) for what in whats], len(keys))
        values = rng.sample(lexicon.ALL, len(keys))
        rows = [
            f"{' '.join(key)} {value} [{i % 3 + 1}]" for i, (key, value) in enumerate(zip(keys, values, strict=True))
        ]
        given = ", ".join(rows)
        for i in rng.sample(range(len(keys)), len(keys)):
            parts.append((f"{', ' if parts else ''}{' '.join(keys[i])}", 0.0))
            parts.append((f" {form(values[i])} [{i % 3 + 1}]", 1.0))
    parts = [(f"<s><|user|> {given}<|end|><|assistant|>", 0.0), *parts, ("<|end|>", 1.0)]
    encoded = [(tokenizer.encode(text, add_special_tokens=False), weight) for text, weight in parts]
    return [i for ids, _ in encoded for i in ids], [weight for ids, weight in encoded for _ in ids]


def drill_share(done: float) -> float:
    """How many of the rows are drills when this share of the training is done."""
    return 0.7 if done < 0.03 else 0.3 if done < 0.15 else 0.1 if done < 0.7 else 0.0


def most_passages(done: float) -> int:
    """How many passages retrieval goes up to when this share of the training is done: first two, then three."""
    return 2 if done < 0.15 else 3


def batches(tokenizer, *, rows: int, seed: int, done: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Steps of micro-batches [(ids (B, T), target weights (B, T)), ...], endless; `done()` is the share trained so far.

    Rows of like length go together, so that little is padding; a step takes a short and a long micro-batch, since
    length goes with skill and a step on one skill alone would unlearn the others. Ranks take turns in the sorted rows:
    none waits for another with longer ones.
    """
    together = rows * _ranks()
    rng = Random(seed)
    streams = {
        most: tasks.records(split="train", seed=10 * seed + most, mix=MIX, most_passages=most) for most in (2, 3)
    }
    while True:
        stream = streams[most_passages(done())]
        count = together * STRATA * POOL
        drills = int(count * drill_share(done()))
        encoded = [drill(rng, tokenizer) for _ in range(drills)]
        encoded += [encode(record, tokenizer) for record in islice(stream, count - drills)]
        encoded.sort(key=lambda pair: len(pair[0]))
        starts = range(_rank(), len(encoded), together)
        groups = [_padded(encoded[i : i + together - _rank() : _ranks()], tokenizer) for i in starts]
        strata = [rng.sample(groups[i : i + POOL], POOL) for i in range(0, len(groups), POOL)]
        yield from map(list, zip(*strata, strict=True))


def _padded(pairs: list[tuple[list[int], list[float]]], tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((len(pairs), max(len(row) for row, _ in pairs)), tokenizer.pad_token_id)
    weights = torch.zeros(ids.shape)
    for row, (row_ids, row_weights) in enumerate(pairs):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        weights[row, : len(row_ids)] = torch.tensor(row_weights)
    return ids, weights


def build(tokenizer):
    """The untrained teacher: a stock Llama."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=INIT_STD,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def exact(folder: Path, *, count: int, split: str, seed: int) -> dict[str, float]:
    """Share of tasks of each skill that greedy answers of the saved weights pass."""
    from ..evaluate.run_skills import run
    from ..runtime import TorchRuntime

    suites = {skill: tasks.suite(skill, count, split=split, seed=seed) for skill in tasks.SCENES}
    found = run(TorchRuntime(folder), suites, max_new_tokens=96)["skills"]
    return {skill: found[skill]["score"] for skill in suites}


def train(out: Path, *, tokens: int, rows: int, lr: float, seed: int, check_every: int) -> None:
    """Train tokenizer and teacher, save both to `out` (bf16 safetensors) with training.json beside them."""
    from torch.nn.functional import cross_entropy

    torch.manual_seed(seed)
    torch.set_num_threads(max(1, torch.get_num_threads() // _ranks()))
    sample = [*islice(tasks.records(split="train", seed=seed + 7, mix=MIX), 20000)]
    tokenizer = train_tokenizer(sample)
    model = build(tokenizer)
    relate_forms(model, tokenizer)
    start_with_induction(model)
    out.mkdir(parents=True, exist_ok=True)
    if _rank() == 0:
        tokenizer.save_pretrained(out)
    parameters = [*model.parameters()]
    embedding = model.get_input_embeddings().weight
    groups = [{"params": [p for p in parameters if p is not embedding]}, {"params": [embedding]}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    started, checked, seen, total, weight_sum = time.monotonic(), 0, 0, 0.0, 0.0
    history = []
    pad: Any = tokenizer.pad_token_id
    stream = batches(tokenizer, rows=rows, seed=seed, done=lambda: seen / tokens)
    for step, micro_batches in enumerate(stream):
        counts = torch.tensor([sum(float(ids.ne(pad).sum()) for ids, _ in micro_batches), 0.0])
        counts[1] = sum(float(weights[:, 1:].sum()) for _, weights in micro_batches)
        step_tokens, step_weight = _sum_over_ranks(counts).tolist()
        seen += int(step_tokens)
        for ids, weights in micro_batches:
            counted = weights[:, 1:] > 0  # padding is on the right: the causal mask keeps it out
            logits = model.lm_head(model.model(input_ids=ids).last_hidden_state[:, :-1][counted])
            losses = cross_entropy(logits, ids[:, 1:][counted], reduction="none")
            loss = (losses * weights[:, 1:][counted]).sum() / step_weight
            loss.backward()
            total, weight_sum = total + loss.item() * step_weight, weight_sum + float(weights[:, 1:].sum())
        if _ranks() > 1:
            flat = _sum_over_ranks(torch.cat([p.grad.flatten() for p in parameters]))
            for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = grad.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        done = min(1.0, seen / tokens)
        share = min(1.0, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        for group, factor in zip(optimizer.param_groups, (1.0, EMBEDDING_LR), strict=True):
            group["lr"] = lr * share * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 49 and _rank() == 0:
            spent = time.monotonic() - started
            print(
                f"{step + 1} {seen / 1e6:.2f}M {total / weight_sum:.4f} {seen / spent:.0f} tok/s {spent:.0f}s",
                flush=True,
            )
            total = weight_sum = 0.0
        if done == 1.0 or seen // check_every > checked:
            checked = seen // check_every
            if _rank() == 0:
                saved = build(tokenizer).to(torch.bfloat16)
                saved.load_state_dict(model.state_dict())
                saved.save_pretrained(out)
                scores = exact(out, count=50, split="validation", seed=1)
                history.append({"tokens": seen, "validation": scores})
                print(history[-1], flush=True)
        if done == 1.0:
            break
    if _rank() == 0:
        facts = {
            "tokens": seen,
            "steps": step + 1,
            "seconds": round(time.monotonic() - started),
            "arguments": {"tokens": tokens, "rows": rows, "lr": lr, "seed": seed, "processes": _ranks()},
            "exact": exact(out, count=200, split="test", seed=1),
            "history": history,
        }
        print(facts["exact"], flush=True)
        (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=13_000_000)
    parser.add_argument("--rows", type=int, default=6, help="of a micro-batch; each process takes two a step")
    parser.add_argument("--lr", type=float, default=5e-4, help="2e-3 unlearns every induction head")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check-every", type=int, default=1_000_000)
    arguments = vars(parser.parse_args())
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    train(arguments.pop("out"), **arguments)
