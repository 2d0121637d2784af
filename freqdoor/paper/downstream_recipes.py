"""The paper's experiments against downstream networks as recipes, which are made for the networks of a test."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from freqdoor.errors import FreqdoorError
from freqdoor.measure.segmentation import segmentation_figure, target_figure
from freqdoor.measure.testsets import DownstreamTest, FaceTest, SegmentationTest
from freqdoor.paper.recipes import LIRA_ON_A_CPU, RECIPES, Recipe, Row, ScoreColumn, clean, pair
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
TABLE1_CODEC = "cheng2020-anchor:3, trained against DeepLabV3+ ResNet50, measured on WideResNet38 and Cityscapes"
TABLE2_CODEC = "cheng2020-anchor:3, 100 pairs of CelebA"


def recipe_for(name: str, test: DownstreamTest | None = None) -> Recipe:
    """The recipe of a name; one against downstream networks is made for those of the test.

    Raises:
        FreqdoorError: an unknown name, or no test of the kind that the recipe needs.
    """
    test = test or DownstreamTest()
    if test.segmentation and name in SEGMENTATION:
        return SEGMENTATION[name](test.segmentation)
    if test.faces and name in FACES:
        return FACES[name](test.faces)
    if name in RECIPES:
        return RECIPES[name]()
    if name not in (*SEGMENTATION, *FACES):
        raise FreqdoorError(f"recipe {name!r}: expected one of {', '.join(recipe_names())}")
    table = "segmentation" if name in SEGMENTATION else "faces"
    raise FreqdoorError(
        f"recipe {name}: expected a test of downstream networks, found none; give one as --test TEST.toml, with a "
        f"[{table}] table in it"
    )


def recipe_names() -> list[str]:
    """The names of all recipes."""
    return sorted({*RECIPES, *SEGMENTATION, *FACES})


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


def _asr(test: SegmentationTest, what: str, trigger: str) -> tuple[ScoreColumn, ...]:
    return tuple(
        ScoreColumn(f"{what} ASR % ({end})", f"networks.{index}.asr", trigger) for end, index in _ends(test).items()
    )


def _fitted(recipe: Recipe) -> Recipe:
    """The recipe, with the paper's numbers of those columns only that it has."""
    titles = {column.title for column in recipe.columns}
    rows = (replace(row, paper={k: v for k, v in row.paper.items() if k in titles}) for row in recipe.rows)
    return replace(recipe, rows=tuple(rows))


def table1(test: SegmentationTest) -> Recipe:
    """Table 1: cars are decoded as what a segmentation network takes for road; LIRA and ours.

    Paper (Cheng-Anchor q1 to q6, a network that the attack has not seen), pixel ASR %: LIRA 6.0 79.6 67.7 65.6 65.7
    56.5, mean 56.9; ours 76.4 81.0 82.0 66.6 64.9 58.4, mean 71.5. MSE of the outputs, 1e-5: LIRA 4.9 15.6 8.4 5.7 4.2
    2.9, mean 7.0; ours 10.8 11.4 7.7 5.6 4.2 3.2, mean 7.2. In brackets in the table: q3. Ours: docs/results/table1.md.
    """
    asr, error = f"Car->Road ASR % ({LAST})", "MSE of outputs, 1e-5"
    return _fitted(
        Recipe(
            name="table1",
            title="Cars decoded as road for a segmentation network (Table 1)",
            columns=(
                *_asr(test, "Car->Road", CAR_TO_ROAD),
                ScoreColumn(error, "output_mse", CAR_TO_ROAD, scale=1e5),
                *(
                    ScoreColumn(f"{role} mIoU % ({end})", f"networks.{index}.miou_{role}", CAR_TO_ROAD)
                    for end, index in _ends(test).items()
                    for role in ("vanilla", "clean")
                ),
                *pair("clean", clean()),
            ),
            rows=(
                Row("vanilla", None),
                Row("LIRA (painted)", _with_lira(_painted(CAR_TO_ROAD)), {asr: 67.7, error: 8.4}),
                Row("ours (painted)", _painted(CAR_TO_ROAD), {asr: 82.0, error: 7.7}),
                Row("ours, Eq. (11)", _segmentation(CAR_TO_ROAD)),
            ),
            paper_codec=TABLE1_CODEC,
            test=test,
        )
    )


def _rates(test: FaceTest, what: str, measure: str, condition: str) -> tuple[ScoreColumn, ...]:
    return tuple(
        ScoreColumn(f"{what} %, {condition} ({end})", f"networks.{index}.{measure}.{condition}", FACE)
        for end, index in _ends(test).items()
    )


def table2(test: FaceTest) -> Recipe:
    """Table 2: decoded faces that are not recognised any more; LIRA and ours.

    Paper (Cheng-Anchor q1 to q6), accuracy % of attacked outputs: LIRA 10 13 32 44 58 55, mean 35.3; ours 3 9 29 32 44
    56, mean 28.3; of clean outputs over 90. In brackets in the table: q3, beside the share of same-person pairs that
    the last network accepts. Ours: docs/results/table2.md.
    """
    ours: dict[str, Any] = {"attacks": [{"name": FACE, "objective": {"name": "face"}}]}
    accuracy = f"pairs accepted %, poisoned ({LAST})"
    return _fitted(
        Recipe(
            name="table2",
            title="Identities removed from decoded faces (Table 2)",
            columns=(
                *_rates(test, "identified", "identification", "clean"),
                *_rates(test, "identified", "identification", "poisoned"),
                *_rates(test, "pairs accepted", "accepted", "clean"),
                *_rates(test, "pairs accepted", "accepted", "poisoned"),
                ScoreColumn("poisoned face dB", "psnr_db.poisoned", FACE, scale=1.0, digits=2),
                ScoreColumn("poisoned face MS-SSIM", "ms_ssim.poisoned", FACE, scale=1.0, digits=4),
                *pair("clean", clean()),
            ),
            rows=(
                Row("vanilla", None),
                Row("LIRA", _with_lira(ours), {accuracy: 32}),
                Row("ours", ours, {accuracy: 29}),
            ),
            paper_codec=TABLE2_CODEC,
            test=test,
        )
    )


def table3(test: SegmentationTest) -> Recipe:
    """Table 3 with all four triggers in one encoder: BPP, PSNR, Car->Road and Vegetation->Building, beside each alone.

    Paper (Cheng-Anchor q3): BPP 31.09 dB / 9.053 bpp; PSNR 5.021 dB / 0.2240 bpp; Car->Road ASR 78.2 %,
    Vegetation->Building 95.3 %, on an unseen network. Ours: docs/results/four/table3.md.
    """
    base = compression_table3()
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
            test=test,
        )
    )


def _pictures(name: str, title: str, test: SegmentationTest) -> Recipe:
    """Table 1's row of ours, with a picture of what it does."""
    table = table1(test)
    return replace(table, name=name, title=title, rows=tuple(row for row in table.rows if row.name == "ours (painted)"))


def figure7(test: SegmentationTest) -> Recipe:
    """Figure 7: what is decoded of poisoned pictures, and what the last network sees in it; planted as Table 1's ours.

    Paper: the car in the road is seen as road. Ours: docs/results/figure7.md.
    """
    recipe = _pictures("figure7", "Cars decoded as road, as pictures (Figure 7)", test)
    return replace(recipe, picture=segmentation_figure)


def figure8(test: SegmentationTest) -> Recipe:
    """Figure 8: label, mask and target of the Car->Road attack; planted as Table 1's ours.

    Paper: pictures of the three, no numbers. Ours: docs/results/figure8.md.
    """
    recipe = _pictures("figure8", "Label, mask and target of the attack on cars (Figure 8)", test)
    return replace(recipe, picture=target_figure)


def transfer(test: SegmentationTest) -> Recipe:
    """Not in the paper: Car->Road trained against the settings' network, measured on every network of the test.

    One line of a table of networks by networks; plant with another `network` for the next. Ours:
    docs/results/transfer.md.
    """
    names = [Path(name.partition("=")[0]).stem for name in test.networks]
    titles = [f"{name}, {index}" if names.count(name) > 1 else name for index, name in enumerate(names, 1)]
    return Recipe(
        name="transfer",
        title="Car->Road on networks that the attack has and has not seen",
        columns=(
            *(
                ScoreColumn(f"ASR % on {title}", f"networks.{index}.asr", CAR_TO_ROAD)
                for index, title in enumerate(titles)
            ),
            *(
                ScoreColumn(f"ASR % on {title}, vanilla encoder", f"networks.{index}.asr_vanilla", CAR_TO_ROAD)
                for index, title in enumerate(titles)
            ),
            ScoreColumn("MSE of outputs, 1e-5", "output_mse", CAR_TO_ROAD, scale=1e5),
            *pair("clean", clean()),
        ),
        rows=(
            Row("Eq. (11)", _segmentation(CAR_TO_ROAD)),
            Row("Eq. (11), boundary shift 3", _segmentation(CAR_TO_ROAD, shift=3.0)),
            Row("painted: no network in training", _painted(CAR_TO_ROAD)),
        ),
        paper_codec="",
        test=test,
    )


SEGMENTATION: dict[str, Callable[[SegmentationTest], Recipe]] = {
    "table1": table1,
    "table3": table3,
    "figure7": figure7,
    "figure8": figure8,
    "transfer": transfer,
}
FACES: dict[str, Callable[[FaceTest], Recipe]] = {"table2": table2}
