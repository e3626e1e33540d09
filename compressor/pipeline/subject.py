"""What is judged or exported, and how: a run brings its own teacher, data, settings and seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import recipe as recipes
from ..errors import UserError
from ..run import Run

if TYPE_CHECKING:
    from ..runtime import Runtime

CALIBRATION_ROWS, CALIBRATION_TOKENS = 128, 1024  # that gptq rounds on, as in its paper but for the length


@dataclass(frozen=True)
class Subject:
    """What is to be judged or exported, and how: a run folder brings its own teacher, data, settings and seed."""

    model: str
    run: Run | None
    against: str | None
    data: str | None
    seed: int
    settings: recipes.Evaluate
    context: int
    section: dict[str, Any]

    @classmethod
    def of(cls, what: str, *, against: str | None = None, data: str | None = None, seed: int | None = None) -> Subject:
        """A run folder means its student; an artifact in a run's export folder belongs to the run; else any model.

        Raises UserError for a run that is not finished.
        """
        from ..plan import hub_name

        settings = recipes.Evaluate()  # pyright: ignore[reportCallIssue] - every field has a default
        folder = Path(what)
        home = folder
        if folder.is_dir() and folder.absolute().parent.name == "export":
            home = folder.absolute().parent.parent
        if not (home / "run.json").exists():
            data = data or ("demo" if "demo" in (what, against) else None)
            return cls(hub_name(what), None, against, data, seed or 0, settings, 1024, {})
        run = ended(Run(home))
        return cls.of_run(run, str(run.student) if home == folder else what, against=against, data=data, seed=seed)

    @classmethod
    def of_run(
        cls, run: Run, model: str, *, against: str | None = None, data: str | None = None, seed: int | None = None
    ) -> Subject:
        """A model that belongs to a run, which may not be finished."""
        recipe = recipes.build(recipes.load_values(str(run.recipe)), origin=str(run.recipe))
        section = {"split": recipe.data.split, "fraction": recipe.data.heldout_fraction, "seed": recipe.seed}
        return cls(
            model,
            run,
            against or recipe.teacher,
            data or recipe.data.source,
            recipe.seed if seed is None else seed,
            recipe.evaluate,
            recipe.data.context,
            section,
        )

    def heldout(self, runtime: Runtime, *, tokens: int | None) -> list[Any]:
        """Rows of held-out text, none without data."""
        from ..data import text_batches

        if not self.data:
            return []
        sizes = {"context": min(self.context, runtime.context), "tokens": tokens or self.settings.tokens}
        return text_batches(self.data, runtime.tokenizer, **sizes, **self.section)

    def prompts(self, runtime: Runtime, *, count: int | None) -> tuple[list[Any], list[str]]:
        """Held-out prompts and their references; UserError without data."""
        from ..data import records
        from ..evaluate.generation import heldout_prompts

        if not self.data:
            raise UserError("--generation has no prompts; expected held-out data; give --data")
        return heldout_prompts(
            records(self.data, part="heldout", **self.section),
            runtime.tokenizer,
            count=count or self.settings.prompts,
            context=min(self.context, runtime.context),
            max_new_tokens=self.settings.max_new_tokens,
        )

    def calibration(self, student: Path) -> Callable[[], Any] | None:
        """What gives rows of training text to round on, or None without data."""
        from transformers import AutoConfig

        from ..checkpoint import load_tokenizer
        from ..data import calibration_batches, records, shuffled

        if not self.data:
            return None
        source = self.data

        def batches() -> Any:
            stream = shuffled(records(source, part="train", **self.section), seed=self.seed)
            longest = getattr(AutoConfig.from_pretrained(student), "max_position_embeddings", self.context)
            context = min(self.context, CALIBRATION_TOKENS, longest)
            return calibration_batches(stream, load_tokenizer(student), samples=CALIBRATION_ROWS, context=context)

        return batches

    def suites(self, names: list[str] | None, tokenizer: Any, *, prompts: int | None) -> dict[str, Any]:
        """Tasks by skill."""
        return suites_of(names, tokenizer, prompts=prompts or self.settings.prompts, seed=self.seed)

    def teacher(self) -> Runtime | None:
        """The model to compare with, loaded."""
        from ..checkpoint import resolve
        from ..plan import hub_name
        from ..runtime import TorchRuntime

        if not self.against:
            return None
        return TorchRuntime(resolve(hub_name(self.against)), batch_size=self.settings.batch_size)

    def judged(
        self,
        student: Path,
        progress: Callable[[str, int, int | None], None],
        *,
        prompts: int | None = None,
        tokens: int | None = None,
    ) -> Callable[[Runtime], dict[str, Any]]:
        """What measures an artifact's fidelity to student and teacher, which are loaded when it is called."""
        from export.fidelity import fidelity

        from ..runtime import TorchRuntime

        def measure(runtime: Runtime) -> dict[str, Any]:
            reference = TorchRuntime(student, batch_size=self.settings.batch_size)
            return fidelity(
                runtime,
                student=reference,
                teacher=self.teacher(),
                heldout=self.heldout(reference, tokens=tokens),
                suites=self.suites(None, reference.tokenizer, prompts=prompts),
                max_new_tokens=self.settings.max_new_tokens,
                seed=self.seed,
                progress=progress,
            )

        return measure


def suites_of(names: list[str] | None, tokenizer: Any, *, prompts: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Tasks by skill: the built-in suites by name, files by path.

    A model without a chat template is asked only what is named: it has to continue a transcript.
    """
    from ..demo import tasks
    from ..evaluate.run_skills import read_suite
    from ..evaluate.skills import SKILLS

    if not tokenizer.chat_template and not names:
        return {}
    suites: dict[str, list[dict[str, Any]]] = {}
    for name in names or SKILLS:
        if name in SKILLS:
            suites.setdefault(name, []).extend(tasks.suite(name, prompts, seed=seed))
            continue
        for task in read_suite(name):
            suites.setdefault(task["skill"], []).append(task)
    return suites


def ended(run: Run) -> Run:
    """The same run; UserError where it has not come to its end."""
    if run.done("report") is None:
        raise UserError(f"{run.folder} holds no finished run; expected one; run compressor distill --out {run.folder}")
    return run
