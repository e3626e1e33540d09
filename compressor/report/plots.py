"""Plots as inline SVG that follows the page's colours.

matplotlib draws in placeholder colours, which are then swapped for CSS variables: one drawing serves the
light and the dark page. Figures are drawn narrow, so that their text stays readable on a phone.
"""

import io
import re
from typing import Any

from ..units import short

# Placeholder colour in the drawing -> CSS variable of the page.
COLOURS = {
    "#010101": "ink",
    "#020202": "faint",
    "#030303": "teacher",
    "#040404": "pruned",
    "#050505": "student",
}
INK, FAINT, TEACHER, PRUNED, STUDENT = COLOURS
MODEL_COLOURS = {"teacher": TEACHER, "pruned": PRUNED, "student": STUDENT}


def loss_plot(metrics: list[dict[str, Any]]) -> str | None:
    """Training and held-out loss against tokens, in nats per token; None where nothing was logged.

    Of training the divergence alone where there is one: its loss may hold more, such as that of hidden states.
    """
    curves = [
        ("kl", "training KL", STUDENT, "-") if any("kl" in m for m in metrics) else ("loss", "training", STUDENT, "-"),
        ("heldout_kl", "held-out KL", PRUNED, "-"),
        ("heldout_ce", "held-out cross-entropy", TEACHER, "--"),
    ]
    figure, axes = _figure(height=2.9)
    drawn = 0
    for key, label, colour, style in curves:
        points = [(m["tokens"], m[key]) for m in metrics if m.get(key) is not None and "tokens" in m]
        if points:
            drawn += 1
            marker = "o" if len(points) < 40 and key.startswith("heldout") else None
            axes.plot(
                *zip(*points, strict=True),
                style,
                color=colour,
                label=label,
                linewidth=1.6,
                marker=marker,
                markersize=3.5,
            )
    if not drawn:
        return None
    values = [m[key] for key, *_ in curves for m in metrics if m.get(key) is not None]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel("tokens of distillation")
    axes.set_ylabel("nats per token")
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    _legend(axes)
    return _svg(figure, "Loss against tokens of distillation")


def skills_plot(report: dict[str, Any]) -> str | None:
    """Skill scores of teacher, pruned and student with their 95 % intervals; None where no skill was
    asked.
    """
    skills = [name for name, entry in report["teacher"]["skills"].items() if entry["n"]]
    if not skills:
        return None
    figure, axes = _figure(height=3.0)
    groups = [*skills, "all"]
    for i, (model, colour) in enumerate(MODEL_COLOURS.items()):
        entries = [report[model]["skills"][skill] for skill in skills] + [report[model]["overall"]]
        asked = [(x, entry) for x, entry in enumerate(entries) if entry["score"] is not None]
        if not asked:
            continue
        xs = [x + (i - 1) * 0.27 for x, _ in asked]
        ys = [100 * entry["score"] for _, entry in asked]
        spread = [
            [max(0.0, 100 * (entry["score"] - entry["low"])) for _, entry in asked],
            [max(0.0, 100 * (entry["high"] - entry["score"])) for _, entry in asked],
        ]
        axes.bar(xs, ys, width=0.25, color=colour, label=model)
        axes.errorbar(xs, ys, yerr=spread, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 105)
    axes.set_ylabel("exact successes, %")
    _legend(axes)
    return _svg(figure, "Skill scores with 95 % intervals")


def shape_plot(report: dict[str, Any]) -> str:
    """Teacher and student side by side: each size as a share of the teacher's, with the numbers written
    on.
    """
    keys = ["num_layers", "hidden", "ffn", "num_heads", "num_kv_heads"]
    labels = ["layers", "hidden", "ffn", "heads", "KV heads"]
    teacher, student = report["shape"]["teacher"], report["shape"]["student"]
    rows = [(label, teacher[key], student[key]) for label, key in zip(labels, keys, strict=True)]
    rows.append(("parameters", report["teacher"]["parameters"], report["student"]["parameters"]))
    figure, axes = _figure(height=3.0)
    for y, (_, theirs, ours) in enumerate(rows):
        for offset, value, colour in ((-0.2, theirs, TEACHER), (0.2, ours, STUDENT)):
            axes.barh(y + offset, value / theirs, height=0.36, color=colour)
            axes.text(value / theirs + 0.015, y + offset, short(value), va="center", color=INK, fontsize=9)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.bar([0], [0], color=TEACHER, label="teacher")
    axes.bar([0], [0], color=STUDENT, label="student")
    _legend(axes)
    return _svg(figure, "Shapes of teacher and student side by side")


def exports_plot(report: dict[str, Any]) -> str | None:
    """Size against quality, the marks as large as decoding is fast; None where nothing was exported.

    Quality is the skill score, or the share of same top tokens as the student where no skill was asked.
    """
    found = [one for one in report["exports"] if not one.get("failed")]
    asked = bool(found) and all(one["overall"] is not None for one in found)
    key = "overall" if asked else "top1"
    if not found or any(one[key] is None for one in found):
        return None
    figure, axes = _figure(height=2.9)
    label_style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 8}
    fastest = max(one["decode_tokens_per_s"] or 0 for one in found) or 1
    for one in found:
        speed = one["decode_tokens_per_s"]
        area = 40 + 260 * (speed or 0) / fastest
        mebibytes = one["bytes"] / 2**20
        axes.scatter([mebibytes], [100 * one[key]], s=area, color=STUDENT, alpha=0.75, linewidths=0)
        label = f"{one['format']}-{one['precision']}" + (f"\n{speed:,.0f} tokens/s" if speed else "")
        axes.annotate(label, (mebibytes, 100 * one[key]), (0, -12), color=INK, **label_style)
    if asked and report["student"]["overall"]["score"] is not None:
        student = (report["student"]["bytes"] / 2**20, 100 * report["student"]["overall"]["score"])
        axes.scatter(*zip(student, strict=True), s=60, color=TEACHER, linewidths=0)
        axes.annotate("student", student, (0, -9), color=INK, **label_style)
    axes.margins(x=0.2, y=0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("MiB on disk")
    axes.set_ylabel("skills, %" if asked else "same top token as the student, %")
    return _svg(figure, "Exports: size against quality, larger marks decode faster")


def _figure(*, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, height), layout="constrained")
    axes = figure.add_subplot()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.grid(axis="both", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=10, length=0)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def _legend(axes: Any) -> None:
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(handles),
        frameon=False,
        labelcolor=INK,
        fontsize=9,
        columnspacing=1.2,
        handlelength=1.6,
    )


def _svg(figure: Any, title: str) -> str:
    import matplotlib

    out = io.StringIO()
    # A fixed salt and no date: the same report is the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    drawing = out.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    # Several drawings share one page: their ids must not meet.
    prefix = re.sub(r"\W+", "-", title.lower())
    drawing = re.sub(r'id="', f'id="{prefix}-', drawing)
    drawing = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", drawing)
    for colour, variable in COLOURS.items():
        drawing = drawing.replace(colour, f"var(--{variable})")
    drawing = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", drawing, count=1)
    return drawing.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
