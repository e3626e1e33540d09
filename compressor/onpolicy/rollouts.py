"""Answers sampled from student and teacher together, with the log-probabilities the objective needs.

Shape suffixes: B rows, P prompt positions, T answer positions, L = P + T, N answer tokens of all rows, V shared ids,
H teacher width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..data import IGNORED, Batch, hidden_states, targets
from ..errors import UserError
from ..losses import token_log_probs
from ..run import write_bytes


@dataclass(frozen=True)
class Rollouts:
    """Answers to a batch of prompts. Values at padding are 0; log-probabilities are in nats.

    Prompts are padded on the left, answers on the right; an answer ends with its end-of-sequence token, which counts,
    or where it was cut off. `log_mix_BT` is of the distribution the tokens were drawn from, temperature included;
    `log_q_BT` (the student as it was) and `log_p_BT` (the teacher; None where it was not asked) are at temperature 1.
    """

    prompt_ids_BP: Tensor
    prompt_mask_BP: Tensor  # bool, as mask_BT
    ids_BT: Tensor
    mask_BT: Tensor
    log_mix_BT: Tensor
    log_q_BT: Tensor
    log_p_BT: Tensor | None = None

    @property
    def rewards(self) -> Tensor:
        """r_t = log p - log q_old, (B, T) in nats (paper, section 2.1). Raises UserError while log p is unknown."""
        if self.log_p_BT is None:
            raise UserError(
                "rewards need the teacher's log-probabilities; expected a teacher's answer; call score first"
            )
        return self.log_p_BT - self.log_q_BT

    def batch(self) -> Batch:
        """input_ids, labels and attention_mask (B, L) for a model: the targets are the answer tokens, row by row."""
        no_labels_BP = torch.full_like(self.prompt_ids_BP, IGNORED)
        return {
            "input_ids": torch.cat([self.prompt_ids_BP, self.ids_BT], 1),
            "labels": torch.cat([no_labels_BP, self.ids_BT.where(self.mask_BT, IGNORED)], 1),
            "attention_mask": torch.cat([self.prompt_mask_BP, self.mask_BT], 1).long(),
        }

    def rows(self, **columns_BT: Tensor) -> list[dict[str, Tensor]]:
        """Each prompt with its answer, without padding, as rows for `data.collate`; `columns_BT` are 0 over prompts."""
        rows = []
        for number in range(len(self.ids_BT)):
            prompt_P, mask_T = self.prompt_ids_BP[number][self.prompt_mask_BP[number]], self.mask_BT[number]
            answer_T = self.ids_BT[number][mask_T]
            row = {
                "input_ids": torch.cat([prompt_P, answer_T]),
                "labels": torch.cat([torch.full_like(prompt_P, IGNORED), answer_T]),
                "attention_mask": torch.ones(len(prompt_P) + len(answer_T), dtype=torch.long),
            }
            for name, values_BT in columns_BT.items():
                values_T = values_BT[number][mask_T]
                row[name] = torch.cat([values_T.new_zeros(len(prompt_P)), values_T])
            rows.append(row)
        return rows

    @classmethod
    def joined(cls, parts: Sequence[Rollouts]) -> Rollouts:
        """All rows of several, padded to the longest prompt and answer, on the CPU."""
        found: dict[str, Tensor | None] = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            side = "left" if field.name.startswith("prompt") else "right"
            rows = [row.cpu() for value in values if value is not None for row in value]
            found[field.name] = pad_sequence(rows, batch_first=True, padding_side=side) if rows else None
        return cls(**found)  # pyright: ignore[reportArgumentType] - only log_p_BT is ever None

    def save(self, path: Path | str) -> None:
        """Write one safetensors file: aside, synced, renamed. Raises UserError on a full disk."""
        from safetensors.torch import save

        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        known = {name: values.contiguous() for name, values in tensors.items() if values is not None}
        write_bytes(Path(path), save(known))

    @classmethod
    def load(cls, path: Path | str) -> Rollouts:
        """Read what `save` wrote, to the CPU, bit for bit. Raises UserError for a missing, broken or other file."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return cls(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise UserError(
                f"cannot read rollouts from {path} ({type(error).__name__}); expected a file that this version "
                "wrote; delete it to sample again"
            ) from error


@torch.no_grad()
def sample(
    student: nn.Module,
    prompt_ids_BP: Tensor,
    prompt_mask_BP: Tensor,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    generator: torch.Generator,
    teacher: nn.Module | None = None,
    alpha: float = 0.0,
    temperature: float = 1.0,
    vocab: int | None = None,
) -> Rollouts:
    """Sample an answer to each prompt from alpha p + (1 - alpha) q, token by token (paper, equation 4).

    Prompts are padded on the left (mask 0). With alpha = 0 the student answers alone: the teacher takes no part, and
    log p is left to `score`. Both distributions are divided by `temperature` in the exponent before they are mixed;
    only the first `vocab` ids (default: all that both models have) can be drawn. The same models, prompts and generator
    state give the same bits on a CPU. Both models read through KV caches, in eval mode; nothing (B, T, V) is kept.
    Raises UserError for prompts not padded on the left and for settings outside their range.
    """
    prompt_mask_BP = prompt_mask_BP.bool()
    if not bool(prompt_mask_BP[:, -1:].all()) or bool((prompt_mask_BP[:, :-1] & ~prompt_mask_BP[:, 1:]).any()):
        raise UserError("a prompt is empty or has padding after a token; expected padding on the left only; pad left")
    if not prompt_mask_BP.shape[1] or max_new_tokens < 1:
        raise UserError(
            f"prompts have {prompt_mask_BP.shape[1]} positions and max_new_tokens is {max_new_tokens}; "
            "expected at least 1 each; pass a prompt and raise max_new_tokens"
        )
    if not 0 <= alpha < 1:
        raise UserError(f"alpha is {alpha}; expected 0 (student alone) up to below 1; 0.2 is the paper's choice")
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}; expected more than 0; 1.0 is the paper's choice")
    if alpha > 0 and teacher is None:
        raise UserError(f"alpha is {alpha} but there is no teacher; expected one to mix in; pass it or set alpha to 0")
    models = [student] if teacher is None or alpha == 0 else [student, teacher]
    device = prompt_ids_BP.device
    stops = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
    going_B = torch.ones(len(prompt_ids_BP), dtype=torch.bool, device=device)
    steps: list[tuple[Tensor, ...]] = []
    with _evaluating(models):
        readers = [_Reader(model, prompt_mask_BP) for model in models]
        inputs_BT = prompt_ids_BP
        while going_B.any() and len(steps) < max_new_tokens:
            logits = [reader(inputs_BT) for reader in readers]
            shared = min([vocab or logits[0].shape[-1], *(logits_BV.shape[-1] for logits_BV in logits)])
            logs = [logits_BV[:, :shared].log_softmax(-1) for logits_BV in logits]
            heated = logs if temperature == 1 else [(log_BV / temperature).log_softmax(-1) for log_BV in logs]
            log_mix_BV = heated[0]
            if alpha > 0:
                log_mix_BV = torch.logaddexp(log_mix_BV + math.log1p(-alpha), heated[1] + math.log(alpha))
            ids_B1 = torch.multinomial(log_mix_BV.exp(), 1, generator=generator)
            steps.append((going_B, ids_B1[:, 0], *(log_BV.gather(1, ids_B1)[:, 0] for log_BV in (log_mix_BV, *logs))))
            going_B = going_B & ~torch.isin(ids_B1[:, 0], stops)
            inputs_BT = ids_B1
    mask_BT, *found = (torch.stack(column, 1) for column in zip(*steps, strict=True))
    ids_BT, *log_probs = (values_BT.where(mask_BT, 0) for values_BT in found)
    return Rollouts(prompt_ids_BP, prompt_mask_BP, ids_BT, mask_BT, *log_probs)


class _Reader:
    """A model with its KV cache: new tokens (B, any) in, logits of the next one (B, V) in float32 or more out."""

    def __init__(self, model: Any, prompt_mask_BP: Tensor) -> None:
        from transformers import DynamicCache

        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.mask_BL = prompt_mask_BP.long()
        self.positions_BT = (self.mask_BL.cumsum(-1) - 1).clamp(min=0)

    def __call__(self, ids_BT: Tensor) -> Tensor:
        logits_BV = self.model(
            input_ids=ids_BT,
            attention_mask=self.mask_BL,
            position_ids=self.positions_BT,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.positions_BT = self.positions_BT[:, -1:] + 1
        self.mask_BL = torch.cat([self.mask_BL, self.mask_BL.new_ones(len(self.mask_BL), 1)], 1)
        return logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))


@contextlib.contextmanager
def _evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode for a while: no dropout, and caches that gradient checkpointing would switch off in training mode."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, training, strict=True):
            model.train(mode)


@torch.no_grad()
def score(rollouts: Rollouts, teacher: nn.Module, *, vocab: int | None = None, chunk_tokens: int = 128) -> Rollouts:
    """The same rollouts with the teacher's log-probability of every answer token, at temperature 1.

    One forward pass over whole answers, for rollouts sampled without the teacher. `vocab` ids (default: all of the
    teacher's) take part in the softmax; the teacher's logits are its hidden states times its head, nothing more.
    """
    batch, causal_lm = rollouts.batch(), cast(Any, teacher)
    hidden_NH = hidden_states(teacher, batch)[:, :-1][targets(batch)]
    head_VH = causal_lm.get_output_embeddings().weight
    ids_N = rollouts.ids_BT[rollouts.mask_BT]
    log_p_N = token_log_probs(hidden_NH, head_VH, ids_N, vocab=vocab, chunk_tokens=chunk_tokens)
    log_p_BT = torch.zeros_like(rollouts.log_q_BT).masked_scatter(rollouts.mask_BT, log_p_N.to(rollouts.log_q_BT.dtype))
    return replace(rollouts, log_p_BT=log_p_BT)
