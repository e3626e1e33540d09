"""A Hugging Face folder run by transformers.

Shape suffixes: B rows, T positions, N positions picked out of a row, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .face import Speaker, stop_ids

# Above this many bytes on disk a CPU keeps the stored precision: float32 would double the memory.
FLOAT32_LIMIT_BYTES = 4 * 2**30


class TorchRuntime(Speaker):
    """A Hugging Face folder run by transformers.

    dtype: None means float32 on a CPU (unless the weights are beyond 4 GiB) and the stored precision
    elsewhere. gguf_file: read the weights from this file of the folder instead, into float32.
    device: None means cuda where there is one, else cpu. Raises what `checkpoint.load_model` raises.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        batch_size: int = 64,
        gguf_file: str | None = None,
    ) -> None:
        from .. import checkpoint

        self.folder = Path(folder)
        self.nbytes = (self.folder / gguf_file).stat().st_size if gguf_file else weight_bytes(self.folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if dtype is None and device == "cpu" and self.nbytes <= FLOAT32_LIMIT_BYTES:
            dtype = torch.float32
        tokenizer = checkpoint.load_tokenizer(self.folder)
        if gguf_file:
            model: Any = checkpoint.load_gguf(self.folder, gguf_file, device=device)
        else:
            model = checkpoint.load_model(self.folder, dtype=dtype, device=device)
        self._hold(model, tokenizer, batch_size)

    @classmethod
    def around(cls, model: Any, tokenizer: Any, *, batch_size: int = 64) -> "TorchRuntime":
        """Of a model that is in memory already, in eval mode; there is no folder to it."""
        runtime = cls.__new__(cls)
        runtime.folder, runtime.nbytes = Path(), 0
        runtime._hold(model, tokenizer, batch_size)
        return runtime

    def _hold(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.parameters: int = model.num_parameters()  # which counts packed weights, not bytes
        self.kv_bytes_per_value: int = model.dtype.itemsize
        self.memory_bytes: int = model.get_memory_footprint()
        self.every_logit = False
        self.context = getattr(model.config, "max_position_embeddings", None) or 2**31
        self.stops = stop_ids(model.generation_config.eos_token_id, tokenizer)

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (T,) -> logits (T, V) in float32."""
        ids = ids.to(self.model.device).unsqueeze(0)
        return self.model(input_ids=ids, use_cache=False).logits[0].float()

    @torch.inference_mode()
    def cached_logits(self, ids: torch.Tensor, *, prefill: int) -> torch.Tensor:
        """As `logits`, but `prefill` tokens are read at once and the others one by one from the KV cache."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        parts = (ids[:prefill], *ids[prefill:].split(1)) if prefill < len(ids) else (ids,)
        found = [
            self.model(input_ids=part.to(self.model.device).unsqueeze(0), past_key_values=cache, use_cache=True)
            for part in parts
        ]
        return torch.cat([step.logits[0].float().cpu() for step in found])

    @torch.inference_mode()
    def picked_logits(
        self,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor,
        picked_BT: torch.Tensor,
        *,
        chunk: int,
    ) -> Iterator[torch.Tensor]:
        """Logits (N, V) in float32 at the picked positions, at most `chunk` at a time, row after row.

        The hidden states are computed once; only a chunk of them goes through the head at any time.
        """
        device = self.model.device
        hidden_BTH = self.model.base_model(
            input_ids=input_ids_BT.to(device), position_ids=position_ids_BT.to(device), use_cache=False
        ).last_hidden_state
        head = self.model.get_output_embeddings()
        for hidden_TH, picked_T in zip(hidden_BTH, picked_BT.to(device), strict=True):
            for hidden_NH in hidden_TH[picked_T].split(chunk):
                yield head(hidden_NH).float()

    def tokens(
        self, ids: list[int], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0, ignore_eos: bool = False
    ) -> Iterator[int]:
        """Continue token ids one by one until a stop token, which is not yielded; `ignore_eos` goes past it."""
        stops = set() if ignore_eos else self.stops
        generator = torch.Generator(self.model.device).manual_seed(seed)
        for ((_, token),) in self._decode([ids], max_new_tokens, stops, temperature, generator):
            yield token

    def _answers(
        self, prompts: Sequence[list[int]], fitting: list[int], max_new_tokens: int, temperature: float, seed: int
    ) -> Iterator[tuple[int, list[int]]]:
        """Batched by length, padded on the left. One generator draws for all batches, so their size counts too."""
        generator = torch.Generator(self.model.device).manual_seed(seed)
        fitting = sorted(fitting, key=lambda i: len(prompts[i]))
        for start in range(0, len(fitting), self.batch_size):
            rows = fitting[start : start + self.batch_size]
            room = min(max_new_tokens, self.context - max(len(prompts[i]) for i in rows))
            answers: list[list[int]] = [[] for _ in rows]
            for step in self._decode([prompts[i] for i in rows], room, self.stops, temperature, generator):
                for row, token in step:
                    answers[row].append(token)
            yield from zip(rows, answers, strict=True)

    @torch.inference_mode()
    def _decode(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        stop_ids: set[int],
        temperature: float,
        generator: torch.Generator,
    ) -> Iterator[list[tuple[int, int]]]:
        """Yield, per step, (row, token) for every row still going; stop tokens end a row and are not
        yielded.
        """
        from transformers import DynamicCache

        device = self.model.device
        stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
        width = max(len(prompt) for prompt in prompts)
        ids_BT = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        rows = torch.arange(len(prompts), device=device)
        going = torch.ones_like(rows, dtype=torch.bool)
        cache = DynamicCache(config=self.model.config)
        for _ in range(max_new_tokens):
            logits_BV = self.model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            if temperature > 0:
                chances_BV = (logits_BV.float() / temperature).softmax(-1)
                tokens_B = torch.multinomial(chances_BV, 1, generator=generator).flatten()
            else:
                tokens_B = logits_BV.argmax(-1)
            going &= ~torch.isin(tokens_B, stops)
            if not going.any():
                return
            yield list(zip(rows[going].tolist(), tokens_B[going].tolist(), strict=True))
            positions_BT = positions_BT[:, -1:] + 1
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], 1)
            # A few long answers must not drag the finished rows along.
            if len(going) > 4 and 4 * int(going.sum()) <= 3 * len(going):
                kept = going.nonzero().flatten()
                cache.batch_select_indices(kept)
                rows, tokens_B, mask_BT, positions_BT = (x[kept] for x in (rows, tokens_B, mask_BT, positions_BT))
                going = going[kept]
            ids_BT = tokens_B.unsqueeze(1)


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files in a model folder."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
