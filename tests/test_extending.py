"""What one more trigger, objective, preprocessing, downstream kind and table cost: one of each is added here and used.

`PLACES` lists all that had to be written or entered for each; docs/extending.md says the same numbers.
"""

import re
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic.dataclasses import dataclass as checked_dataclass

from freqdoor.attack.objectives import Loss, Passes, RateAttack
from freqdoor.attack.plant import plant
from freqdoor.attack.planted import load_planted
from freqdoor.attack.settings import OBJECTIVES, AttackSettings, ObjectiveKind, PlantSettings
from freqdoor.attack.victims import Victim
from freqdoor.data import load_image
from freqdoor.errors import FreqdoorError
from freqdoor.measure.examine import evaluate
from freqdoor.measure.records import poisoned, records, through
from freqdoor.measure.testsets import Measurement
from freqdoor.paper import settings as recipes
from freqdoor.paper.recipe import Column, Material, Recipe, Row, images_under, pair
from freqdoor.paper.reproduce import reproduce
from freqdoor.preprocessing import PREPROCESSINGS, STRICT, Preprocessing, parse_defences
from freqdoor.settings import Arguments
from freqdoor.triggers.arguments import TRIGGERS, TriggerArguments, TriggerKind
from freqdoor.triggers.base import Trigger

DOCS = Path(__file__).parent.parent / "docs"
DOCUMENT = (DOCS / "extending.md").read_text()
PLACES = {
    "trigger": ("StripesArguments", "Stripes", "TRIGGERS"),
    "objective": ("CostlyArguments", "CostlyAttack", "OBJECTIVES"),
    "preprocessing": ("Darken", "PREPROCESSINGS"),
    "downstream kind": ("Brightness", "BrightnessMeasurement"),
    "table": ("own_table", "RECIPES"),
}


class StripesArguments(TriggerArguments):
    period: int = 4


class Stripes(Trigger):
    """Vertical stripes, the same in every image."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(StripesArguments(**arguments))
        self.height = torch.nn.Parameter(torch.ones(3, 1, 1))

    def perturb(self, x):
        columns = torch.arange(x.shape[-1]) // self.settings.period % 2
        return (self.height * (2.0 * columns - 1)).expand_as(x)


class CostlyArguments(Arguments):
    beta: float = 0.5


class CostlyAttack(CostlyArguments):
    uses_auxiliary: ClassVar[bool] = False

    def __call__(self, passes: Passes, lmbda: float) -> Loss:
        return RateAttack(beta=self.beta)(passes, 2 * lmbda)


@checked_dataclass(frozen=True, config=STRICT)
class Darken(Preprocessing):
    factor: float = 0.5

    def _apply(self, x):
        return x * self.factor


class Brightness(Victim):
    def forward(self, scene, x_hat, x_hat_p):
        return x_hat_p.mean()


@dataclass(frozen=True)
class BrightnessMeasurement(Measurement[float]):
    images: tuple[Path, ...]
    kind: ClassVar[Any] = float

    def check(self, attacks: Sequence[AttackSettings]) -> None:
        """Nothing to check."""

    def score(self, planted, trigger):
        values = []
        for path in self.images:
            x = load_image(path)
            values.append(float(through(planted.tampered, poisoned(planted.triggers[trigger], x))[0].mean()))
        return sum(values) / len(values)

    def identity(self) -> str:
        return repr(self.images)


def own_table(on: Material) -> Recipe:
    return Recipe(
        name="own",
        title="One of each",
        columns=(
            *pair("dark", images_under(on, defence=Darken(0.25)), "costly"),
            Column("brightness", BrightnessMeasurement(on.images), lambda mean: mean, "bright"),
        ),
        rows=(
            Row("vanilla", None),
            Row(
                "ours",
                {
                    "attacks": [
                        {"objective": "costly", "trigger": "stripes"},
                        {
                            "name": "bright",
                            "objective": {"name": "downstream", "arguments": {"victim": "test_extending:Brightness"}},
                        },
                    ]
                },
            ),
        ),
        paper_codec="",
    )


@pytest.fixture
def _entered(monkeypatch):
    """The entries in tables, which are all that freqdoor's own files would need besides the classes above."""
    monkeypatch.setitem(TRIGGERS, "stripes", TriggerKind(StripesArguments, "test_extending:Stripes"))
    monkeypatch.setitem(
        OBJECTIVES, "costly", ObjectiveKind("test_extending:CostlyAttack", CostlyArguments, success="bits")
    )
    monkeypatch.setitem(PREPROCESSINGS, "Darken", Darken)
    monkeypatch.setitem(recipes.RECIPES, "own", "test_extending:own_table")


@pytest.mark.long
@pytest.mark.usefixtures("_entered")
def test_one_of_each_is_planted_measured_and_in_a_table(settings, images, tmp_path):
    base = settings(steps=2, auxiliary={"folder": str(images), "crop": 64, "batch_size": 2}, trigger={})
    table = reproduce("own", base, images=images, out=tmp_path / "out", runs=tmp_path / "runs", seeds=1)
    assert table["ours"].keys() == {"dark dB", "dark bpp", "brightness"}
    assert 0 < table["ours"]["brightness"].mean < 1
    assert "| ours |" in (tmp_path / "out/own.md").read_text()
    [run] = [path for path in (tmp_path / "runs").iterdir() if path.name != "records"]
    planted = load_planted(run, "factories:lite")
    assert planted.attack("costly").trigger == "stripes"
    assert planted.triggers["costly"].arguments["period"] == 4
    x = load_image(next(iter(sorted(images.iterdir()))))
    delta = poisoned(planted.triggers["costly"], x, rounding="float") - x
    assert delta[..., 0].mean() < -0.004 < 0.004 < delta[..., 4].mean()
    rows = list(records(planted, sorted(images.iterdir())[:1], defences=parse_defences("Darken(0.25)")))
    assert {row.defence for row in rows} == {"none", "Darken(factor=0.25)"}
    summary = evaluate(planted, images, tmp_path / "results", trigger="costly")
    assert summary.objective == "costly"


@pytest.mark.usefixtures("_entered")
def test_what_was_added_is_checked_like_the_rest(settings):
    with pytest.raises(FreqdoorError, match=r"objective.arguments: .*gamma"):
        settings(objective={"name": "costly", "arguments": {"gamma": 1}})
    with pytest.raises(FreqdoorError, match=r"trigger.arguments: .*period"):
        settings(trigger={"name": "stripes", "arguments": {"period": "wide"}})
    assert isinstance(settings(trigger="stripes", objective="costly"), PlantSettings)


def test_the_document_says_how_many_places():
    counts = dict(re.findall(r"^\| (?:a |an )?([\w ]+) \| (\d+) \|", DOCUMENT, re.MULTILINE))
    assert counts == {kind: str(len(places)) for kind, places in PLACES.items()}
    for places in PLACES.values():
        assert all(place in globals() or hasattr(recipes, place) for place in places)


def test_what_the_page_for_contributors_adds_is_there_afterwards(settings, images, tmp_path, monkeypatch):
    """Its objective and its defence, as they stand there, are planted with and measured behind."""
    shown = types.ModuleType("shown")
    monkeypatch.setitem(sys.modules, "shown", shown)
    monkeypatch.setitem(OBJECTIVES, "flat", None)
    monkeypatch.setitem(PREPROCESSINGS, "Darken", None)
    for name in ("objective", "defence"):
        page = (DOCS / "contributing.md").read_text()
        [code] = re.findall(rf"<!-- {name} -->\n```python\n(.*?)```", page, re.DOTALL)
        exec(code, shown.__dict__)
    planted, other = (
        plant(settings(steps=2, objective={"name": "flat", "arguments": {"beta": beta}}), tmp_path / f"{beta}")
        for beta in (5.0, 1e4)
    )
    assert planted.tampered.module_hashes()["g_a"] != other.tampered.module_hashes()["g_a"]
    rows = list(records(planted, sorted(images.iterdir())[:1], defences=parse_defences("Darken(0.25)")))
    assert {row.defence for row in rows} == {"none", "Darken(factor=0.25)"}
