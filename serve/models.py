"""The models on offer, each in a child process that is started when it is first asked."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from compressor.child import Child
from compressor.errors import UserError
from compressor.units import size
from export.machine import available_memory

ROOM = 1.3  # times its weights that a model takes once loaded
_numbers = count(1)


@dataclass(frozen=True)
class Offer:
    """One model that a person may choose: its name on the page, what it is, its bytes on disk (None: unknown).

    teacher: the others of its run are held to it.
    """

    name: str
    what: str
    nbytes: int | None
    teacher: bool = False


class Model:
    """A handle on one model: asleep, loading or ready. One answer at a time; others wait their turn.

    threads: None leaves the choice to the runtime.
    """

    def __init__(self, offer: Offer, *, threads: int | None = None) -> None:
        self.offer = offer
        self.facts: dict[str, Any] = {}
        self._threads = threads
        self._turn = threading.Lock()
        self._child: Child | None = None

    @property
    def state(self) -> str:
        """asleep, loading or ready."""
        if self.pid is None:
            return "asleep"
        return "ready" if self.facts else "loading"

    @property
    def pid(self) -> int | None:
        """The model's process, while it lives."""
        return None if self._child is None else self._child.pid

    def stream(self, messages: list[dict[str, str]], **settings: Any) -> Generator[dict[str, Any], None, None]:
        """Yield {"state"} while it waits and loads, {"text"} as the answer grows, {"done": figures} at its end.

        Closing the iterator ends the answer and frees the model. Raises UserError with the model's own words.
        """
        while not self._turn.acquire(timeout=0.2):
            yield {"state": "waiting for its turn"}
        try:
            if self.state != "ready":
                yield {"state": "loading"}
            child, number = self._loaded(), next(_numbers)
            answers = child.answers("stream", id=number, messages=messages, **settings)
            try:
                for found in answers:
                    yield found
                    if "done" in found:
                        return
            except GeneratorExit:  # nobody reads any more: what it still had to say must not meet the next question
                child.tell("cancel", id=number)
                with contextlib.suppress(UserError):
                    next(found for found in answers if "done" in found)
                raise
        finally:
            self._turn.release()

    def rate(self, messages: list[dict[str, str]], tools: Any, answer: list[int]) -> list[list[Any]]:
        """What this model gives each token of an answer: [text, probability, its own choice, whether they agree]."""
        with self._turn:
            return self._loaded().ask("rate", messages=messages, tools=tools, answer=answer)["rated"]

    def rest(self) -> None:
        """Close, unless an answer is under way."""
        if self._turn.acquire(blocking=False):
            self.close()
            self._turn.release()

    def close(self) -> None:
        """End the process; its memory is free when this returns."""
        if self._child is not None:
            self._child.close()
        self._child, self.facts = None, {}

    def _loaded(self) -> Child:
        if self._child is None or self.state != "ready":
            self.close()
            check_room(self.offer)
            self._child = Child("serve.worker", self.offer.name)
            try:
                self.facts = self._child.ask("load", what=self.offer.what, threads=self._threads)
            except UserError:
                self.close()
                raise
        return self._child


def has_room(offer: Offer) -> bool:
    """Whether this machine's free memory can hold a model; true where either is unknown."""
    free = available_memory()
    return offer.nbytes is None or free is None or ROOM * offer.nbytes <= free


def check_room(offer: Offer) -> None:
    """Raise UserError for a model that this machine's free memory cannot hold, before it is loaded."""
    if not has_room(offer):
        raise UserError(
            f"{offer.name} needs about {size(int(ROOM * (offer.nbytes or 0)))} and {size(available_memory() or 0)} are "
            "free; expected room for it; choose a smaller one, or close other programs"
        )


def offers(whats: list[str]) -> list[Offer]:
    """What a run folder offers (teacher, student, every artifact), or models by name.

    Raises UserError for a run without a student, and for a name that is neither a folder nor a Hub id with a config.
    """
    from compressor.checkpoint import DEMO_FOLDER, read_config, resolve
    from compressor.recipe import load_values
    from compressor.run import Run
    from compressor.runtime import is_artifact

    found: list[Offer] = []
    for what in whats:
        if not (Path(what) / "run.json").exists():
            if not is_artifact(what):
                read_config(what)
            folder = str(DEMO_FOLDER) if what == "demo" else what
            found.append(_offer(Path(what).name if Path(what).is_dir() else what, folder))
            continue
        run = Run(Path(what))
        if run.done("distill") is None:
            raise UserError(f"{what} has no student yet; expected a finished run; run compressor distill --out {what}")
        teacher = str(load_values(str(run.recipe)).get("teacher"))
        found.append(_offer("teacher", str(resolve(teacher)), teacher=True))
        found.append(_offer("student", str(run.student)))
        for manifest in sorted(run.export.glob("*/export.json")):
            found.append(_offer(manifest.parent.name, str(manifest.parent)))
    names = [offer.name for offer in found]
    return [
        replace(offer, name=f"{offer.name} ({names[:i].count(offer.name) + 1})")
        if names.count(offer.name) > 1
        else offer
        for i, offer in enumerate(found)
    ]


def _offer(name: str, what: str, *, teacher: bool = False) -> Offer:
    folder = Path(what)
    files = (
        [p for p in folder.rglob("*") if p.suffix in (".safetensors", ".gguf", ".onnx", ".data")]
        if folder.is_dir()
        else []
    )
    return Offer(name, what, sum(path.stat().st_size for path in files) or None, teacher)
