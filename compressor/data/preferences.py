"""Preference pairs from wherever they lie: a prompt, the answer that was preferred, and one that was not.

Read: {"prompt", "chosen", "rejected", "tools"?}, each a text or a list of messages; whole conversations under "chosen"
and "rejected", with the prompt in front of both, are taken apart.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from ..errors import UserError
from .sources import Record, messages_of, raw_records, tools_of

EXPECTED = 'a record with "prompt", "chosen" and "rejected"'


def preferences(source: str, *, split: str = "train") -> Iterator[Record]:
    """Yield the pairs of `source` (as in `sources.records`, but for `demo`), in the order in which they are stored.

    A pair is {"prompt", "chosen", "rejected"} in text, or {"prompt": [messages], "chosen": message, "rejected":
    message, "tools"?}. Two answers that are the same tell nothing and are left out. Raises UserError naming file and
    line for anything else.
    """
    for place, raw in raw_records(source, split=split):
        pair = _pair(raw, place)
        if pair["chosen"] != pair["rejected"]:
            yield pair


def prompt_hash(pair: Record) -> str:
    """Of what was asked: two pairs of one prompt have the same."""
    asked = json.dumps([pair["prompt"], pair.get("tools")], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()


def _pair(raw: Any, place: str) -> Record:
    raw = {key: value for key, value in raw.items() if value is not None} if isinstance(raw, dict) else {}
    missing = [key for key in ("chosen", "rejected") if not isinstance(raw.get(key), str | list) or raw[key] == []]
    if missing or not isinstance(raw.get("prompt", []), str | list):
        raise UserError(f"{place}: found the keys {', '.join(sorted(raw)) or 'nothing'}; expected {EXPECTED}")
    texts = {key: raw.get(key) for key in ("prompt", "chosen", "rejected")}
    if all(isinstance(text, str) for text in texts.values()):
        return texts
    chosen, rejected = (messages_of({"messages": _whole(raw, key)}, place) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1] or {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"} or not chosen[:-1]:
        raise UserError(f"{place}: expected two assistant's answers to one prompt, one message each; correct it")
    tools = tools_of(raw.get("tools"), place)
    pair = {"prompt": chosen[:-1], "chosen": chosen[-1], "rejected": rejected[-1]}
    return pair | ({"tools": tools} if tools else {})


def _whole(raw: Record, key: str) -> list[Any]:
    """The conversation that ends with an answer."""
    prompt, answer = raw.get("prompt", []), raw[key]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    first = answer[0] if isinstance(answer[0], dict) else {}
    if first.get("role") != "assistant":
        return answer  # the prompt stands in it
    return ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt) + answer
