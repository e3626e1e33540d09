"""What is done with a finished run, or with any model: judge it, export it, measure it, ship it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import recipe as recipes
from ..errors import CheckFailed, UserError
from ..progress import progress
from ..run import Run, read_json
from .job import Say, hush, public_name, quiet
from .stages import ship
from .subject import Subject, ended

if TYPE_CHECKING:
    from export import Settings

    from ..runtime import Runtime


def evaluate(
    what: str,
    *,
    against: str | None = None,
    suites: list[str] | None = None,
    data: str | None = None,
    prompts: int | None = None,
    tokens: int | None = None,
    seed: int | None = None,
    generation: bool = False,
    say: Say = quiet,
) -> dict[str, Any]:
    """Judge one model and return {"what", "against", "result"}; a run folder means its student.

    An exported artifact is judged by its own runtime. A run folder brings its own teacher, data, settings and seed
    (else 0). `suites` name skills or JSONL files; default: all four. With `generation`, the result has what the model
    writes by itself on held-out prompts under that key, see `compressor.evaluate.generation`.
    Raises UserError for what cannot be found, loaded or asked.
    """
    from .. import runtime as runtimes
    from ..evaluate import evaluate as judge
    from ..evaluate.generation import generation as judge_writing

    hush()
    subject = Subject.of(what, against=against, data=data, seed=seed)
    runtime = runtimes.load(subject.model, batch_size=subject.settings.batch_size)
    heldout = subject.heldout(runtime, tokens=tokens)
    if not subject.data:
        say("no --data, so no perplexity and no agreement with the teacher; only skills are judged")
    chosen = subject.suites(suites, runtime.tokenizer, prompts=prompts)
    if not chosen and not heldout:
        raise UserError(f"{what} has no chat template and no --data was given; nothing to judge; give --data")
    asked = subject.prompts(runtime, count=prompts) if generation else None
    teacher = subject.teacher()
    with progress("evaluate", unit="tasks") as advance:
        result = judge(
            runtime,
            against=teacher,
            heldout=heldout,
            suites=chosen,
            max_new_tokens=subject.settings.max_new_tokens,
            seed=subject.seed,
            progress=advance.of,
        )
        if asked is not None:
            result["generation"] = judge_writing(
                runtime,
                asked[0],
                references=asked[1],
                against=teacher,
                max_new_tokens=subject.settings.max_new_tokens,
                progress=advance.of,
            )
    return {"what": subject.model, "against": subject.against, "result": result}


def export(
    what: str,
    settings: Settings,
    *,
    out: Path | str | None = None,
    against: str | None = None,
    data: str | None = None,
    prompts: int | None = None,
    tokens: int | None = None,
    measured: bool = True,
    say: Say = quiet,
) -> dict[str, Any]:
    """Export one model (a run folder means its student) and return {"path", "manifest"}.

    `out` defaults to export/FORMAT-PRECISION in the run folder, else exports/NAME-FORMAT-PRECISION. Unless `measured`
    is False, the manifest has the artifact's fidelity to the student and to `against` (a run brings its teacher and
    data) and its four skills.
    Raises UserError for what cannot be exported, CheckFailed where the artifact is not the student.
    """
    import export as exporting

    from ..checkpoint import resolve
    from ..plan import hub_name

    hush()
    subject = Subject.of(what, against=against, data=data)
    student = resolve(subject.model)
    name = subject.run.folder.resolve().name if subject.run else Path(subject.model).name
    default = subject.run.folder / "export" if subject.run else Path("exports")
    out = Path(out) if out else default / (settings.name if subject.run else f"{name}-{settings.name}")
    say(f"{settings.name:<17} writing and verifying {out}")

    about = {"name": name}
    if subject.against:
        about["description"] = f"distilled from {public_name(hub_name(subject.against))}"
    with progress(f"export {settings.name}") as advance:
        judged = subject.judged(student, advance.of, prompts=prompts, tokens=tokens)

        def measure(runtime: Runtime) -> dict[str, Any]:
            say(f"{settings.name:<17} verified; measuring fidelity and skills (--no-measure leaves that out)")
            return judged(runtime)

        chosen = measure if measured else None
        given = {"about": about, "calibration": subject.calibration(student)}
        manifest = exporting.export(student, settings, out, **given, measure=chosen, progress=advance.of)
    return {"path": str(out), "manifest": manifest}


def bench(
    whats: list[str],
    *,
    device: str | None = None,
    budgets: list[str] | None = None,
    versus: bool = False,
    fit: bool = False,
    threads: int | None = None,
    repeats: int | None = None,
    say: Say = quiet,
) -> dict[str, Any]:
    """Measure latency and memory of models and artifacts, and return what `export.bench` does.

    A run folder means its student, with `fit` its artifacts too. budgets: texts such as "memory=1GiB".
    Raises UserError for what cannot be found or opened; CheckFailed, with the result, where nothing fits (`fit`), or
    where one of them misses a budget.
    """
    import export as exporting

    from ..checkpoint import resolve
    from ..runtime import is_artifact

    hush()
    limits = [exporting.parse_budget(text) for text in budgets or []]
    if fit and not limits and device is None:
        raise UserError("--fit has nothing to fit; expected --device or --budget; name one")
    if versus and len(whats) < 2:
        raise UserError("--vs compares artifacts; expected two or more; name another")
    chosen: list[str] = []
    for what in whats:
        subject = Subject.of(what)
        chosen.append(subject.model if is_artifact(subject.model) else str(resolve(subject.model)))
        if fit and subject.run and subject.run.folder == Path(what):
            chosen += sorted(str(path.parent) for path in (Path(what) / "export").glob("*/export.json"))
    result = exporting.bench(
        list(dict.fromkeys(chosen)),
        on=device,
        budgets=limits,
        versus=versus,
        fit=fit,
        threads=threads,
        repeats=repeats or exporting.REPEATS,
        say=say,
    )
    missed = [(found["what"], line) for found in result["artifacts"] for line in found["budget"] if not line["passed"]]
    if fit and result["fit"]["what"] is None:
        raise CheckFailed(f"nothing fits the budget: {result['fit']['why']}", result)
    if missed and not fit:
        from export.tables import budget_line

        what, line = missed[0]
        more = f"; {len(missed) - 1} more" if len(missed) > 1 else ""
        raise CheckFailed(f"budget missed: {budget_line(what, line)}{more}", result)
    return result


def package(run_folder: Path | str, *, push: str | None = None, say: Say = quiet) -> dict[str, Any]:
    """Write a finished run's card and checksums again, and push its student if asked: {"folder", "files", "url"}."""
    from ..package import CHECKSUMS, check_checksums
    from ..package import push as upload

    run = ended(Run(run_folder))
    recipe = recipes.build(recipes.load_values(str(run.recipe)), origin=str(run.recipe))
    status = (run.done("distill") or {})["status"]
    if push and status != "ok":
        raise CheckFailed(f"{run.folder} ended {status}, so its student is not pushed; distill it to health first")
    with run.locked():
        ship(run, read_json(run.report), recipe)
        files = check_checksums(run.student)
        say(f"{files} files in {run.student} match {CHECKSUMS}")
        url = upload(run.student, push) if push else None
    return {"folder": str(run.student), "files": files, "url": url}
