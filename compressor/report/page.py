"""report.html: one file with no outside references, light and dark, readable on a phone."""

from html import escape
from typing import Any

from ..units import duration
from . import (
    EXPORT_HEADER,
    align_lines,
    columns,
    correction_line,
    export_rows,
    headline,
    kept_lines,
    model_rows,
    percent,
    shape_rows,
)
from .plots import exports_plot, loss_plot, shape_plot, skills_plot

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1d2430; --soft: #5c6675;
  --faint: #dfe3e8;
  --teacher: #8a94a6; --pruned: #d9822b; --student: #1f7a8c; --good: #2b7a3d; --bad: #b3372f; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1c2128; --ink: #e4e8ee;
  --soft: #9aa5b4;
  --faint: #323a45; --teacher: #7d8796; --pruned: #e09a4a; --student: #46b0c4; --good: #6cc07f;
  --bad: #ef8078; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 .6rem; }
.status { color: var(--soft); margin: .2rem 0 1.2rem; } .status b { color: var(--good); }
.status b.bad { color: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .75rem;
  margin-bottom: .75rem; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .75rem; }
.wide { grid-column: 1 / -1; }
.card { background: var(--card); border: 1px solid var(--faint); border-radius: 10px; padding: 1rem;
  min-width: 0; }
.figure b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; line-height: 1.2; }
.figure span, .note { color: var(--soft); font-size: .87rem; }
svg { display: block; width: 100%; height: auto; } svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; } .narrow { max-width: 560px; margin: 0 auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: right; padding: .35rem .5rem; border-bottom: 1px solid var(--faint);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; }
td small { color: var(--soft); display: block; font-size: .8em; line-height: 1.2; }
.strip { display: grid; grid-template-columns: 5.5rem 1fr; gap: .5rem; align-items: center;
  font-size: .82rem; color: var(--soft); }
.strip + .strip { margin-top: 2px; } .strip span { white-space: nowrap; }
.cells { display: flex; height: 14px; background: var(--faint); border-radius: 2px; overflow: hidden; }
.cells i { flex: 1; background: var(--student); } .cells.gap i + i { margin-left: 2px; }
h3 { font-size: .92rem; margin: 1rem 0 .35rem; }
.bar { display: grid; grid-template-columns: 7rem 1fr 5.5rem; gap: .5rem; align-items: center;
  font-size: .9rem; margin: .25rem 0; }
.bar span:first-child { overflow-wrap: anywhere; }
.bar span:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.bar i { display: block; height: 12px; background: var(--student); border-radius: 2px; min-width: 2px; }
.sample { border-top: 1px solid var(--faint); padding: .7rem 0; } .sample:first-of-type { border-top: 0; }
.sample p { margin: .2rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.sample dl { display: grid; grid-template-columns: 6.2rem 1fr; gap: .15rem .5rem; margin: .3rem 0 0;
  font-size: .9rem; }
.sample dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.sample dt { color: var(--soft); }
.yes::after { content: " right"; color: var(--good); }
.no::after { content: " wrong"; color: var(--bad); }
@media (max-width: 760px) { .grid { grid-template-columns: minmax(0, 1fr); }
main { padding: 1rem .6rem 2rem; }
  .card { padding: .75rem; } th, td { padding: .3rem .2rem; font-size: .8rem; }
  .figures { grid-template-columns: repeat(2, minmax(0, 1fr)); } .figure b { font-size: 1.2rem; } }
"""


def render_html(report: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    """The whole page as text; every value from the report is escaped."""
    name = escape(report["name"] or "Compression report")
    status = escape(report["status"])
    bad = "" if report["status"] == "done" else ' class="bad"'
    figures = "".join(
        f'<div class="card figure"><b>{escape(figure)}</b><span>{escape(meaning)}</span></div>'
        for figure, meaning in headline(report)
    )
    cards = [
        _card("Skills, with 95 % intervals", skills_plot(report)),
        _card("Loss against tokens", loss_plot(metrics)),
        _card("Teacher, pruned and student", _models(report), wide=True),
        _card("Teacher correction", _correction(report["correction"]) if report["correction"] else None, wide=True),
        _card("Alignment", _lines(align_lines(report)) if report["align"] else None, wide=True),
        _card("Exports", _exports(report) if report["exports"] else None, wide=True),
        _card("Shape, side by side", shape_plot(report)),
        _card("Sizes", _table(["", "teacher", "student"], shape_rows(report))),
        _card("What was kept", _kept(report["kept"]) if report["kept"] else None, wide=True),
        _card("Time per stage", _times(report["seconds"]) if report["seconds"] else None, wide=True),
        _card("Answers side by side", _samples(report) if report["samples"] else None, wide=True),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{name}</h1><p class="status">Status: <b{bad}>{status}</b></p>'
        f'<div class="figures">{figures}</div><div class="grid">{"".join(cards)}</div></main></body></html>\n'
    )


def _card(title: str, body: str | None, *, wide: bool = False) -> str:
    if body is None:
        return ""
    return f'<section class="card{" wide" if wide else ""}"><h2>{escape(title)}</h2>{body}</section>'


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    """An interval goes below its score: that keeps four columns on a phone."""
    value, bracket, rest = escape(text).partition(" (")
    return f"{value} <small>({rest}</small>" if bracket and rest[:1].isdigit() else escape(text)


def _correction(correction: dict[str, Any]) -> str:
    return f'<p class="note">{escape(correction_line(correction))}</p>'


def _models(report: dict[str, Any]) -> str:
    rows = [[*row, ""] for row in model_rows(report)]
    recovered = report["recovery"]["skills"] | {"all skills": report["recovery"]["overall"]}
    for row in rows:
        if recovered.get(row[0]) is not None:
            row[-1] = percent(recovered[row[0]])
    note = "Skills: share of exact successes. Ratio: student / teacher, the share recovered."
    return _table(["", *columns(report), "ratio"], rows) + f'<p class="note">{note}</p>'


def _exports(report: dict[str, Any]) -> str:
    failed = "".join(f'<p class="note">{escape(one["failed"])}</p>' for one in report["exports"] if one.get("failed"))
    prompts = sorted({one["prompt"] for one in report["exports"] if not one.get("failed")})
    words = " and ".join(map(str, prompts)) or "some"
    note = f"Time to first token (TTFT) and decoding at a prompt of {words} tokens, each in a process of its own."
    told = dict.fromkeys(warning for one in report["exports"] for warning in one.get("warnings", []))
    failed += "".join(f'<p class="note">{escape(warning)}</p>' for warning in told)
    plot = exports_plot(report)
    drawn = f'<div class="narrow">{plot}</div>' if plot else ""
    return f'{drawn}{_table(EXPORT_HEADER, export_rows(report))}{failed}<p class="note">{note}</p>'


def _kept(kept: dict[str, Any]) -> str:
    layers = set(kept["layers"]["kept"])
    marks = [1.0 if i in layers else 0.0 for i in range(kept["layers"]["of"])]
    lines = kept_lines(kept)
    parts = [f"<h3>{escape(lines[0])}</h3>" + _strip("0 to " + str(len(marks) - 1), marks, gap=True)]
    for line, axis in zip(lines[1:], ("hidden", "ffn", "heads"), strict=True):
        strips = kept[axis]["strips"]
        names = ["all layers"] if axis == "hidden" else [f"layer {i}" for i in kept["layers"]["kept"]]
        drawn = "".join(_strip(name, strip, gap=axis == "heads") for name, strip in zip(names, strips, strict=True))
        parts.append(f"<h3>{escape(line)}</h3>{drawn}")
    note = "Each cell is a stretch of the axis; the fuller its colour, the larger the share of it that was kept."
    return "".join(parts) + f'<p class="note">{note}</p>'


def _strip(name: str, shares: list[float], *, gap: bool = False) -> str:
    cells = "".join(f'<i style="opacity:{float(share):.2f}"></i>' for share in shares)
    style = "cells gap" if gap else "cells"
    return f'<div class="strip"><span>{escape(name)}</span><div class="{style}">{cells}</div></div>'


def _times(stages: dict[str, float | None]) -> str:
    longest = max((value or 0 for value in stages.values()), default=0) or 1
    return "".join(
        f'<div class="bar"><span>{escape(stage)}</span>'
        f'<div><i style="width:{100 * (value or 0) / longest:.1f}%"></i></div>'
        f"<span>{escape(duration(value))}</span></div>"
        for stage, value in stages.items()
    )


def _lines(lines: list[str]) -> str:
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)


def _samples(report: dict[str, Any]) -> str:
    parts = []
    for sample in report["samples"]:
        answers = "".join(
            f'<dt class="{"yes" if sample[model]["passed"] else "no"}">{model}</dt>'
            f"<dd>{escape(sample[model]['answer'])}</dd>"
            for model in columns(report)
        )
        parts.append(
            f'<div class="sample"><b>{escape(sample["skill"])}</b>'
            f"<p>{escape(sample['prompt'])}</p><dl>{answers}</dl></div>"
        )
    return "".join(parts)
