"""What the page shows, as HTML: every word that a model or a person wrote is escaped."""

from __future__ import annotations

import json
from html import escape
from importlib import resources
from typing import Any

from compressor.units import size

from .difference import Rated, difference, heat
from .marks import call_report, cited_spans, marks
from .saved import names_of

STYLE = (resources.files("serve") / "style.css").read_text(encoding="utf-8")


def answer_card(side: dict[str, Any], question: dict[str, Any], *, name: str, teacher: str | None = None) -> str:
    """One side ({"text", "state", "figures", "error"}): its name, state, answer, figures and checks."""
    state = side.get("state") or ""
    parts = [
        f'<div class="head"><span class="name">{escape(name)}</span><span class="state">{escape(state)}</span></div>'
    ]
    if side.get("error"):
        parts.append(f'<p class="error" role="alert">{escape(side["error"])}</p>')
    body = _cited(side["text"], question["numbered"]) if question.get("numbered") else escape(side["text"])
    parts.append(f'<div class="text" aria-live="polite">{body or "&nbsp;"}</div>')
    if side.get("figures"):
        parts.append(_figures(side["figures"], side.get("bytes")))
        parts.append(_checks(side["text"], question, teacher))
    return f'<section class="side">{"".join(parts)}</section>'


def _cited(text: str, passages: int) -> str:
    spans = cited_spans(text, passages)
    words = []
    for part, source in spans:
        kind = "cite" if source and source.startswith("passage") else "nocite"
        words.append(f'<mark class="{kind}" title="{escape(source)}">{escape(part)}</mark>' if source else escape(part))
    return "".join(words)


def _figures(figures: dict[str, Any], nbytes: int | None) -> str:
    """Tokens, TTFT, tokens per second, memory, size."""
    rate, first = figures.get("tokens_per_s"), figures.get("ttft_s")
    found = [
        ("TTFT", f"{1e3 * first:.0f} ms" if first is not None else "-"),
        ("tokens/s", f"{rate:.1f}" if rate else "-"),
        ("tokens", str(figures["tokens"])),
        ("peak memory", size(figures["peak_rss_bytes"]) if figures.get("peak_rss_bytes") else "-"),
        ("model size", size(nbytes) if nbytes else "-"),
    ]
    cells = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in found)
    return f'<dl class="figures">{cells}</dl>'


def _checks(text: str, question: dict[str, Any], teacher: str | None) -> str:
    chips = [(mark.words, mark.passed) for mark in marks(question.get("check") or {}, text.strip())]
    shown = ""
    if question.get("tools"):
        report = call_report(text, question["tools"], teacher)
        if report["calls"]:
            shown = "".join(f'<pre class="call">{escape(json.dumps(call, indent=2))}</pre>' for call in report["calls"])
        elif report["calls"] == []:
            shown = '<p class="call">no call</p>'
        chips += [(error, False) for error in report["errors"]]
        if report["calls"] and not report["errors"]:
            chips.append(("arguments fit the schema", True))
        if report["same_as_teacher"] is not None:
            chips.append(("the same calls as the first side", report["same_as_teacher"]))
    items = "".join(
        f'<li class="{"pass" if passed else "fail"}"><span aria-hidden="true">{"✓" if passed else "✗"}</span> '
        f'{escape(words)}<span class="sr"> {"passed" if passed else "failed"}</span></li>'
        for words, passed in chips
    )
    return shown + (f'<ul class="checks">{items}</ul>' if items else "")


def ratio_line(sides: list[dict[str, Any]], names: list[str]) -> str:
    """How many times as fast, and how much smaller, the other sides are than the first."""
    first, *others = sides
    said = []
    for side, name in zip(others, names[1:], strict=True):
        words = []
        ours, theirs = (found.get("figures") or {} for found in (first, side))
        if ours.get("tokens_per_s") and theirs.get("tokens_per_s"):
            words.append(f"{theirs['tokens_per_s'] / ours['tokens_per_s']:.1f} times the tokens/s")
        if ours.get("ttft_s") and theirs.get("ttft_s"):
            words.append(f"{ours['ttft_s'] / theirs['ttft_s']:.1f} times as soon")
        if first.get("bytes") and side.get("bytes"):
            words.append(f"{side['bytes'] / first['bytes']:.0%} of the size")
        if words:
            said.append(f"<strong>{escape(name)}</strong> against {escape(names[0])}: {escape(', '.join(words))}")
    return f'<p class="ratio">{"<br>".join(said)}</p>' if said else '<p class="ratio">&nbsp;</p>'


def difference_view(left: str, right: str, names: list[str]) -> str:
    """Both answers in one text, word by word, the first divergence marked."""
    pieces = difference(left.strip(), right.strip())
    if all(piece.side == "same" for piece in pieces):
        return '<p class="diff">the same words</p>'
    words = "".join(
        f'<span class="{piece.side}{" first" if piece.first else ""}">{escape(piece.text)}</span>' for piece in pieces
    )
    legend = f'<span class="left">{escape(names[0])}</span> <span class="right">{escape(names[1])}</span>'
    return f'<p class="legend">only in {legend}; the first divergence is underlined</p><p class="diff">{words}</p>'


def heat_line(rated: list[Rated], name: str, teacher: str) -> str:
    """A student's tokens, coloured by the probability that the teacher gives them."""
    agree = sum(row.agrees for row in rated)
    tokens = "".join(
        f'<span class="h{heat(row.probability)}" title="{row.probability:.1%}; first: {escape(repr(row.best))}">'
        f"{escape(row.text)}</span>"
        for row in rated
    )
    head = f"{agree} of {len(rated)} tokens of {escape(name)} are what {escape(teacher)} would say there"
    return f'<p class="legend">{head}</p><p class="heat">{tokens}</p>'


def tally_table(rows: list[dict[str, Any]]) -> str:
    """Votes so far, a pair of models a row."""
    if not rows:
        return '<p class="tally">no votes yet</p>'
    body = ""
    for row in rows:
        (one, two), (wins, losses), (low, high) = row["models"], row["wins"], row["interval"]
        share = "-" if row["share"] is None else f"{row['share']:.0%} ({low:.0%} to {high:.0%})"
        cells = [f"{one} against {two}", str(wins), str(losses), str(row["ties"]), str(row["both_bad"]), share]
        body += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    head = "".join(f"<th>{word}</th>" for word in ("models", "first", "second", "tie", "both bad", "prefer the first"))
    table = f'<table class="tally"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def replayed(saved: dict[str, Any]) -> str:
    """A saved comparison: the question, its answers, where they part."""
    question, sides, names = saved["question"], saved["sides"], names_of(saved)
    asked = "".join(
        f"<p><strong>{escape(message['role'])}</strong> {escape(message['content'])}</p>"
        for message in question["messages"]
    )
    first = sides[0]["text"]
    cards = "".join(
        answer_card(side, question, name=name, teacher=None if i == 0 else first)
        for i, (side, name) in enumerate(zip(sides, names, strict=True))
    )
    parts = [f'<div class="asked">{asked}</div>', ratio_line(sides, names), f'<div class="sides">{cards}</div>']
    if len(sides) > 1:
        parts.append(difference_view(sides[0]["text"], sides[1]["text"], names))
    if saved.get("rated"):
        parts.append(heat_line([Rated(*row) for row in saved["rated"]], names[1], names[0]))
    return "".join(parts)


def whole_page(saved: dict[str, Any]) -> str:
    """A saved comparison as one file that needs nothing else."""
    names = names_of(saved)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(' and '.join(names))}</title><style>{STYLE}</style></head>"
        f'<body class="compressor"><main class="compressor">{replayed(saved)}</main></body></html>'
    )
