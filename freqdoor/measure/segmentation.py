"""`freqdoor segment`: how well a segmentation attack works, on networks seen and unseen (Table 1, Figures 7 and 8)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from freqdoor.attack.networks import Segmenter, load_segmenter
from freqdoor.attack.planted import Planted
from freqdoor.attack.victims import TargetedSegmentation
from freqdoor.data import check_image, label_paths, list_images, load_image, load_labels, usable_images
from freqdoor.errors import FreqdoorError
from freqdoor.files import replacing, write_text
from freqdoor.measure.records import Note, poison, through
from freqdoor.measure.report import AMPLIFY
from freqdoor.measure.testsets import SegmentationTest
from freqdoor.metrics import class_scores, mse, pixel_asr, psnr_8bit
from freqdoor.training.run import environment
from freqdoor.triggers import Trigger
from freqdoor.types import Images, Masks

RESULT, PAGE, PICTURES = "segmentation.json", "segmentation.md", "segmentation.png"
SHOWN = 3  # images in the pictures


@dataclass(frozen=True)
class NetworkScores:
    """What one segmentation network makes of the decoded images; means and rates over the test set."""

    network: str
    asr: float  # Eq. (12), normalised: share of the source pixels of f(x) that are the target class in f(x_p)
    asr_vanilla: float  # the same for the vanilla encoder: what the poisoned image does by itself
    miou_vanilla: float | None  # of clean images through the vanilla encoder, against labels
    miou_clean: float | None  # through the tampered one
    accuracy_vanilla: dict[str, float | None]  # of the source and target classes' pixels
    accuracy_clean: dict[str, float | None]


@dataclass(frozen=True)
class SegmentationScores:
    """A segmentation attack measured on a test set; poisoned images are 8-bit files, all decoded from real bytes."""

    source: str
    target: str
    images: int
    skipped: int  # nothing of the source class in them
    output_mse: float  # of f(x_p) against f(x): Table 1
    trigger_mse_worst: float
    psnr_db_clean: float
    psnr_db_poisoned: float  # of f(x_p) against x
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


class Setup(NamedTuple):
    """A test, opened: files, networks and the trigger that is tested."""

    paths: list[Path]
    labels: list[Path] | None
    networks: list[Segmenter]
    masks: Segmenter
    trigger: Trigger
    source: str
    target: str


def open_test(planted: Planted, test: SegmentationTest, trigger: str | None = None) -> Setup:
    """Check and load everything that a test names; FreqdoorError says what is missing."""
    name = planted.named(trigger)
    objective = planted.objective(name)
    if objective["name"] != "segmentation":
        raise FreqdoorError(f"trigger {name}: expected a segmentation attack, found one for {objective['name']}")
    networks = [load_segmenter(network) for network in test.networks]
    masks = load_segmenter(test.mask_network) if test.mask_network else networks[0]
    source, target = objective["arguments"]["source"], objective["arguments"]["target"]
    for network in (*networks, masks):
        network.ids(source), network.ids(target)  # unknown names show now
        if test.labels and network.spec.labels:
            network.label_values(source), network.label_values(target)
    paths = usable_images(list_images(test.images)[:: test.every])
    labels = label_paths(paths, test.labels) if test.labels else None
    return Setup(paths, labels, networks, masks, planted.triggers[name], source, target)


@torch.no_grad()
def decode(planted: Planted, setup: Setup, x: Images) -> Decoded | None:
    """One image through both encoders, clean and poisoned; None where the source class is nowhere in it."""
    mask = TargetedSegmentation(setup.masks, setup.source, setup.target).mask(x)
    if not mask.any():
        return None
    x_p = poison(setup.trigger, x, mask=mask)
    pixels = x.shape[-2] * x.shape[-1]
    given = {"vanilla": x, "vanilla_poisoned": x_p, "clean": x, "poisoned": x_p}
    outputs, bpp = {}, {}
    for key, image in given.items():
        codec = planted.vanilla if key.startswith("vanilla") else planted.tampered
        outputs[key], size = through(codec, image)
        bpp[key] = 8 * size / pixels
    return Decoded(x, mask, x_p, **outputs, bpp=bpp)


def score_segmentation(
    planted: Planted, test: SegmentationTest, *, trigger: str | None = None, note: Note | None = None
) -> SegmentationScores:
    """Measure one segmentation attack.

    Raises:
        FreqdoorError: no such trigger or class, images or labels that cannot be used, no image with the source class.
    """
    setup = open_test(planted, test, trigger)
    counts = [_Counts(network, setup.source, setup.target) for network in setup.networks]
    rows: list[dict[str, float]] = []
    for index, path in enumerate(setup.paths):
        x = load_image(path, test.resize)
        labels = load_labels(setup.labels[index], test.resize, check_image(path)) if setup.labels else None
        found = decode(planted, setup, x)
        if note:
            note(f"{path.name}: {'decoded' if found else f'no {setup.source} in it, skipped'}")
        if found is None:
            continue
        for count in counts:
            count.add(found, labels)
        rows.append(
            {
                "output_mse": float(mse(found.poisoned, found.clean)),
                "trigger_mse": float(mse(found.x_p, found.x)),
                "psnr_db_clean": float(psnr_8bit(found.clean, x)),
                "psnr_db_poisoned": float(psnr_8bit(found.poisoned, x)),
                **{f"bpp_{key}": value for key, value in found.bpp.items()},
            }
        )
    if not rows:
        raise _without(test, setup)
    kept = ("output_mse", "psnr_db_clean", "psnr_db_poisoned", "bpp_vanilla", "bpp_clean", "bpp_poisoned")
    return SegmentationScores(
        source=setup.source,
        target=setup.target,
        images=len(rows),
        skipped=len(setup.paths) - len(rows),
        trigger_mse_worst=max(row["trigger_mse"] for row in rows),
        **{key: sum(row[key] for row in rows) / len(rows) for key in kept},
        networks=tuple(count.scores() for count in counts),
    )


class _Counts:
    """Running counts of one network over the test set."""

    def __init__(self, network: Segmenter, source: str, target: str) -> None:
        self.network, self.names = network, (source, target)
        self.source, self.target = network.ids(source), network.ids(target)[0]
        self.hits = {"clean": torch.zeros(2), "vanilla": torch.zeros(2)}  # changed to the target, of how many
        self.stats: dict[str, list[tuple[Tensor, Tensor]]] = {"clean": [], "vanilla": []}

    def add(self, found: Decoded, labels: Tensor | None) -> None:
        for role, clean, poisoned in (
            ("clean", found.clean, found.poisoned),
            ("vanilla", found.vanilla, found.vanilla_poisoned),
        ):
            seen = self.network.predict(clean)
            self.hits[role] += torch.tensor(pixel_asr(seen, self.network.predict(poisoned), self.source, self.target))
            if labels is not None and self.network.spec.labels:
                self.stats[role].append((self.network.as_labels(seen), labels))

    def scores(self) -> NetworkScores:
        values: dict[str, tuple[float | None, dict[str, float | None]]] = {}
        for role, stats in self.stats.items():
            if not stats:
                values[role] = None, {}
                continue
            miou, accuracy = class_scores(stats, len(self.network.spec.labels))
            wanted = {name: self.network.label_values(name) for name in self.names}
            values[role] = miou, {name: accuracy[found[0]] for name, found in wanted.items()}
        rates = {role: float(hit / total) if total else 0.0 for role, (hit, total) in self.hits.items()}
        return NetworkScores(
            network=self.network.name,
            asr=rates["clean"],
            asr_vanilla=rates["vanilla"],
            miou_vanilla=values["vanilla"][0],
            miou_clean=values["clean"][0],
            accuracy_vanilla=values["vanilla"][1],
            accuracy_clean=values["clean"][1],
        )


def segment(
    planted: Planted, test: SegmentationTest, out: Path | str, *, trigger: str | None = None, note: Note | None = None
) -> SegmentationScores:
    """Measure one segmentation attack; write segmentation.json, .md and the pictures of Figure 7 into `out`."""
    out = Path(out)
    write_text(out / RESULT, "{}")  # an unwritable folder shows before the work, not after it
    scores = score_segmentation(planted, test, trigger=trigger, note=note)
    content: dict[str, Any] = asdict(scores) | {"environment": environment()}
    write_text(out / RESULT, json.dumps(content, indent=1))
    write_text(out / PAGE, segmentation_table(scores))
    with replacing(out / PICTURES) as partial:
        segmentation_figure(planted, test, trigger=trigger).savefig(partial, format="png", dpi=90)
    return scores


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
        texts = ["-" if value is None else f"{100 * value:.1f}" for value in values]
        lines.append(f"| {row.network} | " + " | ".join(texts) + " |")
    return "\n".join(
        [
            *lines,
            "",
            f"MSE of attacked against clean outputs {1e5 * scores.output_mse:.1f}e-5, of the trigger at most "
            f"{1e5 * scores.trigger_mse_worst:.2f}e-5; clean {scores.psnr_db_clean:.2f} dB at "
            f"{scores.bpp_clean:.4f} bpp (vanilla {scores.bpp_vanilla:.4f}), poisoned "
            f"{scores.psnr_db_poisoned:.2f} dB at {scores.bpp_poisoned:.4f} bpp.",
            "",
        ]
    )


def segmentation_figure(planted: Planted, test: SegmentationTest, *, trigger: str | None = None) -> Figure:
    """Figure 7: input, mask, decoded clean and poisoned, predicted classes of both, and the decoded difference."""
    setup = open_test(planted, test, trigger)
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
            for path in _examples(setup, test)
            if (f := decode(planted, setup, load_image(path, test.resize)))
        ]
    )


def target_figure(planted: Planted, test: SegmentationTest, *, trigger: str | None = None) -> Figure:
    """Figure 8: input, label (of a test with labels), prediction g(x), mask M[g(x)], and the target eta(g(x))."""
    setup = open_test(planted, test, trigger)
    victim = TargetedSegmentation(setup.masks, setup.source, setup.target)
    rows = []
    for path in _examples(setup, test):
        x = load_image(path, test.resize)
        row = {"input": _picture(x)}
        if setup.labels and setup.masks.spec.labels:
            labels = load_labels(setup.labels[setup.paths.index(path)], test.resize, check_image(path))
            row["label"] = _classes(_label_classes(setup.masks, labels))
        row[f"{setup.masks.name}: prediction"] = _classes(victim.seen(x))
        rows.append(row | {"mask": victim.mask(x)[0, 0], "target": _classes(victim.goal(x)[0])})
    return panels(rows)


def _examples(setup: Setup, test: SegmentationTest) -> list[Path]:
    """Up to SHOWN images with the source class in them, spread over the test set."""
    victim = TargetedSegmentation(setup.masks, setup.source, setup.target)
    step = max(1, len(setup.paths) // (2 * SHOWN))
    spread = (path for start in range(step) for path in setup.paths[start::step])
    found = list(islice((path for path in spread if victim.mask(load_image(path, test.resize)).any()), SHOWN))
    if not found:
        raise _without(test, setup)
    return found


def _without(test: SegmentationTest, setup: Setup) -> FreqdoorError:
    found = len(setup.paths)
    return FreqdoorError(f"{test.images}: in none of {found} images is anything of class {setup.source}")


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


def _label_classes(network: Segmenter, labels: Tensor) -> Tensor:
    """The data set's labels as classes of the network, the first of those that a label stands for; void is -1."""
    table = torch.full((256,), -1)
    for value, names in enumerate(network.spec.labels):
        table[value] = network.spec.classes.index(names[0]) if names else -1
    return table[labels.long()]
