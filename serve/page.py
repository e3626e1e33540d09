"""The Gradio page: one question, independent answers side by side, blind votes, comparisons to keep.

Each side streams in an event of its own, so the fast one never waits for the slow one; what a person asked stays in
that person's session. The page only moves things between widgets: `app` does the work, `markup` draws.
"""

from __future__ import annotations

import functools
import inspect
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from pydantic import ValidationError, validate_call

from compressor.errors import UserError

from . import markup, saved
from .app import LONGEST_PROMPT, MOST_TOKENS, App, Settings, ended
from .presets import Preset, demo_library, library

FRAMES = 15  # times a second that a growing answer is drawn: the models need the processor
CLIENTS = 32  # answers that may be under way or waiting, over all sessions
NONE = "(none)"
TABS = {
    "instruction": "Instructions",
    "rag": "Retrieval",
    "tools": "Functions",
    "roleplay": "Role play",
    "chat": "Chat",
}
CONVERSATIONS = ("roleplay", "chat")  # whose answers can be gone on from
LETTERS = "ABC"
VOTES = {"left": "A is better", "right": "B is better", "tie": "Tie", "bad": "Both bad"}
CACHE = (3600, 24 * 3600)  # seconds: how often gradio's copies of downloads are looked at, and how old they may grow
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


class Page:
    """The widgets that several events share, and the events. `blocks` is the whole, as gradio.Blocks.

    demo: the embedded teacher's own tasks are the presets. report: the run's, offered for download.
    """

    def __init__(self, app: App, *, demo: bool = False, report: Path | None = None) -> None:
        self.app = app
        self._presets: Callable[[str], tuple[Preset, ...]] = demo_library if demo else library
        with gr.Blocks(title="compressor: side by side", analytics_enabled=False, delete_cache=CACHE) as self.blocks:
            gr.Markdown(
                "# Side by side\nOne question, every model at its own pace. "
                "The checks are those of `compressor evaluate`."
            )
            self.question = gr.State(None)
            self.sides = [gr.State(None) for _ in LETTERS]
            self._choices()
            starts = [start for skill, title in TABS.items() for start in self._tab(skill, title)]
            self._answers()
            self._drawers(report)
            for start in starts:
                self._stream_after(start)
            gr.api(_told(app.compare), api_name="compare")  # pyright: ignore[reportPrivateImportUsage]
            gr.api(_told(app.vote), api_name="vote")  # pyright: ignore[reportPrivateImportUsage]
            self.blocks.load(self._arrive, None, [self.tally, *self.vote_files], **QUIET)
            self.blocks.unload(self._leave)

    # --- what there is to see ---

    def _choices(self) -> None:
        names = list(self.app.offers)
        with gr.Row():
            self.pickers = [
                gr.Dropdown(names, value=names[0], label="First", elem_id="first"),
                gr.Dropdown(
                    [NONE, *names], value=names[1] if len(names) > 1 else NONE, label="Second", elem_id="second"
                ),
                gr.Dropdown([NONE, *names], value=names[2] if len(names) > 2 else NONE, label="Third", elem_id="third"),
            ]
        with gr.Accordion("Settings", open=False), gr.Row():
            self.settings = [
                gr.Slider(1, MOST_TOKENS, Settings().max_new_tokens, step=1, label="Most tokens", elem_id="most"),
                gr.Slider(0, 2, Settings().temperature, step=0.05, label="Temperature (0: greedy)"),
                gr.Number(Settings().seed, precision=0, label="Seed"),
            ]
            self.blind = gr.Checkbox(False, label="Blind: names and order are hidden until you vote", elem_id="blind")

    def _tab(self, skill: str, title: str) -> Iterator[Any]:
        """The inputs of one skill; yields the events after which answers are to be streamed."""
        presets = () if skill == "chat" else self._presets(skill)
        by_title = {preset.label: preset for preset in presets}
        with gr.Tab(title, id=skill):
            pick = gr.Dropdown(
                list(by_title), value=None, label="Preset", elem_id=f"preset-{skill}", visible=bool(presets)
            )
            system = gr.Textbox(label="System prompt", lines=1, max_length=LONGEST_PROMPT, elem_id=f"system-{skill}")
            passages = gr.Textbox(
                label="Passages, one a line",
                placeholder="Numbered before the question. None, where they stand in the prompt.",
                lines=5,
                max_length=LONGEST_PROMPT,
                visible=skill == "rag",
                elem_id="passages",
            )
            tools = gr.Code(
                language="json",
                label="Functions on offer",
                lines=6,
                max_lines=14,
                visible=skill == "tools",
                elem_id="functions",
            )
            prompt = gr.Textbox(label="Prompt", lines=3, max_length=LONGEST_PROMPT, elem_id=f"prompt-{skill}")
            with gr.Row():
                ask = gr.Button("Ask", variant="primary", elem_id=f"ask-{skill}")
                follow = gr.Button("Go on", visible=skill in CONVERSATIONS, elem_id=f"follow-{skill}")

        def given(preset: Preset) -> list[str]:
            schemas = json.dumps(list(preset.tools), indent=2) if preset.tools else ""
            return [preset.system, "\n".join(preset.passages), schemas, preset.prompt]

        def fill(title: str | None) -> list[Any]:
            preset = by_title.get(title or "")
            return given(preset) if preset else [gr.skip()] * 4

        def start(
            request: gr.Request, title: str | None, system: str, passages: str, tools: str, prompt: str,
            first: str, second: str, third: str, most: float, temperature: float, seed: float | None, blind: bool,
        ) -> list[Any]:  # fmt: skip
            preset = by_title.get(title or "")
            written = [text or "" for text in (system, passages, tools, prompt)]
            if preset and not written[-1].strip():  # asked before the preset had reached the page
                written = given(preset)
            unedited = preset is not None and written == given(preset)
            system, passages, tools, prompt = written
            try:
                asked = self.app.question(
                    prompt,
                    names=[name for name in (first, second, third) if name != NONE],
                    skill=skill,
                    system=system,
                    turns=preset.turns if preset and prompt == preset.prompt else (),
                    passages=passages.splitlines(),
                    tools=tools,
                    check=preset.check if preset and unedited else None,  # an edited question has none
                    settings={"max_new_tokens": most, "temperature": temperature, "seed": seed or 0},
                    blind=blind,
                )
            except UserError as error:
                return self._refused(error)
            return self._begin(request, asked)

        def go_on(
            request: gr.Request, prompt: str, most: float, temperature: float, seed: float | None,
            asked: dict[str, Any] | None, *found: dict[str, Any] | None,
        ) -> list[Any]:  # fmt: skip
            settings = {"max_new_tokens": most, "temperature": temperature, "seed": seed or 0}
            try:
                asked, sides = _answered(asked, found)
                if asked["skill"] != skill:
                    raise UserError(f"the last question was asked under {TABS[asked['skill']]}; ask here first")
                return self._begin(request, self.app.follow(asked, sides, prompt or "", settings))
            except UserError as error:
                return self._refused(error)

        pick.change(fill, pick, [system, passages, tools, prompt], **QUIET)
        inputs = [pick, system, passages, tools, prompt, *self.pickers, *self.settings, self.blind]
        yield functools.partial(ask.click, start, inputs)
        yield functools.partial(follow.click, go_on, [prompt, *self.settings, self.question, *self.sides])

    def _answers(self) -> None:
        gr.Markdown(
            "Sides answer at once and share this machine; `compressor bench` measures each alone.",
            elem_classes="legend",
        )
        self.ratio = gr.HTML("", elem_id="ratio")
        with gr.Row(elem_classes="sides-row"):
            self.cards = [gr.HTML("", elem_id=f"side-{letter}") for letter in LETTERS]
        gr.Markdown("Which of A and B is better?")
        with gr.Row(elem_classes="votes-row"):
            self.votes = {
                choice: gr.Button(words, elem_id=f"vote-{choice}", size="sm") for choice, words in VOTES.items()
            }
            stop = gr.Button("Stop", variant="stop", elem_id="stop", size="sm")
        self.tally = gr.HTML("", elem_id="tally")
        stop.click(self._stop, queue=False, **QUIET)

    def _drawers(self, report: Path | None) -> None:
        """What is folded away: the difference, and what can be kept."""
        with gr.Accordion("Difference, and how likely each token is", open=False):
            look = gr.Button("Show", elem_id="look", size="sm")
            self.apart = gr.HTML("", elem_id="apart")
        with gr.Accordion("Keep and replay", open=False), gr.Row():
            self.files = [
                gr.DownloadButton("Save as HTML", elem_id="save-html", size="sm"),
                gr.DownloadButton("Save as JSON", elem_id="save-json", size="sm"),
            ]
            self.vote_files = [
                gr.DownloadButton(f"Votes as {kind}", elem_id=f"votes-{kind.lower()}", size="sm")
                for kind in ("JSON", "CSV")
            ]
            if report is not None:
                gr.DownloadButton("Report of the run", str(report), elem_id="report", size="sm")
        answered = [self.question, *self.sides]
        look.click(self._look, answered, [self.apart, *self.files], api_visibility="private")
        for choice, button in self.votes.items():
            outputs = [self.question, self.tally, *self.vote_files, *self.cards, self.ratio, *self.files]
            button.click(self._vote(choice), answered, outputs, **QUIET)

    # --- what happens ---

    def _stream_after(self, start: Callable[[list[Any]], Any]) -> None:
        """Every side answers in an event of its own; the one that ends last has the whole judged."""
        outputs = [self.question, *self.cards, *self.sides, self.ratio, self.apart, *self.files]
        started = start(outputs, **QUIET)
        for place, (card, side) in enumerate(zip(self.cards, self.sides, strict=True)):
            streamed = started.success(
                self._stream(place),
                self.question,
                [card, side],
                concurrency_limit=CLIENTS,
                trigger_mode="multiple",  # a new question does not wait for the old one's end
                **QUIET,
            )
            streamed.then(self._judge, [self.question, *self.sides], [*self.cards, self.ratio, *self.files], **QUIET)

    def _begin(self, request: gr.Request, asked: dict[str, Any]) -> list[Any]:
        """The page of a question that nobody has answered yet."""
        self.app.begin(request.session_hash, asked)
        sides = [self.app.waiting(asked, place) for place in range(len(asked["names"]))]
        names = _called(asked)
        cards = [markup.answer_card(asked, side, place, names) for place, side in enumerate(sides)]
        ratio = markup.ratio_line(asked, sides, names)
        return [asked, *_padded(cards, ""), *_padded([], None), ratio, "", None, None]

    def _refused(self, error: UserError) -> list[Any]:
        """The page as it was, and why."""
        gr.Warning(str(error))
        return [gr.skip()] * (1 + 2 * len(LETTERS) + 2 + len(self.files))

    def _stream(self, place: int) -> Callable[..., Any]:
        def stream(request: gr.Request, asked: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
            stop = self.app.claim(request.session_hash, asked, place)
            if stop is None:
                return
            drawn = 0.0
            for side in self.app.answer(asked, place, stop):
                if not self.app.is_current(request.session_hash, asked):
                    return
                if ended(side) or time.monotonic() - drawn > 1 / FRAMES:
                    drawn = time.monotonic()
                    yield markup.answer_card(asked, side, place, _called(asked)), side

        return stream

    def _judge(self, request: gr.Request, asked: dict[str, Any], *found: dict[str, Any] | None) -> list[Any]:
        """Cards with the calls compared, the ratio and the files to keep, once every side has ended."""
        try:
            asked, sides = _answered(asked, found)
        except UserError:
            return [gr.skip()] * (len(LETTERS) + 3)
        return self._judged(request, asked, sides)

    def _judged(self, request: gr.Request, asked: dict[str, Any], sides: list[dict[str, Any]]) -> list[Any]:
        names = _called(asked)
        cards = _padded(markup.answer_cards(asked, sides, names), "")
        hidden = [None, None]  # files would tell the names
        kept = hidden if asked["blind"] else self.app.kept(request.session_hash, saved.comparison(asked, sides))
        return [*cards, markup.ratio_line(asked, sides, names), *kept]

    def _vote(self, choice: str) -> Callable[..., Any]:
        def cast(request: gr.Request, asked: dict[str, Any] | None, *found: dict[str, Any] | None) -> list[Any]:
            with _shown():
                asked, sides = _answered(asked, found, least=2)
                self.app.cast(request.session_hash, choice, asked, sides)
            told = asked | {"blind": False}
            tally = markup.tally_table(self.app.ballot.tally())
            return [told, tally, *self.app.votes(request.session_hash), *self._judged(request, told, sides)]

        return cast

    def _look(self, request: gr.Request, asked: dict[str, Any] | None, *found: dict[str, Any] | None) -> list[Any]:
        """Where the answers part, and what the measure makes of the others' tokens; kept with the comparison."""
        with _shown():
            asked, sides = _answered(asked, found, least=2)
            if asked["blind"]:
                raise UserError("the difference would tell which side is the measure; vote first")
            rated = self.app.rated(asked, sides)
        kept = saved.comparison(asked, sides, [[list(row) for row in rows] for rows in rated])
        return [markup.apart(asked, sides, _called(asked), rated), *self.app.kept(request.session_hash, kept)]

    def _stop(self, request: gr.Request) -> None:
        self.app.halt(request.session_hash)

    def _arrive(self, request: gr.Request) -> list[Any]:
        return [markup.tally_table(self.app.ballot.tally()), *self.app.votes(request.session_hash)]

    def _leave(self, request: gr.Request) -> None:
        self.app.forget(request.session_hash)


def replay(found: dict[str, Any]) -> Any:
    """A saved comparison as gradio.Blocks, without any model."""
    with gr.Blocks(title="compressor: replay", analytics_enabled=False) as blocks:
        gr.Markdown("# Side by side\nA saved comparison; no model is running.")
        gr.HTML(markup.replayed(found), elem_id="replay")
    return blocks


def _answered(
    asked: dict[str, Any] | None, found: tuple[dict[str, Any] | None, ...], *, least: int = 1
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A question and its sides. Raises UserError unless every side has ended, and there are `least` of them."""
    mine = [side for side in found if asked is not None and side is not None and side["question"] == asked["id"]]
    sides = [side for side in mine if ended(side)]
    if asked is None or len(sides) < len(asked["names"]):
        raise UserError("the answers are not there yet; ask a question, and wait for its end or stop it")
    if len(sides) < least:
        raise UserError("one answer has nothing to be compared with; choose two models and ask")
    return asked, sides


def _called(asked: dict[str, Any]) -> list[str]:
    """What the page calls each side: its letter, and its name unless that is to be hidden."""
    return [letter if asked["blind"] else f"{letter}: {name}" for letter, name in zip(LETTERS, asked["names"])]  # noqa: B905


def _padded(found: list[Any], filler: Any) -> list[Any]:
    return [*found, *[filler] * (len(LETTERS) - len(found))]


@contextmanager
def _shown() -> Iterator[None]:
    """A UserError as the page shows it."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _told(call: Callable[..., Any]) -> Callable[..., Any]:
    """A method for programs: its arguments are checked, and what is wrong is told in a line."""
    checked, named = validate_call(call), inspect.signature(call)

    @functools.wraps(call)
    def told(*args: Any, **kwargs: Any) -> Any:
        with _shown():
            try:
                return checked(**named.bind(*args, **kwargs).arguments)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise UserError(f"argument {where}: {first['msg']}; correct it") from error

    return told


__all__ = ["CLIENTS", "Page", "replay"]
