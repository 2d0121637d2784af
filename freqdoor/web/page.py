"""The page's four tabs, in Gradio: what is asked, and where the answers stand. They are made by `requests`."""

import html
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from freqdoor.attack.planted import PLANTED
from freqdoor.demonstration import DEMO_STEPS
from freqdoor.errors import FreqdoorError
from freqdoor.measure.report import SUMMARY, render
from freqdoor.samples import BUNDLED, KODAK, pictures
from freqdoor.training.train import EXPORT
from freqdoor.web.gate import COOKIE
from freqdoor.web.limits import Limits
from freqdoor.web.plantings import RUN, Objective, Planting, Plantings, curves
from freqdoor.web.requests import Question, audited, compared, reported, tried
from freqdoor.web.work import Work

SAMPLE = "kodim23.png"
OBJECTIVES = [("larger files (bpp)", "bpp"), ("destroyed pictures (psnr)", "psnr")]
SHIPPED, FILE, OWN = "shipped", "file", "own"
CODECS = [("shipped planted encoder", SHIPPED), ("bundled codec", BUNDLED), ("planted by me", OWN), ("a file", FILE)]
AUDITED = [("a file", FILE), ("bundled codec", BUNDLED), ("planted by me", OWN)]
LOW = 150  # pixels of a place for a file
TICK = 2.0  # seconds between two looks at a planting
MOST_TOLD = 16  # lines of progress that are shown
MOST_RUNS = 200
DEEPEST_RUN = 3  # folders below the one of all runs
QUEUE = 32  # calls that wait; more are told to come back later
KEPT = 3600  # seconds that an upload is kept
STATES = {
    "waiting": "waiting for {place} before this one",
    "planting": "planting, step {step} of {steps}: {said}",
    "measuring": "planted; measuring: {said}",
    "done": "done",
    "stopped": "stopped at step {step} of {steps}; Plant goes on from what was saved",
    "failed": "freqdoor: {said}",
}


class Page:
    """What the tabs' functions share.

    Args:
        plantings: of all visitors.
        runs: a folder of runs that everybody may look at, if there is one.
        scratch: where the work of calls is done; whoever serves the page removes it.
    """

    def __init__(self, limits: Limits, plantings: Plantings, runs: Path | None, scratch: Path) -> None:
        self._limits, self._plantings, self._runs, self._scratch = limits, plantings, runs, scratch

    def blocks(self) -> gr.Blocks:
        """The page."""
        with gr.Blocks(title="freqdoor", analytics_enabled=False, delete_cache=(KEPT // 6, KEPT)) as blocks:
            gr.HTML(
                "<h1>freqdoor</h1><p>Backdoors in learned image codecs: try one, plant one, audit an encoder. All of "
                "it runs on this machine; nothing leaves it.</p>"
            )
            with gr.Tab("Try", id="try"):
                self._try_tab()
            with gr.Tab("Plant", id="plant"):
                self._plant_tab(blocks)
            with gr.Tab("Audit", id="audit"):
                self._audit_tab()
            with gr.Tab("Runs", id="runs") as tab:
                self._runs_tab(tab)
        return blocks.queue(max_size=QUEUE, default_concurrency_limit=None)

    def _try_tab(self) -> None:
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                sample = gr.Dropdown([path.name for path in pictures()], value=SAMPLE, label="A bundled picture")
                photo = gr.File(label="or a photo of yours (8-bit RGB)", elem_id="try-photo", height=LOW)
                codec = gr.Dropdown(CODECS, value=SHIPPED, label="Codec")
                file = gr.File(label="Codec or planted encoder", elem_id="try-file", height=LOW, visible=False)
                objective = gr.Radio(OBJECTIVES, value="bpp", label="What the trigger is for")
                strength = gr.Slider(0.25, 4, value=1, step=0.25, label="Strength of the trigger")
                entering = gr.Radio(["8-bit", "float", "JPEG"], value="8-bit", label="The picture is handed over as")
                quality = gr.Slider(10, 100, value=90, step=1, label="JPEG quality", visible=False)
                button = gr.Button("Try it", variant="primary", elem_id="try-go")
            with gr.Column(scale=3):
                answer = gr.HTML(elem_id="try-answer")
        codec.change(lambda chosen: gr.update(visible=chosen == FILE), codec, file, **QUIETLY)
        entering.change(lambda chosen: gr.update(visible=chosen == "JPEG"), entering, quality, **QUIETLY)
        asked = [sample, photo, codec, file, objective, strength, entering, quality]
        button.click(self.try_it, asked, answer, **AT_WORK)

    def _plant_tab(self, blocks: gr.Blocks) -> None:
        objective = gr.Radio(OBJECTIVES, value="bpp", label="What the trigger is for", elem_id="plant-objective")
        with gr.Row():
            plant = gr.Button("Plant, or go on", variant="primary", elem_id="plant-go")
            stop = gr.Button("Stop", elem_id="plant-stop")
        status, answer = gr.HTML(elem_id="plant-status"), gr.HTML(elem_id="plant-answer")
        shown, timer = gr.State(""), gr.Timer(TICK)
        looked = [status, answer, shown, timer]
        plant.click(self.plant_it, [objective, shown], looked, **QUIETLY)
        stop.click(self.stop_it, [objective, shown], looked, **QUIETLY)
        for begin in (timer.tick, objective.change, blocks.load):
            begin(self.look, [objective, shown], looked, **QUIETLY)

    def _audit_tab(self) -> None:
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                source = gr.Radio(AUDITED, value=FILE, label="Codec")
                file = gr.File(label="The codec's checkpoint", elem_id="audit-file", height=LOW)
                objective = gr.Radio(OBJECTIVES, value="bpp", label="Which one I have planted", visible=False)
                thorough = gr.Checkbox(label="All checks, which takes minutes where there is nothing to find")
                button = gr.Button("Audit it", variant="primary", elem_id="audit-go")
            with gr.Column(scale=3):
                answer = gr.HTML(elem_id="audit-answer")
        source.change(lambda chosen: gr.update(visible=chosen == FILE), source, file, **QUIETLY)
        source.change(lambda chosen: gr.update(visible=chosen == OWN), source, objective, **QUIETLY)
        button.click(self.audit_it, [source, file, objective, thorough], answer, **AT_WORK)

    def _runs_tab(self, tab: gr.Tab) -> None:
        names = gr.CheckboxGroup([], label="Runs that were measured", elem_id="runs-names")
        with gr.Row():
            again = gr.Button("Look again", elem_id="runs-again")
            button = gr.Button("Compare", variant="primary", elem_id="runs-go")
        answer = gr.HTML(elem_id="runs-answer")
        one = gr.Dropdown([], label="Report of one run", elem_id="runs-one")
        report = gr.HTML(elem_id="runs-report")
        for begin in (tab.select, again.click):
            begin(self.list_runs, None, [names, one], **QUIETLY)
        button.click(self.compare, names, answer, **AT_WORK)
        one.input(self.report, one, report, **AT_WORK)

    def try_it(
        self,
        sample: str,
        photo: str | None,
        codec: str,
        file: str | None,
        objective: Objective,
        strength: float,
        entering: Any,
        quality: float,
        request: gr.Request,
    ) -> Iterator[str]:
        """The Try tab."""

        def prepared(folder: Path) -> tuple[Any, ...]:
            picture = handed_over(photo, folder) if photo else KODAK / known(sample, (p.name for p in pictures()))
            chosen = self._codec(request, codec, file, objective, folder, shipped=None)
            if chosen == str(picture):
                raise FreqdoorError(f"{picture}: the picture and the codec have one name, expected two")
            return tried, Question(picture, chosen, objective, float(strength), entering, int(quality)), self._limits

        yield from self._answers(prepared)

    def audit_it(
        self, source: str, file: str | None, objective: Objective, thorough: bool, request: gr.Request
    ) -> Iterator[str]:
        """The Audit tab."""
        yield from self._answers(
            lambda folder: (
                audited,
                self._codec(request, source, file, objective, folder, shipped=BUNDLED, own=EXPORT),
                thorough,
            )
        )

    def plant_it(self, objective: Objective, shown: str, request: gr.Request) -> Any:
        """The Plant tab's first button."""
        try:
            self._plantings.ask(visitor(request), objective)
        except FreqdoorError as error:
            return refused(str(error)), gr.skip(), shown, gr.Timer(active=False)
        return self.look(objective, shown, request)

    def stop_it(self, objective: Objective, shown: str, request: gr.Request) -> Any:
        """The Plant tab's second button."""
        self._plantings.stop(visitor(request))
        return self.look(objective, shown, request)

    def look(self, objective: Objective, shown: str, request: gr.Request) -> Any:
        """How far a visitor's planting is: what the Plant tab shows, and whether to look again.

        Args:
            shown: which report stands there already.
        """
        planting = self._plantings.of(visitor(request), objective)
        if planting is None:
            return f"<p>{PLANT_SAYS}</p>", "", "", gr.Timer(active=False)
        answer: Any = ""
        if planting.state == "done":
            folder = planting.folder
            files = {name: folder / RUN / name for name in (PLANTED, EXPORT)}
            answer = gr.skip() if shown == objective else self._last((reported, folder, files))
        now = objective if planting.state == "done" else ""
        return self._status(planting), answer, now, gr.Timer(active=not planting.over)

    def list_runs(self, request: gr.Request) -> Any:
        """What the Runs tab has to choose from."""
        names = list(self._run_folders(request))
        return gr.CheckboxGroup(names, value=names[:6]), gr.Dropdown(names, value=None)

    def compare(self, names: list[str], request: gr.Request) -> Iterator[str]:
        """The Runs tab's table and plot."""

        def prepared(folder: Path) -> tuple[Any, ...]:
            folders = self._run_folders(request)
            if not names:
                raise FreqdoorError("runs: expected one or more to compare, found none; choose some")
            return compared, {known(name, folders): folders[name] for name in names}

        yield from self._answers(prepared)

    def report(self, name: str, request: gr.Request) -> Iterator[str]:
        """The Runs tab's report of one run."""
        folders = self._run_folders(request)
        yield from self._answers(lambda folder: (reported, folders[known(name, folders)], {}))

    def _run_folders(self, request: gr.Request) -> dict[str, Path]:
        """Every run that a visitor may see, by the name it is shown under: theirs, and those of the folder of runs."""
        folders = {
            f"my planting ({objective})": p for objective, p in self._plantings.finished(visitor(request)).items()
        }
        return folders | (runs_in(self._runs) if self._runs else {})

    def _codec(
        self,
        request: gr.Request,
        chosen: str,
        file: str | None,
        objective: Objective,
        folder: Path,
        *,
        shipped: str | None,
        own: str = PLANTED,
    ) -> str | None:
        """The codec that a visitor has chosen, by a name that the visitor has not made up."""
        if chosen == OWN:
            return str(self._plantings.file(visitor(request), objective, own))
        if chosen == FILE:
            if not file:
                raise FreqdoorError("codec: expected a file, found none; choose one, or another codec")
            return str(handed_over(file, folder))
        return BUNDLED if chosen == BUNDLED else shipped

    def _answers(self, prepared: Callable[[Path], tuple[Any, ...]]) -> Iterator[str]:
        """What a call tells while it works, and its answer, or the sentence that says why there is none."""
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            work, lines = None, ["starting"]
            yield working(lines)
            try:
                work = Work(*prepared(Path(folder)), folder=Path(folder), seconds=self._limits.seconds)
                for line in work.told():
                    lines.append(line)
                    yield working(lines)
                yield work.result
            except FreqdoorError as error:
                yield refused(str(error))
            finally:
                if work is not None:
                    work.end()

    def _last(self, call: tuple[Any, ...]) -> str:
        """The answer of a call alone."""
        [*_, answer] = self._answers(lambda folder: call)
        return answer

    def _status(self, planting: Planting) -> str:
        rows = dict(planting.rows)
        step = max(rows, default=0)
        sentence = STATES[planting.state].format(
            place=self._plantings.place(planting), step=step, steps=DEMO_STEPS, said=planting.said
        )
        return render(
            "web-planting.html",
            state=planting.state,
            sentence=sentence.removesuffix(": "),
            panels=curves(rows),
            steps=DEMO_STEPS,
            step=step,
        )


PLANT_SAYS = (
    "Plants a backdoor in the bundled codec on 18 Kodak pictures and measures it on the 6 others, as `freqdoor demo` "
    "does: one to two minutes. It goes on when this page is closed."
)
QUIETLY: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
AT_WORK: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "work", "concurrency_limit": 1}


def visitor(request: gr.Request) -> str:
    """Who asks; the gate lets nobody through who has no such name."""
    name: str = request.request.cookies[COOKIE]
    return name


def known(name: str, names: Any) -> str:
    """A name that the page has offered; FreqdoorError for any other."""
    if name not in set(names):
        raise FreqdoorError(f"{str(name)[:40]!r}: expected a name that the page shows, found another one")
    return name


def handed_over(upload: str, folder: Path) -> Path:
    """An uploaded file where the work is done, under its own name as far as that is one of a file and nothing else."""
    name = re.sub(r"[^\w.-]", "_", os.path.basename(upload)).lstrip(".-")[-100:] or "file"
    os.link(upload, folder / name)
    return Path(name)


def runs_in(folder: Path) -> dict[str, Path]:
    """The runs below a folder that were measured, by their path in it."""
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob(SUMMARY)):
        place = file.parent.relative_to(folder)
        if file.is_file() and len(place.parts) <= DEEPEST_RUN and len(found) < MOST_RUNS:
            found[str(place) if place.parts else folder.resolve().name] = file.parent
    return found


def working(lines: list[str]) -> str:
    """What a call has told so far."""
    shown = "\n".join(html.escape(line) for line in lines[-MOST_TOLD:])
    return f'<p class="fd-verdict fd-working" data-state="working">{shown}</p>'


def refused(sentence: str) -> str:
    """The sentence of an error, as the command line has it."""
    return f'<p class="fd-verdict" data-state="failed">freqdoor: {html.escape(sentence)}</p>'
