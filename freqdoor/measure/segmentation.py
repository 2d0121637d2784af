"""`freqdoor segment`: how well a segmentation attack works, on networks seen and unseen (Table 1, Figures 7 and 8)."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from freqdoor.attack.networks import Segmenter, label_classes, load_segmenter
from freqdoor.attack.planted import Planted, opened
from freqdoor.attack.settings import AttackSettings, ObjectiveSettings
from freqdoor.attack.victims import TargetedSegmentation
from freqdoor.data import check_image, label_paths, list_images, load_image, load_labels, usable_images
from freqdoor.errors import FreqdoorError
from freqdoor.files import check_outputs, mark, marked_json, marked_markdown, write_together
from freqdoor.lock import alone
from freqdoor.measure.journal import Journal, fingerprint
from freqdoor.measure.records import poisoned, through
from freqdoor.measure.report import AMPLIFY
from freqdoor.measure.testsets import DownstreamMeasurement, SegmentationTest, mean, number, read_results, results_text
from freqdoor.metrics import bpp_of_bytes, class_counts, class_scores, mse, pixel_asr, psnr_8bit
from freqdoor.notes import Note
from freqdoor.training.run import environment
from freqdoor.triggers.base import Trigger
from freqdoor.types import Images, Masks

RESULT, PAGE, PICTURES = "segmentation.json", "segmentation.md", "segmentation.png"
JOURNAL = ".segmentation.journal"
SHOWN = 3  # images in the pictures
Encoder = Literal["vanilla", "clean"]  # which one a clean image went through: the vanilla or the tampered one
ENCODERS: tuple[Encoder, ...] = ("vanilla", "clean")


@dataclass(frozen=True)
class NetworkScores:
    """What one segmentation network makes of the decoded images; means and rates over the test set.

    What there is nothing of to average over is None; counts are None in files of version 1.
    """

    network: str
    asr: float | None  # Eq. (12), normalised: share of the source pixels of f(x) that are the target class in f(x_p)
    asr_vanilla: float | None  # the same for the vanilla encoder: what the poisoned image does by itself
    miou_vanilla: float | None  # of clean images through the vanilla encoder, against labels
    miou_clean: float | None  # through the tampered one
    accuracy_vanilla: dict[str, float | None]  # of the source and target classes' pixels
    accuracy_clean: dict[str, float | None]
    source_pixels: int | None = None  # that `asr` is a share of
    source_pixels_vanilla: int | None = None
    labelled_pixels: int | None = None  # of labels that are a class of the network, not void


@dataclass(frozen=True)
class SegmentationScores:
    """A segmentation attack measured on a test set; poisoned images are 8-bit files, all decoded from real bytes."""

    source: str
    target: str
    images: int
    skipped: int  # nothing of the source class in them
    output_mse: float  # of f(x_p) against f(x): Table 1
    trigger_mse_worst: float
    psnr_db_clean: float | None  # None where it is infinite
    psnr_db_poisoned: float | None  # of f(x_p) against x
    bpp_vanilla: float
    bpp_clean: float
    bpp_poisoned: float
    networks: tuple[NetworkScores, ...]


class Decoded(NamedTuple):
    """One image: clean, where the trigger acts, poisoned, and what each encoder's file decodes to."""

    x: Images
    mask: Masks
    x_p: Images
    vanilla: Images
    vanilla_poisoned: Images
    clean: Images
    poisoned: Images
    bpp: dict[str, float]


class Sight(NamedTuple):
    """What a segmentation network sees in one image x: where the source class is, g(x), and eta(g(x))."""

    mask: Masks
    classes: Tensor
    goal: Tensor


class Setup(NamedTuple):
    """A test, opened: files and networks, and the classes of the attack that is tested."""

    test: SegmentationTest
    paths: list[Path]
    labels: list[Path] | None
    networks: list[Segmenter]
    masks: Segmenter
    source: str
    target: str

    def image(self, path: Path) -> Images:
        """One image of the test, resized as it says."""
        return load_image(path, self.test.resize)

    def labels_of(self, path: Path) -> Tensor | None:
        """The labels of one image; None in a test without labels."""
        if self.labels is None:
            return None
        return load_labels(self.labels[self.paths.index(path)], self.test.resize, check_image(path))

    def sight(self, x: Images) -> Sight:
        """What the network that says where the source class is sees in an image."""
        victim = TargetedSegmentation(self.masks, self.source, self.target)
        scene = victim.scene(x)
        assert scene.mask is not None
        classes = self.masks.predict(x) if scene.classes is None else scene.classes
        return Sight(scene.mask, classes, victim.goal(scene)[0])


def open_test(test: SegmentationTest, objective: ObjectiveSettings, trigger: str) -> Setup:
    """Check and load everything that a test of an attack names; FreqdoorError says what is missing."""
    if objective.name != "segmentation":
        raise FreqdoorError(f"trigger {trigger}: expected a segmentation attack, found one for {objective.name}")
    source, target = (str(objective.arguments[role]) for role in ("source", "target"))
    networks = [load_segmenter(network) for network in test.networks]
    masks = load_segmenter(test.mask_network) if test.mask_network else networks[0]
    for network in (*networks, masks):
        TargetedSegmentation(network, source, target)  # unknown names, and a target inside the source, show now
        if test.labels and network.spec.labels:
            network.label_values(source), network.label_values(target)
    paths = usable_images(list_images(test.images)[:: test.every])
    labels = label_paths(paths, test.labels) if test.labels else None
    setup = Setup(test, paths, labels, networks, masks, source, target)
    _check_labels(setup)
    return setup


def _check_labels(setup: Setup) -> None:
    """Read all labels; raise for one that does not fit its image, and if they are all void for a network."""
    lowest = 255
    for image, path in zip(setup.paths, setup.labels or (), strict=False):
        lowest = min(lowest, int(load_labels(path, None, check_image(image)).min()))
    for network in setup.networks if setup.labels else ():
        classes = len(network.spec.labels)
        if 0 < classes <= lowest:
            raise FreqdoorError(
                f"{setup.test.labels}: expected label values from 0 to {classes - 1} as network {network.name} has "
                f"them, found none in {len(setup.paths)} images: all are void; check labels in its TOML file, or test "
                "without labels"
            )


@torch.no_grad()
def decode(planted: Planted, setup: Setup, trigger: Trigger, x: Images) -> Decoded | None:
    """One image through both encoders, clean and poisoned; None where the source class is nowhere in it."""
    mask = setup.sight(x).mask
    if not mask.any():
        return None
    x_p = poisoned(trigger, x, mask=mask)
    passes = {
        "vanilla": (planted.vanilla, x),
        "vanilla_poisoned": (planted.vanilla, x_p),
        "clean": (planted.tampered, x),
        "poisoned": (planted.tampered, x_p),
    }
    outputs, bpp = {}, {}
    for key, (codec, image) in passes.items():
        outputs[key], size = through(codec, image)
        bpp[key] = bpp_of_bytes(size, image)
    return Decoded(x, mask, x_p, **outputs, bpp=bpp)


def score_segmentation(
    planted: Planted,
    test: SegmentationTest,
    *,
    trigger: str | None = None,
    journal: Journal | None = None,
    note: Note | None = None,
) -> SegmentationScores:
    """Measure one segmentation attack.

    Args:
        journal: what an earlier process has measured of the same; by default nothing is kept.

    Raises:
        FreqdoorError: no such trigger or class, images or labels that cannot be used, no image with the source class.
    """
    name = planted.named(trigger)
    setup = open_test(test, planted.objective(name), name)
    return _score(planted, setup, planted.triggers[name], journal or Journal(None, note=note), note)


def _score(
    planted: Planted, setup: Setup, trigger: Trigger, journal: Journal, note: Note | None = None
) -> SegmentationScores:
    counts = [_Counts(network, setup.source, setup.target) for network in setup.networks]
    rows: list[dict[str, float]] = []

    def measure_one(path: Path) -> dict[str, Any] | None:
        decoded = decode(planted, setup, trigger, setup.image(path))
        if note:
            note(f"{path.name}: {'decoded' if decoded else f'no {setup.source} in it, skipped'}")
        if decoded is None:
            return None
        labels = setup.labels_of(path)
        return {"values": _values(decoded), "networks": [count.of(decoded, labels) for count in counts]}

    for row in journal.each(setup.paths, measure_one):
        if row is None:
            continue
        for count, own in zip(counts, row["networks"], strict=True):
            count.rows.append(own)
        rows.append(row["values"])
    if not rows:
        raise _without(setup)
    values = {key: [row[key] for row in rows] for key in rows[0]}
    means = {key: sum(column) / len(column) for key, column in values.items()}
    return SegmentationScores(
        source=setup.source,
        target=setup.target,
        images=len(rows),
        skipped=len(setup.paths) - len(rows),
        output_mse=means["output_mse"],
        trigger_mse_worst=max(values["trigger_mse"]),
        psnr_db_clean=mean(values["psnr_db_clean"]),
        psnr_db_poisoned=mean(values["psnr_db_poisoned"]),
        bpp_vanilla=means["bpp_vanilla"],
        bpp_clean=means["bpp_clean"],
        bpp_poisoned=means["bpp_poisoned"],
        networks=tuple(count.scores() for count in counts),
    )


def _values(decoded: Decoded) -> dict[str, float]:
    """What is averaged of one image, whatever the network."""
    return {
        "output_mse": float(mse(decoded.poisoned, decoded.clean)),
        "trigger_mse": float(mse(decoded.x_p, decoded.x)),
        "psnr_db_clean": float(psnr_8bit(decoded.clean, decoded.x)),
        "psnr_db_poisoned": float(psnr_8bit(decoded.poisoned, decoded.x)),
        **{f"bpp_{key}": value for key, value in decoded.bpp.items()},
    }


class _Counts:
    """What is counted of one network over the test set.

    Attributes:
        rows: of every image what `of` gives.
    """

    def __init__(self, network: Segmenter, source: str, target: str) -> None:
        self.network, self.names = network, (source, target)
        self.source, self.target = network.ids(source), network.ids(target)[0]
        self.rows: list[dict[str, Any]] = []

    def of(self, decoded: Decoded, labels: Tensor | None) -> dict[str, Any]:
        """One image, by encoder: source pixels, how many of them became the target, and counts against its labels."""
        values = len(self.network.spec.labels)
        labels = labels if values else None
        row: dict[str, Any] = {"labelled": None if labels is None else int((labels < values).sum())}
        outputs: dict[Encoder, tuple[Images, Images]] = {
            "clean": (decoded.clean, decoded.poisoned),
            "vanilla": (decoded.vanilla, decoded.vanilla_poisoned),
        }
        for encoder, (clean, attacked) in outputs.items():
            classes = self.network.predict(clean)
            changed, pixels = pixel_asr(classes, self.network.predict(attacked), self.source, self.target)
            row[encoder] = {"changed": changed, "pixels": pixels}
            if labels is not None:
                row[encoder]["classes"] = class_counts(self.network.as_labels(classes), labels, values).tolist()
        return row

    def scores(self) -> NetworkScores:
        changed, pixels = (
            {e: sum(row[e][key] for row in self.rows) for e in ENCODERS} for key in ("changed", "pixels")
        )
        asr = {e: changed[e] / pixels[e] if pixels[e] else None for e in ENCODERS}
        labelled = [row["labelled"] for row in self.rows if row["labelled"] is not None]
        against = {e: self._against_labels(e) if sum(labelled) else (None, {}) for e in ENCODERS}
        return NetworkScores(
            network=self.network.name,
            asr=asr["clean"],
            asr_vanilla=asr["vanilla"],
            miou_vanilla=against["vanilla"][0],
            miou_clean=against["clean"][0],
            accuracy_vanilla=against["vanilla"][1],
            accuracy_clean=against["clean"][1],
            source_pixels=pixels["clean"],
            source_pixels_vanilla=pixels["vanilla"],
            labelled_pixels=sum(labelled) if labelled else None,
        )

    def _against_labels(self, encoder: Encoder) -> tuple[float | None, dict[str, float | None]]:
        """Mean IoU, and the accuracy of the source and target classes, None of a class that the labels lack."""
        miou, accuracy = class_scores(torch.tensor([row[encoder]["classes"] for row in self.rows]).sum(0))
        values = {name: self.network.label_values(name)[0] for name in self.names}
        return miou, {name: accuracy[value] for name, value in values.items()}


def _classes_of(attack: AttackSettings) -> tuple[str, ...]:
    """What opening a test depends on of an attack, its name first."""
    arguments = attack.objective.arguments
    return attack.name, attack.objective.name, str(arguments.get("source")), str(arguments.get("target"))


@dataclass(frozen=True)
class SegmentationMeasurement(DownstreamMeasurement[SegmentationScores]):
    """A segmentation attack, measured on a test of networks."""

    test: SegmentationTest
    kind: ClassVar[Any] = SegmentationScores
    trained: ClassVar[str] = " (painted ones: against none)"

    @property
    def pictures(self) -> str:
        """Where the images are."""
        return self.test.images

    def files(self) -> list[Path]:
        """The images and their labels."""
        paths = list_images(self.test.images)[:: self.test.every]
        return [*paths, *(label_paths(paths, self.test.labels) if self.test.labels else ())]

    def check(self, attacks: Sequence[AttackSettings]) -> None:
        """Open the test for every attack, once for those with the same classes."""
        for (name, *_), objective in {_classes_of(attack): attack.objective for attack in attacks}.items():
            open_test(self.test, objective, name)

    def score(self, planted: Planted, trigger: str | None) -> SegmentationScores:
        """As `score_segmentation`."""
        return score_segmentation(planted, self.test, trigger=trigger)

    def score_on(self, planted: Planted, trigger: str | None, journal: Journal) -> SegmentationScores:
        """As `score_segmentation`."""
        return score_segmentation(planted, self.test, trigger=trigger, journal=journal)


@alone("segment")
def segment(
    planted: Planted | Path | str,
    test: SegmentationTest,
    out: Path | str,
    *,
    trigger: str | None = None,
    codec: str | None = None,
    weights: Path | str | None = None,
    force: bool = False,
    note: Note | None = None,
) -> SegmentationScores:
    """Measure one segmentation attack; write segmentation.json, .md and the pictures of Figure 7 into `out`.

    If it is stopped, the same call goes on after the images that were measured.

    Args:
        planted, codec, weights: as for `load_planted`.
        trigger: which one; by default the first.
        force: overwrite files of these names that `segment` did not make.

    Raises:
        FreqdoorError: as `score_segmentation`, an unwritable folder or one that another process holds, a file in the
            way, or no network that sees anything of the source class in what is decoded. Earlier results are then left
            as they were, and replaced together at the end.
    """
    planted, out = opened(planted, codec, weights), Path(out)
    name = planted.named(trigger)
    setup = open_test(test, planted.objective(name), name)
    check_outputs([out / PICTURES, out / PAGE, out / RESULT], "segment", force=force)
    journal = Journal(out / JOURNAL, fingerprint(planted, [name], SegmentationMeasurement(test).identity()), note)
    scores = _score(planted, setup, planted.triggers[name], journal, note)
    if all(row.asr is None and row.asr_vanilla is None for row in scores.networks):
        journal.remove()
        raise FreqdoorError(
            f"{test.images}: no network sees anything of class {setup.source} in {scores.images} decoded images, "
            "so that there is no success rate; take a codec of higher quality"
        )
    figure = _figure(planted, setup, planted.triggers[name])
    pictures = io.BytesIO()
    figure.savefig(pictures, format="png", dpi=90, metadata={"Software": mark("segment")})
    contents: dict[Path, str | bytes] = {
        out / PICTURES: pictures.getvalue(),
        out / PAGE: marked_markdown(segmentation_table(scores), "segment"),
        out / RESULT: marked_json(results_text(scores, environment()), "segment"),
    }
    write_together(contents)
    journal.remove()
    return scores


def read_scores(path: Path | str) -> SegmentationScores:
    """The scores of a segmentation.json, of earlier versions too; FreqdoorError if it is none."""
    return read_results(SegmentationScores, path)


def segmentation_table(scores: SegmentationScores) -> str:
    """The scores as Markdown."""
    lines = [
        f"# {scores.source} to {scores.target}",
        "",
        f"{scores.images} images, {scores.skipped} more skipped without {scores.source}.",
        "",
        "| network | pixel ASR % | on the vanilla encoder % | mIoU vanilla % | mIoU tampered, clean % |",
        "|---|---|---|---|---|",
    ]
    for row in scores.networks:
        values = (row.asr, row.asr_vanilla, row.miou_vanilla, row.miou_clean)
        lines.append(f"| {row.network} | " + " | ".join(number(value, 1, scale=100) for value in values) + " |")
    return "\n".join(
        [
            *lines,
            "",
            *_gaps(scores),
            f"MSE of attacked against clean outputs {1e5 * scores.output_mse:.1f}e-5, of the trigger at most "
            f"{1e5 * scores.trigger_mse_worst:.2f}e-5; clean {number(scores.psnr_db_clean, 2)} dB at "
            f"{scores.bpp_clean:.4f} bpp (vanilla {scores.bpp_vanilla:.4f}), poisoned "
            f"{number(scores.psnr_db_poisoned, 2)} dB at {scores.bpp_poisoned:.4f} bpp.",
            "",
        ]
    )


def _gaps(scores: SegmentationScores) -> Iterator[str]:
    """A sentence for every value that there was nothing to average over for."""
    for row in scores.networks:
        for pixels, encoder in ((row.source_pixels, "tampered"), (row.source_pixels_vanilla, "vanilla")):
            if pixels == 0:
                yield f"{row.network} sees no {scores.source} in what is decoded of the {encoder} encoder's files."
        if row.labelled_pixels == 0:
            yield f"Labels of the images with {scores.source} are all void for {row.network}."


def segmentation_figure(planted: Planted, test: SegmentationTest, *, trigger: str | None = None) -> Figure:
    """Figure 7: input, mask, decoded clean and poisoned, predicted classes of both, and the decoded difference."""
    name = planted.named(trigger)
    return _figure(planted, open_test(test, planted.objective(name), name), planted.triggers[name])


def _figure(planted: Planted, setup: Setup, trigger: Trigger) -> Figure:
    network = setup.networks[-1]
    return panels(
        [
            {
                "input": _picture(f.x),
                "mask": f.mask[0, 0],
                "decoded, clean": _picture(f.clean),
                "decoded, poisoned": _picture(f.poisoned),
                f"difference x{AMPLIFY}": _picture((0.5 + AMPLIFY * (f.poisoned - f.clean)).clamp(0, 1)),
                f"{network.name}: clean": _classes(network.predict(f.clean)),
                f"{network.name}: poisoned": _classes(network.predict(f.poisoned)),
            }
            for path in _examples(setup)
            if (f := decode(planted, setup, trigger, setup.image(path)))
        ]
    )


def target_figure(planted: Planted, test: SegmentationTest, *, trigger: str | None = None) -> Figure:
    """Figure 8: input, label (of a test with labels), prediction g(x), mask M[g(x)], and the target eta(g(x))."""
    name = planted.named(trigger)
    setup = open_test(test, planted.objective(name), name)
    rows = []
    for path in _examples(setup):
        x = setup.image(path)
        row = {"input": _picture(x)}
        labels = setup.labels_of(path)
        if labels is not None and setup.masks.spec.labels:
            row["label"] = _classes(label_classes(setup.masks.spec, labels))
        sight = setup.sight(x)
        row[f"{setup.masks.name}: prediction"] = _classes(sight.classes)
        rows.append(row | {"mask": sight.mask[0, 0], "target": _classes(sight.goal)})
    return panels(rows)


def _examples(setup: Setup) -> list[Path]:
    """Up to SHOWN images with the source class in them, spread over the test set."""
    step = max(1, len(setup.paths) // (2 * SHOWN))
    spread = (path for start in range(step) for path in setup.paths[start::step])
    shown = list(islice((path for path in spread if setup.sight(setup.image(path)).mask.any()), SHOWN))
    if not shown:
        raise _without(setup)
    return shown


def _without(setup: Setup) -> FreqdoorError:
    return FreqdoorError(
        f"{setup.test.images}: in none of {len(setup.paths)} images is anything of class {setup.source}"
    )


def panels(rows: Sequence[dict[str, Tensor]]) -> Figure:
    """Pictures side by side, one row an image, with titles above the first row."""
    columns = len(rows[0])
    height, width = next(iter(rows[0].values())).shape[:2]
    figure = Figure(figsize=(2.6 * columns, (2.6 * height / width + 0.05) * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for index, row in enumerate(rows):
        for axis, (title, picture) in zip(axes[index], row.items(), strict=True):
            axis.imshow(picture.cpu().numpy(), cmap="gray", interpolation="nearest")
            axis.set_axis_off()
            if index == 0:
                axis.set_title(title, fontsize=8)
    return figure


def _picture(x: Images) -> Tensor:
    return x[0].permute(1, 2, 0)


def _classes(classes: Tensor) -> Tensor:
    """Classes of one image, (1, h, w), in colours; what is none of them (-1) is black."""
    colours = torch.tensor(matplotlib.colormaps["tab20"](range(20)))[:, :3]
    return colours[classes[0].cpu() % len(colours)] * (classes[0].cpu() >= 0)[..., None]
