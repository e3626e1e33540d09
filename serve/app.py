"""The Gradio page: one question, independent answers side by side, blind votes, saved comparisons.

Each side streams in an event of its own, so the fast one never waits for the slow one; what a person asked stays in
that person's session. The page is drawn by `page`, the models are run by `models`.
"""

from __future__ import annotations

import functools
import json
import random
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from compressor.errors import UserError

from . import page, saved
from .difference import Rated
from .models import Model, Offer
from .presets import Preset, conversation, demo_library, library, schema_errors
from .votes import Ballot

LONGEST_PROMPT = 20_000  # characters
MOST_TOKENS = 2048
CLIENTS = 32  # answers that may be under way or waiting, over all sessions
NONE = "(none)"
TABS = {
    "instruction": "Instructions",
    "rag": "Retrieval",
    "tools": "Functions",
    "roleplay": "Role play",
    "chat": "Chat",
}
LETTERS = "ABC"


class App:
    """What the page's events call. Models and votes are shared by all sessions; questions and stops are not."""

    def __init__(self, offers: list[Offer], ballot: Ballot, *, threads: int | None = None) -> None:
        self.offers = {offer.name: offer for offer in offers}
        self.models = {name: Model(offer, threads=threads) for name, offer in self.offers.items()}
        self.ballot = ballot
        self._stops: dict[str, threading.Event] = {}

    def close(self) -> None:
        """Stop every model."""
        for model in self.models.values():
            model.close()

    def question(
        self,
        prompt: str,
        *,
        names: list[str],
        skill: str = "chat",
        system: str = "",
        turns: tuple[dict[str, str], ...] = (),
        passages: list[str] | None = None,
        tools: str = "",
        check: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        blind: bool = False,
    ) -> dict[str, Any]:
        """A question as all sides get it. Raises UserError for what is empty, too long, or no schema."""
        if not prompt.strip():
            raise UserError("the prompt is empty; expected a question; write one")
        passages = [line for line in passages or [] if line.strip()]
        length = len(prompt) + len(system) + len(tools) + sum(map(len, passages))
        if length > LONGEST_PROMPT:
            raise UserError(f"{length:,} characters; expected at most {LONGEST_PROMPT:,}; shorten the prompt")
        functions, wrong = schema_errors(tools)
        if wrong:
            raise UserError(wrong)
        chosen = [name for name in names if name in self.models]
        if not chosen:
            raise UserError(f"no model is chosen; expected one or more of {', '.join(self.models)}")
        if blind:
            random.shuffle(chosen)
        defaults = {"max_new_tokens": 256, "temperature": 0.0, "seed": 0}
        return {
            "skill": skill,
            "messages": conversation(prompt, system=system, turns=turns, passages=tuple(passages)),
            "tools": functions,
            "passages": passages,
            "numbered": len(passages) or len(set(re.findall(r"\[\d+\]", prompt))) if skill == "rag" else 0,
            "check": check or {},
            "settings": defaults | (settings or {}),
            "names": chosen,
            "blind": blind,
        }

    def answer(self, question: dict[str, Any], place: int, stop: threading.Event) -> Iterator[dict[str, Any]]:
        """The side at `place` as it grows: {"name", "bytes", "text", "state", "figures", "error"}."""
        name = question["names"][place]
        side: dict[str, Any] = {
            "name": name,
            "bytes": self.offers[name].nbytes,
            "text": "",
            "state": "",
            "figures": None,
        }
        stream = self.models[name].stream(question["messages"], tools=question["tools"], **question["settings"])
        try:
            for found in stream:
                side["state"] = found.get("state", "answering")
                side["text"] += found.get("text", "")
                if "done" in found:
                    side["figures"] = found["done"]
                    side["state"] = "stopped" if found["done"]["stopped"] else ""
                yield side
                if stop.is_set() and side["figures"] is None:
                    side["state"] = "stopped"
                    yield side
                    return
        except UserError as error:
            side["state"], side["error"] = "failed", str(error)
            yield side
        finally:
            stream.close()

    def compare(
        self, prompt: str, models: list[str], max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> dict[str, Any]:
        """The whole comparison of one prompt, for programs: as `saved.comparison`."""
        settings = {"max_new_tokens": _bounded(max_new_tokens), "temperature": temperature, "seed": seed}
        question = self.question(prompt, names=models, settings=settings)
        never = threading.Event()
        sides = [list(self.answer(question, place, never))[-1] for place in range(len(question["names"]))]
        return saved.comparison(question, sides)

    def vote(self, choice: str, left: str, right: str, prompt: str = "") -> dict[str, Any]:
        """Count a vote on two models, for programs; returns it."""
        for name in (left, right):
            if name not in self.models:
                raise UserError(f"model {name[:40]!r} is not on offer; expected one of {', '.join(self.models)}")
        return self.ballot.cast(choice, left=left, right=right, prompt=prompt[:LONGEST_PROMPT], blind=False)

    def rated(self, question: dict[str, Any], sides: list[dict[str, Any]]) -> list[Rated]:
        """What the first side's model gives the second's tokens; nothing where they cannot be compared."""
        if len(sides) < 2 or not sides[1].get("figures"):
            return []
        teacher = self.models[question["names"][0]]
        rows = teacher.rate(question["messages"], question["tools"] or None, sides[1]["figures"]["ids"])
        return [Rated(*row) for row in rows]

    def stop_of(self, session: str | None) -> threading.Event:
        """The stop button of one session."""
        return self._stops.setdefault(session or "", threading.Event())

    def forget(self, session: str | None) -> None:
        """A session that was closed stops what it still had under way."""
        stop = self._stops.pop(session or "", None)
        if stop is not None:
            stop.set()


def _bounded(tokens: int | float) -> int:
    return max(1, min(int(tokens), MOST_TOKENS))


def build(app: App, *, demo: bool = False) -> Any:
    """The page as gradio.Blocks. demo: offer the embedded teacher's own tasks first."""
    names = list(app.offers)
    source: Callable[[str], tuple[Preset, ...]] = demo_library if demo else library

    with gr.Blocks(title="compressor: side by side", analytics_enabled=False) as blocks:
        gr.Markdown(
            "# Side by side\nOne question, every model at its own pace. The checks are those of `compressor evaluate`."
        )
        with gr.Row():
            pickers = [
                gr.Dropdown(names, value=names[0], label="First, the measure", elem_id="first"),
                gr.Dropdown(names, value=names[min(1, len(names) - 1)], label="Second", elem_id="second"),
                gr.Dropdown([NONE, *names], value=names[2] if len(names) > 2 else NONE, label="Third", elem_id="third"),
            ]
        with gr.Accordion("Settings", open=False), gr.Row():
            most = gr.Slider(1, MOST_TOKENS, 256, step=1, label="Most tokens")
            temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: greedy)")
            seed = gr.Number(0, precision=0, label="Seed")
            blind = gr.Checkbox(False, label="Blind: names and order are hidden until you vote", elem_id="blind")
        question = gr.State(None)
        sides = [gr.State(None) for _ in pickers]
        asks = []
        for skill, title in TABS.items():
            with gr.Tab(title, id=skill):
                asks.append(
                    _tab(
                        app,
                        skill,
                        () if skill == "chat" else source(skill),
                        pickers,
                        most,
                        temperature,
                        seed,
                        blind,
                    )
                )
        ratio = gr.HTML('<p class="ratio">&nbsp;</p>', elem_id="ratio")
        with gr.Row(elem_classes="sides-row"):
            cards = [gr.HTML("", elem_id=f"side-{letter}", min_height=260) for letter in LETTERS]
        with gr.Row(elem_classes="votes-row"):
            votes = [
                gr.Button(words, elem_id=f"vote-{choice}", size="sm")
                for choice, words in (
                    ("left", "A is better"),
                    ("right", "B is better"),
                    ("tie", "Tie"),
                    ("bad", "Both bad"),
                )
            ]
            stop = gr.Button("Stop", variant="stop", elem_id="stop", size="sm")
        tally = gr.HTML(page.tally_table(app.ballot.tally()), elem_id="tally")
        with gr.Accordion("Difference, and what the first model makes of the second's tokens", open=False):
            look = gr.Button("Show", elem_id="look", size="sm")
            apart, heat = gr.HTML("", elem_id="diff"), gr.HTML("", elem_id="heat")
        with gr.Accordion("Keep and replay", open=False), gr.Row():
            keep = gr.DownloadButton("Save as HTML", elem_id="save-html", size="sm")
            keep_json = gr.DownloadButton("Save as JSON", elem_id="save-json", size="sm")
            cast_json, cast_csv = (_file(f"votes.{kind}", text) for kind, text in app.ballot.exported())
            export_json = gr.DownloadButton("Votes as JSON", cast_json, elem_id="votes-json", size="sm")
            export_csv = gr.DownloadButton("Votes as CSV", cast_csv, elem_id="votes-csv", size="sm")

        def card(
            side: dict[str, Any] | None, asked: dict[str, Any] | None, place: int, first: str | None = None
        ) -> str:
            if side is None or asked is None or place >= len(asked["names"]):
                return ""
            name = f"{LETTERS[place]}" if asked["blind"] else f"{LETTERS[place]}: {side['name']}"
            return page.answer_card(side, asked, name=name, teacher=first)

        def streamer(place: int) -> Callable[..., Any]:
            def run(asked: dict[str, Any], request: gr.Request) -> Iterator[tuple[str, Any]]:
                if place >= len(asked["names"]):
                    yield "", None
                    return
                for side in app.answer(asked, place, app.stop_of(request.session_hash)):
                    yield card(side, asked, place), side

            return run

        def judge(asked: dict[str, Any], *found: dict[str, Any] | None) -> list[Any]:
            """Cards with the calls compared, the ratio and the files to save, once every side has ended."""
            shown = [side for side in found if side is not None and _ended(side)]
            if len(shown) < len(asked["names"]):
                return [gr.skip()] * (len(cards) + 3)
            first = shown[0]["text"]
            drawn = [card(side, asked, i, None if i == 0 else first) for i, side in enumerate(found)]
            titles = [LETTERS[i] if asked["blind"] else side["name"] for i, side in enumerate(shown)]
            whole = saved.comparison(asked, shown)
            return [*drawn, page.ratio_line(shown, titles), *_kept(whole)]

        for prepared in (ask(question, [*cards, *sides, ratio, apart, heat]) for ask in asks):
            for place in range(len(pickers)):
                prepared.success(
                    streamer(place),
                    question,
                    [cards[place], sides[place]],
                    concurrency_limit=CLIENTS,
                    show_progress="hidden",
                    api_visibility="private",
                ).then(
                    judge,
                    [question, *sides],
                    [*cards, ratio, keep, keep_json],
                    show_progress="hidden",
                    api_visibility="private",
                )

        def cast(choice: str) -> Callable[..., Any]:
            def run(asked: dict[str, Any] | None, *found: dict[str, Any] | None) -> list[Any]:
                shown = [side for side in found if side is not None]
                if asked is None or len(shown) < 2:
                    raise gr.Error("there is nothing to vote on yet; ask a question first")
                left, right = shown[:2]
                about = {"skill": asked["skill"], "prompt": asked["messages"][-1]["content"], "blind": asked["blind"]}
                answers = {"left_answer": left["text"], "right_answer": right["text"]}
                app.ballot.cast(choice, left=left["name"], right=right["name"], **about, **answers)
                told = asked | {"blind": False}
                drawn = [card(side, told, i, None if i == 0 else shown[0]["text"]) for i, side in enumerate(found)]
                files = [_file(f"votes.{kind}", text) for kind, text in app.ballot.exported()]
                return [told, page.tally_table(app.ballot.tally()), *files, *drawn]

            return run

        for button, choice in zip(votes, ("left", "right", "tie", "bad"), strict=True):
            outputs = [question, tally, export_json, export_csv, *cards]
            button.click(cast(choice), [question, *sides], outputs, api_visibility="private")

        def halt(request: gr.Request) -> None:
            app.stop_of(request.session_hash).set()

        stop.click(halt, queue=False, api_visibility="private")

        def leave(request: gr.Request) -> None:
            app.forget(request.session_hash)

        blocks.unload(leave)

        def show(asked: dict[str, Any] | None, *found: dict[str, Any] | None) -> list[Any]:
            shown = [side for side in found if side is not None]
            if asked is None or len(shown) < 2:
                raise gr.Error("there is nothing to compare yet; ask two models first")
            titles = [f"{LETTERS[i]}" if asked["blind"] else side["name"] for i, side in enumerate(shown)]
            try:
                rated = app.rated(asked, shown)
            except UserError as error:
                raise gr.Error(str(error)) from error
            apart = page.difference_view(shown[0]["text"], shown[1]["text"], titles)
            whole = saved.comparison(asked, shown, [list(row) for row in rated])
            return [apart, page.heat_line(rated, titles[1], titles[0]), *_kept(whole)]

        look.click(show, [question, *sides], [apart, heat, keep, keep_json], api_visibility="private")
        gr.api(_told(app.compare), api_name="compare")  # pyright: ignore[reportPrivateImportUsage]
        gr.api(_told(app.vote), api_name="vote")  # pyright: ignore[reportPrivateImportUsage]
    return blocks


def _tab(
    app: App,
    skill: str,
    presets: tuple[Preset, ...],
    pickers: Any,
    most: Any,
    temperature: Any,
    seed: Any,
    blind: Any,
) -> Any:
    """The inputs of one skill; returns what wires its Ask button to the answers."""
    by_title = {
        f"{preset.title} ({preset.level})" if not preset.title[0].isdigit() else preset.title: preset
        for preset in presets
    }
    chosen = gr.State(None)
    with gr.Column():
        pick = gr.Dropdown(list(by_title), value=None, label="Preset", elem_id=f"preset-{skill}", visible=bool(presets))
        system = gr.Textbox(
            label="System prompt", lines=1, max_length=LONGEST_PROMPT, visible=skill in ("roleplay", "chat")
        )
        passages = gr.Textbox(label="Passages, one a line", lines=5, max_length=LONGEST_PROMPT, visible=skill == "rag")
        tools = gr.Code(language="json", label="Functions on offer", lines=6, visible=skill == "tools")
        prompt = gr.Textbox(label="Prompt", lines=3, max_length=LONGEST_PROMPT, elem_id=f"prompt-{skill}")
        ask = gr.Button("Ask", variant="primary", elem_id=f"ask-{skill}")

    def fill(title: str | None) -> list[Any]:
        preset = by_title.get(title or "")
        if preset is None:
            return [None, "", "", "", ""]
        schemas = json.dumps(list(preset.tools), indent=2) if preset.tools else ""
        return [title, preset.system, "\n".join(preset.passages), schemas, preset.prompt]

    pick.change(fill, pick, [chosen, system, passages, tools, prompt], api_visibility="private", show_progress="hidden")

    def prepare(
        title: str | None, system: str, passages: str, tools: str, prompt: str, first: str, second: str, third: str,
        most: float, temperature: float, seed: float, blind: bool, request: gr.Request,
    ) -> list[Any]:  # fmt: skip
        preset = by_title.get(title or "")
        same = preset is not None and prompt == preset.prompt  # an edited prompt has no check any more
        try:
            asked = app.question(
                prompt or "",
                names=[first, second, third],
                skill=skill,
                system=system or "",
                turns=preset.turns if preset is not None and same else (),
                passages=(passages or "").splitlines(),
                tools=tools or "",
                check=preset.check if preset is not None and same else None,
                settings={"max_new_tokens": _bounded(most), "temperature": temperature, "seed": int(seed or 0)},
                blind=blind,
            )
        except UserError as error:
            raise gr.Error(str(error)) from error
        app.stop_of(request.session_hash).clear()
        return [asked, "", "", "", None, None, None, '<p class="ratio">&nbsp;</p>', "", ""]

    inputs = [chosen, system, passages, tools, prompt, *pickers, most, temperature, seed, blind]
    return lambda question, outputs: ask.click(
        prepare, inputs, [question, *outputs], api_visibility="private", show_progress="hidden"
    )


def replay(found: dict[str, Any]) -> Any:
    """A saved comparison as gradio.Blocks, without any model."""
    with gr.Blocks(title="compressor: replay", analytics_enabled=False) as blocks:
        gr.Markdown("# Side by side\nA saved comparison; no model is running.")
        gr.HTML(page.replayed(found), elem_id="replay")
    return blocks


def _ended(side: dict[str, Any]) -> bool:
    return bool(side.get("figures") or side.get("error") or side["state"] == "stopped")


def _kept(whole: dict[str, Any]) -> list[str]:
    """A comparison as files: HTML and JSON."""
    text = json.dumps(whole, indent=2, ensure_ascii=False)
    return [_file("comparison.html", page.whole_page(whole)), _file("comparison.json", text)]


def _file(name: str, text: str) -> str:
    """A file to download: in a folder of its own, so that two people's do not meet."""
    path = Path(tempfile.mkdtemp(prefix="compressor-")) / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def _told(call: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose UserError a program is shown as it is."""

    @functools.wraps(call)
    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except UserError as error:
            raise gr.Error(str(error)) from error

    return told


__all__ = ["App", "build", "replay"]
