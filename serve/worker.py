"""One model in a process of its own, so that a page outlives it.

{"do": "load", "what": ...}                                 -> facts
{"do": "stream", "id": 1, "messages": [...], ...}           -> {"text": ...}* {"done": figures}
{"do": "rate", "messages": [...], "answer": ids}            -> {"rated": [[text, probability, best, agrees], ...]}
{"do": "cancel", "id": 1}                                   ends that stream at its next token
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from compressor.child import answer


class Worker:
    """The commands, by name; each yields what is written."""

    def __init__(self) -> None:
        self.runtime: Any = None
        self.cancelled = -1  # the stream that is to end

    def cancel(self, id: int) -> None:
        """End a stream; whoever reads it gets its figures all the same."""
        self.cancelled = id

    def load(self, what: str, threads: int | None = None) -> dict[str, Any]:
        """Open the model."""
        from compressor import runtime as runtimes

        self.runtime = runtimes.load(what, threads=threads)
        return {
            "runtime": runtimes.name_of(self.runtime),
            "context": self.runtime.context,
            "bytes": self.runtime.nbytes,
            "parameters": self.runtime.parameters,
        }

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
    ) -> dict[str, Any]:
        """What this model gives each token of another's answer, in one pass."""
        import torch

        from compressor.runtime import prompt_ids

        tokenizer = self.runtime.tokenizer
        prompt = prompt_ids({"messages": messages, "tools": tools or None}, tokenizer)
        answer = answer[: max(0, self.runtime.context - len(prompt) - 1)]
        if not answer:
            return {"rated": []}
        logits_TV = self.runtime.logits(torch.tensor(prompt + answer))[len(prompt) - 1 : -1]
        chances_TV = logits_TV.softmax(-1)
        best_T = chances_TV.argmax(-1).tolist()
        chances_T = chances_TV[torch.arange(len(answer)), torch.tensor(answer)].tolist()
        rows = [
            [tokenizer.decode([token]), chance, tokenizer.decode([best]), token == best]
            for token, chance, best in zip(answer, chances_T, best_T, strict=True)
        ]
        return {"rated": rows}


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


if __name__ == "__main__":
    answer(Worker(), at_once=("cancel",))
