"""What the page calls: questions, answers, votes, files to keep. No widget is known here.

A question and its sides are plain dictionaries, because they are kept in a browser's session and saved as JSON:

    question  {"id", "skill", "messages", "histories", "tools", "passages", "numbered", "check", "settings",
               "names", "measure", "blind"}
    side      {"question", "name", "bytes", "text", "state", "figures", "error"?}

`measure` is the place of the side that the others are held to; `histories` holds, for each side, the turns in which
its own earlier answers stand.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

from pydantic import BaseModel, Field, ValidationError

from compressor.errors import UserError

from . import markup, saved
from .difference import Rated
from .models import Models, Offer
from .presets import conversation, schema_errors, turns
from .votes import Ballot

LONGEST_PROMPT = 20_000  # characters
MOST_TOKENS = 2048
MOST_SIDES = 3


class Settings(BaseModel):
    """How all sides answer. temperature 0: greedy; else `seed` fixes the draw."""

    max_new_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = 256
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


@dataclass
class _Session:
    """What one browser has under way: one question at a time."""

    question: str = ""  # its id
    stop: threading.Event = field(default_factory=threading.Event)
    begun: set[int] = field(default_factory=set)  # places whose answers were begun
    voted: bool = False


class App:
    """Models, votes and files of one page. Models and votes are shared by all sessions; questions are not."""

    def __init__(self, offers: list[Offer], ballot: Ballot, *, threads: int | None = None) -> None:
        self.models = Models(offers, threads=threads)
        self.offers = self.models.offers
        self.ballot = ballot
        self._sessions: dict[str, _Session] = {}
        self._voting = threading.Lock()
        self._folder = Path(tempfile.mkdtemp(prefix="compressor-"))

    def close(self) -> None:
        """Stop every model and remove every file made for a session."""
        for session in list(self._sessions.values()):
            session.stop.set()
        self.models.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- questions and answers ---

    def question(
        self,
        prompt: str,
        *,
        names: list[str],
        skill: str = "chat",
        system: str = "",
        turns: tuple[dict[str, str], ...] = (),
        passages: list[str] | None = None,
        tools: str = "",
        check: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        blind: bool = False,
    ) -> dict[str, Any]:
        """A question as all sides get it. settings: fields of Settings.

        Raises UserError for what is empty, too long, no schema, no model on offer or out of range.
        """
        passages = [line for line in passages or [] if line.strip()]
        _check_length(prompt, sum(map(len, (system, tools, *passages))))
        functions, wrong = schema_errors(tools)
        if wrong:
            raise UserError(wrong)
        chosen = list(dict.fromkeys(names))
        unknown = [name for name in chosen if name not in self.offers]
        if unknown or not 0 < len(chosen) <= MOST_SIDES:
            found = f"model {unknown[0][:40]!r} is not on offer" if unknown else f"{len(chosen)} models are chosen"
            raise UserError(f"{found}; expected one to {MOST_SIDES} of {', '.join(self.offers)}; choose among them")
        measure = next((name for name in chosen if self.offers[name].teacher), chosen[0])
        if blind:
            random.shuffle(chosen)
        return {
            "id": uuid4().hex,
            "skill": skill,
            "messages": conversation(prompt, system=system, turns=turns, passages=tuple(passages)),
            "histories": [[] for _ in chosen],
            "tools": functions,
            "passages": passages,
            "numbered": len(passages) or len(set(re.findall(r"\[\d+\]", prompt))) if skill == "rag" else 0,
            "check": check or {},
            "settings": _checked(settings or {}),
            "names": chosen,
            "measure": chosen.index(measure),
            "blind": blind,
        }

    def follow(
        self, asked: dict[str, Any], sides: list[dict[str, Any]], prompt: str, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """The next turn of a conversation, in which each side goes on from its own answers. Raises UserError."""
        *before, last = asked["messages"]
        longest = max(sum(len(turn["content"]) for turn in turns(asked, place)) for place in range(len(sides)))
        _check_length(prompt, longest + max(len(side["text"]) for side in sides))
        told = [{"role": "assistant", "content": side["text"]} for side in sides]
        grown = [[*history, last, one] for history, one in zip(asked["histories"], told, strict=True)]
        messages = [*before, {"role": "user", "content": prompt}]
        new = {"id": uuid4().hex, "messages": messages, "histories": grown, "check": {}}
        return asked | new | {"settings": _checked(settings)}

    def answer(self, asked: dict[str, Any], place: int, stop: threading.Event) -> Iterator[dict[str, Any]]:
        """The side at `place` as it grows, until it ends or `stop` is set; at times unchanged, as a sign of life."""
        side = self.waiting(asked, place)
        model = self.models[asked["names"][place]]
        load = self.models.load(keep=asked["names"])
        settings = {"tools": asked["tools"], **asked["settings"]}
        try:
            for found in model.stream(turns(asked, place), stop=stop, load=load, **settings):
                if "state" in found:
                    side["state"] = found["state"]
                if "text" in found:
                    side["state"] = "answering"
                    side["text"] += found["text"]
                if "done" in found:
                    side["figures"] = found["done"]
                yield side
            stopped = side["figures"]["stopped"] if side["figures"] else True
            side["state"] = "stopped" if stopped else ""
        except UserError as error:
            side["state"], side["error"] = "failed", str(error)
        yield side

    def waiting(self, asked: dict[str, Any], place: int) -> dict[str, Any]:
        """The side at `place` before it has said anything."""
        name = asked["names"][place]
        begun = {"question": asked["id"], "text": "", "state": "waiting", "figures": None}
        return begun | {"name": name, "bytes": self.offers[name].nbytes}

    def rated(self, asked: dict[str, Any], sides: list[dict[str, Any]]) -> list[list[Rated]]:
        """For each side, what the measure gives its tokens, in one pass; nothing for the measure and who failed."""
        measure = self.models[asked["names"][asked["measure"]]]
        load = self.models.load(keep=asked["names"])
        found: list[list[Rated]] = [[] for _ in sides]
        for place, side in enumerate(sides):
            if place != asked["measure"] and side.get("figures"):
                rows = measure.rate(turns(asked, place), asked["tools"] or None, side["figures"], load=load)
                found[place] = [Rated(*row) for row in rows]
        return found

    # --- sessions ---

    def begin(self, session: str | None, asked: dict[str, Any]) -> None:
        """A session's next question: whatever it still had under way is stopped."""
        self.halt(session)
        self._sessions[session or ""] = _Session(asked["id"])

    def claim(self, session: str | None, asked: dict[str, Any], place: int) -> threading.Event | None:
        """The stop button of one side's answer; None where another question came after, or the answer was begun."""
        found = self._sessions.get(session or "")
        if found is None or found.question != asked["id"] or place in found.begun or place >= len(asked["names"]):
            return None
        found.begun.add(place)
        return found.stop

    def is_current(self, session: str | None, asked: dict[str, Any]) -> bool:
        """Whether this is the session's last question."""
        found = self._sessions.get(session or "")
        return found is not None and found.question == asked["id"]

    def halt(self, session: str | None) -> None:
        """Stop what a session has under way."""
        found = self._sessions.get(session or "")
        if found is not None:
            found.stop.set()

    def forget(self, session: str | None) -> None:
        """A session that was closed stops what it still had under way, and its files go."""
        self.halt(session)
        self._sessions.pop(session or "", None)
        shutil.rmtree(self._home(session), ignore_errors=True)

    def cast(self, session: str | None, choice: str, asked: dict[str, Any], sides: list[dict[str, Any]]) -> None:
        """Count a session's vote on its question, once. Raises UserError."""
        left, right = sides[:2]
        if left.get("error") or right.get("error"):
            raise UserError("a side has failed; expected two answers to choose between; ask again")
        with self._voting:
            found = self._sessions.get(session or "")
            if found is None or found.question != asked["id"] or found.voted:
                raise UserError("you have voted on these answers; ask again to vote again")
            about = {"skill": asked["skill"], "prompt": asked["messages"][-1]["content"], "blind": asked["blind"]}
            answers = {"left_answer": left["text"], "right_answer": right["text"]}
            self.ballot.cast(choice, left=left["name"], right=right["name"], **about, **answers)
            found.voted = True

    def kept(self, session: str | None, comparison: dict[str, Any]) -> list[str]:
        """A comparison as files to download: HTML and JSON."""
        text = json.dumps(comparison, indent=2, ensure_ascii=False)
        whole = markup.whole_page(comparison)
        return [self._file(session, "comparison.html", whole), self._file(session, "comparison.json", text)]

    def votes(self, session: str | None) -> list[str]:
        """The votes as files to download: JSON and CSV."""
        return [
            self._file(session, "votes.json", self.ballot.as_json()),
            self._file(session, "votes.csv", self.ballot.as_csv()),
        ]

    def _home(self, session: str | None) -> Path:
        return self._folder / hashlib.sha256((session or "").encode()).hexdigest()

    def _file(self, session: str | None, name: str, text: str) -> str:
        self._home(session).mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(dir=self._home(session))) / name  # two events may end at once
        path.write_text(text, encoding="utf-8")
        return str(path)

    # --- for programs ---

    def compare(
        self, prompt: str, models: list[str], max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> dict[str, Any]:
        """Ask models one prompt, one after the other, and return the comparison: question, sides with figures."""
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        asked = self.question(prompt, names=models, settings=settings)
        never = threading.Event()
        sides = [deque(self.answer(asked, place, never), maxlen=1)[0] for place in range(len(asked["names"]))]
        return saved.comparison(asked, sides)

    def vote(self, choice: str, left: str, right: str, prompt: str = "") -> dict[str, Any]:
        """Count a vote (left, right, tie or bad) on two models and return it."""
        for name in (left, right):
            if name not in self.offers:
                raise UserError(f"model {name[:40]!r} is not on offer; expected one of {', '.join(self.offers)}")
        return self.ballot.cast(choice, left=left, right=right, prompt=prompt[:LONGEST_PROMPT], blind=False)


def ended(side: dict[str, Any]) -> bool:
    """Whether a side has said all that it will."""
    return bool(side.get("figures") or side.get("error") or side["state"] == "stopped")


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    try:
        return Settings(**settings).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{first['loc'][0]} is {str(first['input'])[:40]}; {first['msg']}; correct it") from error


def _check_length(prompt: str, others: int) -> None:
    if not prompt.strip():
        raise UserError("the prompt is empty; expected a question; write one")
    if len(prompt) + others > LONGEST_PROMPT:
        length = len(prompt) + others
        raise UserError(f"{length:,} characters; expected at most {LONGEST_PROMPT:,}; shorten the prompt")


__all__ = ["App", "Settings", "ended"]
