"""Records from wherever they lie, one at a time, and the hash that sets some of them aside.

A record is one of {"text"}, {"messages", "tools"?} and {"prompt", "completion"}; ShareGPT's "conversations"
become messages. The held-out side is decided by the record's own content, so it is the same on every
machine, in every order and after the file has grown; two copies of a record never land on both sides.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError

Record = dict[str, Any]

DEFAULT_DATA = "HuggingFaceFW/fineweb-edu:sample-10BT"
EXPECTED = 'a record with "text", "messages" (and "tools"), or "prompt" and "completion"'
SEPARATOR = "<|endoftext|>"
SEPARATOR_SEARCH_BYTES = 16 * 2**20
DOCUMENT_CHARACTERS = 2000
# Who speaks in ShareGPT files -> the role that chat templates know.
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def records(
    source: str, *, part: str = "train", split: str = "train", fraction: float = 0.01, seed: int = 0
) -> Iterator[Record]:
    """Yield the records of one side of `source`, in the order in which they are stored.

    source: a .jsonl, .json, .txt or .parquet file, a folder of those, a Hub data set `owner/name` (streamed;
    `owner/name:config` picks a configuration, `split` its split) or `demo`, which never ends and whose train
    and test sides are disjoint by construction (there `seed` counts, elsewhere it does not).
    part: "train" or "heldout". fraction: share of the records held out, by hash.
    Raises UserError naming file and line for a record of the wrong shape, and for a source that is not there.
    """
    if part not in ("train", "heldout"):
        raise ValueError(f"part is {part!r}; it is train or heldout")
    if source == "demo":
        from ..demo import tasks

        yield from tasks.records(split="train" if part == "train" else "validation", seed=seed)
        return
    for place, raw in raw_records(source, split=split):
        record = _checked(raw, place)
        if record is not None and heldout(record, fraction=fraction) == (part == "heldout"):
            yield record


def heldout(record: Record, *, fraction: float) -> bool:
    """Whether a record belongs to the held-out side: the sha256 of its canonical content, as a number in [0,
    1).
    """
    content = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def raw_records(source: str, *, split: str) -> Iterator[tuple[str, Any]]:
    """Pairs of (where it stands, what stands there)."""
    path = Path(source).expanduser()
    if path.is_file():
        yield from _read_file(path)
    elif path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and p.suffix in READERS]
        if not files:
            raise UserError(f"no data in the folder {path}; expected files that end in {', '.join(READERS)}")
        for file in files:
            yield from _read_file(file)
    elif path.suffix in READERS or source.startswith((".", "/", "~")):
        raise UserError(f"data file {source} does not exist; give a file, a folder, a Hub data set id or demo")
    else:
        yield from _read_hub(source, split=split)


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix not in READERS:
        raise UserError(
            f"cannot read {path}: unknown kind {path.suffix or 'of file'}; expected one of {', '.join(READERS)}"
        )
    try:
        yield from READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.object[error.start]:#04x}); convert it to UTF-8 first"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the file") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}, line {number}", _parsed(line, f"{path}, line {number}")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON ({error.msg}); expected {EXPECTED}") from error


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of records; or, as many data sets name them, one record per line."""
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(1024).lstrip()[:1]
        if start == "[":
            file.seek(0)
            content = _parsed(file.read().removeprefix("\ufeff"), str(path))
            for number, raw in enumerate(content, start=1):
                yield f"{path}, record {number}", raw
            return
    yield from _read_jsonl(path)


def _read_text(path: Path) -> Iterator[tuple[str, Any]]:
    """Documents: what stands between separator lines, else groups of paragraphs of about 2,000 characters."""
    with path.open("rb") as file:
        head = file.read(SEPARATOR_SEARCH_BYTES)
    separated = re.search(rb"^" + re.escape(SEPARATOR.encode()) + rb"\s*$", head, re.MULTILINE) is not None
    document: list[str] = []
    length, start = 0, 1
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if separated:
                whole = line.strip() == SEPARATOR
            else:
                # A text without blank lines must not become one endless document.
                whole = length >= (DOCUMENT_CHARACTERS if not line.strip() else 4 * DOCUMENT_CHARACTERS)
            if whole:
                yield from _document(document, f"{path}, line {start}")
                document, length, start = [], 0, number + 1
            if not (separated and whole):
                document.append(line)
                length += len(line)
    yield from _document(document, f"{path}, line {start}")


def _document(lines: list[str], place: str) -> Iterator[tuple[str, Any]]:
    text = "".join(lines).strip()
    if text:
        yield place, {"text": text}


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            wanted = [name for name in file.schema_arrow.names if name in KEYS]
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                for raw in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", raw
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read {path} as parquet: {reason}; check the file") from error


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".txt": _read_text, ".parquet": _read_parquet}
KEYS = ("text", "messages", "conversations", "prompt", "completion", "chosen", "rejected", "tools", "system")


def _read_hub(source: str, *, split: str) -> Iterator[tuple[str, Any]]:
    import datasets
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] - httpx or httpx2

    name, _, config = source.partition(":")
    hint = "give a file, a folder, demo, or a Hub data set as owner/name or owner/name:config"
    try:
        rows: Iterable[Any] = datasets.load_dataset(name, config or None, split=split, streaming=True)
        for number, raw in enumerate(rows, start=1):
            yield f"{source} ({split}), row {number}", dict(raw)
    # ValueError: an unknown split or configuration; OSError: an unknown name, a refused one, no network.
    except (OSError, ValueError, HTTPError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot read the data set {source} (split {split}): {reason}; {hint}") from error


def _checked(raw: Any, place: str) -> Record | None:
    """The record in its canonical form; None for an empty text; UserError for anything else."""
    if not isinstance(raw, dict):
        raise UserError(f"{place}: found {_kind(raw)}; expected {EXPECTED}")
    raw = {key: value for key, value in raw.items() if value is not None}
    if "messages" in raw or "conversations" in raw:
        messages = messages_of(raw, place)
        tools = tools_of(raw.get("tools"), place)
        return {"messages": messages, "tools": tools} if tools else {"messages": messages}
    if "prompt" in raw and "completion" in raw:
        prompt, completion = raw["prompt"], raw["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            tools = tools_of(raw.get("tools"), place)
            return {"prompt": prompt, "completion": completion} | ({"tools": tools} if tools else {})
        if isinstance(prompt, list) and isinstance(completion, list):
            joined = {"messages": prompt + completion, "tools": raw.get("tools")}
            return _checked(joined, place)
        raise UserError(f'{place}: "prompt" and "completion" must both be text or both lists of messages')
    if "text" in raw:
        if not isinstance(raw["text"], str):
            raise UserError(f'{place}: "text" is {_kind(raw["text"])}; expected a string')
        return {"text": raw["text"]} if raw["text"].strip() else None
    found = ", ".join(sorted(raw)) or "nothing"
    raise UserError(f"{place}: found the keys {found}; expected {EXPECTED}")


def messages_of(raw: Record, place: str) -> list[Record]:
    """The messages of a record in their canonical form; UserError where one has no role or no text."""
    key = "messages" if "messages" in raw else "conversations"
    turns = raw[key]
    if not isinstance(turns, list) or not turns:
        raise UserError(f'{place}: "{key}" is {_kind(turns)}; expected a list of at least one message')
    messages = []
    if key == "conversations" and isinstance(raw.get("system"), str) and raw["system"].strip():
        messages.append({"role": "system", "content": raw["system"]})
    for number, turn in enumerate(turns, start=1):
        where = f"{place}, message {number}"
        if not isinstance(turn, dict):
            raise UserError(f'{where}: found {_kind(turn)}; expected an object with "role" and "content"')
        if "from" in turn and "role" not in turn:
            role, content = SHAREGPT_ROLES.get(str(turn["from"])), turn.get("value")
            if role is None or not isinstance(content, str):
                raise UserError(f'{where}: "from" must be one of {", ".join(SHAREGPT_ROLES)} and "value" a string')
            messages.append({"role": role, "content": content})
            continue
        message = {key: value for key, value in turn.items() if value is not None}
        if message.get("tool_calls"):
            if not isinstance(message["tool_calls"], list):
                raise UserError(f'{where}: "tool_calls" is {_kind(message["tool_calls"])}; expected a list of calls')
            message.setdefault("content", "")
            message["tool_calls"] = [_call(call, where) for call in message["tool_calls"]]
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise UserError(f'{where}: found the keys {", ".join(sorted(turn))}; expected "role" and "content" as text')
        messages.append(message)
    if all(message["role"] != "assistant" for message in messages):
        raise UserError(f"{place}: no message has the role assistant; there is nothing to learn from")
    return messages


def _call(call: Any, where: str) -> Record:
    """A tool call whose arguments are an object: the OpenAI form writes them as a string, templates want an
    object.
    """
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise UserError(f'{where}: a tool call must hold "function" with "name" and "arguments"')
    function = dict(inner)
    if isinstance(function.get("arguments"), str):
        function["arguments"] = _parsed(function["arguments"] or "{}", f"{where}, tool call arguments")
    return {**call, "function": function} if "function" in call else function


def tools_of(tools: Any, place: str) -> list[Any]:
    """Tool schemas; parquet and ShareGPT files keep them as one JSON string."""
    if isinstance(tools, str):
        tools = _parsed(tools, f'{place}, "tools"') if tools.strip() else []
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f'{place}: "tools" is {_kind(tools)}; expected a list of JSON schemas')
    return tools


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}
    return "an empty list" if value == [] else names.get(type(value), type(value).__name__)
