"""What every stage of one run is handed, and how it talks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..progress import progress
from ..run import Run
from ..shape import Shape

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..recipe import Recipe

Say = Callable[[str], None]


def quiet(message: str) -> None:
    """Say nothing: what a notebook gets unless it passes print."""


@dataclass
class Job:
    """What every stage of one run is handed: the folder, the recipe, the teacher and the shape to reach."""

    run: Run
    recipe: Recipe
    teacher: Checkpoint
    shape: Shape
    say: Say
    facts: dict[str, Any] = field(default_factory=dict)  # what the current stage wants noted with its mark

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's, read once for all stages."""
        from ..checkpoint import load_tokenizer

        return load_tokenizer(self.teacher.folder)

    @property
    def vocab(self) -> int:
        """How many token ids there are: the heads' further rows are padding and take no part in the loss."""
        from ..data import num_ids

        return min(num_ids(self.tokenizer), self.shape.vocab)

    @property
    def source(self) -> str:
        """Where the data come from; the recipe names it once the run is open."""
        return str(self.recipe.data.source)

    @property
    def learned_from(self) -> str:
        """Where the student's rows come from: the data, or the teacher's answers to them."""
        return str(self.answers / "data") if self.recipe.distill.method == "seqkd" else self.source

    @property
    def answers(self) -> Path:
        """Where the teacher's answers are kept."""
        return self.run.folder / "answers"

    def before_answers(self) -> Job:
        """This job as one that learns from the data themselves, whose rows the answers' will be like."""
        distill = self.recipe.distill
        if distill.method != "seqkd":
            return self
        recipe = self.recipe.model_copy(update={"distill": distill.model_copy(update={"method": "sft"})})
        return replace(self, recipe=recipe)

    @property
    def correction(self) -> Path:
        """Where the teacher's correction keeps its checkpoints and what came out: beside a cache that is made of it."""
        return self._beside_cache(self.run.correction)

    @property
    def corrected(self) -> Path:
        """Where the corrected teacher is; there is none where correcting did not help."""
        return self._beside_cache(self.run.corrected)

    def _beside_cache(self, path: Path) -> Path:
        asked = self.recipe.distill
        if asked.cache is None or asked.signal == "online" or asked.method != "kl":
            return path
        return Path(f"{asked.cache}-{path.name}")

    @property
    def taught_by(self) -> Checkpoint:
        """The teacher that the student learns from: the corrected one, where correcting it helped."""
        from ..checkpoint import Checkpoint

        wanted = self.recipe.correct.before and self.corrected.is_dir()
        return Checkpoint(self.corrected) if wanted else self.teacher

    @property
    def data(self) -> dict[str, Any]:
        """How this run reads its data, for every function of compressor.data."""
        section = self.recipe.data
        return {"split": section.split, "fraction": section.heldout_fraction, "seed": self.recipe.seed}

    @property
    def cache(self) -> Path:
        """Where what the teacher said is kept, by recipes that keep it."""
        return Path(self.recipe.distill.cache or self.run.folder / "cache")

    @cached_property
    def cached_of(self) -> dict[str, Any]:
        """What such a cache depends on."""
        from ..signals import fingerprint

        settings = self.recipe.distill
        assert settings.signal != "online"
        return fingerprint(
            teacher=self.taught_by.fingerprint(),
            tokenizer=self.tokenizer,
            kind=settings.signal,
            keep=settings.keep,
            temperature=settings.temperature,
            vocab=self.vocab,
            rows={
                "source": public_name(self.source),
                "seed": self.recipe.seed,
                "context": self.recipe.data.context,
                "tokens": settings.tokens,
                "batch": settings.batch,
                "micro_batch": settings.micro_batch,
                "heldout_rows": settings.heldout_rows,
            },
        )

    @cached_property
    def batches(self) -> Any:
        """The rows to train on."""
        return self._rows(self.learned_from, self.recipe.distill.micro_batch)

    @property
    def rows_anew(self) -> Any:
        """The same data in another order, for a second training of the same student."""
        return self._rows(self.source, self.recipe.distill.micro_batch, seed=self.recipe.seed + 1)

    @cached_property
    def heldout(self) -> Any:
        """The batches of the held-out loss."""
        return self._heldout(self.learned_from, self.recipe.distill.micro_batch)

    @cached_property
    def correcting(self) -> dict[str, Any]:
        """Rows, held-out batches and settings of the teacher's correction: the data themselves, not its answers."""
        section = self.recipe.correct
        return {
            "batches": self._rows(self.source, section.micro_batch),
            "heldout": self._heldout(self.source, section.micro_batch),
            "settings": section.training(self.recipe.distill),
        }

    def _rows(self, source: str, micro_batch: int, **changes: Any) -> Any:
        from ..data import Blocks

        sizes = {"context": self.recipe.data.context, "group": micro_batch}
        return Blocks(source, self.tokenizer, **sizes, **(self.data | changes))

    def _heldout(self, source: str, micro_batch: int) -> Any:
        from ..data import heldout_batches

        sizes = {"limit": self.recipe.distill.heldout_rows, "batch_size": micro_batch}
        with progress("held-out rows", unit="rows"):
            return heldout_batches(source, self.tokenizer, context=self.recipe.data.context, **sizes, **self.data)

    def prompts(self, part: str, count: int, *, after: int = 0) -> tuple[list[list[int]], list[str]]:
        """`count` prompts of the data's part as token ids, or as many as there are, and what the data answer.

        after: so many come first and are left out, unless there are not enough for that.
        """
        from ..data import records, shuffled
        from ..evaluate.generation import heldout_prompts
        from ..runtime.prompts import ids_of

        stream = records(self.source, part=part, **self.data)
        stream = shuffled(stream, seed=self.recipe.seed) if part == "train" else stream
        room = {"context": self.recipe.data.context, "max_new_tokens": self.recipe.distill.max_new_tokens}
        prompts, references = heldout_prompts(stream, self.tokenizer, count=after + count, **room)
        return [ids_of(prompt, self.tokenizer) for prompt in prompts[-count:]], references[-count:]


def public_name(value: str | None) -> str | None:
    """A path on this machine becomes a name: what is written here may be published."""
    return Path(value).name if value and Path(value).exists() else value


def hush() -> None:
    """Keep the libraries' own bars and talk off the screen, but for downloads; ours say what there is to say."""
    import datasets
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()  # the Hub's too
    enable_progress_bars()  # a download takes long, and only the Hub's bar knows of it
    logging.set_verbosity_error()
