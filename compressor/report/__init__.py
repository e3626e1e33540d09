"""The report of a run: report.json (schema in docs/report.md), report.md and report.html.

Everything is gathered from what the stages left in the run folder; nothing is measured here. A measure that
is not there is null in JSON and a dash on the pages, never a zero.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..evaluate import recovery
from ..evaluate.skills import SKILLS
from ..progress import stdout
from ..run import Run, read_json, write_json, write_text
from ..units import duration, short, size

if TYPE_CHECKING:
    from ..shape import Shape

SCHEMA_VERSION = 1
CORRECTION = ("mode", "when", "used", "before", "after", "tokens")
MODELS = ("teacher", "pruned", "student")
ALIGNED = ("teacher", "pruned", "distilled", "student")  # where alignment followed distillation
SIZES = ("num_layers", "hidden", "ffn", "num_heads", "num_kv_heads", "head_dim", "vocab")


def write(folder: Path | str, *, status: str = "done") -> dict[str, Any]:
    """Write report.json, report.md and report.html into a run folder and return the report.

    Reads evaluation.json {teacher, pruned, student}, shape.json {teacher, student, kept?}, run.json {stages}
    and, where there is one, metrics.jsonl. status: "done", or what went wrong: "worse", "not_finite"
    or "collapsed".
    Raises UserError when one of the first three is missing or broken.
    """
    from .page import render_html

    run = Run(folder)
    metrics = read_metrics(run.metrics)
    report = build(
        evaluation=read_json(run.evaluation),
        shape=read_json(run.shape),
        facts=read_json(run.facts),
        metrics=metrics,
        exports=read_json(run.exports) if run.exports.exists() else [],
        name=run.folder.resolve().name,
        status=status,
    )
    write_json(run.report, report)
    write_text(run.folder / "report.md", render_markdown(report))
    write_text(run.folder / "report.html", render_html(report, metrics))
    return report


def build(
    *,
    evaluation: dict[str, Any],
    shape: dict[str, Any],
    facts: dict[str, Any],
    metrics: list[dict[str, Any]],
    exports: list[dict[str, Any]] | None = None,
    name: str = "",
    status: str = "done",
) -> dict[str, Any]:
    """The report as one JSON-ready dict; docs/report.md names every key."""
    missing = [model for model in MODELS if model not in evaluation]
    if missing:
        raise UserError(f"evaluation.json holds no {', '.join(missing)}; expected {', '.join(MODELS)}; evaluate again")
    models = {model: _model(evaluation[model]) for model in columns(evaluation)}
    stages = facts.get("stages", {})
    distilled = [line["tokens"] for line in metrics if "tokens" in line]
    return {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "status": status,
        **models,
        "recovery": recovery(models["student"], models["teacher"]),
        "agreement": models["student"]["agreement"] or {"kl": None, "top1": None},
        "tokens": {
            "distill": max(distilled, default=0) + stages.get("start", {}).get("tokens", 0),
            "heldout": evaluation["student"].get("heldout_tokens"),
        },
        "seconds": {stage: mark.get("seconds") for stage, mark in stages.items()},
        "shape": {"teacher": shape["teacher"], "student": shape["student"]},
        "kept": shape.get("kept"),
        "align": {key: stages["align"][key] for key in ("sft", "pairs", "dpo") if key in stages.get("align", {})}
        or None,
        "samples": _samples(evaluation),
        "correction": _correction(stages.get("correct") or stages.get("distill", {}).get("correction")),
        "exports": exports or [],
        "versions": facts.get("versions", {}),
        "seeds": facts.get("seeds", {}),
        "fingerprints": facts.get("fingerprints", {}),
    }


def _correction(mark: dict[str, Any] | None) -> dict[str, Any] | None:
    return mark and {"when": "before"} | {key: mark[key] for key in CORRECTION if key in mark}


def columns(found: dict[str, Any]) -> tuple[str, ...]:
    """The models that an evaluation or a report holds, in the order of the story."""
    return ALIGNED if "distilled" in found else MODELS


def _model(result: dict[str, Any]) -> dict[str, Any]:
    nothing = {"score": None, "low": None, "high": None, "n": 0}
    return {
        "parameters": result["parameters"],
        "bytes": result["bytes"],
        "perplexity": result.get("perplexity"),
        "bits_per_byte": result.get("bits_per_byte"),
        "skills": {skill: dict(nothing) for skill in SKILLS} | result.get("skills", {}),
        "overall": result.get("overall") or dict(nothing),
        "agreement": result.get("agreement"),
    }


def _samples(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The same prompts answered by every model: [{skill, prompt, teacher, pruned, student: {answer,
    passed}}].
    """
    models = columns(evaluation)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for model in models:
        for sample in evaluation[model].get("samples", []):
            row = rows.setdefault(
                (sample["skill"], sample["prompt"]), {"skill": sample["skill"], "prompt": sample["prompt"]}
            )
            row[model] = {"answer": sample["answer"], "passed": sample["passed"]}
    return [row for row in rows.values() if all(model in row for model in models)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, in order of their step; none when there is no file.

    A run that was killed may have logged a step twice: the last line of a step counts. A half-written last
    line is left out.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number}: not valid JSON ({error.msg}); expected one object a line"
            ) from error
        steps[record.get("step", 0)] = steps.get(record.get("step", 0), {}) | record
    return [steps[step] for step in sorted(steps)]


def kept_summary(
    *,
    layers: "tuple[int, ...]",
    hidden: Any,
    ffn: Any,
    heads: Any,
    teacher: "Shape",
    bins: int = 64,
) -> dict[str, Any]:
    """What surgery kept, small enough for a page: for shape.json under "kept".

    layers: kept layer numbers. hidden: kept channel ids. ffn, heads: kept ids for each kept layer.
    Per axis: of (how many the teacher has), kept, and strips: the share kept in each of at most `bins` equal
    stretches of the axis (one strip for hidden, one per kept layer for ffn and heads).
    """

    def axis(rows: list[Any], size: int) -> dict[str, Any]:
        return {"of": size, "kept": len(rows[0]), "strips": [_strip(row, size, bins) for row in rows]}

    return {
        "layers": {"of": teacher.num_layers, "kept": [int(layer) for layer in layers]},
        "hidden": axis([hidden], teacher.hidden),
        "ffn": axis(list(ffn), teacher.ffn),
        "heads": axis(list(heads), teacher.num_heads),
    }


def _strip(ids: Any, size: int, bins: int) -> list[float]:
    bins = min(bins, size)
    have, kept = [0] * bins, [0] * bins
    for i in range(size):
        have[i * bins // size] += 1
    for i in ids:
        kept[int(i) * bins // size] += 1
    return [round(k / h, 3) for k, h in zip(kept, have, strict=True)]


# --- the words both pages use -----------------------------------------------------------------------------------------


def percent(value: float | None, digits: int = 1) -> str:
    """0.973 -> "97.3 %"; a dash for what was not measured."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def number(value: float | None, digits: int = 3) -> str:
    """Thousands separated, or `digits` significant ones; a dash for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def score(entry: dict[str, Any]) -> str:
    """ "95.0 % (92.1-97.3)" """
    if entry["score"] is None:
        return "-"
    return f"{percent(entry['score'])} ({100 * entry['low']:.1f}-{100 * entry['high']:.1f})"


def model_rows(report: dict[str, Any]) -> list[list[str]]:
    """Measure, then each of `columns`: the table at the heart of both pages."""
    return measure_rows([report[model] for model in columns(report)])


def measure_rows(models: list[dict[str, Any]]) -> list[list[str]]:
    """One row per measure, one column per model (in the form of report.json)."""
    rows = [
        ["parameters", *(short(model["parameters"]) for model in models)],
        ["size on disk", *(size(model["bytes"]) for model in models)],
        ["perplexity", *(number(model["perplexity"], 4) for model in models)],
        ["bits per byte", *(number(model["bits_per_byte"], 4) for model in models)],
    ]
    for key, words in (("kl", "KL to the teacher (nats)"), ("top1", "same top token as the teacher")):
        rows.append([words, *(_agreed(model, key) for model in models)])
    names = dict.fromkeys(name for model in models for name in model["skills"])
    skills = [name for name in names if any(model["skills"].get(name, {}).get("n") for model in models)]
    rows += [[skill, *(score(model["skills"][skill]) for model in models)] for skill in skills]
    if skills:
        rows.append(["all skills", *(score(model["overall"]) for model in models)])
    return rows


def _agreed(model: dict[str, Any], key: str) -> str:
    value = (model["agreement"] or {}).get(key)
    return number(value) if key == "kl" else percent(value)


EXPORT_HEADER = [
    "export",
    "runtime",
    "size",
    "skills",
    "KL to the student",
    "same top token",
    "TTFT",
    "decode",
    "peak memory",
]


def export_rows(report: dict[str, Any]) -> list[list[str]]:
    """One row per export, under EXPORT_HEADER."""
    rows = []
    for one in report["exports"]:
        name = f"{one['format']}-{one['precision']}"
        if one.get("failed"):
            rows.append([name, "not kept", *["-"] * (len(EXPORT_HEADER) - 2)])
            continue
        quality = [percent(one["overall"]), number(one["kl_student"]), percent(one["top1"])]
        timed = one["ttft_ms"] is not None  # else another runtime stood in
        times = [f"{one['ttft_ms']:.0f} ms", f"{one['decode_tokens_per_s']:,.0f} tokens/s"] if timed else ["-", "-"]
        rows.append([name, one["runtime"], size(one["bytes"]), *quality, *times, size(one["peak_rss_bytes"])])
    return rows


def align_lines(report: dict[str, Any]) -> list[str]:
    """What alignment did, one line per step; "distilled" is the student before it."""
    lines = []
    for name, found in report["align"].items():
        if name == "pairs":
            sides = ", ".join(
                f"{which} from {found.get(f'{which}_teacher', 0):,} of the teacher's and "
                f"{found.get(f'{which}_student', 0):,} of the student's answers"
                for which in ("chosen", "rejected")
            )
            lines.append(f"pairs: {found['pairs']:,} made of {found['prompts']:,} prompts; {sides}")
            continue
        measures = {
            "held-out loss": found["heldout_loss"],
            "reward margin": found.get("heldout_margin"),
            "reward accuracy": found.get("heldout_accuracy"),
        }
        told = [f"{key} {number(value[0])} to {number(value[1])}" for key, value in measures.items() if value]
        kept = f"step {found['best_step']} kept" if found["best_step"] else "none better than what came in"
        lines.append(f"{name}: {found['rows']:,} rows in {found['steps']:,} steps, {', '.join(told)}; {kept}")
    return lines


def shape_rows(report: dict[str, Any]) -> list[list[str]]:
    """Size, teacher, student."""
    teacher, student = report["shape"]["teacher"], report["shape"]["student"]
    rows = [[key, number(teacher.get(key)), number(student.get(key))] for key in SIZES]
    return [*rows, ["parameters", *(number(report[model]["parameters"]) for model in ("teacher", "student"))]]


def headline(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(figure, what it says): the four things a reader wants first."""
    teacher, student = report["teacher"], report["student"]
    smaller = student["parameters"] / teacher["parameters"]
    figures = [(percent(smaller, 0), f"of the teacher's parameters: {short(student['parameters'])}")]
    if report["recovery"]["overall"] is not None:
        figures.append((percent(report["recovery"]["overall"]), "of the teacher's skill score"))
    if student["perplexity"] is not None:
        figures.append((number(student["perplexity"], 4), f"perplexity (teacher {number(teacher['perplexity'], 4)})"))
    if report["agreement"]["top1"] is not None:
        figures.append((percent(report["agreement"]["top1"]), "same top token as the teacher"))
    if report["tokens"]["distill"]:
        figures.append((number(report["tokens"]["distill"]), "tokens of distillation"))
    return figures


def render_markdown(report: dict[str, Any]) -> str:
    """The report for a terminal or a repository."""
    parts = [f"# {_cell(report['name'] or 'Compression report')}", f"Status: {_cell(report['status'])}."]
    parts.append("\n".join(f"- **{figure}** {_cell(meaning)}" for figure, meaning in headline(report)))
    parts += ["## Quality", markdown_table(["", *columns(report)], model_rows(report))]
    parts.append("Skill scores are shares of exact successes, with 95 % bootstrap intervals.")
    recovered = [[k, percent(v)] for k, v in report["recovery"]["skills"].items() if v is not None]
    if recovered:
        parts += ["## Recovered (student / teacher)", markdown_table(["skill", "share"], recovered)]
    if report["correction"]:
        parts += ["## Teacher correction", correction_line(report["correction"])]
    if report["align"]:
        parts += ["## Alignment", "\n".join(f"- {line}" for line in align_lines(report))]
    if report["exports"]:
        parts += ["## Exports", markdown_table(EXPORT_HEADER, export_rows(report))]
        parts += [f"{_cell(one['failed'])}." for one in report["exports"] if one.get("failed")]
    parts += ["## Shape", markdown_table(["", "teacher", "student"], shape_rows(report))]
    if report["kept"]:
        parts += ["## Kept", "\n".join(f"- {line}" for line in kept_lines(report["kept"]))]
    if report["seconds"]:
        times = [[stage, duration(value)] for stage, value in report["seconds"].items()]
        parts += ["## Time", markdown_table(["stage", "time"], times)]
    return "\n\n".join(parts) + "\n"


def render_evaluation(evaluation: dict[str, Any]) -> None:
    """Print {"what", "against", "result"}, the outcome of evaluating one model, as a table on stdout."""
    from rich.table import Table
    from rich.text import Text

    title = evaluation["what"] + (f" against {evaluation['against']}" if evaluation["against"] else "")
    table = Table(title=Text(title), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in measure_rows([_model(evaluation["result"])]):
        if row[1] != "-":
            table.add_row(*map(Text, row))
    stdout().print(table)
    found = evaluation["result"].get("generation")
    if found is None:
        return
    title = f"{found['prompts']} prompts, {len(found['seeds'])} seeds, temperature {found['temperature']:g}"
    table = Table("", *GENERATION_COLUMNS, title=title, title_justify="left")
    for row in generation_rows(found):
        table.add_row(*row)
    stdout().print(table)
    if found["collapsed"]:
        stdout().print(Text(f"collapsed: {found['collapsed']}"))


CALIBRATION = (
    ("ece", "expected calibration error"),
    ("confidence", "confidence in the next token"),
    ("accuracy", "accuracy of the next token"),
)
GENERATION_COLUMNS = ("model", "teacher", "references")


def generation_rows(found: dict[str, Any]) -> list[list[str]]:
    """Measure, then GENERATION_COLUMNS, of what `evaluate.generation` found; a dash for what was not measured."""

    def rouge(one: dict[str, Any]) -> str:
        score = one["rouge_l"]
        return percent(score["mean"]) + (f" ± {100 * score['std']:.1f}" if score["std"] is not None else "")

    sides = [found, found["teacher"], found["references"]]
    rows = [["Rouge-L", *(rouge(side) if side and "rouge_l" in side else "-" for side in sides)]]
    for key, words, show in (
        ("distinct_4", "distinct 4-grams", percent),
        ("length", "length (tokens)", number),
        ("length_drift", "length / references'", number),
        ("repetition", "repeated 4-grams of an answer", percent),
    ):
        rows.append([words, *(show((side or {}).get(key)) for side in sides)])
    rows += [[words, percent(found[key]), "-", "-"] for key, words in CALIBRATION]
    for at in found["exposure_bias"] or []:
        rows.append([f"excess accumulated error, {at['length']} tokens", f"{at['ex_acc_err']:+.1f} %", "-", "-"])
    return rows


def correction_line(correction: dict[str, Any]) -> str:
    """What correcting the teacher did, in a sentence or two."""
    tokens = f"{correction['mode']}, {correction['tokens']:,} tokens"
    change = f"cross-entropy on held-out data {correction['before']:.4f} -> {correction['after']:.4f} nats a token"
    if correction["when"] == "beside":
        worse = "" if correction["used"] else ", which is no better"
        return (
            f"The teacher was trained on the data while the student learned from it ({tokens}): {change}{worse}. The "
            "teacher above is as it was."
        )
    if not correction["used"]:
        return (
            f"The teacher was trained on the data first ({tokens}), but never had less than {correction['before']:.4f} "
            "nats a held-out token; the student learned from it as it was."
        )
    return (
        f"The student learned from the teacher after it was trained on the data ({tokens}): {change}. The teacher "
        "above is as it was."
    )


def kept_lines(kept: dict[str, Any]) -> list[str]:
    """What was kept, one line per axis."""
    layers = kept["layers"]
    lines = [f"layers: {len(layers['kept'])} of {layers['of']} ({', '.join(map(str, layers['kept']))})"]
    lines += [f"{axis}: {kept[axis]['kept']:,} of {kept[axis]['of']:,}" for axis in ("hidden", "ffn", "heads")]
    return lines


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A GitHub table; cells are escaped, all but the first column are right-aligned."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)] + [[_cell(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    for mark in "\\|<*_`":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())
