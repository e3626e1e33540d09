"""The models on offer, each in a child process that is started when it is first asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from compressor.child import Child
from compressor.errors import UserError
from compressor.memory import available_memory
from compressor.units import size

ROOM = 1.3  # times its weights in memory that a model takes
TICK = 0.2  # seconds after which whoever waits for a model is given a sign of life, and may leave
_keys = count(1)


@dataclass(frozen=True)
class Offer:
    """One model that a person may choose: its name on the page, what it is, its bytes on disk and as weights in memory.

    None: not known before it is opened. teacher: the others of its run are held to it.
    """

    name: str
    what: str
    nbytes: int | None
    weights: int | None
    teacher: bool = False

    @property
    def needs(self) -> int:
        """Bytes of memory, about; 0 where unknown."""
        return int(ROOM * (self.weights or 0))


class Model:
    """A handle on one model. One answer at a time; others wait their turn.

    threads: None leaves the choice to the runtime.
    """

    def __init__(self, offer: Offer, *, threads: int | None = None) -> None:
        self.offer = offer
        self.facts: dict[str, Any] = {}
        self.asked = 0.0  # when, on the monotonic clock
        self._threads = threads
        self._turn = threading.Lock()
        self._child: Child | None = None

    @property
    def awake(self) -> bool:
        """Whether its process is there and the model open."""
        return bool(self.facts) and self.pid is not None

    @property
    def pid(self) -> int | None:
        """The model's process, while it lives."""
        child = self._child
        return None if child is None else child.pid

    def stream(
        self,
        messages: list[dict[str, str]],
        *,
        stop: threading.Event,
        load: Load,
        **settings: Any,
    ) -> Iterator[dict[str, Any]]:
        """Yield {"state"} while it waits and loads, {"text"} as the answer grows, {"done": figures} at its end.

        {} is a sign of life. `stop` ends the answer, with its figures if it had begun; closing the iterator ends it
        too, and waits for nothing. load: opens the model where it is not awake. Raises UserError with its own words.
        """
        while not self._turn.acquire(timeout=TICK):
            yield {"state": "waiting for its turn"}
            if stop.is_set():
                return
        try:
            self.asked = time.monotonic()
            if not self.awake:
                with closing(load(self)) as opening:
                    for found in opening:
                        yield found
                        if stop.is_set():
                            return
            yield from self._answer(messages, stop, settings)
        finally:
            if not self.awake:  # left or failed while it was opened
                self.close()
            self._turn.release()

    def _answer(
        self, messages: list[dict[str, str]], stop: threading.Event, settings: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        assert self._child is not None
        key, over, told = next(_keys), False, False
        try:
            for found in self._child.answers("stream", tick=TICK, key=key, messages=messages, **settings):
                over = "done" in found
                yield found
                if stop.is_set() and not (over or told):
                    self._child.tell("cancel", key=key)
                    told = True
        finally:
            if not (over or told):
                self._child.tell("cancel", key=key)

    def rate(
        self,
        messages: list[dict[str, str]],
        tools: Any,
        figures: dict[str, Any],
        load: Callable[[Model], Iterator[Any]],
    ) -> list[list[Any]]:
        """What this model gives each token of an answer: [text, probability, its own choice, whether they agree]."""
        with self._turn:
            if not self.awake:
                list(load(self))
            assert self._child is not None
            answer = {"answer": figures["ids"], "tokenizer": figures["tokenizer"]}
            return self._child.ask("rate", messages=messages, tools=tools, **answer)["rated"]

    def open(self) -> Iterator[dict[str, Any]]:
        """Start the process and open the model; yields signs of life. Raises UserError; for who holds the turn."""
        self.close()
        self._child = Child("serve.worker", self.offer.name)
        for found in self._child.answers("load", tick=TICK, what=self.offer.what, threads=self._threads):
            self.facts = found or self.facts
            yield {"state": "loading"}

    def rest(self) -> None:
        """Close, unless an answer is under way."""
        if self._turn.acquire(blocking=False):
            try:
                self.close()
            finally:
                self._turn.release()

    def close(self) -> None:
        """End the process; its memory is free when this returns."""
        child, self._child, self.facts = self._child, None, {}
        if child is not None:
            child.close()


Load = Callable[[Model], Generator[dict[str, Any], None, None]]


class Models:
    """All models of a page, opened one at a time, so that each finds the memory that the one before has left."""

    def __init__(self, offers: list[Offer], *, threads: int | None = None) -> None:
        self.offers = {offer.name: offer for offer in offers}
        self._models = {offer.name: Model(offer, threads=threads) for offer in offers}
        self._opening = threading.Lock()

    def __getitem__(self, name: str) -> Model:
        return self._models[name]

    def close(self) -> None:
        """End every process."""
        for model in self._models.values():
            model.close()

    def load(self, keep: list[str]) -> Load:
        """How to open a model while those of `keep` stay awake. Raises UserError where memory cannot hold it."""

        def load(model: Model) -> Generator[dict[str, Any], None, None]:
            while not self._opening.acquire(timeout=TICK):
                yield {"state": "waiting for another to load"}
            try:
                yield {"state": "loading"}
                self._make_room(model.offer, keep)
                yield from model.open()
            finally:
                self._opening.release()

        return load

    def _make_room(self, offer: Offer, keep: list[str]) -> None:
        """Put others to rest, longest unasked first, if that helps."""
        others = [one for name, one in self._models.items() if one.awake and name not in keep and name != offer.name]
        free = available_memory()
        if free is None:
            return
        if free + sum(other.offer.needs for other in others) >= offer.needs:
            for other in sorted(others, key=lambda other: other.asked):
                if (available_memory() or 0) >= offer.needs:
                    break
                other.rest()
        free = available_memory() or 0
        if free < offer.needs:
            raise UserError(
                f"{offer.name} needs about {size(offer.needs)} and {size(free)} are free; expected room for it; choose "
                "a smaller one, or close other programs"
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
            parent = Path(what).parent
            if parent != Path() and parent.is_dir() and not Path(what).exists():
                raise UserError(f"there is no {what}; expected a run folder or a model; check the path")
            if not is_artifact(what):
                read_config(what)
            folder = str(DEMO_FOLDER) if what == "demo" else what
            found.append(_offer(Path(what).name if Path(what).is_dir() else what, folder))
            continue
        run = Run(Path(what))
        if run.done("distill") is None:
            raise UserError(f"{what} has no student yet; expected a finished run; run its compressor distill again")
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
    from compressor.checkpoint import count_parameters
    from compressor.run import read_json
    from compressor.runtime.in_torch import FLOAT32_LIMIT_BYTES, weight_bytes

    folder = Path(what)
    if not folder.is_dir():
        return Offer(name, what, None, None, teacher)
    if (folder / "export.json").is_file():
        manifest = read_json(folder / "export.json")
        widened = manifest["format"] == "gguf" and not find_spec("llama_cpp")  # transformers reads it into float32
        return Offer(
            name, what, manifest["bytes"], 4 * manifest["parameters"] if widened else manifest["bytes"], teacher
        )
    nbytes = weight_bytes(folder)
    widened = nbytes <= FLOAT32_LIMIT_BYTES
    return Offer(name, what, nbytes, 4 * count_parameters(folder) if widened else nbytes, teacher)
