"""What a recipe is: the encoders that are planted, what is measured of them, and the paper's numbers."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from matplotlib.figure import Figure

from freqdoor.attack.planted import Planted
from freqdoor.attack.settings import AttackSettings
from freqdoor.codecs.architectures import import_object
from freqdoor.data import dataset_hash
from freqdoor.errors import FreqdoorError
from freqdoor.measure.journal import Journal
from freqdoor.measure.records import Condition, measured_image
from freqdoor.measure.testsets import DownstreamTest, Measurement, mean
from freqdoor.paper.settings import RECIPES, recipe_names
from freqdoor.preprocessing import Preprocessing
from freqdoor.types import Record, Role, Rounding

OWN = "*"  # a column's trigger: whichever the row's encoder has first
DIGITS = {"psnr_db": 2, "bpp_real": 4}  # after the point, of a record's fields
S = TypeVar("S")
Records = tuple[Record, ...]


@dataclass(frozen=True)
class ImageMeasurement(Measurement[Records]):
    """Quality and rate of images under one condition, whose trigger is the one that is scored."""

    images: tuple[Path, ...]
    condition: Condition
    kind: ClassVar[Any] = Records

    def check(self, attacks: Sequence[AttackSettings]) -> None:
        """Refuse to average over no image."""
        if not self.images:
            raise FreqdoorError("images: expected one or more to measure on, found none")

    def score(self, planted: Planted, trigger: str | None) -> Records:
        """A record of every image."""
        return self.score_on(planted, trigger, Journal(None))

    def score_on(self, planted: Planted, trigger: str | None, journal: Journal) -> Records:
        """A record of every image."""
        condition = replace(self.condition, trigger=trigger)

        def measure_one(path: Path) -> dict[str, Any]:
            [row] = measured_image(planted, path, [condition])
            return row.record.to_dict()

        return tuple(map(Record.model_validate, journal.each(self.images, measure_one)))

    def identity(self) -> str:
        """The condition, and a hash of the images."""
        return json.dumps([repr(self.condition), dataset_hash(self.images)])


@dataclass(frozen=True)
class Column(Generic[S]):
    """One value out of the scores of one measurement."""

    title: str
    measurement: Measurement[S]
    value: Callable[[S], float | None]  # None where nothing was measured
    trigger: str | None = OWN  # None: of clean images, so that an encoder without triggers has it too
    digits: int = 1  # after the point


@dataclass(frozen=True)
class Row:
    """One planted encoder, or the vanilla codec (`changes` is None), with the paper's numbers by column title."""

    name: str
    changes: dict[str, Any] | None  # to the base settings of `freqdoor plant`
    paper: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """One table or figure."""

    name: str
    title: str
    columns: tuple[Column[Any], ...]
    rows: tuple[Row, ...]
    paper_codec: str  # what the paper's numbers were measured on
    plot: bool = False  # whether it is a figure: one point a row in the plane of rate and PSNR
    picture: Callable[[Planted], Figure] | None = None  # of the first row's first planting

    @property
    def measurements(self) -> tuple[Measurement[Any], ...]:
        """What its columns are measured by, each once."""
        return tuple(dict.fromkeys(column.measurement for column in self.columns))


@dataclass(frozen=True)
class Material:
    """What a recipe is measured on: images, and tests of downstream networks."""

    images: tuple[Path, ...] = ()
    tests: DownstreamTest = field(default_factory=DownstreamTest)


def recipe_for(name: str, material: Material) -> Recipe:
    """The recipe of a name, made for what it is measured on.

    Raises:
        FreqdoorError: an unknown name, or no test of the kind that the recipe needs.
    """
    if name not in RECIPES:
        raise FreqdoorError(f"recipe {name!r}: expected one of {', '.join(recipe_names())}")
    recipe: Recipe = import_object(RECIPES[name])(material)
    return recipe


def images_under(
    material: Material,
    role: Role = "tampered",
    *,
    strength: float = 1.0,
    rounding: Rounding = "8-bit",
    defence: Preprocessing | None = None,
) -> ImageMeasurement:
    """The material's images through an encoder; clean or poisoned, as the column's trigger says."""
    return ImageMeasurement(material.images, Condition(role, None, strength, rounding, defence))


def record_column(title: str, measurement: ImageMeasurement, field: str, trigger: str | None = None) -> Column[Records]:
    """The mean of a record's field over images."""

    def value(records: Records) -> float | None:
        return mean([getattr(record, field) for record in records])

    return Column(title, measurement, value, trigger, DIGITS[field])


def pair(
    title: str, measurement: ImageMeasurement, trigger: str | None = None
) -> tuple[Column[Records], Column[Records]]:
    """Quality and rate of images."""
    return (
        record_column(f"{title} dB", measurement, "psnr_db", trigger),
        record_column(f"{title} bpp", measurement, "bpp_real", trigger),
    )
