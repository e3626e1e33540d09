"""An ONNX folder run by onnxruntime-genai: its graph with a KV cache, and the tokenizer that lies beside it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .face import Speaker, choose, stop_ids

GENAI_CONFIG = "genai_config.json"


class OnnxRuntime(Speaker):
    """A folder that `compressor export onnx` wrote; ids come from its tokenizer.json, as they do for transformers.

    threads: None leaves the choice to onnxruntime. Raises UserError for a folder that onnxruntime-genai cannot open.
    """

    def __init__(self, folder: Path | str, *, threads: int | None = None) -> None:
        from importlib import import_module

        from ..checkpoint import load_tokenizer

        genai: Any = import_module("onnxruntime_genai")  # a compiled module without types
        genai.disable_telemetry_events()
        self.folder = Path(folder)
        self._genai = genai
        try:
            settings = json.loads((self.folder / GENAI_CONFIG).read_text(encoding="utf-8"))["model"]
            config = genai.Config(str(self.folder))
            if threads is not None:
                options = {"session_options": {"intra_op_num_threads": threads}}
                config.overlay(json.dumps({"model": {"decoder": options}}))
            self._model = genai.Model(config)
            graph = self.folder / settings["decoder"]["filename"]
            self.context: int = settings["context_length"]
            self.vocab: int = settings["vocab_size"]
            stops = settings["eos_token_id"]
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"onnxruntime-genai cannot open {folder} ({why}); expected a folder written by compressor export onnx; "
                "export it again"
            ) from error
        self.kv_bytes_per_value = 2 if _half(graph) else 4
        self.every_logit = True
        self.nbytes = self.memory_bytes = sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*"))
        self.tokenizer = load_tokenizer(self.folder)
        self.stops = stop_ids(stops, self.tokenizer)

    @property
    def parameters(self) -> int:
        """Of the model; counted when asked for, since transformers builds a model whose family has no row."""
        from ..checkpoint import count_parameters

        return count_parameters(self.folder)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (T,) -> logits (T, V) in float32."""
        return self._logits(self._generator(len(ids) + 1), ids.tolist())

    def cached_logits(self, ids: torch.Tensor, *, prefill: int) -> torch.Tensor:
        """As `logits`, but `prefill` tokens are read at once and the others one by one from the KV cache."""
        generator = self._generator(len(ids) + 1)
        parts = [ids[:prefill].tolist(), *([int(token)] for token in ids[prefill:])]
        return torch.cat([self._logits(generator, part) for part in parts])

    def tokens(
        self, ids: list[int], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0, ignore_eos: bool = False
    ) -> Iterator[int]:
        """Continue token ids one by one until a stop token, which is not yielded; `ignore_eos` goes past it."""
        # the runtime's own search would need another way to go past a stop, and draws other random numbers than torch
        random = torch.Generator().manual_seed(seed)
        count = min(max_new_tokens, self.context - len(ids))
        generator = self._generator(len(ids) + count)
        fresh = ids
        for _ in range(count):
            generator.append_tokens(_int32(fresh))
            logits_V = torch.from_numpy(self._array(generator.get_logits()).reshape(-1, self.vocab)[-1])
            token = choose(logits_V, temperature, random)
            if token in self.stops and not ignore_eos:
                return
            yield token
            fresh = [token]

    def _generator(self, length: int) -> Any:
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=length, do_sample=False, num_beams=1, repetition_penalty=1.0)
        return self._genai.Generator(self._model, params)

    def _logits(self, generator: Any, ids: list[int]) -> torch.Tensor:
        generator.append_tokens(_int32(ids))
        return torch.from_numpy(self._array(generator.get_output("logits"))[0])

    @staticmethod
    def _array(values: Any) -> Any:
        import numpy

        return numpy.array(values, dtype=numpy.float32)


def _half(graph: Path) -> bool:
    """Whether a graph keeps its KV cache in 16 bits."""
    import onnx_ir

    inputs = onnx_ir.load(graph).graph.inputs
    return any(value.dtype == onnx_ir.DataType.FLOAT16 for value in inputs)


def _int32(ids: list[int]) -> Any:
    import numpy

    return numpy.asarray(ids, dtype=numpy.int32)
