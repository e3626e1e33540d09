"""Importance scores by forward passes alone (Minitron, arXiv 2407.14679, section 2.2).

Hooks on the stock modules watch one pass over the calibration rows. Of one row b with real tokens t, the
activation s_bti of channel i is reduced over t, then over b, each by one of
    mean = mean(|s|),   l2 = sqrt(sum s^2),   var = mean((s - mean(s))^2)
and only these sums are kept. hidden: norm outputs, summed over all norms; ffn: the input of down_proj; heads:
the L2 norm over head_dim of a head's part of the input of o_proj; layers: block influence, which is
1 - E_bt[cos(x_in, x_out)]. Each row is reduced by itself, without its padding, so scores do not depend on how
rows are batched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .data import IGNORED, position_ids
from .errors import UserError
from .families import family
from .scores import Scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CHUNK = 256  # tokens whose logits exist at once


def _sequence_mean(s_TC: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(s_TC, ord=1, dim=0, dtype=torch.float32) / s_TC.shape[0]


def _sequence_l2(s_TC: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(s_TC, ord=2, dim=0, dtype=torch.float32)


def _sequence_var(s_TC: torch.Tensor) -> torch.Tensor:
    return s_TC.float().var(dim=0, unbiased=False)


SEQUENCE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": _sequence_mean,
    "l2": _sequence_l2,
    "var": _sequence_var,
}

# over rows, from (number of rows, sum of |r|, sum of r^2, sum of squared deviations)
BATCH: dict[str, Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean": lambda count, absolute, squares, deviations: absolute / count,
    "l2": lambda count, absolute, squares, deviations: squares.sqrt(),
    "var": lambda count, absolute, squares, deviations: deviations / count,
}


class _Rows:
    """Running sums over rows of one reduced activation, on its device (float64 where the device has it)."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, row_C: torch.Tensor) -> None:
        row_C = row_C.to(_wide(row_C.device))
        if self.count == 0:
            self.absolute, self.squares, self.mean, self.deviations = torch.zeros_like(row_C).repeat(4, 1)
        self.count += 1
        self.absolute += row_C.abs()
        self.squares += row_C * row_C
        # Welford: sum r^2 - (sum r)^2 / n would cancel
        delta = row_C - self.mean
        self.mean += delta / self.count
        self.deviations += delta * (row_C - self.mean)

    def result(self, batch: str) -> torch.Tensor:
        return BATCH[batch](self.count, self.absolute, self.squares, self.deviations).float().cpu()


class _Cosine:
    """Running mean over real tokens of the cosine between two hidden states."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None
        self.count = 0

    def add(self, x_TH: torch.Tensor, y_TH: torch.Tensor) -> None:
        cosine_T = torch.nn.functional.cosine_similarity(x_TH.float(), y_TH.to(x_TH.device).float(), dim=-1)
        part = cosine_T.sum(dtype=_wide(cosine_T.device))
        self.total = part if self.total is None else self.total + part
        self.count += len(cosine_T)

    def influence(self) -> float:
        assert self.total is not None
        return 1.0 - float(self.total) / self.count


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def measure(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    batch: str = "l2",
    sequence: str = "mean",
    block_sizes: Sequence[int] = (),
    teacher: str = "",
    progress: Callable[[int], object] | None = None,
) -> Scores:
    """Score every axis in one pass over `batches` of {"input_ids" (B, T), "attention_mask" (B, T), optional}.

    `batch` and `sequence` name the aggregations (mean, l2, var): `sequence` over the real tokens of a row,
    then `batch` over rows. Extra memory is the sums of the scores and one row's reduction; `block_sizes`
    also keeps the hidden states of the last max(block_sizes) layers of a batch. `progress` advances by
    rows. `teacher` is the fingerprint to note. Raises UserError for an unknown aggregation or family, no
    rows, or activations that are not finite.
    """
    for name, table in ((batch, BATCH), (sequence, SEQUENCE)):
        if name not in table:
            raise UserError(f"unknown aggregation {name}; expected {', '.join(table)}; correct the recipe")
    watch = _Watch(model, sequence=sequence, block_sizes=block_sizes)
    digest, rows, tokens = hashlib.sha256(), 0, 0
    with watch.attached(), torch.inference_mode():
        for rows_in in batches:
            inputs, mask_BT = _prepared(model, rows_in)
            watch.mask_BT = mask_BT
            model.base_model(**inputs, use_cache=False)
            for ids_T, mask_T in zip(inputs["input_ids"].cpu(), mask_BT.cpu(), strict=True):
                if mask_T.any():
                    real = ids_T[mask_T]
                    digest.update(f"{len(real)}:".encode() + real.to(torch.int64).numpy().tobytes())
                    rows, tokens = rows + 1, tokens + len(real)
            if progress is not None:
                progress(len(mask_BT))
    if rows == 0:
        raise UserError("the calibration data hold no tokens; expected at least one row; check --data")
    about = {
        "teacher": teacher,
        "calibration": digest.hexdigest()[:16],
        "batch": batch,
        "sequence": sequence,
        "rows": str(rows),
        "tokens": str(tokens),
    }
    scores = watch.scores(batch, about)
    for name in ("hidden", "ffn", "heads", "layers"):
        if not torch.isfinite(getattr(scores, name)).all():
            raise UserError(
                f"the {name} scores are not finite: the teacher's activations overflow; "
                "expected finite ones; run the teacher in bf16 or fp32"
            )
    return scores


class _Watch:
    """The hooks of one measurement and what they have summed so far."""

    def __init__(self, model: PreTrainedModel, *, sequence: str, block_sizes: Sequence[int]) -> None:
        points, self.base = family(model.config.model_type).points, model.base_model
        self.layers = list(self.base.get_submodule(points.layers).children())
        self.points, self.reduce, self.mask_BT = points, SEQUENCE[sequence], torch.empty(0)
        config: Any = model.config
        self.num_heads = config.num_attention_heads
        count = len(self.layers)
        for size in block_sizes:
            if not 1 <= size <= count:
                raise UserError(f"block size {size} does not fit {count} layers; expected 1 to {count}; correct it")
        self.block_sizes = sorted({1, *block_sizes})
        self.norms = [_Rows() for _ in range(count * len(points.norms) + 1)]
        self.ffn = [_Rows() for _ in range(count)]
        self.heads = [_Rows() for _ in range(count)]
        self.cosines = {size: [_Cosine() for _ in range(count - size + 1)] for size in self.block_sizes}
        self.entered: dict[int, torch.Tensor] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on every module of interest, removed again whatever happens."""
        handles = []
        try:
            norms = [self.base.get_submodule(self.points.final_norm)]
            for i, layer in enumerate(self.layers):
                norms += [layer.get_submodule(name) for name in self.points.norms]
                down, out = layer.get_submodule(self.points.ffn), layer.get_submodule(self.points.heads)
                handles.append(down.register_forward_pre_hook(self._on_input(self.ffn[i])))
                handles.append(out.register_forward_pre_hook(self._on_heads(self.heads[i])))
                handles.append(layer.register_forward_hook(self._on_layer(i), with_kwargs=True))
            for rows, norm in zip(self.norms, norms, strict=True):
                handles.append(norm.register_forward_hook(self._on_output(rows)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _real(self, x_BTC: torch.Tensor) -> Iterator[torch.Tensor]:
        """Each row of a batch without its padding: (T_real, C), a view where nothing is padded."""
        mask_BT = self.mask_BT.to(x_BTC.device)
        for x_TC, mask_T in zip(x_BTC, mask_BT, strict=True):
            if mask_T.all():
                yield x_TC
            elif mask_T.any():
                yield x_TC[mask_T]

    def _reduced(self, rows: _Rows, x_BTC: torch.Tensor) -> None:
        for s_TC in self._real(x_BTC):
            rows.add(self.reduce(s_TC))

    def _on_output(self, rows: _Rows) -> Callable[..., None]:
        return lambda module, args, output: self._reduced(rows, output)

    def _on_input(self, rows: _Rows) -> Callable[..., None]:
        return lambda module, args: self._reduced(rows, args[0])

    def _on_heads(self, rows: _Rows) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x_BTND = args[0].unflatten(-1, (self.num_heads, -1))
            self._reduced(rows, torch.linalg.vector_norm(x_BTND, dim=-1, dtype=torch.float32))

        return hook

    def _on_layer(self, i: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.entered[i] = args[0] if args else kwargs["hidden_states"]
            left = output[0] if isinstance(output, tuple) else output
            for size in self.block_sizes:
                first = i - size + 1
                if first >= 0:
                    pairs = zip(self._real(self.entered[first]), self._real(left), strict=True)
                    for x_TH, y_TH in pairs:
                        self.cosines[size][first].add(x_TH, y_TH)
            self.entered.pop(i - self.block_sizes[-1] + 1, None)

        return hook

    def scores(self, batch: str, about: dict[str, str]) -> Scores:
        blocks = {n: torch.tensor([c.influence() for c in row]) for n, row in self.cosines.items()}
        return Scores(
            hidden=torch.stack([rows.result(batch) for rows in self.norms]).sum(0),
            ffn=torch.stack([rows.result(batch) for rows in self.ffn]),
            heads=torch.stack([rows.result(batch) for rows in self.heads]),
            layers=blocks.pop(1),
            blocks=blocks,
            about=about,
        )


def candidate_blocks(num_layers: int, size: int) -> list[tuple[int, int]]:
    """(first, stop) of each contiguous block of `size` layers that keeps the first and the last layer."""
    return [(first, first + size) for first in range(1, num_layers - size)]


def removal_loss(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    blocks: Iterable[tuple[int, int]],
    *,
    progress: Callable[[int], object] | None = None,
) -> dict[tuple[int, int], float]:
    """Loss on `batches` (nats per token; exp is the perplexity) with layers first..stop-1 skipped, per block.

    `batches` as for `measure`, read once; with "labels" (B, T), only labels other than -100 are predicted,
    otherwise every real token after a real one. A block may be a single layer (i, i + 1), or (0, 0) for the
    whole model. `progress` advances by one per batch and block. Raises UserError for no tokens to predict
    or a block outside the model.
    """
    layers = list(model.base_model.get_submodule(family(model.config.model_type).points.layers).children())
    totals = {(int(first), int(stop)): 0.0 for first, stop in blocks}
    for first, stop in totals:
        if not 0 <= first <= stop <= len(layers):
            raise UserError(f"block {first}..{stop} is outside {len(layers)} layers; expected 0 <= first <= stop")
    tokens = 0
    with torch.inference_mode():
        for batch in batches:
            inputs, mask_BT = _prepared(model, batch)
            if "labels" in batch:
                targets_BT = batch["labels"].to(mask_BT.device)[:, 1:]
            else:
                real_BT = mask_BT[:, 1:] & mask_BT[:, :-1]
                targets_BT = inputs["input_ids"][:, 1:].masked_fill(~real_BT, IGNORED)
            tokens += int((targets_BT != IGNORED).sum())
            for first, stop in totals:
                with skipped(layers[first:stop]):
                    totals[first, stop] += _loss_sum(model, inputs, targets_BT)
                if progress is not None:
                    progress(1)
    if tokens == 0:
        raise UserError("the calibration data have no tokens to predict; expected rows of two or more; check --data")
    return {block: total / tokens for block, total in totals.items()}


@contextmanager
def skipped(layers: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Decoder layers that pass their input on; the model is as before afterwards."""

    def identity(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    layers = list(layers)
    try:
        for layer in layers:
            layer.forward = identity  # on the instance: the class's own forward is only hidden
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _loss_sum(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], targets_BT: torch.Tensor) -> float:
    """Summed cross-entropy of targets (B, T - 1), a few tokens at a time: no (T, V) tensor is whole."""
    hidden_BTH = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    targets_BT = targets_BT.to(hidden_BTH.device)
    keep_BT = targets_BT != IGNORED
    parts = zip(hidden_BTH[keep_BT].split(CHUNK), targets_BT[keep_BT].split(CHUNK), strict=True)
    head: Any = model.get_output_embeddings()
    losses = [
        torch.nn.functional.cross_entropy(head(hidden_NH).float(), targets_N.to(hidden_NH.device), reduction="sum")
        for hidden_NH, targets_N in parts
    ]
    return float(torch.stack(losses).double().sum()) if losses else 0.0


def _prepared(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the model takes of a batch, on its device, and the boolean mask of real tokens (B, T).

    Position ids alone, as in distillation: packed documents do not see each other, padding is seen by nobody.
    """
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items()}
    inputs = {"input_ids": batch["input_ids"], "position_ids": position_ids(batch)}
    return inputs, batch.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
