"""The page: a prompt's images side by side, and blind pairs to vote on. Nothing on it is loaded from another machine."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from hypersd_pipeline.arena.config import TEACHER, ArenaConfig
from hypersd_pipeline.arena.contenders import Busy, Contender, Sample, Sampler
from hypersd_pipeline.arena.study import Pair, Study
from hypersd_pipeline.arena.votes import Choice
from hypersd_pipeline.evaluation.samples import steps_label

BUSY = "Many people are sampling now. Please try again in a moment."
MOST_SEED = 2**31 - 1
_BUTTONS: tuple[tuple[str, Choice], ...] = (("Left", "left"), ("No difference", "neither"), ("Right", "right"))


@dataclass(frozen=True)
class Arena:
    """What all visitors share."""

    config: ArenaConfig
    sampler: Sampler
    shown: Sequence[Contender]
    study: Study


def accepted(prompt: Any, most: int) -> str | None:
    """A visitor's prompt on one line without characters that cannot be seen. None where it is empty, too long or no text."""
    if not isinstance(prompt, str) or len(prompt) > most:
        return None
    return "".join(c for c in " ".join(prompt.split()) if c.isprintable()) or None


def accepted_seed(seed: Any) -> int | None:
    """A visitor's seed. None where it is no whole number from 0 to `MOST_SEED`."""
    if isinstance(seed, bool) or not isinstance(seed, int | float) or seed != seed // 1 or not 0 <= seed <= MOST_SEED:
        return None
    return int(seed)


def data_url(image: Image.Image) -> str:
    """A PNG inside its address, which no file and no address of its own is needed for: neither could tell whose image it is."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def add_page(arena: Arena) -> None:
    """Let NiceGUI serve the page at ``/``."""
    from nicegui import app, ui

    @ui.page("/")
    def page() -> None:
        ui.colors(primary="#1f4e79")
        ui.query("body").style("font-family: system-ui, sans-serif")
        with ui.tabs() as tabs:
            ui.tab("try", "Try a prompt").props("data-arena=tab-try")
            ui.tab("vote", "Vote").props("data-arena=tab-vote")
        with ui.tab_panels(tabs, value="try").classes("w-full"):
            with ui.tab_panel("try"):
                _try(arena)
            with ui.tab_panel("vote"):
                _vote(arena, str(app.storage.browser["id"]), tabs)


def _try(arena: Arena) -> None:
    """A prompt, and a table of images: models in rows, numbers of steps in columns."""
    from nicegui import ui

    most, running = arena.config.prompt_characters, [False]
    with ui.row().classes("items-center w-full no-wrap"):
        prompt = ui.input("Prompt").props(f"maxlength={most} data-arena=prompt outlined dense").classes("grow")
        seed = ui.number("Seed", value=0, min=0, max=MOST_SEED, precision=0).props("data-arena=seed outlined dense").classes("w-32")
        button = ui.button("Generate").props("data-arena=generate no-caps")
    told = ui.label("All images of a table start from the same noise. The seconds are of sampling and decoding, without the queue.")
    told.props("data-arena=told").classes("text-grey-8")
    cells = _cells(arena.shown)

    async def generate() -> None:
        text, number = accepted(prompt.value, most), accepted_seed(seed.value)
        if text is None or number is None:
            told.set_text(f"Please give a prompt of at most {most} characters, and a whole number as the seed.")
            return
        if running[0]:
            return
        running[0] = True
        button.disable()
        for image, time in cells.values():
            image.set_visibility(False)
            time.set_text("")
        told.set_text(text)
        try:
            for contender, (image, time) in cells.items():
                sample = await _sampled(functools.partial(arena.sampler.sample, contender, text, number))
                if sample is None:
                    told.set_text(BUSY)
                    return
                image.set_source(data_url(sample.image))
                image.set_visibility(True)
                time.set_text(f"{sample.seconds:.2f} s")
        finally:
            running[0] = False
            button.enable()

    button.on_click(generate)
    prompt.on("keydown.enter", generate)


def _cells(shown: Sequence[Contender]) -> dict[Contender, tuple[Any, Any]]:
    """The empty table: contender -> its image and its time."""
    from nicegui import ui

    steps = sorted({contender.contract.steps for contender in shown})
    at = {(contender.model, contender.contract.steps): contender for contender in shown}
    found: dict[Contender, tuple[Any, Any]] = {}
    with ui.element("table").props("data-arena=table").classes("mt-4"):
        with ui.element("tr"):
            ui.element("th")
            for number in steps:
                with ui.element("th"):
                    ui.label(steps_label(number))
        for model in dict.fromkeys(contender.model for contender in shown):
            with ui.element("tr"):
                with ui.element("th").classes("pr-4 text-left"):
                    ui.label("Teacher" if model == TEACHER else f"LoRA {model}")
                for number in steps:
                    with ui.element("td").classes("p-1 align-top").style("min-width: 7rem"):
                        if (model, number) in at:
                            contender = at[model, number]
                            image = ui.image().props(f"data-arena={contender.name} no-transition").style("width: 7rem; height: 7rem")
                            image.set_visibility(False)
                            time = ui.label().props(f"data-arena=time-{contender.name}").classes("text-grey-8 text-sm")
                            found[contender] = (image, time)
    return found


def _vote(arena: Arena, voter: str, tabs: Any) -> None:
    """A pair, and three buttons. Which contenders they are is known on the server only."""
    from nicegui import ui

    open_pair: list[Pair] = []
    ui.label(arena.config.question).classes("text-h6")
    prompt = ui.label().props("data-arena=vote-prompt").classes("text-subtitle1")
    with ui.row():
        images = [ui.image().props(f"data-arena={side} no-transition").style("width: 20rem; height: 20rem") for side in ("left", "right")]
    with ui.row():
        buttons = [ui.button(title).props(f"data-arena=vote-{choice} no-caps") for title, choice in _BUTTONS]
    told = ui.label().props("data-arena=vote-told").classes("text-grey-8")

    def enable(on: bool) -> None:
        for button in buttons:
            button.set_enabled(on)
        for image in images:
            image.set_visibility(on)

    async def bring() -> None:
        enable(False)
        pair = await _worked(functools.partial(arena.study.next_pair, voter))
        if pair is None:
            prompt.set_text("")
            told.set_text("You have voted on all pairs that are meant for you. Thank you.")
            return
        sides = [await _sampled(functools.partial(arena.sampler.sample, one, pair.prompt, pair.seed)) for one in (pair.left, pair.right)]
        if None in sides:
            told.set_text(BUSY)
            return
        for image, side in zip(images, sides, strict=True):
            image.set_source(data_url(side.image))  # type: ignore[union-attr]
        prompt.set_text(pair.prompt)
        open_pair[:] = [pair]
        enable(True)

    async def vote(choice: Choice) -> None:
        if not open_pair:  # a second click, or one that was made up
            return
        pair = open_pair.pop()
        enable(False)
        counted = await _worked(functools.partial(arena.study.vote, pair, voter, choice))
        told.set_text("Your vote is counted." if counted else "This vote was not counted.")
        await bring()

    async def entered() -> None:
        if tabs.value == "vote" and not open_pair:
            await bring()

    enable(False)
    for button, (_, choice) in zip(buttons, _BUTTONS, strict=True):
        button.on_click(functools.partial(vote, choice))
    tabs.on_value_change(entered)


async def _worked(work: Callable[[], Any]) -> Any:
    """Run in a thread, so that the page goes on for others."""
    from nicegui import run

    return await run.io_bound(work)


async def _sampled(work: Callable[[], Sample]) -> Sample | None:
    """An image, made in a thread. None where too many wait."""
    try:
        found: Sample | None = await _worked(work)
    except Busy:
        return None
    return found
