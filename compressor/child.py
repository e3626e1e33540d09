"""Work in a process of its own, whose memory and whose end are its own: JSON lines in, JSON lines out.

The parent holds a `Child`; the child's main calls `answer` with an object whose methods are the commands:

    {"id": 1, "do": "load", "what": ...}  ->  {"id": 1, ...} for what the method returns or each thing it yields,
                                              {"id": 1, "error": one line} where it fails, and {"id": 1, "end": true}
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from itertools import count
from typing import Any

from .errors import UserError


class Child:
    """A running `python -m module`. name: what it runs, for messages.

    One thread asks at a time; any may `tell` and `close`.
    """

    def __init__(self, module: str, name: str) -> None:
        self.name = name
        self._talk = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the child; an unread pipe would fill up
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._talk}
        self._process: Any = subprocess.Popen([sys.executable, "-m", module], **pipes, text=True)
        self._writing = threading.Lock()
        self._numbers = count(1)
        self._heard: queue.Queue[dict[str, Any] | None] = queue.Queue()  # None: the child said its last
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def pid(self) -> int | None:
        """The process, while it lives."""
        return self._process.pid if self._process.poll() is None else None

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a command that gives one. Raises UserError with the child's own words."""
        found = list(self.answers(do, **arguments))  # to its end, so that nothing is left unread
        return found[0]

    def answers(self, do: str, *, tick: float | None = None, **arguments: Any) -> Iterator[dict[str, Any]]:
        """What a command gives, one after the other. Raises UserError as `ask`.

        tick: seconds after which {} is given where nothing else came. One may stop reading at any time: what the child
        still says to this command is skipped by the next.
        """
        number = self._say(do, arguments)
        while True:
            try:
                found = self._heard.get(timeout=tick)
            except queue.Empty:
                yield {}
                continue
            if found is None:
                self._heard.put(None)
                raise UserError(self._obituary())
            if found.pop("id") != number:
                continue
            if "error" in found:
                raise UserError(f"{self.name}: {found['error']}")
            if "end" in found:
                return
            yield found

    def tell(self, do: str, **arguments: Any) -> None:
        """Send a command and wait for nothing."""
        self._say(do, arguments)

    def close(self) -> None:
        """End the process; its memory is free when this returns."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _say(self, do: str, arguments: dict[str, Any]) -> int:
        number = next(self._numbers)
        with self._writing, contextlib.suppress(BrokenPipeError):  # listening tells of a dead child
            self._process.stdin.write(json.dumps({"id": number, "do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        return number

    def _listen(self) -> None:
        for line in self._process.stdout:
            if line.endswith("\n"):  # else the child was killed in the middle of it
                self._heard.put(json.loads(line))
        self._heard.put(None)

    def _obituary(self) -> str:
        code = self._process.wait()
        if code < 0:
            why = f"was killed by signal {-code}"
        else:
            self._talk.seek(0)
            said = (self._talk.read().strip().splitlines() or ["nothing"])[-1]
            why = f"ended with code {code} ({said[:200]})"
        return (
            f"the process of {self.name} {why}; expected it to answer; if memory ran out, choose a smaller model, else "
            "try again"
        )


def answer(commands: Any, *, at_once: tuple[str, ...] = ()) -> None:
    """Answer commands until the input ends, `at_once` those that must not wait for the one under way.

    Anything that a library prints goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    waiting: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] in at_once:
                command.pop("id")
                getattr(commands, command.pop("do"))(**command)
            else:
                waiting.put(command)
        waiting.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while (command := waiting.get()) is not None:
        number = {"id": command.pop("id")}
        try:
            found = getattr(commands, command.pop("do"))(**command)
            for one in [found] if isinstance(found, dict) else found:
                answers.write(json.dumps(number | one) + "\n")
            answers.write(json.dumps(number | {"end": True}) + "\n")
        except Exception as error:  # whatever it is, the parent shows one line
            said = " ".join(str(error).split()) or type(error).__name__
            answers.write(json.dumps(number | {"error": said}) + "\n")


__all__ = ["Child", "answer"]
