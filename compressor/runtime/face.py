"""What every runtime offers, and what all of them share: prompts, stops, text from tokens."""

import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from ..errors import UserError

log = logging.getLogger(__name__)

# How a base model, which has no chat template, is asked: a transcript that it continues.
TRANSCRIPT = (
    "{% if tools %}Tools:\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{{ '\n' }}{% endif %}"
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
TRANSCRIPT_STOPS = ("\n\nUser:", "\n\nSystem:", "\n\nTool:")


@runtime_checkable
class Runtime(Protocol):
    """What evaluation, benchmark and the app need of a model."""

    tokenizer: Any
    nbytes: int
    context: int
    stops: set[int]  # tokens that end an answer
    kv_bytes_per_value: int  # of the KV cache
    memory_bytes: int  # of the weights once loaded
    every_logit: bool  # whether `tokens` computes logits at every position of the prompt

    @property
    def parameters(self) -> int:
        """Of the model, however few bits each has."""
        ...

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (T,) -> logits (T, V) in float32."""
        ...

    def cached_logits(self, ids: torch.Tensor, *, prefill: int) -> torch.Tensor:
        """As `logits`, on the CPU; `prefill` tokens are read at once, the others one by one from the KV cache."""
        ...

    def tokens(
        self, ids: list[int], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0, ignore_eos: bool = False
    ) -> Iterator[int]:
        """Continue token ids one by one until a stop token, which is not yielded; `ignore_eos` goes past it."""
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

    def answers(
        self, prompts: Sequence[list[int]], *, max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        """The token ids that continue each prompt, which is token ids too; temperature 0 is greedy."""
        ...


class Speaker(ABC):
    """`stream`, `complete` and `answers` of a runtime that has `tokens`, a tokenizer and a context."""

    tokenizer: Any
    context: int

    @abstractmethod
    def tokens(
        self, ids: list[int], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0, ignore_eos: bool = False
    ) -> Iterator[int]:
        """As in `Runtime`."""

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
        found = self.tokens(prompt, max_new_tokens=room, temperature=temperature, seed=seed)
        yield from _cut(_pieces(found, self.tokenizer), stops)

    def complete(self, conversations: Sequence[dict], *, max_new_tokens: int = 256) -> list[str]:
        """Greedy answers, in the order of the conversations.

        A conversation that does not fit the model's context gets an empty answer and a warning.
        """
        prompts = [prompt_ids(conversation, self.tokenizer) for conversation in conversations]
        answers = self.answers(prompts, max_new_tokens=max_new_tokens)
        stops = TRANSCRIPT_STOPS if not self.tokenizer.chat_template else ()
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return ["".join(_cut(iter([text]), stops)).strip() for text in texts]

    def answers(
        self, prompts: Sequence[list[int]], *, max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        """The token ids that continue each prompt, which is token ids too; the stop token is left out.

        temperature 0 is greedy; else `seed` fixes the draws, which are independent from prompt to prompt.
        A prompt that does not fit the model's context gets an empty answer and a warning.
        """
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < self.context]
        if len(fitting) < len(prompts):
            log.warning("%d conversations exceed the context of %d tokens", len(prompts) - len(fitting), self.context)
        answers: list[list[int]] = [[] for _ in prompts]
        for i, answer in self._answers(prompts, fitting, max_new_tokens, temperature, seed):
            answers[i] = answer
        return answers

    def _answers(
        self, prompts: Sequence[list[int]], fitting: list[int], max_new_tokens: int, temperature: float, seed: int
    ) -> Iterator[tuple[int, list[int]]]:
        """(number of the prompt, its answer) for every prompt that fits; one after another, each with its own seed."""
        seeds = random.Random(seed)
        for i in fitting:
            room = min(max_new_tokens, self.context - len(prompts[i]))
            drawn = seeds.getrandbits(31)  # as large as every runtime takes
            yield i, list(self.tokens(prompts[i], max_new_tokens=room, temperature=temperature, seed=drawn))


def prompt_ids(conversation: dict, tokenizer: Any) -> list[int]:
    """The token ids that ask for an answer: the chat template's, or a transcript's for a model that has none.

    Raises UserError when the chat template refuses the conversation.
    """
    import jinja2

    from ..data.encoding import document_ends

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


def choose(logits_V: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """The likeliest token at temperature 0, else one drawn."""
    if temperature <= 0:
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))


def stop_ids(configured: int | list[int] | None, tokenizer: Any) -> set[int]:
    """Every token that ends an answer: the generation config's one or several, and the tokenizer's."""
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}


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
