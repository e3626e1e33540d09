"""One model in a process of its own, so that a page outlives it.

{"do": "load", "what": ...}                                       -> facts
{"do": "stream", "key": 1, "messages": [...], ...}                -> {"text": ...}* {"done": figures}
{"do": "rate", "messages": [...], "answer": ids, "tokenizer": h}  -> {"rated": [[text, probability, best, agrees], ...]}
{"do": "cancel", "key": 1}                                        ends that stream at its next token
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from typing import Any

from compressor.child import answer
from compressor.errors import UserError
from compressor.memory import reset_peak, resident


class Worker:
    """The commands, by name."""

    def __init__(self) -> None:
        self.runtime: Any = None
        self.tokenizer = ""  # a fingerprint: what a token id means
        self.cancelled = -1  # the stream that is to end

    def load(self, what: str, threads: int | None = None) -> dict[str, Any]:
        """Open the model."""
        import torch

        from compressor import runtime

        if threads:
            torch.set_num_threads(threads)
        self.runtime = runtime.load(what, threads=threads)
        known = json.dumps(self.runtime.tokenizer.get_vocab(), sort_keys=True)
        self.tokenizer = hashlib.sha256(known.encode()).hexdigest()
        return {"bytes": self.runtime.nbytes, "parameters": self.runtime.parameters}

    def cancel(self, key: int) -> None:
        """End a stream; whoever reads it gets its figures all the same."""
        self.cancelled = key

    def stream(
        self,
        key: int,
        messages: list[dict[str, str]],
        tools: list[dict[str, Any]] | None,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> Iterator[dict[str, Any]]:
        """Answer in pieces, then tell how fast: seconds to the first token, tokens per second after it."""
        clock, tokens = _Clock(self, key), self.runtime.tokens
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
                "tokenizer": self.tokenizer,
                "tokens": count,
                "ttft_s": first - started if count else None,
                "tokens_per_s": rate,
                "peak_rss_bytes": resident("VmHWM"),
                "stopped": self.cancelled == key,
            }
        }

    def rate(
        self, messages: list[dict[str, str]], tools: list[dict[str, Any]] | None, answer: list[int], tokenizer: str
    ) -> dict[str, Any]:
        """What this model gives each token of another's answer, in one pass. Raises UserError for other tokens."""
        import torch

        from compressor.runtime import prompt_ids

        if tokenizer != self.tokenizer:
            raise UserError("the other model has another tokenizer; expected the same one to compare token by token")
        decode = self.runtime.tokenizer.decode
        prompt = prompt_ids({"messages": messages, "tools": tools or None}, self.runtime.tokenizer)
        answer = answer[: max(0, self.runtime.context - len(prompt) - 1)]
        if not answer:
            return {"rated": []}
        logits_TV = self.runtime.logits(torch.tensor(prompt + answer))[len(prompt) - 1 : -1]
        log_total_T = logits_TV.logsumexp(-1)
        chances_T = (logits_TV[torch.arange(len(answer)), torch.tensor(answer)] - log_total_T).exp().tolist()
        best_T = logits_TV.argmax(-1).tolist()
        rows = [
            [decode([token]), chance, decode([best]), token == best]
            for token, chance, best in zip(answer, chances_T, best_T, strict=True)
        ]
        return {"rated": rows}


class _Clock:
    """Watches tokens pass: what they are, when they came, and whether somebody has had enough."""

    def __init__(self, worker: Worker, key: int) -> None:
        self._worker, self._key = worker, key
        self.ids: list[int] = []
        self.times: list[float] = []

    def watch(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            if self._worker.cancelled == self._key:
                return
            self.ids.append(token)
            self.times.append(time.perf_counter())
            yield token


if __name__ == "__main__":
    answer(Worker(), at_once=("cancel",))
