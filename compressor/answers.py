"""SeqKD: the teacher's own answers to the prompts of the data, as records to train on (Kim and Rush, arXiv 1606.07947).

answers/
  index.json          what they were made of, and what became of the prompts
  data/00000.jsonl    records, a shard after the other; each is whole or absent, and a build goes on after the last
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from .data.repetition import REPETITION_LIMIT, repetition
from .errors import UserError
from .run import build_shards, outcome_counts, write_json_lines
from .runtime import Runtime
from .runtime.prompts import Asked, fitting

DATA = "data"
SHARD_PROMPTS = 256
DRAWS = 20  # records looked at for each prompt wanted: many may repeat one that was seen, or be too long


def generate(
    folder: Path,
    teacher: Callable[[], Runtime],
    records: Iterable[dict[str, Any]],
    tokenizer: Any,
    *,
    about: dict[str, Any],
    count: int,
    context: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], None] = lambda prompts: None,
) -> dict[str, Any]:
    """Have the teacher answer `count` different prompts of `records`, or as many as there are, and return the index.

    about: what the answers depend on besides; with the settings here it is kept in the index, and a folder made of
    something else is refused. Left out: answers that are empty, that were cut at `max_new_tokens` (a text alone
    has no end of its own), and that loop. temperature 0 is greedy. A build that was ended goes on, to the same bits.
    Raises UserError for a folder that holds something else, and where nothing is left to learn from.
    """
    about = about | {"count": count, "context": context, "max_new_tokens": max_new_tokens}
    about |= {"temperature": temperature, "seed": seed}
    runtime: Runtime | None = None

    def write(number: int, group: list[Asked]) -> dict[str, Any]:
        nonlocal runtime
        runtime = runtime or teacher()
        sampling: dict[str, Any] = {"temperature": temperature, "seed": seed + 1_000_003 * number}
        found = runtime.answers([one.ids for one in group], max_new_tokens=max_new_tokens, **sampling)
        ends = {*runtime.stops, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        pairs = zip(group, found, strict=True)
        judged = [_judged(one, answer, tokenizer, ends=ends, most=max_new_tokens) for one, answer in pairs]
        name = f"{number:05d}.jsonl"
        write_json_lines(folder / DATA / name, [record for record, _ in judged if record is not None])
        progress(len(group))
        return {"name": name, "prompts": len(group), "outcomes": dict(Counter(outcome for _, outcome in judged))}

    prompts = _prompts(records, tokenizer, count=count, context=context, max_new_tokens=max_new_tokens)
    groups = iter(lambda: list(islice(prompts, SHARD_PROMPTS)), [])
    index = build_shards(folder, about, groups, write, passed=lambda group: progress(len(group)))
    if not outcome_counts(index)["kept"]:
        raise UserError(
            f"the teacher's answers in {folder} leave nothing to learn from ({dict(outcome_counts(index))}); expected "
            "some; raise distill.max_new_tokens or use other data"
        )
    return index


def _prompts(
    records: Iterable[dict[str, Any]], tokenizer: Any, *, count: int, context: int, max_new_tokens: int
) -> Iterator[Asked]:
    """Different prompts that leave an answer room."""
    seen: set[bytes] = set()
    for one in fitting(islice(records, DRAWS * count), tokenizer, context=context, max_new_tokens=max_new_tokens):
        key = hashlib.sha256(json.dumps(one.ids).encode()).digest()
        if key not in seen:
            seen.add(key)
            yield one
        if len(seen) == count:
            return


def _judged(
    one: Asked, answer: list[int], tokenizer: Any, *, ends: set[int | None], most: int
) -> tuple[dict[str, Any] | None, str]:
    """A record to learn from, or None, and what became of the answer."""
    # special tokens stay where they are the answer's own, such as marks around a call
    text = tokenizer.decode([token for token in answer if token not in ends], skip_special_tokens=False)
    if not text.strip():
        return None, "empty"
    if repetition(answer) > REPETITION_LIMIT:
        return None, "repetitive"
    prompt = one.prompt
    if one.goes_on and isinstance(prompt, str):
        return {"text": prompt + text}, "kept"  # all of it is learned: what precedes the answer is the data's own
    if len(answer) >= most:
        return None, "too long"
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": text}, "kept"
    return prompt | {"messages": [*prompt["messages"], {"role": "assistant", "content": text.strip()}]}, "kept"
