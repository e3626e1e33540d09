"""Runtime: one face for every model that is judged, whatever runs it.

Evaluation, benchmark and the app speak to this face only, so the code that judged the torch student also
judges its exported, quantized copies. A conversation is {"messages": [...], "tools"?: [...]}.

Shape suffixes: B rows, T positions, N positions picked out of a row, V vocabulary.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from .errors import UserError

log = logging.getLogger(__name__)

# Above this many bytes on disk a CPU keeps the stored precision: float32 would double the memory.
FLOAT32_LIMIT_BYTES = 4 * 2**30
# How a base model, which has no chat template, is asked: a transcript that it continues.
TRANSCRIPT = (
    "{% if tools %}Tools:\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{{ '\n' }}{% endif %}"
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
TRANSCRIPT_STOPS = ("\n\nUser:", "\n\nSystem:", "\n\nTool:")


@runtime_checkable
class Runtime(Protocol):
    """What evaluation needs of a model."""

    tokenizer: Any
    nbytes: int
    parameters: int

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (T,) -> logits (T, V) in float32."""
        ...

    def stream(
        self,
        messages: list[dict],
        tools: list | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Yield the answer in pieces of whole characters; temperature 0 is greedy."""
        ...

    def complete(self, conversations: Sequence[dict], *, max_new_tokens: int = 256) -> list[str]:
        """Greedy answers, in the order of the conversations."""
        ...


class TorchRuntime:
    """A Hugging Face folder run by transformers.

    dtype: None means float32 on a CPU (unless the weights are beyond 4 GiB) and the stored precision
    elsewhere.
    device: None means cuda where there is one, else cpu. Raises what `checkpoint.load_model` raises.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        batch_size: int = 64,
    ) -> None:
        from . import checkpoint

        self.folder = Path(folder)
        self.batch_size = batch_size
        self.nbytes = weight_bytes(self.folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if dtype is None and device == "cpu" and self.nbytes <= FLOAT32_LIMIT_BYTES:
            dtype = torch.float32
        self.tokenizer = checkpoint.load_tokenizer(self.folder)
        self.model: Any = checkpoint.load_model(self.folder, dtype=dtype, device=device)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.context = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        self.stops = stop_ids(self.model.generation_config, self.tokenizer)

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (T,) -> logits (T, V) in float32."""
        ids = ids.to(self.model.device).unsqueeze(0)
        return self.model(input_ids=ids, use_cache=False).logits[0].float()

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

    def stream(
        self,
        messages: list[dict],
        tools: list | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Yield the answer in pieces of whole characters; temperature 0 is greedy, `seed` fixes the draw.

        Raises UserError when the conversation does not fit the model's context.
        """
        prompt = prompt_ids({"messages": messages, "tools": tools}, self.tokenizer)
        if len(prompt) >= self.context:
            raise UserError(
                f"the conversation has {len(prompt)} tokens; expected fewer than the model's context of "
                f"{self.context}; shorten it"
            )
        room = min(max_new_tokens, self.context - len(prompt))
        stops = TRANSCRIPT_STOPS if not self.tokenizer.chat_template else ()
        tokens = (token for ((_, token),) in self._decode([prompt], room, temperature=temperature, seed=seed))
        yield from _cut(_pieces(tokens, self.tokenizer), stops)

    def complete(self, conversations: Sequence[dict], *, max_new_tokens: int = 256) -> list[str]:
        """Greedy answers, in the order of the conversations; batched by length, padded on the left.

        A conversation that does not fit the model's context gets an empty answer and a warning.
        """
        prompts = [prompt_ids(conversation, self.tokenizer) for conversation in conversations]
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < self.context]
        if len(fitting) < len(prompts):
            log.warning("%d conversations exceed the context of %d tokens", len(prompts) - len(fitting), self.context)
        fitting.sort(key=lambda i: len(prompts[i]))
        answers: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(fitting), self.batch_size):
            rows = fitting[start : start + self.batch_size]
            room = min(max_new_tokens, self.context - max(len(prompts[i]) for i in rows))
            for step in self._decode([prompts[i] for i in rows], room):
                for row, token in step:
                    answers[rows[row]].append(token)
        stops = TRANSCRIPT_STOPS if not self.tokenizer.chat_template else ()
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return ["".join(_cut(iter([text]), stops)).strip() for text in texts]

    @torch.inference_mode()
    def _decode(
        self, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[list[tuple[int, int]]]:
        """Yield, per step, (row, token) for every row still going; stop tokens end a row and are not
        yielded.
        """
        from transformers import DynamicCache

        device = self.model.device
        generator = torch.Generator(device).manual_seed(seed)
        stops = torch.tensor(sorted(self.stops), device=device)
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


def prompt_ids(conversation: dict, tokenizer: Any) -> list[int]:
    """The token ids that ask for an answer: the chat template's, or a transcript's for a model that has none.

    Raises UserError when the chat template refuses the conversation.
    """
    import jinja2

    from .data.encoding import document_ends

    plain = not tokenizer.chat_template
    try:
        text = tokenizer.apply_chat_template(
            conversation["messages"],
            tools=conversation.get("tools") or None,
            chat_template=TRANSCRIPT if plain else None,
            add_generation_prompt=True,
            tokenize=False,
        )
    except jinja2.TemplateError as error:
        raise UserError(
            f"the chat template refuses a conversation: {error}; expected roles it knows, in its order"
        ) from error
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return document_ends(tokenizer)[0] + ids if plain else ids


def stop_ids(generation_config: Any, tokenizer: Any) -> set[int]:
    """Every token that ends an answer: the generation config's one or several, and the tokenizer's."""
    configured = getattr(generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files in a model folder."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _pieces(tokens: Iterator[int], tokenizer: Any) -> Iterator[str]:
    """Text as it becomes final: a character whose bytes are spread over tokens waits for the last of them."""
    window: list[int] = []
    told = 0  # characters of the window's text already given out
    for token in tokens:
        window.append(token)
        text = tokenizer.decode(window, skip_special_tokens=True)
        if text.endswith("\ufffd") or len(text) <= told:
            continue
        yield text[told:]
        told = len(text)
        # Start a new window at a line end; within it, earlier tokens decide about the spaces around later
        # ones.
        if text.endswith("\n"):
            window, told = [token], len(tokenizer.decode([token], skip_special_tokens=True))
    rest = tokenizer.decode(window, skip_special_tokens=True)[told:]
    if rest:
        yield rest


def _cut(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """Pass pieces on until one of `stops` appears; text that may be the start of a stop is held back."""
    held = ""
    for piece in pieces:
        held += piece
        found = [held.index(stop) for stop in stops if stop in held]
        if found:
            yield held[: min(found)]
            return
        keep = max(
            (n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])),
            default=0,
        )
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held
