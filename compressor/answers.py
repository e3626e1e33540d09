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

from .data.repetition import repetition
from .errors import UserError
from .run import alone, check_about, read_json, write_json, write_text
from .runtime import Runtime
from .runtime.prompts import Prompt, asked, ids_of

INDEX, DATA = "index.json", "data"
SHARD_PROMPTS = 256
MOST_REPETITION = 0.3  # of 4-grams: good answers repeat a few percent, one that loops nearly all
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
    something else is refused. Left out: answers that are empty, that were cut at `max_new_tokens` (of chats; a text has
    no end of its own), and that loop. temperature 0 is greedy. A build that was ended goes on, to the same bits.
    Raises UserError for a folder that holds something else, and where nothing is left to learn from.
    """
    about = about | {"count": count, "context": context, "max_new_tokens": max_new_tokens}
    about |= {"temperature": temperature, "seed": seed}
    with alone(folder):
        index = _begun(folder, about)
        prompts = _prompts(records, tokenizer, count=count, context=context, max_new_tokens=max_new_tokens)
        for shard in index["shards"]:
            progress(len(list(islice(prompts, shard["prompts"]))))
        runtime: Runtime | None = None
        while not index["complete"] and (group := list(islice(prompts, SHARD_PROMPTS))):
            runtime = runtime or teacher()
            drawn = seed + 1_000_003 * len(index["shards"])
            sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": drawn}
            answers = runtime.answers([ids for _, ids in group], **sampling)
            found = [_judged(*pair, tokenizer, most=max_new_tokens) for pair in zip(group, answers, strict=True)]
            kept = [record for record, _ in found if record is not None]
            name = f"{len(index['shards']):05d}.jsonl"
            write_text(folder / DATA / name, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
            outcomes = dict(Counter(outcome for _, outcome in found))
            index["shards"].append({"name": name, "prompts": len(group), "outcomes": outcomes})
            write_json(folder / INDEX, index)
            progress(len(group))
        index["complete"] = True
        write_json(folder / INDEX, index)
    if not outcome_counts(index)["kept"]:
        raise UserError(
            f"the teacher's answers in {folder} leave nothing to learn from ({dict(outcome_counts(index))}); expected "
            "some; raise distill.max_new_tokens or use other data"
        )
    return index


def outcome_counts(index: dict[str, Any]) -> Counter[str]:
    """How many prompts were answered well ("kept"), and why the others were left out."""
    total: Counter[str] = Counter()
    for shard in index["shards"]:
        total.update(shard["outcomes"])
    return total


def _begun(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    (folder / DATA).mkdir(parents=True, exist_ok=True)
    if not (folder / INDEX).is_file():
        return {"about": about, "shards": [], "complete": False}
    index = read_json(folder / INDEX)
    check_about(folder, index, about)
    return index


def _prompts(
    records: Iterable[dict[str, Any]], tokenizer: Any, *, count: int, context: int, max_new_tokens: int
) -> Iterator[tuple[Prompt, list[int]]]:
    """Different prompts that leave an answer room, with their ids."""
    seen: set[bytes] = set()
    room = context - max_new_tokens
    for record in islice(records, DRAWS * count):
        prompt, _ = asked(record, tokenizer, most=min(max_new_tokens, room // 2))
        if not isinstance(prompt, str) and not prompt["messages"]:
            continue  # it begins with an answer
        try:
            ids = ids_of(prompt, tokenizer)
        except UserError:
            if not tokenizer.chat_template:
                raise
            continue  # the template refuses it, as it does in training
        key = hashlib.sha256(json.dumps(ids).encode()).digest()
        if 0 < len(ids) <= room and key not in seen:
            seen.add(key)
            yield prompt, ids
        if len(seen) == count:
            return


def _judged(
    one: tuple[Prompt, list[int]], answer: list[int], tokenizer: Any, *, most: int
) -> tuple[dict[str, Any] | None, str]:
    """A record to learn from, or None, and what became of the answer."""
    prompt, _ = one
    text = tokenizer.decode(answer, skip_special_tokens=True)
    if not text.strip():
        return None, "empty"
    if repetition(answer) > MOST_REPETITION:
        return None, "repetitive"
    if isinstance(prompt, str):
        return {"text": prompt + text}, "kept"  # all of it is learned: what precedes the answer is the data's own
    if len(answer) >= most:
        return None, "too long"
    return prompt | {"messages": [*prompt["messages"], {"role": "assistant", "content": text.strip()}]}, "kept"
