"""A GGUF file run by llama.cpp where llama-cpp-python is installed, else read by transformers into float32."""

import json
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .face import Runtime, Speaker, stop_ids
from .in_torch import TorchRuntime

FILE = "model.gguf"
FIRST_CONTEXT = 512  # tokens; room grows by as many


def open_gguf(folder: Path | str, *, engine: str | None = None, threads: int | None = None) -> Runtime:
    """The runtime of a GGUF folder. engine: "llama.cpp" or "transformers"; None takes llama.cpp where it is there."""
    engine = engine or ("llama.cpp" if find_spec("llama_cpp") else "transformers")
    if engine == "llama.cpp":
        return LlamaCppRuntime(folder, threads=threads)
    return TorchRuntime(folder, gguf_file=FILE)


class LlamaCppRuntime(Speaker):
    """llama.cpp through llama-cpp-python; ids come from the tokenizer beside the file.

    llama.cpp takes the memory of its KV cache when it opens a file, so it is opened for as many tokens as are asked
    for, and again where more are. Raises UserError for a file that llama.cpp cannot open.
    """

    kv_bytes_per_value = 2  # float16, llama.cpp's default
    every_logit = False

    def __init__(self, folder: Path | str, *, threads: int | None = None) -> None:
        from ..checkpoint import load_tokenizer, read_config
        from ..shape import Shape

        self.folder = Path(folder)
        config = read_config(self.folder)
        self.context: int = config["max_position_embeddings"]
        self.parameters = Shape.from_config(config).parameters
        self.nbytes = self.memory_bytes = (self.folder / FILE).stat().st_size
        self.tokenizer = load_tokenizer(self.folder)
        self.stops = stop_ids(_eos(self.folder, config), self.tokenizer)
        self._threads = threads
        self._models: dict[bool, Any] = {}  # every position's logits kept, or the last one's -> the open model
        self._open(FIRST_CONTEXT, every_logit=False)

    def _open(self, tokens: int, *, every_logit: bool) -> Any:
        """The open model with room for so many tokens, nothing read yet."""
        model = self._models.get(every_logit)
        if model is None or model.n_ctx() < tokens:
            room = min(self.context, -(-tokens // FIRST_CONTEXT) * FIRST_CONTEXT)
            model = self._models[every_logit] = self._load(room, every_logit=every_logit)
        model.reset()
        return model

    def _load(self, context: int, *, every_logit: bool) -> Any:
        llama_cpp: Any = import_module("llama_cpp")  # installed by those who want it
        threads: dict[str, Any] = (
            {} if self._threads is None else {"n_threads": self._threads, "n_threads_batch": self._threads}
        )
        path = str(self.folder / FILE)
        try:
            return llama_cpp.Llama(path, n_ctx=context, logits_all=every_logit, verbose=False, **threads)
        except (ValueError, AssertionError) as error:
            raise UserError(
                f"llama.cpp cannot open {path} ({error}); expected a file written by compressor export gguf; "
                "export it again"
            ) from error

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (T,) -> logits (T, V) in float32."""
        return self.cached_logits(ids, prefill=len(ids))

    def cached_logits(self, ids: torch.Tensor, *, prefill: int) -> torch.Tensor:
        """As `logits`, but `prefill` tokens are read at once and the others one by one from the KV cache."""
        import numpy

        model = self._open(len(ids), every_logit=True)
        for part in (ids[:prefill].tolist(), *([int(token)] for token in ids[prefill:])):
            model.eval(part)
        return torch.from_numpy(numpy.array(model.scores[: len(ids)], dtype=numpy.float32))

    def tokenize(self, text: str) -> list[int]:
        """Token ids as llama.cpp itself reads text, special tokens in it included."""
        return list(self._open(1, every_logit=False).tokenize(text.encode(), add_bos=False, special=True))

    def tokens(
        self, ids: list[int], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0, ignore_eos: bool = False
    ) -> Iterator[int]:
        """Continue token ids one by one until a stop token, which is not yielded; `ignore_eos` goes past it."""
        count = min(max_new_tokens, self.context - len(ids))
        model = self._open(len(ids) + count, every_logit=False)
        model.set_seed(seed)
        options = {"temp": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
        found = model.generate(ids, reset=False, **options)
        for _ in range(count):
            token = next(found)
            if token in self.stops and not ignore_eos:
                return
            yield token


def _eos(folder: Path, config: dict[str, Any]) -> int | list[int] | None:
    """What ends an answer: generation_config.json says so where there is one, as for transformers."""
    path = folder / "generation_config.json"
    stated = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return stated.get("eos_token_id", config.get("eos_token_id"))
