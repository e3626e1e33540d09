"""The models on offer, each in a child process that is started when it is first asked."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from compressor.errors import UserError
from compressor.units import size

ROOM = 1.3  # times its weights that a model takes once loaded
_numbers = count(1)


@dataclass(frozen=True)
class Offer:
    """One model that a person may choose: its name on the page, what it is, and its bytes on disk (None: unknown)."""

    name: str
    what: str
    nbytes: int | None


class Model:
    """A handle on one model: asleep, loading, ready or failed. One answer at a time; others wait their turn.

    threads: None leaves the choice to the runtime.
    """

    def __init__(self, offer: Offer, *, threads: int | None = None) -> None:
        self.offer = offer
        self.facts: dict[str, Any] = {}
        self._threads = threads
        self._turn = threading.Lock()
        self._writing = threading.Lock()
        self._child: Any = None
        self._talk: Any = None

    @property
    def state(self) -> str:
        """asleep, loading or ready."""
        if self._child is None or self._child.poll() is not None:
            return "asleep"
        return "ready" if self.facts else "loading"

    @property
    def pid(self) -> int | None:
        """The child's process, while it lives."""
        return None if self._child is None or self._child.poll() is not None else self._child.pid

    def stream(self, messages: list[dict[str, str]], **settings: Any) -> Generator[dict[str, Any], None, None]:
        """Yield {"state"} while it waits and loads, {"text"} as the answer grows, {"done": figures} at its end.

        Closing the iterator ends the answer and frees the model. Raises UserError with the model's own words.
        """
        while not self._turn.acquire(timeout=0.2):
            yield {"state": "waiting for its turn"}
        number = next(_numbers)
        over = True
        try:
            if self.state != "ready":
                yield {"state": "loading"}
                self._load()
            over = False
            for found in self._ask("stream", id=number, messages=messages, **settings):
                over = "done" in found
                yield found
                if over:
                    return
        except UserError:
            over = True
            raise
        finally:
            if not over:
                self._end(number)
            self._turn.release()

    def rate(self, messages: list[dict[str, str]], tools: Any, answer: list[int]) -> list[list[Any]]:
        """What this model gives each token of an answer: [text, probability, its own choice, whether they agree]."""
        with self._turn:
            if self.state != "ready":
                self._load()
            return next(self._ask("rate", messages=messages, tools=tools, answer=answer))["rated"]

    def close(self) -> None:
        """Stop the child and give its memory back."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._talk.close()
        self._child, self.facts = None, {}

    def _load(self) -> None:
        self.close()
        check_room(self.offer)
        self._talk = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the child; an unread pipe would fill up
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._talk}
        self._child = subprocess.Popen([sys.executable, "-m", "serve.worker"], **pipes, text=True)
        self.facts = next(self._ask("load", what=self.offer.what, threads=self._threads))["ready"]

    def _ask(self, do: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        self._write({"do": do, **arguments})
        while True:
            line = self._child.stdout.readline()
            if not line:
                raise UserError(self._obituary())
            found = json.loads(line)
            if "error" in found:
                if do == "load":
                    self.close()
                raise UserError(f"{self.offer.name}: {found['error']}")
            yield found

    def _write(self, command: dict[str, Any]) -> None:
        with self._writing, contextlib.suppress(BrokenPipeError, ValueError):  # reading tells of a dead child
            self._child.stdin.write(json.dumps(command) + "\n")
            self._child.stdin.flush()

    def _end(self, number: int) -> None:
        """End a stream that nobody reads any more, and take what it still had to say off the line."""
        self._write({"cancel": number})
        while line := self._child.stdout.readline():
            found = json.loads(line)
            if "done" in found or "error" in found:
                return

    def _obituary(self) -> str:
        code = self._child.wait()
        self._talk.seek(0)
        said = (self._talk.read().strip().splitlines() or ["nothing"])[-1]
        self.close()
        return (
            f"the process of {self.offer.name} ended with code {code} ({said[:200]}); expected it to answer; ask again "
            "to start it anew, or choose a smaller model if memory ran out"
        )


def check_room(offer: Offer) -> None:
    """Raise UserError for a model that this machine's free memory cannot hold, before it is loaded."""
    from export.machine import available_memory

    free = available_memory()
    if offer.nbytes is not None and free is not None and ROOM * offer.nbytes > free:
        raise UserError(
            f"{offer.name} needs about {size(int(ROOM * offer.nbytes))} and {size(free)} are free; expected room for "
            "it; close other models or choose a smaller one"
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
        found.append(_offer("teacher", str(resolve(teacher))))
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


def _offer(name: str, what: str) -> Offer:
    folder = Path(what)
    files = (
        [p for p in folder.rglob("*") if p.suffix in (".safetensors", ".gguf", ".onnx", ".data")]
        if folder.is_dir()
        else []
    )
    return Offer(name, what, sum(path.stat().st_size for path in files) or None)
