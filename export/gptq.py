"""GPTQ: rounding that lets the weights not yet rounded make up for the error of those that are.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323. The error that counts is that of a layer's output on calibration
text, |X W' - X Q'|^2, whose Hessian is X'X. Scales are those `search` finds before anything moves ("static groups"),
and no weight moves further than `MOVED` steps, so that an artifact can still be told from a damaged one.
Suffixes: N output channels, K input channels, C columns done at a time, B rows, T positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import UserError

from .rounding import MOVED, Blocks, round_blocks

if TYPE_CHECKING:
    import torch

DAMPING = 0.01  # of the Hessian's mean diagonal, as in the paper
ROOM = 3  # times the model that a GPU must have free
COLUMNS = 128  # whose errors reach the columns after them at once


def round_layers(
    student: Path,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    block_of: Callable[[str, int], int | None],
    progress: Callable[[int], object] | None = None,
) -> dict[str, Blocks]:
    """Round the matrices of a model's layers to 4 bits, each layer on what the rounded ones before it make of text.

    batches: {"input_ids", "attention_mask", "position_ids"}, all (B, T). block_of: a weight's name and its K -> the
    block size, None for what stays. Memory: the model in float32, the hidden states of all batches, one layer's
    Hessians (three copies of the largest in float64), a byte a weight of the result. Raises UserError for a model
    whose layers cannot be run one by one.
    """
    import torch
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    from compressor.checkpoint import load_model
    from compressor.data import hidden_states

    model: Any = load_model(student, dtype=torch.float32, device="cpu")
    device = _device(model)
    model.to(device)
    layers = _layers(model)
    names = {module: f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear | Conv1D)}
    calls: dict[Any, list[tuple[Any, ...]]] = {layer: [] for layer in layers}
    hidden, masks, found = [], [], {}

    def oriented(module: Any) -> torch.Tensor:  # (N, K)
        return module.weight.T if isinstance(module, Conv1D) else module.weight

    def watch(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer is layers[0]:
            hidden.append(args[0])
        calls[layer].append((args[1:], kwargs))

    with torch.no_grad():
        hooks = [layer.register_forward_pre_hook(watch, with_kwargs=True) for layer in layers]
        for batch in batches:
            hidden_states(model, {key: value.to(device) for key, value in batch.items()})
            masks.append(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().flatten().to(device))
        for hook in hooks:
            hook.remove()
        for layer, seen in calls.items():
            runs = [(h, *call) for h, call in zip(hidden, seen, strict=True)]
            wanted = {
                module: block
                for module in layer.modules()
                if module in names and (block := block_of(names[module], oriented(module).shape[1])) is not None
            }
            hessians = _hessians(layer, list(wanted), runs, masks)
            for module, block in wanted.items():
                weight = oriented(module)
                blocks = round_on(weight, hessians[module], block=block)
                found[names[module]] = blocks.cpu()
                weight.copy_(blocks.values()[:, : weight.shape[1]])
                if progress is not None:
                    progress(weight.numel())
            hidden = [_output(layer(h, *args, **kwargs)) for h, args, kwargs in runs]
    return found


def _device(model: Any) -> str:
    """A GPU where it has room for the model, its hidden states and its Hessians."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return "cuda" if torch.cuda.mem_get_info()[0] > ROOM * model.get_memory_footprint() else "cpu"


def _layers(model: Any) -> list[Any]:
    from torch.nn import ModuleList

    count = model.config.num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, ModuleList) and len(module) == count:
            return list(module)
    raise UserError(
        f"gptq finds no list of {count} layers in this model; expected a decoder; choose another --algorithm"
    )


def _output(found: Any) -> torch.Tensor:
    return found[0] if isinstance(found, tuple) else found


def _hessians(layer: Any, modules: list[Any], runs: list[Any], masks: list[torch.Tensor]) -> dict[Any, torch.Tensor]:
    """X'X of each module's inputs (K, K) over all real tokens; modules that read the same tensor share one."""
    found: dict[Any, torch.Tensor] = {}
    read: list[tuple[torch.Tensor, Any]] = []  # the last input, and the module that counted it
    real_T = masks[0]

    def count(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if read and read[-1][0] is args[0]:
            found[module] = found[read[-1][1]]
            return
        read[:] = [(args[0], module)]
        x_TK = args[0].reshape(-1, args[0].shape[-1])[real_T]
        product_KK = x_TK.T @ x_TK
        found[module] = found[module].add_(product_KK) if module in found else product_KK

    hooks = [module.register_forward_pre_hook(count) for module in modules]
    for (hidden, args, kwargs), real_T in zip(runs, masks, strict=True):  # noqa: B007 - `count` reads it
        layer(hidden, *args, **kwargs)
    for hook in hooks:
        hook.remove()
    return found


def round_on(weight_NK: torch.Tensor, hessian_KK: torch.Tensor, *, block: int) -> Blocks:
    """Round a matrix to 4 bits so that X W' changes least, given X'X; the last block is filled up with zeros."""
    import torch

    first = round_blocks(weight_NK, bits=4, block=block, algorithm="search")
    scale_NK = first.scale_NG.repeat_interleave(block, dim=1)
    step_NK = torch.where(scale_NK == 0, 1.0, scale_NK)
    fill = scale_NK.shape[1] - weight_NK.shape[1]
    weight_NK = torch.nn.functional.pad(weight_NK.float(), (0, fill))
    nearest_NK = (weight_NK / step_NK).round() + 8
    lowest_NK, highest_NK = (nearest_NK - MOVED).clamp(0, 15), (nearest_NK + MOVED).clamp(0, 15)
    spread_KK = _spread(torch.nn.functional.pad(hessian_KK, (0, fill, 0, fill)))
    q_NK = torch.empty_like(weight_NK)
    columns = weight_NK.shape[1]
    for start in range(0, columns, COLUMNS):
        stop = min(start + COLUMNS, columns)
        error_NC = torch.empty_like(weight_NK[:, start:stop])
        for k in range(start, stop):
            exact_N = weight_NK[:, k]
            q_NK[:, k] = (exact_N / step_NK[:, k]).round().add(8).clamp(lowest_NK[:, k], highest_NK[:, k])
            error_NC[:, k - start] = (exact_N - (q_NK[:, k] - 8) * scale_NK[:, k]) / spread_KK[k, k]
            weight_NK[:, k + 1 : stop] -= error_NC[:, k - start, None] * spread_KK[k, k + 1 : stop]
        weight_NK[:, stop:] -= error_NC @ spread_KK[start:stop, stop:]
    return Blocks(q_NK.byte().view(first.q_NGB.shape), first.scale_NG, None, 4)


def _spread(hessian_KK: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse Hessian: its row k spreads the error of column k over those after it."""
    import torch

    diagonal_K = hessian_KK.diagonal()
    damping = DAMPING * float(diagonal_K.mean()) or 1.0
    damped_KK = hessian_KK.double() + damping * torch.eye(len(hessian_KK), device=hessian_KK.device)
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(damped_KK))
    return torch.linalg.cholesky(inverse_KK, upper=True).float()
