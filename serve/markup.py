"""What the page shows, as HTML: every word that a model or a person wrote is escaped.

A card has all its parts from the start and a body of fixed height, so that nothing moves while answers stream in.
"""

from __future__ import annotations

import json
from html import escape
from importlib import resources
from typing import Any

from compressor.units import size

from .difference import Rated, difference, heat
from .marks import call_report, cited_spans, marks
from .presets import turns
from .saved import names_of

STYLE = (resources.files("serve") / "style.css").read_text(encoding="utf-8")
NOTHING = "-"
OUTCOMES = {True: ("pass", "✓", "passed"), False: ("fail", "✗", "failed"), None: ("open", "·", "not judged")}
Chip = tuple[str, bool | None]  # a requirement in words, and whether it is met; None: not known


def answer_cards(asked: dict[str, Any], sides: list[dict[str, Any]], names: list[str]) -> list[str]:
    """A card for each side once all have ended, so that calls can be compared."""
    theirs = sides[asked["measure"]]["text"]
    return [answer_card(asked, side, place, names, theirs) for place, side in enumerate(sides)]


def answer_card(
    asked: dict[str, Any], side: dict[str, Any], place: int, names: list[str], theirs: str | None = None
) -> str:
    """One side's state, checks, answer and figures. names: as each side is called; theirs: the measure's answer."""
    hidden = asked.get("blind", False)  # what would tell which model this is waits for the vote
    over = bool(side.get("figures") or side.get("error"))
    chips, calls = _requirements(asked, side, place, None if hidden else (names[asked["measure"]], theirs))
    head = (
        f'<span class="name">{escape(names[place])}</span><span class="state">{escape(side.get("state") or "")}</span>'
    )
    error = ""
    if side.get("error"):
        said = "this side has failed; why is told with its name, after the vote" if hidden else side["error"]
        error = f'<p class="error" role="alert">{escape(said)}</p>'
    text = _cited(side["text"], asked) if asked.get("numbered") else escape(side["text"])
    body = f'{_before(asked, place)}{error}<div class="text">{text or "&nbsp;"}</div>{calls}'
    figures = _figures({}, None) if hidden else _figures(side.get("figures") or {}, side.get("bytes"))
    return (
        f'<section class="side{" over" if over else ""}" data-question="{escape(asked.get("id", ""))}">'
        f'<div class="head">{head}</span></div>{_chip_list(chips)}'
        f'<div class="body{"" if over else " live"}" tabindex="0" role="group" aria-label="Answer of '
        f'{escape(names[place])}"><div>{body}</div></div>{figures}</section>'
    )


def _before(asked: dict[str, Any], place: int) -> str:
    """Earlier turns of the conversation, before the answer."""
    earlier = [turn for turn in turns(asked, place)[:-1] if turn["role"] != "system"]
    return "".join(f'<p class="turn {escape(turn["role"])}">{escape(turn["content"])}</p>' for turn in earlier)


def _cited(text: str, asked: dict[str, Any]) -> str:
    passages = asked.get("passages") or []
    words = []
    for part, numbers in cited_spans(text, asked["numbered"]):
        if not numbers:
            words.append(escape(part))
            continue
        told = [
            passages[n - 1] if 0 < n <= len(passages) else f"passage {n}" if n else "no such passage" for n in numbers
        ]
        kind = "cite" if all(numbers) else "nocite"
        words.append(f'<mark class="{kind}" title="{escape(" / ".join(told))}">{escape(part)}</mark>')
    return "".join(words)


def _figures(figures: dict[str, Any], nbytes: int | None) -> str:
    """Tokens, TTFT, tokens per second, memory, size."""
    rate, first, peak = (figures.get(key) for key in ("tokens_per_s", "ttft_s", "peak_rss_bytes"))
    found = [
        ("TTFT", f"{1e3 * first:.0f} ms" if first is not None else NOTHING),
        ("tokens/s", f"{rate:.1f}" if rate else NOTHING),
        ("tokens", str(figures.get("tokens", NOTHING))),
        ("peak memory", size(peak) if peak else NOTHING),
        ("model size", size(nbytes) if nbytes else NOTHING),
    ]
    return _cells(found)


def _cells(found: list[tuple[str, str]]) -> str:
    cells = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in found)
    return f'<dl class="figures">{cells}</dl>'


def _requirements(
    asked: dict[str, Any], side: dict[str, Any], place: int, measure: tuple[str, str | None] | None
) -> tuple[list[Chip], str]:
    """What an answer is held to, and its calls as HTML. measure: its name, and its answer to compare calls with."""
    over, text = bool(side.get("figures")), side["text"]
    chips: list[Chip] = [
        (mark.words, mark.passed if over else None) for mark in marks(asked.get("check") or {}, text.strip())
    ]
    if not asked.get("tools"):
        return chips, ""
    against = None if place == asked["measure"] else measure
    report = call_report(text, asked["tools"], against[1] if against else None)
    chips.append(("arguments fit the schema", not report["errors"] if over and report["calls"] != [] else None))
    if against:
        chips.append((f"the same calls as {against[0]}", report["same_as_teacher"] if over else None))
    if not over:
        return chips, ""
    calls = "".join(f'<pre class="call">{escape(json.dumps(call, indent=2))}</pre>' for call in report["calls"] or [])
    errors = "".join(f'<p class="error">{escape(error)}</p>' for error in report["errors"])
    return chips, (calls or '<p class="call">no call</p>') + errors


def _chip_list(chips: list[Chip]) -> str:
    items = []
    for words, passed in chips:
        kind, sign, spoken = OUTCOMES[passed]
        items.append(
            f'<li class="{kind}"><span aria-hidden="true">{sign}</span> {escape(words)}'
            f'<span class="sr"> {spoken}</span></li>'
        )
    return f'<ul class="checks">{"".join(items)}</ul>' if items else ""


def ratio_line(asked: dict[str, Any], sides: list[dict[str, Any]], names: list[str]) -> str:
    """How many times as fast, and how much smaller, the other sides are than the measure."""
    if asked.get("blind"):
        return '<p class="ratio">Speed and size are told after the vote.</p>'
    measure = sides[asked["measure"]]
    theirs = measure.get("figures") or {}
    said = []
    for place, (side, name) in enumerate(zip(sides, names, strict=True)):
        if place == asked["measure"]:
            continue
        ours = side.get("figures") or {}
        cells = [
            ("tokens/s", _ratio(ours.get("tokens_per_s"), theirs.get("tokens_per_s"), "{:.1f} times")),
            ("wait (TTFT)", _ratio(ours.get("ttft_s"), theirs.get("ttft_s"), "{:.2f} times")),
            ("model size", _ratio(side.get("bytes"), measure.get("bytes"), "{:.0%}")),
        ]
        said.append(f"<p>{escape(name)} against {escape(names[asked['measure']])}</p>{_cells(cells)}")
    return f'<div class="ratio">{"".join(f"<div>{one}</div>" for one in said)}</div>'


def _ratio(one: float | None, other: float | None, form: str) -> str:
    return form.format(one / other) if one and other else NOTHING


def difference_view(left: str, right: str, names: tuple[str, str]) -> str:
    """Both answers in one text, word by word, the first divergence marked."""
    pieces = difference(left.strip(), right.strip())
    if all(piece.side == "same" for piece in pieces):
        return f'<p class="diff">{escape(names[0])} and {escape(names[1])} say the same words</p>'
    words = "".join(
        f'<span class="{piece.side}{" first" if piece.first else ""}">{escape(piece.text)}</span>' for piece in pieces
    )
    legend = f'<span class="left">{escape(names[0])}</span> <span class="right">{escape(names[1])}</span>'
    return f'<p class="legend">only in {legend}; the first divergence is underlined</p><p class="diff">{words}</p>'


def heat_line(rated: list[Rated], name: str, measure: str) -> str:
    """A side's tokens, coloured by the probability that the measure gives them."""
    agree = sum(row.agrees for row in rated)
    tokens = "".join(
        f'<span class="h{heat(row.probability)}" title="{row.probability:.1%}; first: {escape(repr(row.best))}">'
        f"{escape(row.text)}</span>"
        for row in rated
    )
    head = f"{agree} of {len(rated)} tokens of {escape(name)} are what {escape(measure)} would say there"
    return f'<p class="legend">{head}</p><p class="heat">{tokens}</p>'


def apart(asked: dict[str, Any], sides: list[dict[str, Any]], names: list[str], rated: list[list[Rated]] | None) -> str:
    """Each side against the measure: where the words part, and, where it was rated, how likely its tokens are."""
    measure, parts = asked["measure"], []
    for place, side in enumerate(sides):
        if place != measure:
            parts.append(difference_view(sides[measure]["text"], side["text"], (names[measure], names[place])))
            if rated and rated[place]:
                parts.append(heat_line(rated[place], names[place], names[measure]))
    return "".join(parts)


def tally_table(rows: list[dict[str, Any]]) -> str:
    """Votes so far, a pair of models a row."""
    if not rows:
        return '<p class="tally">no votes yet</p>'
    body = ""
    for row in rows:
        (one, two), (wins, losses), (low, high) = row["models"], row["wins"], row["interval"]
        share = NOTHING if row["share"] is None else f"{row['share']:.0%} ({low:.0%} to {high:.0%})"
        cells = [
            f"{one} against {two}",
            "blind" if row["blind"] else "open",
            str(wins),
            str(losses),
            str(row["ties"]),
            str(row["both_bad"]),
            share,
        ]
        body += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    head = "".join(
        f"<th>{word}</th>" for word in ("models", "votes", "first", "second", "tie", "both bad", "prefer the first")
    )
    table = f'<table class="tally"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def replayed(saved: dict[str, Any]) -> str:
    """A saved comparison: the question, its answers, where they part."""
    asked, sides, names = saved["question"], saved["sides"], names_of(saved)
    *before, last = asked["messages"]  # earlier turns stand in the cards
    shown = [message for message in before if message["role"] == "system"] + [last]
    told = "".join(
        f"<p><strong>{escape(message['role'])}</strong> {escape(message['content'])}</p>" for message in shown
    )
    rated = saved.get("rated") and [[Rated(*row) for row in rows] for rows in saved["rated"]]
    cards = "".join(answer_cards(asked, sides, names))
    return (
        f'<div class="asked">{told}</div>{ratio_line(asked, sides, names)}<div class="sides">{cards}</div>'
        f"{apart(asked, sides, names, rated)}"
    )


def whole_page(saved: dict[str, Any]) -> str:
    """A saved comparison as one file that needs nothing else."""
    names = names_of(saved)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(' and '.join(names))}</title><style>{STYLE}</style></head>"
        f'<body class="compressor"><main class="compressor">{replayed(saved)}</main></body></html>'
    )
