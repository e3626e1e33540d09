"""What TRL's trainers read: chats encoded as everywhere in this house, and pairs of answers in TRL's own form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from ..data import IGNORED, encode, prompt_hash
from ..data.encoding import TemplateError
from ..errors import UserError

DRAWS, LEAST_DRAWS = 20, 10_000  # records looked at for each chat wanted, and in all: plain text is passed over
HELDOUT_SHARE = 10  # at most one pair in so many is held out

Row = dict[str, Any]


def chats(records: Iterable[dict[str, Any]], tokenizer: Any, *, count: int, context: int) -> list[Row]:
    """`count` rows {"input_ids", "labels"}, or as many as there are, of the records with an answer in them.

    Labels are -100 wherever the assistant did not write, by the house's own encoding: it finds the assistant's turns in
    any template, with their end-of-turn marks. Plain text, chats beyond `context` and such as the template refuses are
    left out. Raises UserError where nothing is left, and for chats under a tokenizer without a chat template.
    """
    rows: list[Row] = []
    for record in islice(records, max(LEAST_DRAWS, DRAWS * count)):
        if "text" in record:
            continue
        try:
            example = encode(record, tokenizer)
        except TemplateError:
            continue
        if any(example.trained) and len(example.ids) <= context:
            pairs = zip(example.ids, example.trained, strict=True)
            labels = [token if trained else IGNORED for token, trained in pairs]
            rows.append({"input_ids": example.ids, "labels": labels})
        if len(rows) == count:
            break
    if not rows:
        raise UserError(
            "the data for SFT hold no chat that fits data.context and the chat template; expected some on each side of "
            "the held-out split; give align.data"
        )
    return rows


def preference_rows(
    pairs: Iterable[dict[str, Any]], tokenizer: Any, *, context: int, count: int | None = None
) -> list[Row]:
    """Rows {"prompt", "chosen", "rejected", "tools"} as DPOTrainer takes them, of what `data.preferences` yields.

    count: no more than so many. With a chat template a pair in text becomes one exchange, without one it stays text.
    Left out: pairs beyond `context` and such as the template refuses. Raises UserError where nothing is left, and for
    chats without a chat template.
    """
    rows: list[Row] = []
    for pair in pairs:
        if isinstance(pair["prompt"], str) and not tokenizer.chat_template:
            row = dict(pair)
            lengths = [len(tokenizer(pair["prompt"] + pair[side])["input_ids"]) + 1 for side in ("chosen", "rejected")]
        else:
            row = _messages(pair)
            conversations = [{"messages": row["prompt"] + row[side]} for side in ("chosen", "rejected")]
            try:
                lengths = [len(encode(one | {"tools": row["tools"]}, tokenizer).ids) for one in conversations]
            except TemplateError:
                continue
        if max(lengths) <= context:
            rows.append(row)
        if len(rows) == count:
            break
    if not rows:
        raise UserError(
            "no preference pair fits data.context and the chat template; expected some; give other align.pairs, or "
            "raise data.context"
        )
    return rows


def _messages(pair: dict[str, Any]) -> Row:
    """A pair in messages; one in text becomes an exchange."""
    if isinstance(pair["prompt"], str):
        sides = {side: {"role": "assistant", "content": pair[side]} for side in ("chosen", "rejected")}
        pair = {"prompt": [{"role": "user", "content": pair["prompt"]}]} | sides
    return {
        "prompt": pair["prompt"],
        "chosen": [pair["chosen"]],
        "rejected": [pair["rejected"]],
        "tools": pair.get("tools"),
    }


def divided(rows: Sequence[Row], *, heldout: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and about `heldout` (a tenth at most, one at least) set aside by the hash of their prompt.

    Pairs of one prompt stay on one side. Raises UserError where there are not two prompts.
    """
    hashes = [prompt_hash(row) for row in rows]
    names = sorted(set(hashes))
    if len(names) < 2:
        raise UserError(
            f"there are pairs for {len(names)} prompt; expected two at least, one to hold out; use more pairs"
        )
    aside = set(names[: max(1, min(heldout, len(names) // HELDOUT_SHARE))])
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row, name in zip(rows, hashes, strict=True):
        sides[name in aside].append(row)
    return sides
