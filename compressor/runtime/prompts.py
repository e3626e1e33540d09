"""What a record asks of a model, and what it answers."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from ..data.encoding import document_ends
from ..errors import UserError
from .face import prompt_ids

Prompt = dict[str, Any] | str  # a conversation {"messages", "tools"?} to answer, or text to go on with


class Asked(NamedTuple):
    """A prompt, its ids, what the record answers, and whether it begins a text, which goes on and has no end."""

    prompt: Prompt
    ids: list[int]
    reference: str
    goes_on: bool


def fitting(records: Iterable[dict[str, Any]], tokenizer: Any, *, context: int, max_new_tokens: int) -> Iterator[Asked]:
    """What the records ask, where that leaves room for an answer of `max_new_tokens` in the context.

    A chat asks for its last assistant's turn; of a text, the first half asks for the second, both cut to where they
    fit. Left out besides: chats that begin with an answer or that the template refuses, as in training. Raises
    UserError for chats under a tokenizer without a chat template.
    """
    room = context - max_new_tokens
    for record in records:
        # half the room: what is cut out of a text may take a few tokens more than it had
        prompt, reference = asked(record, tokenizer, most=min(max_new_tokens, room // 2), answer=max_new_tokens)
        if not isinstance(prompt, str) and not prompt["messages"]:
            continue
        try:
            ids = ids_of(prompt, tokenizer)
        except UserError:
            if not tokenizer.chat_template:
                raise
            continue
        if 0 < len(ids) <= room:
            yield Asked(prompt, ids, reference, "text" in record)


def asked(record: dict[str, Any], tokenizer: Any, *, most: int, answer: int) -> tuple[Prompt, str]:
    """The prompt and the reference of one record; of a text at most `most` tokens ask and `answer` tokens answer."""
    if "text" in record:
        found = tokenizer(record["text"], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in found["offset_mapping"]]
        half = max(0, min(len(ends) // 2, most))
        cut, end = (ends[half - 1], ends[min(half + answer, len(ends)) - 1]) if half else (0, 0)
        return record["text"][:cut], record["text"][cut:end]
    tools = {"tools": record["tools"]} if "tools" in record else {}
    if "prompt" in record:
        asked = [{"role": "user", "content": record["prompt"]}]
        return ({"messages": asked} | tools) if tokenizer.chat_template else record["prompt"], record["completion"]
    messages = record["messages"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return {"messages": messages[:last]} | tools, messages[last]["content"] if last else ""


def ids_of(prompt: Prompt, tokenizer: Any) -> list[int]:
    """A prompt as token ids. Raises UserError for a chat under a tokenizer without a chat template."""
    if isinstance(prompt, str):
        return document_ends(tokenizer)[0] + plain_ids(prompt, tokenizer)
    if not tokenizer.chat_template:
        raise UserError(
            "the prompts are chats but the model's tokenizer has no chat template; expected texts, or a model with a "
            "chat template; use other data or an instruct model"
        )
    return prompt_ids(prompt, tokenizer)


def plain_ids(text: str, tokenizer: Any) -> list[int]:
    """A text as token ids, with nothing before or after it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
