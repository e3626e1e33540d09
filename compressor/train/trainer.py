"""transformers.Trainer with a loss function, token-exact normalisation and whole checkpoints.

The student lives inside `Objective`, whose forward computes the loss: wrapping that module (DDP) keeps
gradient hooks in the path without any full logits. Each checkpoint (see `whole`) is a stock Hugging Face
folder plus the Trainer's state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data import Batch, collate, real_tokens, targets
from ..errors import UserError
from ..run import write_text
from .metrics import json_lines, metric_lines
from .whole import WholeCheckpoints, checkpoint_step

BESIDE = "beside"  # folder in a checkpoint, out of the way of whoever loads the student


class LossSum(NamedTuple):
    """What a loss function returns: sums over the batch's targets."""

    loss: Tensor
    parts: dict[str, Tensor]  # further sums worth reporting on held-out rows, such as "kl" and "ce"


LossFunction = Callable[[nn.Module, Batch], LossSum]


class Supply(Protocol):
    """Makes the micro-batches of a step out of those of the data, just before it: answers of the student as it is."""

    def of_step(
        self, student: nn.Module, step: int, batches: list[Batch], over_ranks: Callable[[Sequence[float]], list[float]]
    ) -> list[Batch]:
        """As many micro-batches as came; `over_ranks` sums figures over all ranks."""
        ...

    def notes(self) -> dict[str, float]:
        """What is worth a place in the log."""
        ...

    def save(self, folder: Path) -> None:
        """Keep in a checkpoint what the next step needs; every rank calls it."""
        ...

    def load(self, folder: Path, *, step: int) -> None:
        """Read what was saved after `step` steps."""
        ...


class Judge(NamedTuple):
    """How a student's own writing is judged wherever its held-out loss is taken."""

    measure: Callable[[nn.Module], dict[str, float]]
    failed: Callable[[Mapping[str, float]], str | None]  # what was measured -> why it has run away, or None
    best: str  # the figure by which the best checkpoint is chosen; more is better

    def stopped(self, history: Sequence[Mapping[str, float]]) -> str | None:
        """Why training has to end: the last judgement failed and an earlier one did not."""
        judged = [line for line in history if self.best in line]
        reason = self.failed(judged[-1]) if judged else None
        return reason if any(self.failed(line) is None for line in judged) else None


class NotFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite: the step is not taken."""


class Objective(nn.Module):
    """The student and its loss as one module: whatever wraps the module wraps all of the computation."""

    def __init__(self, student: nn.Module, loss: LossFunction, beside: nn.Module | None = None) -> None:
        super().__init__()
        self.student = student
        self.beside = beside  # what the loss trains with the student and the student is not saved with
        self.loss = loss  # a plain function: what it holds and is not beside has no part in parameters and checkpoints

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The sums of the loss function in one dict, which every wrapper can carry."""
        total, parts = self.loss(self.student, batch)
        return {"loss": total, **parts}


class LastStepIsLogged(TrainerCallback):
    """The Trainer evaluates and saves after the last step whatever the intervals are; here it logs too."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log line after the last step."""
        control.should_log |= state.global_step >= state.max_steps


class Trainer(WholeCheckpoints, transformers.Trainer):
    """The loop of transformers with our loss, our normalisation, our held-out loss and our checkpoints."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        student: nn.Module,
        *,
        loss: LossFunction,
        beside: nn.Module | None,
        rates: Mapping[nn.Module, float],
        arguments: TrainingArguments,
        batches: torch.utils.data.IterableDataset,
        heldout: Sequence[Batch],
        metrics: Path,
        callbacks: Sequence[TrainerCallback],
        supply: Supply | None = None,
        judge: Judge | None = None,
    ) -> None:
        self.objective, self.student, self.heldout, self.metrics = (
            Objective(student, loss, beside),
            student,
            heldout,
            metrics,
        )
        self.supply, self.judge, self.rates = supply, judge, rates
        super().__init__(
            self.objective,
            arguments,
            data_collator=collate,
            train_dataset=batches,
            eval_dataset={},  # asked for by the arguments; `evaluate` reads self.heldout
            callbacks=[LastStepIsLogged(), *callbacks],
        )
        self.remove_callback(transformers.PrinterCallback)
        self._step_loss = torch.zeros((), device=arguments.device)
        self._parts: dict[str, Tensor] = {}  # since the last log: (sum, targets) of every part of the loss
        self._last_log = self._started = time.perf_counter()
        self._last_tokens, self._seconds_before = 0, 0.0

    # -- the loss: sums, divided once by the targets of the whole step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's mean loss per target."""
        assert num_items_in_batch is not None, "get_batch_samples counts the targets of every step"
        outputs = model(inputs)
        # DDP averages gradients over ranks where a sum is meant.
        loss = outputs["loss"] * (self.args.world_size / max(1, int(num_items_in_batch)))
        self._step_loss += loss.detach()
        for name in outputs.keys() - {"loss"}:
            found = torch.stack([outputs[name].detach().float(), targets(inputs).sum()])
            self._parts[name] = self._parts.get(name, torch.zeros_like(found)) + found
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step and how many targets they hold over all ranks."""
        batches = list(islice(epoch_iterator, num_batches))
        if len(batches) < num_batches:
            raise UserError("the training data ended early; expected an endless stream of rows; repeat the data")
        if self.supply is not None:
            with self.accelerator.autocast():
                batches = self.supply.of_step(self.student, self.state.global_step, batches, self._over_ranks)
        counts = [sum(int(targets(batch).sum()) for batch in batches), sum(map(real_tokens, batches))]
        num_targets, num_tokens = self._over_ranks(counts)
        self.state.num_input_tokens_seen += int(num_tokens)
        return batches, int(num_targets)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last stop before the optimizer's step: its loss is complete, its gradients are reduced."""
        found: Any = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = float(found)
        [loss] = self._over_ranks([self._step_loss.item()])
        self._step_loss.zero_()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NotFiniteError(f"loss {loss}, gradient norm {norm} at step {self.state.global_step + 1}")
        return norm

    def _means(self) -> dict[str, float]:
        """Mean of every part of the loss since the last log, per target of the micro-batches that have it."""
        names = sorted(self._parts)
        sums = self._over_ranks([value for name in names for value in self._parts[name].tolist()])
        self._parts = {}
        return {name: sums[2 * i] / max(1.0, sums[2 * i + 1]) for i, name in enumerate(names)}

    def _over_ranks(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks."""
        if self.args.world_size == 1:
            return list(values)
        total: Any = self.accelerator.reduce(
            torch.tensor(values, dtype=torch.float64, device=self.args.device), reduction="sum"
        )
        return total.tolist()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The usual one, where modules that have their own learning rate are groups of their own."""
        optimizer = super().create_optimizer(model)
        for module, lr in self.rates.items():
            own = {id(parameter) for parameter in module.parameters()}
            for group in list(optimizer.param_groups):
                apart = [parameter for parameter in group["params"] if id(parameter) in own]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
                optimizer.add_param_group(group | {"params": apart, "lr": lr})
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """A module with its own learning rate is clipped by itself; what is returned and logged is the student's norm.

        Where one of the others is not finite, it is returned instead.
        """
        if not self.rates:
            return super()._clip_grad_norm(model)
        clip, most = self.accelerator.clip_grad_norm_, self.args.max_grad_norm
        norms = [clip(list(module.parameters()), most) for module in self.rates]
        apart = {id(parameter) for module in self.rates for parameter in module.parameters()}
        norms.append(clip([parameter for parameter in model.parameters() if id(parameter) not in apart], most))
        return next((norm for norm in norms if norm is not None and not math.isfinite(norm)), norms[-1])

    # -- held-out loss, metrics

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out losses per target, exact over batches of any size; ranks share the batches."""
        begun = time.perf_counter()
        sums: dict[str, float] = {}
        self.objective.eval()
        with torch.no_grad():
            for batch in self.heldout[self.args.process_index :: self.args.world_size]:
                inputs = self._prepare_inputs(dict(batch))
                outputs = self.objective(inputs) | {"targets": targets(inputs).sum()}
                for name, value in outputs.items():
                    sums[name] = sums.get(name, 0.0) + value.item()
        totals = dict(zip(sums, self._over_ranks(list(sums.values())), strict=True))
        num_targets = totals.pop("targets")
        metrics = {f"eval_{name}": total / num_targets for name, total in totals.items()}
        if self.judge is not None:
            found = self.judge.measure(self.student)
            means = [total / self.args.world_size for total in self._over_ranks(list(found.values()))]  # all agree
            metrics |= {f"eval_{name}": mean for name, mean in zip(found, means, strict=True)}
        self.log(dict(metrics))
        self._last_log += time.perf_counter() - begun  # speed is that of training
        if not math.isfinite(metrics["eval_loss"]):
            raise NotFiniteError(f"held-out loss {metrics['eval_loss']} at step {self.state.global_step}")
        if self.state.global_step == 0:
            self.state.best_metric = metrics[f"eval_{self.args.metric_for_best_model}"]  # what a checkpoint has to beat
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.judge is not None and self.judge.stopped(metric_lines(self.state.log_history)):
            self.control.should_training_stop = True
        # Whatever is judged is kept, so that the best one can be.
        self.control.should_save = self.state.global_step > 0
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """A student whose writing has run away is never the best, whatever its figure is."""
        if self.judge is not None and self.judge.stopped(metric_lines(self.state.log_history)):
            return False
        return super()._determine_best_metric(metrics, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens, seconds and speed to what is logged, and a line to metrics.jsonl."""
        now, tokens = time.perf_counter(), self.state.num_input_tokens_seen
        logs |= {"tokens": tokens, "seconds": self._seconds_before + now - self._started}
        if "loss" in logs:
            logs["tokens_per_second"] = (tokens - self._last_tokens) / max(now - self._last_log, 1e-9)
            self._last_log, self._last_tokens = now, tokens
            logs |= self._means() | (self.supply.notes() if self.supply is not None else {})
        super().log(logs, start_time)
        if self.is_world_process_zero():
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json_lines(metric_lines(self.state.log_history[-1:])))

    # -- checkpoints: whole or absent

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Clocks and metrics follow the checkpoint: lines of steps that a kill undid are written again."""
        counts = super()._init_training_state(*args, **kwargs)
        history = self.state.log_history
        self._last_log = self._started = time.perf_counter()
        self._last_tokens = self.state.num_input_tokens_seen
        self._seconds_before = history[-1]["seconds"] if history else 0.0
        if self.is_world_process_zero():
            write_text(self.metrics, json_lines(metric_lines(history)))
        return counts

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        begun = time.perf_counter()
        super()._save_checkpoint(model, trial)
        self._last_log += time.perf_counter() - begun

    def _save_more(self, folder: Path) -> None:
        if self.supply is not None:
            (folder / BESIDE).mkdir(exist_ok=True)
            self.supply.save(folder / BESIDE)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The student alone, as stock transformers would save it; of a partly frozen one, what is trained."""
        if self.args.should_save:
            found = {} if state_dict is None else state_dict  # gathered from shards, under the names of the wrapper
            parts = {
                prefix: {name.removeprefix(prefix): found[name] for name in found if name.startswith(prefix)}
                for prefix in ("student.", "beside.")
            }
            folder, student = Path(str(output_dir)), cast(PreTrainedModel, self.student)
            if all(parameter.requires_grad for parameter in student.parameters()):
                student.save_pretrained(folder, state_dict=parts["student."] or None)
            else:
                _save(student, parts["student."], folder)
            if self.objective.beside is not None:
                (folder / BESIDE).mkdir(exist_ok=True)
                _save(self.objective.beside, parts["beside."], folder / BESIDE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        _restore(self.student, checkpoint)
        if self.objective.beside is not None:
            _restore(self.objective.beside, checkpoint / BESIDE)
        if self.supply is not None:
            self.supply.load(checkpoint / BESIDE, step=checkpoint_step(checkpoint))


def _trained(model: nn.Module) -> list[str]:
    """Names of the parameters that are trained; those that are tied once."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _save(model: nn.Module, gathered: dict[str, Tensor], folder: Path) -> None:
    """What is trained, of the weights as gathered or else as they are: whoever resumes finds the rest as it was."""
    values = gathered or model.state_dict()
    save_file({name: values[name] for name in _trained(model)}, folder / "model.safetensors")


def _restore(model: nn.Module, folder: Path) -> None:
    """The weights of all files of the folder."""
    missing = set(_trained(model))
    for file in sorted(folder.glob("model*.safetensors")):
        result = model.load_state_dict(load_file(file), strict=False)
        missing &= set(result.missing_keys)
        assert not result.unexpected_keys, f"{file} holds {result.unexpected_keys}"
    assert not missing, f"{folder} lacks {sorted(missing)}"
