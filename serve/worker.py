"""One model in a process of its own, so that a page outlives it: JSON lines in, JSON lines out.

{"do": "load", "what": ...}                                    -> {"ready": facts}
{"do": "stream", "id": 1, "messages": [...], ...}              -> {"text": ...}* {"done": figures}
{"do": "rate", "messages": [...], "answer": ids}               -> {"rated": [[text, probability, best], ...]}
{"cancel": 1}                                                  ends that stream at its next token
Whatever fails is {"error": one line}.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any


class Worker:
    """The commands, by name; each yields what is written."""

    def __init__(self) -> None:
        self.runtime: Any = None
        self.cancelled = -1  # the stream that is to end

    def load(self, what: str, threads: int | None = None) -> Iterator[dict[str, Any]]:
        """Open the model."""
        from compressor import runtime as runtimes

        self.runtime = runtimes.load(what, threads=threads)
        facts = {"runtime": runtimes.name_of(self.runtime), "context": self.runtime.context}
        yield {"ready": facts | {"bytes": self.runtime.nbytes, "parameters": self.runtime.parameters}}

    def stream(
        self,
        id: int,
        messages: list[dict[str, str]],
        tools: list[dict[str, Any]] | None,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> Iterator[dict[str, Any]]:
        """Answer in pieces, then tell how fast: seconds to the first token, tokens per second after it."""
        from export.memory import reset_peak, resident

        clock, tokens = _Clock(self, id), self.runtime.tokens
        reset_peak()
        self.runtime.tokens = lambda *args, **kwargs: clock.watch(tokens(*args, **kwargs))
        started = time.perf_counter()
        try:
            sizes = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
            for text in self.runtime.stream(messages, tools or None, **sizes):
                yield {"text": text}
        finally:
            self.runtime.tokens = tokens
        first, last = (clock.times[0], clock.times[-1]) if clock.times else (started, started)
        count = len(clock.ids)
        rate = (count - 1) / (last - first) if count > 1 else None
        yield {
            "done": {
                "ids": clock.ids,
                "tokens": count,
                "ttft_s": first - started if count else None,
                "tokens_per_s": rate,
                "peak_rss_bytes": resident("VmHWM"),
                "stopped": self.cancelled == id,
            }
        }

    def rate(
        self, messages: list[dict[str, str]], tools: list[dict[str, Any]] | None, answer: list[int]
    ) -> Iterator[dict[str, Any]]:
        """What this model gives each token of another's answer, in one pass."""
        import torch

        from compressor.runtime import prompt_ids

        tokenizer = self.runtime.tokenizer
        prompt = prompt_ids({"messages": messages, "tools": tools or None}, tokenizer)
        answer = answer[: max(0, self.runtime.context - len(prompt) - 1)]
        if not answer:
            yield {"rated": []}
            return
        logits_TV = self.runtime.logits(torch.tensor(prompt + answer))[len(prompt) - 1 : -1]
        chances_TV = logits_TV.softmax(-1)
        best_T = chances_TV.argmax(-1).tolist()
        chances_T = chances_TV[torch.arange(len(answer)), torch.tensor(answer)].tolist()
        rows = [
            [tokenizer.decode([token]), chance, tokenizer.decode([best]), token == best]
            for token, chance, best in zip(answer, chances_T, best_T, strict=True)
        ]
        yield {"rated": rows}


class _Clock:
    """Watches tokens pass: what they are, when they came, and whether somebody has had enough."""

    def __init__(self, worker: Worker, id: int) -> None:
        self._worker, self._id = worker, id
        self.ids: list[int] = []
        self.times: list[float] = []

    def watch(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            self.ids.append(token)
            self.times.append(time.perf_counter())
            yield token
            if self._worker.cancelled == self._id:
                return


def main() -> None:
    """Answer commands until the input ends. Anything a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker, commands = Worker(), queue.Queue[dict[str, Any] | None]()

    def listen() -> None:  # beside the work, so that a cancellation is heard during it
        for line in sys.stdin:
            command = json.loads(line)
            if "cancel" in command:
                worker.cancelled = command["cancel"]
            else:
                commands.put(command)
        commands.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while (command := commands.get()) is not None:
        try:
            for found in getattr(worker, command.pop("do"))(**command):
                answers.write(json.dumps(found) + "\n")
        except Exception as error:  # whatever it is, the page shows one line
            answers.write(json.dumps({"error": " ".join(str(error).split()) or type(error).__name__}) + "\n")


if __name__ == "__main__":
    main()
