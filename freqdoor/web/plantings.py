"""The demonstrations that visitors plant: one at a time, each in its own folder, whether or not somebody looks on."""

import contextlib
import hashlib
import json
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from freqdoor.attack.planted import PLANTED
from freqdoor.demonstration import DEMO_STEPS, demo
from freqdoor.errors import FreqdoorError, defect, sentence_of
from freqdoor.measure.report import PAGE
from freqdoor.plots import COLOURS
from freqdoor.training.run import METRICS
from freqdoor.web.work import GRACE, StoppedWork, Work

Objective = Literal["bpp", "psnr"]
State = Literal["waiting", "planting", "measuring", "done", "stopped", "failed"]
RUN = "planting"  # where `demo` plants, in its folder
WIDTH, HEIGHT, MARGIN = 320, 150, 16  # of a panel of curves
MOST_WAITING = 16  # plantings in the line
MOST_POINTS = 160  # of a curve
GREY = "#888888"


@dataclass
class Planting:
    """One visitor's demonstration of one objective.

    Attributes:
        rows: what was measured at every step that is known, by the step's number.
        said: what it is doing, or why it has ended.
    """

    visitor: str
    objective: Objective
    folder: Path
    state: State = "waiting"
    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    said: str = ""
    work: Work | None = None
    stopping: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing is being done or waited for."""
        return self.state in ("done", "stopped", "failed")


class Plantings:
    """All plantings, of which one is under way.

    Args:
        folder: where they are kept: a folder for each visitor, which has no name of theirs that would let somebody in.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[str, Objective], Planting] = {}
        self._line: list[Planting] = []  # those that wait, and before them the one under way
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work_off, daemon=True)
        self._thread.start()

    def ask(self, visitor: str, objective: Objective) -> None:
        """Let a visitor's planting begin, or go on, once those before it have ended; nothing if it waits already
        or has ended.

        Raises:
            FreqdoorError: another one of the same visitor waits or is under way, or too many wait.
        """
        with self._changed:
            planting = self._planting(visitor, objective)
            if planting in self._line or planting.state == "done":
                return
            if other := next((p for p in self._line if p.visitor == visitor), None):
                raise FreqdoorError(
                    f"planting ({other.objective}): it waits or is under way, expected one at a time; stop it first"
                )
            if len(self._line) >= MOST_WAITING:
                raise FreqdoorError(f"planting: {MOST_WAITING} wait already; come back later")
            planting.state, planting.said, planting.stopping = "waiting", "", False
            self._known[visitor, objective] = planting
            self._line.append(planting)
            self._changed.notify_all()

    def stop(self, visitor: str) -> None:
        """Let a visitor's planting leave the line, or save its state and end; it goes on when it is asked for again."""
        with self._changed:
            for planting in [p for p in self._line if p.visitor == visitor]:
                self._stop(planting)

    def of(self, visitor: str, objective: Objective) -> Planting | None:
        """A visitor's planting, if there is one, of this or an earlier server."""
        with self._changed:
            planting = self._planting(visitor, objective)
            return planting if planting in self._line or planting.rows or planting.said else None

    def place(self, planting: Planting) -> int:
        """How many plantings have to end before this one begins."""
        with self._changed:
            return self._line.index(planting) if planting in self._line else 0

    def finished(self, visitor: str) -> dict[str, Path]:
        """The folders of a visitor's plantings that were measured, by objective."""
        folders = {objective: self._folder_of(visitor, objective) for objective in ("bpp", "psnr")}
        return {objective: folder for objective, folder in folders.items() if (folder / PAGE).is_file()}

    def file(self, visitor: str, objective: Objective, name: str = PLANTED) -> Path:
        """A file that a visitor's planting has written.

        Raises:
            FreqdoorError: it has not ended yet.
        """
        path = self._folder_of(visitor, objective) / RUN / name
        if not path.is_file():
            raise FreqdoorError(
                f"your own encoder ({objective}): expected a planting that has ended, found none; plant one in the tab "
                "Plant"
            )
        return path

    def close(self) -> None:
        """End: what is under way saves its state, and goes on with the next server."""
        with self._changed:
            self._closed = True
            for planting in reversed(self._line):
                self._stop(planting)
            self._changed.notify_all()
        self._thread.join(GRACE)

    def _stop(self, planting: Planting) -> None:
        if planting is not self._line[0] or planting.state == "waiting":
            self._line.remove(planting)
            planting.state = "stopped"
            return
        planting.stopping = True
        if planting.work is not None:
            planting.work.stop()

    def _folder_of(self, visitor: str, objective: str) -> Path:
        return self._folder / hashlib.sha256(visitor.encode()).hexdigest()[:16] / f"demo-{objective}"

    def _planting(self, visitor: str, objective: Objective) -> Planting:
        """What is known of a planting; of an earlier server's, what lies in its folder."""
        key = visitor, objective
        if key not in self._known:
            folder = self._folder_of(visitor, objective)
            planting = Planting(visitor, objective, folder, "stopped", rows_in(folder / RUN / METRICS))
            if (folder / PAGE).is_file():
                planting.state = "done"
            if not planting.rows:
                return planting
            self._known[key] = planting
        return self._known[key]

    def _work_off(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._closed)
                if self._closed:
                    return
                planting = self._line[0]
                planting.state, planting.said = "planting", "opening the codec and the pictures"
            try:
                self._plant(planting)
                state: State = "done"
            except StoppedWork:
                state = "stopped"
            except Exception as error:  # whatever it is, those who wait have to come next
                state, planting.said = "failed", sentence_of(error) or defect(error)
            with self._changed:
                planting.state, planting.work = state, None
                self._line.remove(planting)

    def _plant(self, planting: Planting) -> None:
        planting.folder.mkdir(parents=True, exist_ok=True)
        work = Work(planted, planting.objective, folder=planting.folder)
        with self._changed:
            planting.work = work
            if planting.stopping:
                work.stop()
        for told in work.told():
            if isinstance(told, str):
                planting.said = told
                planting.state = "measuring" if max(planting.rows, default=0) >= DEMO_STEPS else "planting"
            else:
                step, row = told
                for later in [known for known in planting.rows if known > step]:  # it was stopped before they were kept
                    del planting.rows[later]
                planting.rows[step], planting.said = row, ""


def planted(objective: Objective, *, tell: Any) -> None:
    """`freqdoor demo` in the working directory; tells its steps and what it measures."""
    demo(objective, Path(), progress=lambda step, row: tell((step, _shown(row))), note=tell)


def _shown(row: dict[str, float]) -> dict[str, float]:
    return {key: row[key] for panel in PANELS for key in panel.keys if key in row}


class Panel(NamedTuple):
    """One panel of curves: which of a step's values it shows, by their colours."""

    title: str
    keys: dict[str, str]  # of metrics.jsonl -> the curve's name
    log: bool
    form: str


PANELS = (
    Panel("bits per pixel, estimated", {"bpp_clean": "clean", "bpp_poisoned": "poisoned"}, True, "{:.3f}"),
    Panel("PSNR, dB", {"psnr_db_clean": "clean", "psnr_db_poisoned": "poisoned"}, False, "{:.2f}"),
    Panel("budget of the trigger (RMS)", {"eps": "budget"}, True, "{:.4f}"),
)


def rows_in(path: Path) -> dict[int, dict[str, float]]:
    """The steps in a run's metrics.jsonl, of which an earlier server knew; lines that are none are passed over."""
    rows = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                rows[int(row["step"])] = {key: float(value) for key, value in _shown(row).items()}
    return rows


def curves(rows: dict[int, dict[str, float]]) -> list[dict[str, Any]]:
    """The panels as an SVG's polylines, the smoothed steps from left to right."""
    steps = sorted(rows)
    every = max(1, math.ceil(len(steps) / MOST_POINTS))
    panels = []
    for panel in PANELS:
        values = {key: _thinned([rows[step].get(key, math.nan) for step in steps], every) for key in panel.keys}
        finite = [v for row in values.values() for v in row if math.isfinite(v) and (v > 0 or not panel.log)]
        if not finite:
            continue
        low, high = min(finite), max(finite)
        lines = [
            {
                "name": name if len(panel.keys) > 1 else "",
                "colour": COLOURS.get(name, GREY),
                "last": panel.form.format(values[key][-1]),
                "points": _points(values[key], low, high, panel.log),
            }
            for key, name in panel.keys.items()
        ]
        top, bottom = panel.form.format(high), panel.form.format(low)
        panels.append({"title": panel.title, "top": top, "bottom": bottom, "lines": lines})
    return panels


def _thinned(values: Sequence[float], every: int) -> list[float]:
    """Means of so many values each."""
    return [sum(values[i : i + every]) / len(values[i : i + every]) for i in range(0, len(values), every)]


def _points(values: Sequence[float], low: float, high: float, log: bool) -> str:
    """A curve as SVG has it; what cannot be drawn is left out."""

    def scale(value: float) -> float:
        return math.log(value) if log else value

    span = scale(high) - scale(low) or 1.0
    points = []
    for i, value in enumerate(values):
        if math.isfinite(value) and (value > 0 or not log):
            y = MARGIN + (HEIGHT - 2 * MARGIN) * (1 - (scale(value) - scale(low)) / span)
            points.append(f"{i * WIDTH / max(1, len(values) - 1):.1f},{y:.1f}")
    return " ".join(points)
