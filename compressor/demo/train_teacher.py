"""Trains the embedded teacher and its tokenizer from nothing: `python -m compressor.demo.train_teacher --out DIR`.

A 3.1M-parameter Llama (hidden 192, 6 layers, 8 heads) learns the four generated skills on two CPU cores. What matters
at this size: every word is one token in every form, one example per row, answer tokens weighted 1 and all others 0.1,
and a curriculum that starts retrieval with few passages. docs/lab-notes.md tells what did not work.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from . import lexicon, tasks

ROLES = ("system", "user", "assistant", "tool")
SPECIAL = ["<s>", "<|end|>", "<pad>", *(f"<|{role}|>" for role in ROLES)]
CALL_TAGS = ["<tool_call>", "</tool_call>"]  # ordinary tokens: decoding keeps them
VOCAB = 2304
CONTEXT = 512
STRATA = 2  # micro-batches of a step: short rows and long rows
PROMPT_WEIGHT = PROSE_WEIGHT = 0.1  # what cannot be known is learned too, but must not drown the answers

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}
<|tool|>
{%- for tool in tools -%}
{%- set f = tool.function -%}
{{ f.name }}({% for key, schema in f.parameters.properties.items() %}{{ key }}: {{ schema.type }}{% if not loop.last %}, \
{% endif %}{% endfor %}) - {{ f.description }}{% if not loop.last %}{{ '\\n' }}{% endif %}
{%- endfor -%}
<|end|>
{%- endif -%}
{%- for message in messages -%}
<|{{ message.role }}|>{{ message.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def train_tokenizer(records: list[dict[str, Any]]):
    """A byte-level BPE of VOCAB entries over the domain; digits stand alone, so that numbers are read digit by digit."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?\p{L}+|\s*[^\s\p{L}\d]+|\s+"), behavior="isolated"),
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
            pairs = ", ".join(f"{k}: {s['type']}" for k, s in f["parameters"]["properties"].items())
            texts.append(f"{f['name']}({pairs}) - {f['description']}\n")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(CALL_TAGS),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # every word whole, with and without its space, and the words that tasks put in capitals in capitals too:
    # copying is then one token for one token, which a model this small learns far sooner
    for word in lexicon.ALL:
        forms = [word, word.upper()] + ([word.title()] if word in lexicon.NOUNS else [])
        texts += [space + form for form in forms for space in ("", " ")] * 200
    core.train_from_iterator(texts, trainer)
    core.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in CALL_TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(record: dict[str, Any], tokenizer) -> tuple[list[int], list[float]]:
    """Token ids of one record and the weight of each as a target."""
    if "text" in record:
        text = tokenizer.bos_token + record["text"] + tokenizer.eos_token
        ids = tokenizer.encode(text, add_special_tokens=False)
        return ids, [PROSE_WEIGHT] * len(ids)
    *prompt, reply = record["messages"]
    tools = record.get("tools")
    head = tokenizer.apply_chat_template(prompt, tools=tools, tokenize=False, add_generation_prompt=True)
    head_ids = tokenizer.encode(head, add_special_tokens=False)
    reply_ids = tokenizer.encode(reply["content"] + tokenizer.eos_token, add_special_tokens=False)
    return head_ids + reply_ids, [PROMPT_WEIGHT] * len(head_ids) + [1.0] * len(reply_ids)


def batches(tokenizer, *, rows: int, tokens: int, seed: int, pool: int = 12) -> Iterator[tuple[list[Any], int]]:
    """Steps of micro-batches [(ids (B, T), target weights (B, T)), ...] and the tokens seen, until `tokens` are spent.

    Rows of like length go together, so that little is padding; a step takes a short and a long micro-batch, since
    length goes with skill and a step on one skill alone would unlearn the others.
    """
    streams = {
        most: tasks.generate(split="train", seed=1000 * seed + most, most_passages=most) for most in (1, 2, 3, 4)
    }
    seen = 0
    while seen < tokens:
        most = min(4, 1 + int(16 * seen / tokens))  # one passage for a sixteenth of the time, then two, three, four
        encoded = [encode(tasks.as_record(task), tokenizer) for task in islice(streams[most], rows * STRATA * pool)]
        encoded.sort(key=lambda pair: len(pair[0]))
        groups = [_padded(encoded[i : i + rows], tokenizer) for i in range(0, len(encoded), rows)]
        orders = [[stratum * pool + i for i in torch.randperm(pool).tolist()] for stratum in range(STRATA)]
        for step in zip(*orders, strict=True):
            seen += sum(int((groups[i][1] > 0).sum()) for i in step)
            yield [groups[i] for i in step], seen


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
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config)


def exact(model, tokenizer, *, count: int, split: str, seed: int) -> dict[str, float]:
    """Share of tasks of each skill that greedy answers pass."""
    from ..evaluate.skills import SKILLS, passes

    scores = {}
    for skill in SKILLS:
        suite = tasks.suite(skill, count, split=split, seed=seed)
        prompts = [
            tokenizer.apply_chat_template(
                t["messages"], tools=t.get("tools"), tokenize=False, add_generation_prompt=True
            )
            for t in suite
        ]
        encoded = tokenizer(
            prompts,
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_token_type_ids=False,
        )
        with torch.inference_mode():
            out = model.generate(**encoded, max_new_tokens=72, do_sample=False)
        answers = tokenizer.batch_decode(out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        scores[skill] = sum(map(passes, suite, answers)) / count
    return scores


def train(out: Path, *, tokens: int, rows: int, lr: float, seed: int, check_every: int, start: Path | None) -> None:
    """Train tokenizer and teacher, save both to `out` (bf16 safetensors) with training.json beside them.

    `start` is the `out` of an earlier leg: its weights and tokenizer are gone on with, its tokens are counted.
    """
    from torch.nn.functional import cross_entropy

    torch.manual_seed(seed)
    earlier: dict[str, Any] = {"tokens": 0, "steps": 0, "seconds": 0, "history": []}
    if start:
        tokenizer = AutoTokenizer.from_pretrained(start)
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        earlier = json.loads((start / "training.json").read_text())
    else:
        sample = [tasks.as_record(t) for t in islice(tasks.generate(split="train", seed=seed + 7), 20000)]
        tokenizer = train_tokenizer(sample)
        model = build(tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    started, checked = time.monotonic(), 0
    total = weight_sum = 0.0
    history = earlier["history"]
    for step, (micro_batches, seen) in enumerate(batches(tokenizer, rows=rows, tokens=tokens, seed=seed)):
        done = seen / tokens
        now = lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
        step_weight = sum(weights[:, 1:].sum().item() for _, weights in micro_batches)
        for ids, weights in micro_batches:
            logits = model(input_ids=ids).logits[:, :-1]  # padding is on the right: the causal mask keeps it out
            losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            loss = (losses * weights[:, 1:].flatten()).sum() / step_weight
            loss.backward()
            total += loss.item() * step_weight
        weight_sum += step_weight
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = now
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 49:
            spent = time.monotonic() - started
            print(
                f"{step + 1} {seen / 1e6:.2f}M {total / weight_sum:.4f} {seen / spent:.0f} tok/s {spent:.0f}s",
                flush=True,
            )
            total = weight_sum = 0.0
        if seen // check_every > checked or seen >= tokens:
            checked = seen // check_every
            model.eval()
            scores = exact(model, tokenizer, count=100, split="test", seed=1)
            history.append({"tokens": earlier["tokens"] + seen, "exact": scores})
            model.train()
            print(history[-1], flush=True)
            saved = build(tokenizer).to(torch.bfloat16)
            saved.load_state_dict(model.state_dict())
            saved.save_pretrained(out)
            facts = {
                "tokens": earlier["tokens"] + seen,
                "steps": earlier["steps"] + step + 1,
                "seconds": earlier["seconds"] + round(time.monotonic() - started),
                "seed": seed,
                "exact": scores,
                "history": history,
            }
            (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=12_000_000)
    parser.add_argument("--rows", type=int, default=16, help="of a micro-batch")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path)
    parser.add_argument("--check-every", type=int, default=1_000_000)
    arguments = vars(parser.parse_args())
    train(arguments.pop("out"), **arguments)
