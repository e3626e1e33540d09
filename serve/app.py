"""What the page calls: questions, answers, votes, files to keep. No widget is known here.

A question and its sides are plain dictionaries, because they are kept in a browser's session and saved as JSON:

    question  {"skill", "messages", "histories", "tools", "passages", "numbered", "check", "settings",
               "names", "measure", "blind"}
    side      {"name", "bytes", "text", "state", "figures", "error"?}

`measure` is the place of the side that the others are held to; `histories` holds, for each side, the turns in which
its own earlier answers stand.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compressor.errors import UserError

from . import markup, saved
from .difference import Rated
from .models import Model, Offer, has_room
from .presets import conversation, schema_errors
from .votes import Ballot

LONGEST_PROMPT = 20_000  # characters
MOST_TOKENS = 2048
SETTINGS = {"max_new_tokens": 256, "temperature": 0.0, "seed": 0}


class App:
    """Models, votes and files of one page. Models and votes are shared by all sessions; questions and stops are not."""

    def __init__(self, offers: list[Offer], ballot: Ballot, *, threads: int | None = None) -> None:
        self.offers = {offer.name: offer for offer in offers}
        self.models = {name: Model(offer, threads=threads) for name, offer in self.offers.items()}
        self.ballot = ballot
        self._asked: dict[str, float] = {}  # when each model was asked last
        self._stops: dict[str, threading.Event] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="compressor-"))

    def close(self) -> None:
        """Stop every model and remove every file made for a session."""
        for model in self.models.values():
            model.close()
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
        """A question as all sides get it. Raises UserError for what is empty, too long, or no schema."""
        passages = [line for line in passages or [] if line.strip()]
        _check_length(prompt, system, tools, *passages)
        functions, wrong = schema_errors(tools)
        if wrong:
            raise UserError(wrong)
        chosen = [name for name in names if name in self.models]
        if not chosen:
            raise UserError(f"no model is chosen; expected one or more of {', '.join(self.models)}")
        measure = next((name for name in chosen if self.offers[name].teacher), chosen[0])
        if blind:
            random.shuffle(chosen)
        return {
            "skill": skill,
            "messages": conversation(prompt, system=system, turns=turns, passages=tuple(passages)),
            "histories": [[] for _ in chosen],
            "tools": functions,
            "passages": passages,
            "numbered": len(passages) or len(set(re.findall(r"\[\d+\]", prompt))) if skill == "rag" else 0,
            "check": check or {},
            "settings": SETTINGS | (settings or {}),
            "names": chosen,
            "measure": chosen.index(measure),
            "blind": blind,
        }

    def follow(
        self, asked: dict[str, Any], sides: list[dict[str, Any]], prompt: str, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """The next turn of a conversation, in which each side goes on from its own answers. Raises UserError."""
        *before, last = asked["messages"]
        _check_length(prompt, *(message["content"] for place in range(len(sides)) for message in turns(asked, place)))
        told = [{"role": "assistant", "content": side["text"]} for side in sides]
        grown = [[*history, last, one] for history, one in zip(asked["histories"], told, strict=True)]
        messages = [*before, {"role": "user", "content": prompt}]
        return asked | {"messages": messages, "histories": grown, "check": {}, "settings": SETTINGS | settings}

    def answer(self, asked: dict[str, Any], place: int, stop: threading.Event) -> Iterator[dict[str, Any]]:
        """The side at `place` as it grows, until it ends or `stop` is set."""
        name = asked["names"][place]
        side = self.waiting(asked, place)
        self._make_room(name, keep=asked["names"])
        stream = self.models[name].stream(turns(asked, place), tools=asked["tools"], **asked["settings"])
        try:
            for found in stream:
                side["state"] = found.get("state", "answering")
                side["text"] += found.get("text", "")
                if "done" in found:
                    side["figures"] = found["done"]
                    side["state"] = "stopped" if found["done"]["stopped"] else ""
                yield side
                if stop.is_set() and side["figures"] is None:
                    side["state"] = "stopped"
                    yield side
                    return
        except UserError as error:
            side["state"], side["error"] = "failed", str(error)
            yield side
        finally:
            stream.close()

    def waiting(self, asked: dict[str, Any], place: int) -> dict[str, Any]:
        """The side at `place` before it has said anything."""
        name = asked["names"][place]
        return {"name": name, "bytes": self.offers[name].nbytes, "text": "", "state": "waiting", "figures": None}

    def _make_room(self, name: str, *, keep: list[str]) -> None:
        """Put models to rest that this question does not ask, longest unasked first, until `name` can be loaded."""
        self._asked[name] = time.monotonic()
        if self.models[name].state == "ready":
            return
        others = [other for other in self._asked if other not in keep]
        for other in sorted(others, key=self._asked.__getitem__):
            if has_room(self.offers[name]):
                return
            self.models[other].rest()

    def rated(self, asked: dict[str, Any], sides: list[dict[str, Any]]) -> list[list[Rated]]:
        """For each side, what the measure gives its tokens, in one pass; nothing for the measure and who failed."""
        measure = self.models[asked["names"][asked["measure"]]]
        found: list[list[Rated]] = [[] for _ in sides]
        for place, side in enumerate(sides):
            if place != asked["measure"] and side.get("figures"):
                rows = measure.rate(turns(asked, place), asked["tools"] or None, side["figures"]["ids"])
                found[place] = [Rated(*row) for row in rows]
        return found

    # --- sessions ---

    def stop_of(self, session: str | None) -> threading.Event:
        """The stop button of one session."""
        return self._stops.setdefault(session or "", threading.Event())

    def forget(self, session: str | None) -> None:
        """A session that was closed stops what it still had under way, and its files go."""
        stop = self._stops.pop(session or "", None)
        if stop is not None:
            stop.set()
        shutil.rmtree(self._home(session), ignore_errors=True)

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
        return self._folder / re.sub(r"\W", "", session or "all")

    def _file(self, session: str | None, name: str, text: str) -> str:
        path = self._home(session) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    # --- for programs ---

    def compare(
        self, prompt: str, models: list[str], max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> dict[str, Any]:
        """Ask models one prompt, one after the other, and return the comparison: question, sides with figures."""
        settings = {"max_new_tokens": bounded(max_new_tokens), "temperature": temperature, "seed": seed}
        asked = self.question(prompt, names=models, settings=settings)
        never = threading.Event()
        sides = [list(self.answer(asked, place, never))[-1] for place in range(len(asked["names"]))]
        return saved.comparison(asked, sides)

    def vote(self, choice: str, left: str, right: str, prompt: str = "") -> dict[str, Any]:
        """Count a vote (left, right, tie or bad) on two models and return it."""
        for name in (left, right):
            if name not in self.models:
                raise UserError(f"model {name[:40]!r} is not on offer; expected one of {', '.join(self.models)}")
        return self.ballot.cast(choice, left=left, right=right, prompt=prompt[:LONGEST_PROMPT], blind=False)


def turns(asked: dict[str, Any], place: int) -> list[dict[str, str]]:
    """The whole conversation as the side at `place` gets it."""
    *before, last = asked["messages"]
    return [*before, *asked["histories"][place], last]


def ended(side: dict[str, Any]) -> bool:
    """Whether a side has said all that it will."""
    return bool(side.get("figures") or side.get("error") or side["state"] == "stopped")


def bounded(tokens: int | float) -> int:
    """A number of tokens within what the page gives."""
    return max(1, min(int(tokens), MOST_TOKENS))


def _check_length(prompt: str, *others: str) -> None:
    if not prompt.strip():
        raise UserError("the prompt is empty; expected a question; write one")
    length = len(prompt) + sum(map(len, others))
    if length > LONGEST_PROMPT:
        raise UserError(f"{length:,} characters; expected at most {LONGEST_PROMPT:,}; shorten the prompt")


__all__ = ["App", "bounded", "ended", "turns"]
