"""The paper's experiments against downstream networks as recipes, which are made for the networks of a test."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from freqdoor.errors import FreqdoorError
from freqdoor.files import name_and_file
from freqdoor.measure.faces import FaceMeasurement, FaceScores, IdentityScores
from freqdoor.measure.segmentation import (
    NetworkScores,
    SegmentationMeasurement,
    SegmentationScores,
    segmentation_figure,
    target_figure,
)
from freqdoor.measure.testsets import FaceTest, SegmentationTest
from freqdoor.paper.recipe import Column, Material, Recipe, Row, images_under, pair
from freqdoor.paper.recipes import LIRA_ON_A_CPU
from freqdoor.paper.recipes import table3 as compression_table3

CAR_TO_ROAD = "car-to-road"
TREE_TO_BUILDING = "tree-to-building"
FACE = "face"
CLASSES: dict[str, dict[str, Any]] = {  # by the attack's name
    CAR_TO_ROAD: {"source": "cars", "target": "road"},
    TREE_TO_BUILDING: {"source": "vegetation", "target": "building"},
}
PAINT: dict[str, Any] = {"alpha": 0.01, "beta": 1.0, "masks": "labels", "weight": 0.0, "paint": 300.0, "margin": 8}
PAINTED: dict[str, dict[str, Any]] = {  # the same without a network in training (docs/equations.md)
    CAR_TO_ROAD: PAINT | {"also": "off-road", "colour": "#707070"},
    TREE_TO_BUILDING: PAINT | {"also": "outdoors", "colour": "#404040"},
}
FIRST, LAST = "first network", "last network"
OUTPUT_MSE = "MSE of outputs, 1e-5"
TABLE1_CODEC = "cheng2020-anchor:3, trained against DeepLabV3+ ResNet50, measured on WideResNet38 and Cityscapes"
TABLE2_CODEC = "cheng2020-anchor:3, 100 pairs of CelebA"
T = TypeVar("T", SegmentationTest, FaceTest)


def _needed(test: T | None, recipe: str, table: str) -> T:
    """The test that a recipe needs; FreqdoorError if none was given."""
    if test is None:
        raise FreqdoorError(
            f"recipe {recipe}: expected a test of downstream networks, found none; give one as --test TEST.toml, with "
            f"a [{table}] table in it"
        )
    return test


def _segmentation(*names: str, **changes: Any) -> dict[str, Any]:
    """Attacks of Eq. (11) for a row's settings; further arguments are those of the objective."""
    return {"attacks": [_attack(name, changes) for name in names]}


def _painted(*names: str) -> dict[str, Any]:
    """The same attacks, painted."""
    return {"attacks": [_attack(name, PAINTED[name]) for name in names]}


def _attack(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "objective": {"name": "segmentation", "arguments": CLASSES[name] | changes}}


def _with_lira(changes: dict[str, Any]) -> dict[str, Any]:
    return {"attacks": [attack | {"trigger": LIRA_ON_A_CPU} for attack in changes["attacks"]]}


def _ends(test: SegmentationTest | FaceTest) -> dict[str, int]:
    """The first and the last network of a test; where there is one only, it is the first."""
    return {FIRST: 0, LAST: -1} if len(test.networks) > 1 else {FIRST: 0}


def _scaled(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def _segmenter_column(
    title: str, test: SegmentationTest, index: int, rate: Callable[[NetworkScores], float | None], trigger: str
) -> Column[SegmentationScores]:
    """A rate of one network, in percent."""

    def value(scores: SegmentationScores) -> float | None:
        return _scaled(100.0, rate(scores.networks[index]))

    return Column(title, SegmentationMeasurement(test), value, trigger)


def _asr(test: SegmentationTest, what: str, trigger: str) -> tuple[Column[SegmentationScores], ...]:
    return tuple(
        _segmenter_column(f"{what} ASR % ({end})", test, index, lambda network: network.asr, trigger)
        for end, index in _ends(test).items()
    )


def _miou(test: SegmentationTest, trigger: str) -> Iterator[Column[SegmentationScores]]:
    for end, index in _ends(test).items():
        yield _segmenter_column(f"vanilla mIoU % ({end})", test, index, lambda network: network.miou_vanilla, trigger)
        yield _segmenter_column(f"clean mIoU % ({end})", test, index, lambda network: network.miou_clean, trigger)


def _output_mse(test: SegmentationTest) -> Column[SegmentationScores]:
    return Column(
        OUTPUT_MSE, SegmentationMeasurement(test), lambda scores: _scaled(1e5, scores.output_mse), CAR_TO_ROAD
    )


def _rates(
    test: FaceTest, what: str, condition: str, rates: Callable[[FaceScores], dict[str, float | None]]
) -> tuple[Column[IdentityScores], ...]:
    """A rate of the first and the last network under one condition, in percent."""

    def column(end: str, index: int) -> Column[IdentityScores]:
        def value(scores: IdentityScores) -> float | None:
            return _scaled(100.0, rates(scores.networks[index]).get(condition))

        return Column(f"{what} %, {condition} ({end})", FaceMeasurement(test), value, FACE)

    return tuple(column(end, index) for end, index in _ends(test).items())


def _fitted(recipe: Recipe) -> Recipe:
    """The recipe, with the paper's numbers of those columns only that it has."""
    titles = {column.title for column in recipe.columns}
    rows = (replace(row, paper={k: v for k, v in row.paper.items() if k in titles}) for row in recipe.rows)
    return replace(recipe, rows=tuple(rows))


def table1(on: Material) -> Recipe:
    """Table 1: cars are decoded as what a segmentation network takes for road; LIRA and ours.

    Paper (Cheng-Anchor q1 to q6, a network that the attack has not seen), pixel ASR %: LIRA 6.0 79.6 67.7 65.6 65.7
    56.5, mean 56.9; ours 76.4 81.0 82.0 66.6 64.9 58.4, mean 71.5. MSE of the outputs, 1e-5: LIRA 4.9 15.6 8.4 5.7 4.2
    2.9, mean 7.0; ours 10.8 11.4 7.7 5.6 4.2 3.2, mean 7.2. In brackets in the table: q3. Ours: docs/results/table1.md.
    """
    test = _needed(on.tests.segmentation, "table1", "segmentation")
    asr, error = f"Car->Road ASR % ({LAST})", OUTPUT_MSE
    return _fitted(
        Recipe(
            name="table1",
            title="Cars decoded as road for a segmentation network (Table 1)",
            columns=(
                *_asr(test, "Car->Road", CAR_TO_ROAD),
                _output_mse(test),
                *_miou(test, CAR_TO_ROAD),
                *pair("clean", images_under(on)),
            ),
            rows=(
                Row("vanilla", None),
                Row("LIRA (painted)", _with_lira(_painted(CAR_TO_ROAD)), {asr: 67.7, error: 8.4}),
                Row("ours (painted)", _painted(CAR_TO_ROAD), {asr: 82.0, error: 7.7}),
                Row("ours, Eq. (11)", _segmentation(CAR_TO_ROAD)),
            ),
            paper_codec=TABLE1_CODEC,
        )
    )


def table2(on: Material) -> Recipe:
    """Table 2: decoded faces that are not recognised any more; LIRA and ours.

    Paper (Cheng-Anchor q1 to q6), accuracy % of attacked outputs: LIRA 10 13 32 44 58 55, mean 35.3; ours 3 9 29 32 44
    56, mean 28.3; of clean outputs over 90. In brackets in the table: q3, beside the share of same-person pairs that
    the last network accepts. Ours: docs/results/table2.md.
    """
    test = _needed(on.tests.faces, "table2", "faces")
    ours: dict[str, Any] = {"attacks": [{"name": FACE, "objective": {"name": "face"}}]}
    accuracy = f"pairs accepted %, poisoned ({LAST})"
    faces = FaceMeasurement(test)
    return _fitted(
        Recipe(
            name="table2",
            title="Identities removed from decoded faces (Table 2)",
            columns=(
                *_rates(test, "identified", "clean", lambda network: network.identification),
                *_rates(test, "identified", "poisoned", lambda network: network.identification),
                *_rates(test, "pairs accepted", "clean", lambda network: network.accepted),
                *_rates(test, "pairs accepted", "poisoned", lambda network: network.accepted),
                Column("poisoned face dB", faces, lambda scores: scores.psnr_db["poisoned"], FACE, digits=2),
                Column("poisoned face MS-SSIM", faces, lambda scores: scores.ms_ssim["poisoned"], FACE, digits=4),
                *pair("clean", images_under(on)),
            ),
            rows=(
                Row("vanilla", None),
                Row("LIRA", _with_lira(ours), {accuracy: 32}),
                Row("ours", ours, {accuracy: 29}),
            ),
            paper_codec=TABLE2_CODEC,
        )
    )


def table3(on: Material) -> Recipe:
    """Table 3, with a test all four triggers in one encoder: BPP, PSNR, Car->Road and Vegetation->Building.

    Each stands alone beside them. Without a test the table is that of `recipes.table3`.

    Paper (Cheng-Anchor q3): BPP 31.09 dB / 9.053 bpp; PSNR 5.021 dB / 0.2240 bpp; Car->Road ASR 78.2 %,
    Vegetation->Building 95.3 %, on an unseen network. Ours: docs/results/four/table3.md.
    """
    base = compression_table3(on)
    test = on.tests.segmentation
    if test is None:
        return base
    [both] = (row for row in base.rows if row.name == "both")
    assert both.changes is not None
    four = {"attacks": [*both.changes["attacks"], *_painted(CAR_TO_ROAD, TREE_TO_BUILDING)["attacks"]]}
    paper = {f"Car->Road ASR % ({LAST})": 78.2, f"Vege->Build ASR % ({LAST})": 95.3}
    return _fitted(
        replace(
            base,
            title="Several triggers in one encoder (Table 3)",
            columns=(
                *base.columns,
                *_asr(test, "Car->Road", CAR_TO_ROAD),
                *_asr(test, "Vege->Build", TREE_TO_BUILDING),
            ),
            rows=(
                *(replace(row, paper={}) if row is both else row for row in base.rows),
                Row("Car->Road alone", _painted(CAR_TO_ROAD)),
                Row("Vege->Build alone", _painted(TREE_TO_BUILDING)),
                Row("all four", four, both.paper | paper),
            ),
        )
    )


def _pictures(on: Material, name: str, title: str) -> Recipe:
    """Table 1's row of ours, with a picture of what it does."""
    table = table1(on)
    return replace(table, name=name, title=title, rows=tuple(row for row in table.rows if row.name == "ours (painted)"))


def figure7(on: Material) -> Recipe:
    """Figure 7: what is decoded of poisoned pictures, and what the last network sees in it; planted as Table 1's ours.

    Paper: the car in the road is seen as road. Ours: docs/results/figure7.md.
    """
    test = _needed(on.tests.segmentation, "figure7", "segmentation")
    recipe = _pictures(on, "figure7", "Cars decoded as road, as pictures (Figure 7)")
    return replace(recipe, picture=lambda planted: segmentation_figure(planted, test))


def figure8(on: Material) -> Recipe:
    """Figure 8: label, mask and target of the Car->Road attack; planted as Table 1's ours.

    Paper: pictures of the three, no numbers. Ours: docs/results/figure8.md.
    """
    test = _needed(on.tests.segmentation, "figure8", "segmentation")
    recipe = _pictures(on, "figure8", "Label, mask and target of the attack on cars (Figure 8)")
    return replace(recipe, picture=lambda planted: target_figure(planted, test))


def transfer(on: Material) -> Recipe:
    """Not in the paper: Car->Road trained against the settings' network, measured on every network of the test.

    One line of a table of networks by networks; plant with another `network` for the next. Ours:
    docs/results/transfer.md.
    """
    test = _needed(on.tests.segmentation, "transfer", "segmentation")
    names = [Path(name_and_file(name)[0]).stem for name in test.networks]
    titles = [f"{name}, {index}" if names.count(name) > 1 else name for index, name in enumerate(names, 1)]
    return Recipe(
        name="transfer",
        title="Car->Road on networks that the attack has and has not seen",
        columns=(
            *(
                _segmenter_column(f"ASR % on {title}", test, index, lambda network: network.asr, CAR_TO_ROAD)
                for index, title in enumerate(titles)
            ),
            *(
                _segmenter_column(
                    f"ASR % on {title}, vanilla encoder", test, index, lambda network: network.asr_vanilla, CAR_TO_ROAD
                )
                for index, title in enumerate(titles)
            ),
            _output_mse(test),
            *pair("clean", images_under(on)),
        ),
        rows=(
            Row("Eq. (11)", _segmentation(CAR_TO_ROAD)),
            Row("Eq. (11), boundary shift 3", _segmentation(CAR_TO_ROAD, shift=3.0)),
            Row("painted: no network in training", _painted(CAR_TO_ROAD)),
        ),
        paper_codec="",
    )
