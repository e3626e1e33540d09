"""One record -> token ids and a mask of the tokens that count.

Text gets the BOS or EOS its tokenizer is used to. A chat is rendered whole by the teacher's own chat
template, and an assistant's turn is found by rendering the conversation up to it with and without it (the
prefix difference), so any template works, with or without {% generation %} marks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import UserError

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "naive cafe: na\u00efve caf\u00e9, \u00bfqu\u00e9?",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\u6df1\u5ea6\u5b66\u4e60\u306f\u697d\u3057\u3044 \ud55c\uad6d\uc5b4",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u041f\u0440\u0438\u0432\u0435\u0442",
    "def f(x_1: int) -> dict[str, int]:\n    return {'a': x_1 ** 2}  # square\n",
    '{"name": "get_weather", "arguments": {"city": "Paris"}}',
    "0 1 12 123 1234 12345 3.14159 1,000,000 0xFF 1e-5",
    "a  b   c    d\t\te\n\n\nf \r\n g ",
    "https://example.org/a?b=c&d=%20#e",
)


class Example(NamedTuple):
    """ids and, for each, whether it is a target; num_bytes: UTF-8 bytes each stands for, or None if not
    asked for.
    """

    ids: list[int]
    trained: list[bool]
    num_bytes: list[int] | None
    packs: bool  # text is packed with other text, a chat keeps a row to itself


class TemplateError(ValueError):
    """The chat template does not accept this conversation (roles out of order, a role it does not know,
    ...).
    """


def encode(record: dict[str, Any], tokenizer: Any, *, count_bytes: bool = False) -> Example:
    """Encode one record of `data.records`, whole: cutting or dropping is the caller's business.

    The first token of a text is never a target: nothing stands before it. In a chat the assistant's tokens
    and their end-of-turn token are targets. A prompt and its completion become one exchange when the
    tokenizer has a chat template and are joined otherwise; the completion counts.
    Raises TemplateError, and UserError for chats under a tokenizer that has no chat template.
    """
    if "text" in record:
        example = _plain(record["text"], tokenizer, start=0, count_bytes=count_bytes)
        return example._replace(packs=True)
    if "messages" in record:
        return _chat(record["messages"], record.get("tools"), tokenizer, count_bytes=count_bytes)
    prompt, completion = record["prompt"], record["completion"]
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _chat(messages, record.get("tools"), tokenizer, count_bytes=count_bytes)
    example = _plain(prompt + completion, tokenizer, start=len(prompt), count_bytes=count_bytes)
    eos = tokenizer.eos_token_id
    if eos is None or example.ids[-1:] == [eos]:
        return example
    num_bytes = None if example.num_bytes is None else [*example.num_bytes, 0]
    return Example([*example.ids, eos], [*example.trained, True], num_bytes, packs=False)


def document_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids before and after each document: what the tokenizer adds by itself, else BOS, else EOS.

    Tokenizers read from a SentencePiece file add nothing under transformers 5, though their models expect
    BOS.
    """
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if len(full) > len(bare) and full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and bos != eos:
        return [bos], []
    return ([], [eos]) if eos is not None else ([], [])


def _plain(text: str, tokenizer: Any, *, start: int, count_bytes: bool) -> Example:
    ids, offsets = _tokens(text, tokenizer)
    before, after = document_ends(tokenizer)
    trained = [False] * len(before) + _covered(offsets, [(start, len(text))]) + [True] * len(after)
    num_bytes = None
    if count_bytes:
        num_bytes = [0] * len(before) + _bytes(text, ids, offsets, tokenizer) + [0] * len(after)
    ids = before + ids + after
    if trained:
        trained[0] = False
    return Example(ids, trained, num_bytes, packs=False)


def _chat(messages: list[dict], tools: list | None, tokenizer: Any, *, count_bytes: bool) -> Example:
    if not tokenizer.chat_template:
        raise UserError(
            "the data holds chats but the teacher's tokenizer has no chat template; "
            "expected text, or a teacher with a chat template; use other data or an instruct teacher"
        )
    text, spans = assistant_spans(messages, tools, tokenizer)
    ids, offsets = _tokens(text, tokenizer)
    num_bytes = _bytes(text, ids, offsets, tokenizer) if count_bytes else None
    trained = _covered(offsets, spans)
    if trained:
        trained[0] = False
    return Example(ids, trained, num_bytes, packs=False)


def assistant_spans(messages: list[dict], tools: list | None, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the character ranges that the assistant wrote, end-of-turn mark included.

    A turn whose place cannot be found in the whole rendering (a template that rewrites earlier turns beyond
    recognition) is left out: it then counts as context.
    """
    whole = _render(messages, tools, tokenizer, prompt=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:
            continue
        before = _render(messages[:i], tools, tokenizer, prompt=False)
        asked = _render(messages[:i], tools, tokenizer, prompt=True)
        if not whole.startswith(before):
            continue
        # A generation prompt may open more than history shows (a thinking mark): the turn starts where they
        # part.
        start = _shared_length(whole, asked)
        answered = _render(messages[: i + 1], tools, tokenizer, prompt=False)
        shared = min(start, _shared_length(answered, asked))
        turn = answered[shared:].rstrip()
        # Templates may show a last turn with more in front (its reasoning) than the same turn in history.
        skipped = next((k for k in range(len(turn)) if whole.startswith(turn[k:], start)), len(turn))
        end = start + len(turn) - skipped
        if end > start:
            spans.append((start, end))
    return whole, spans


def _shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How far two sequences agree from the start."""
    if a == b[: len(a)]:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _render(messages: list[dict], tools: list | None, tokenizer: Any, *, prompt: bool) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    except (jinja2.TemplateError, TypeError, KeyError, IndexError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TemplateError(reason) from error


def _tokens(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer {type(tokenizer).__name__} is a slow one, without character offsets; "
            "expected a fast one; save it as tokenizer.json first"
        )
    # verbose=False: a long document is cut into rows later, the tokenizer's length warning would mislead.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), encoded["offset_mapping"]


def _covered(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Which tokens share a character with a span; both are in ascending order."""
    covered, k = [], 0
    for start, end in offsets:
        # Byte-level tokenizers trim white space off the offsets, which leaves nothing of a token of spaces.
        start = start - 1 if start == end and start > 0 else start
        while k < len(spans) and spans[k][1] <= start:
            k += 1
        covered.append(k < len(spans) and spans[k][0] < end and start < spans[k][1])
    return covered


def _bytes(text: str, ids: list[int], offsets: list[tuple[int, int]], tokenizer: Any) -> list[int]:
    """UTF-8 bytes of each token, so that a document's sum is exact; special tokens stand for none."""
    special = set(tokenizer.all_special_ids)
    counts, reached = [], 0
    for token, (_, end) in zip(ids, offsets, strict=True):
        new = text[reached:end] if end > reached else ""
        reached = max(reached, end)
        counts.append(0 if token in special else len(new.encode("utf-8", "surrogatepass")))
    return counts


def num_ids(tokenizer: Any) -> int:
    """One more than the largest token id; there can be gaps, so `len` will not do."""
    return 1 + max(tokenizer.get_vocab().values())


def check_same_tokens(teacher: Any, student: Any) -> None:
    """Raise UserError at the first probe string to which two tokenizers give different ids.

    Sizes are not compared: padded vocabularies differ in size and agree in every id, and equal sizes prove
    nothing.
    """
    marks = sorted(set(teacher.all_special_tokens) | set(student.all_special_tokens))
    for probe in (*PROBES, *marks, "a".join(["", *marks, ""])):
        theirs = teacher(probe, add_special_tokens=False)["input_ids"]
        ours = student(probe, add_special_tokens=False)["input_ids"]
        if theirs != ours:
            at = _shared_length(theirs, ours)
            raise UserError(
                f"teacher and student do not share token ids: {probe!a} is {theirs[at : at + 4]} in the "
                f"teacher and {ours[at : at + 4]} in the student from token {at}; expected one tokenizer; "
                "use the teacher's tokenizer for the student"
            )
