"""The teacher: loaded once, frozen, only ever asked for hidden states and logits; corrected on the data, if wanted.

Correction (Minitron in practice, arXiv 2408.11796) is a short fine-tuning of the whole teacher on the data that the
student learns from, before that or beside it: a teacher that never saw such data is a poor guide there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import DTYPES, Checkpoint, copy_tokenizer, load_model, require_space
from .run import RANK, staged

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .data import Batch
    from .train import LossFunction, TrainResult


def load(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.nn.Module:
    """Load a teacher in eval mode with no parameter to train.

    `dtype` defaults to bfloat16 on a GPU and float32 elsewhere, where half precision is slow or inexact;
    `device` to the one this process trains on. Raises UserError for a broken checkpoint and for NaN weights.
    """
    import torch
    from accelerate import PartialState

    place = torch.device(device) if device is not None else torch.device(PartialState().device or "cpu")
    if dtype is None:
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    return load_model(folder, dtype=dtype, device=place).requires_grad_(False)


def correct(
    teacher: Path,
    *,
    loss: LossFunction,
    batches: torch.utils.data.IterableDataset,
    heldout: Sequence[Batch],
    settings: Any,
    training: Any,
    folder: Path,
    out: Path,
    seed: int = 0,
) -> TrainResult:
    """Fine-tune the teacher of the folder `teacher` by `loss`; its best checkpoint becomes the stock folder `out`.

    `settings` is a recipe.Correct whose mode names a row of MODES; `training` the settings of `train.train`, which
    `batches` and `heldout` are for too. Checkpoints go to `folder`, and a correction that was killed continues there.
    `out` has the precision and the tokenizer of `teacher`. Where no checkpoint beats the start (`best_folder` is None)
    nothing is written. Every process of a launch calls this, the first one writes. Raises UserError as `train.train`.
    """
    from .signals import check_head
    from .train import train

    model = to_correct(teacher, settings=settings, precision=training.precision, seed=seed)
    check_head(model)
    options = {"batches": batches, "heldout": heldout, "settings": training, "folder": folder, "seed": seed}
    result = train(model, loss=loss, **options, section="correct")
    del model
    if RANK == 0 and result.best_folder:
        _write(teacher, result.best_folder, out, settings, seed)
    return result


def to_correct(teacher: Path, *, settings: Any, precision: str, seed: int = 0) -> nn.Module:
    """The teacher of a folder with that left to train, in float32, which the mode of a recipe.Correct trains."""
    import torch

    half = precision == "bf16" or (precision == "auto" and torch.cuda.is_available())
    # weights that stay as they are need no more than the precision that they are multiplied in
    held = torch.bfloat16 if half and settings.mode != "full" else torch.float32
    return _to_train(load_model(teacher, dtype=held), settings, seed)


def _write(teacher: Path, best: Path, out: Path, settings: Any, seed: int) -> None:
    """Save the teacher with what the checkpoint `best` holds, as a stock folder in the teacher's precision."""
    import torch
    from safetensors.torch import load_file

    source = Checkpoint(teacher)
    dtype = getattr(torch, DTYPES[source.metadata("model.embed_tokens.weight").dtype][0])
    require_space(out.parent, source.shape.parameters * dtype.itemsize)
    if settings.mode == "full":
        corrected: Any = load_model(best, dtype=dtype)
    else:
        corrected = _to_train(load_model(teacher, dtype=torch.float32), settings, seed)
        unknown = corrected.load_state_dict(load_file(best / "model.safetensors"), strict=False).unexpected_keys
        assert not unknown, f"{best} holds {unknown}"
        if settings.mode == "lora":
            corrected = corrected.merge_and_unload()
        corrected = corrected.to(dtype)
    with staged(out) as folder:
        corrected.save_pretrained(folder)
        copy_tokenizer(teacher, folder)
        Checkpoint(folder).check()


def _to_train(model: nn.Module, settings: Any, seed: int) -> nn.Module:
    """The model with only that left to train which the mode trains."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)  # every process, and whoever continues, begins with the same updates
        return MODES[settings.mode](model, settings)


def _full(model: Any, settings: Any) -> nn.Module:
    return model.requires_grad_(True)


def _lora(model: Any, settings: Any) -> nn.Module:
    import warnings

    from peft import LoraConfig, get_peft_model

    # all-linear leaves out the head, as the authors of QLoRA do
    config = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules="all-linear")  # pyright: ignore[reportArgumentType]
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft asks transformers by an old name
        return get_peft_model(model, config)


def _norms(model: Any, settings: Any) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("norm.weight"))
    return model


MODES: dict[str, Callable[[Any, Any], Any]] = {"full": _full, "lora": _lora, "norms": _norms}
