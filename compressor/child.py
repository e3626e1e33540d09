"""Work in a process of its own, whose memory and whose end are its own: JSON lines in, JSON lines out.

The parent holds a `Child`; the child's main calls `answer` with an object whose methods are the commands:

    {"do": "load", "what": ...}  ->  what the method returns, or each thing it yields

or {"error": one line} where it fails.
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
from typing import Any

from .errors import UserError


class Child:
    """A running `python -m module`. name: what it runs, for messages. One thread asks; any may `tell`."""

    def __init__(self, module: str, name: str) -> None:
        self.name = name
        self._talk = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the child; an unread pipe would fill up
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._talk}
        self._process: Any = subprocess.Popen([sys.executable, "-m", module], **pipes, text=True)
        self._writing = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The process, while it lives."""
        return self._process.pid if self._process.poll() is None else None

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a command that gives one. Raises UserError with the child's own words."""
        return next(self.answers(do, **arguments))

    def answers(self, do: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """What a command gives, without end: the caller knows the last one. Raises UserError as `ask`."""
        self.tell(do, **arguments)
        while True:
            line = self._process.stdout.readline()
            if not line:
                raise UserError(self._obituary())
            found = json.loads(line)
            if "error" in found:
                raise UserError(f"{self.name}: {found['error']}")
            yield found

    def tell(self, do: str, **arguments: Any) -> None:
        """Send a command and wait for nothing."""
        with self._writing, contextlib.suppress(BrokenPipeError, ValueError):  # reading tells of a dead child
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """End the process; its memory is free when this returns."""
        self._process.kill()
        self._process.communicate()
        self._talk.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _obituary(self) -> str:
        code = self._process.wait()
        self._talk.seek(0)
        said = (self._talk.read().strip().splitlines() or ["nothing"])[-1]
        return (
            f"the process of {self.name} ended with code {code} ({said[:200]}); expected it to answer; "
            "if memory ran out, choose a smaller model"
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
                getattr(commands, command.pop("do"))(**command)
            else:
                waiting.put(command)
        waiting.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while (command := waiting.get()) is not None:
        try:
            found = getattr(commands, command.pop("do"))(**command)
            for one in [found] if isinstance(found, dict) else found:
                answers.write(json.dumps(one) + "\n")
        except Exception as error:  # whatever it is, the parent shows one line
            answers.write(json.dumps({"error": " ".join(str(error).split()) or type(error).__name__}) + "\n")


__all__ = ["Child", "answer"]
