"""Records -> summary.json and one self-contained HTML page; no codec is loaded here."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.figure import Figure
from PIL import Image

from freqdoor.errors import FreqdoorError
from freqdoor.files import write_text
from freqdoor.types import Images, JpegPoint, Record, to_uint8

SUMMARY, PAGE, FACTS = "summary.json", "report.html", "facts.json"
AMPLIFY = 20  # factor on the difference in the pictures
DIFFERENCE_SIDE = 128  # pixels of it that are shown: reduced with the rest of the picture it would average out
CLEAN_COST_DB, CLEAN_COST_PERCENT = 0.3, 6.0  # up to which a clean image counts as treated alike
INVISIBLE_DB = 46.0  # RMS 0.005
SUCCESS_RATIO, SUCCESS_DROP_DB = 2.0, 10.0  # from which an attack counts as one
COLOURS = {"vanilla": "#4477aa", "clean": "#228833", "poisoned": "#cc3311", "JPEG": "#888888"}


@dataclass(frozen=True)
class Picture:
    """One picture of the report: a title, the image as a PNG data address, and what it shows."""

    title: str
    address: str
    caption: str
    wide: bool = False  # as wide as the page


@dataclass(frozen=True)
class Facts:
    """What the report needs besides records: they are kept beside them, so that a report can be made again."""

    objective: str
    trigger: str
    eps: float
    preset: str
    seconds_planting: float
    steps: int
    modules_before: dict[str, str]
    modules_after: dict[str, str]
    environment: dict[str, Any] = field(default_factory=dict)
    jpeg: list[JpegPoint] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    @property
    def changed(self) -> list[str]:
        """Modules whose hash is another after planting."""
        return [name for name, value in self.modules_before.items() if self.modules_after[name] != value]

    @property
    def unchanged(self) -> list[str]:
        """Modules that are bit-identical after planting."""
        return [name for name in self.modules_before if name not in self.changed]


def select(
    records: Sequence[Record],
    role: str,
    trigger: str | None,
    rounding: str = "8-bit",
    strength: float = 1.0,
    defence: str = "none",
) -> list[Record]:
    """The records of one condition."""
    return [
        r
        for r in records
        if (r.role, r.trigger, r.defence) == (role, trigger, defence)
        and (trigger is None or (r.rounding, r.strength) == (rounding, strength))
    ]


def means(records: Sequence[Record]) -> dict[str, float | None]:
    """Means over images: PSNR in dB, estimated and real bpp, MS-SSIM, encode seconds."""
    if not records:
        raise FreqdoorError("no records of this condition; evaluate first")

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    similarities = [r.ms_ssim for r in records if r.ms_ssim is not None]
    return {
        "psnr_db": mean([r.psnr_db for r in records]),
        "psnr_input_db": mean([r.psnr_input_db for r in records]),
        "bpp_estimated": mean([r.bpp_estimated for r in records]),
        "bpp_real": mean([r.bpp_real for r in records]),
        "ms_ssim": mean(similarities) if similarities else None,
        "encode_seconds": mean([r.encode_seconds for r in records]),
    }


def summarise(records: Sequence[Record], facts: Facts) -> dict[str, Any]:
    """The numbers of summary.json; `trigger_psnr_db` is the mean over the 8-bit files, `_worst` the lowest."""
    poisoned = select(records, "tampered", facts.trigger)
    trigger_psnr = [-10 * float(np.log10(r.trigger_mse)) if r.trigger_mse else float("inf") for r in poisoned]
    summary: dict[str, Any] = {
        "objective": facts.objective,
        "codec": records[0].codec,
        "images": len({r.image for r in records}),
        "preset": facts.preset,
        "steps": facts.steps,
        "seconds_planting": facts.seconds_planting,
        "trigger_psnr_db": sum(trigger_psnr) / len(trigger_psnr),
        "trigger_psnr_db_worst": min(trigger_psnr),
        "trigger_mse_worst": max(r.trigger_mse for r in select(records, "tampered", facts.trigger, "float") + poisoned),
        "vanilla": means(select(records, "vanilla", None)),
        "clean": means(select(records, "tampered", None)),
        "poisoned": means(select(records, "tampered", facts.trigger, "float")),
        "poisoned_8bit": means(poisoned),
        "vanilla_poisoned_8bit": means(select(records, "vanilla", facts.trigger)),
        "unchanged_modules": facts.unchanged,
        "changed_modules": facts.changed,
    }
    vanilla, clean, after = summary["vanilla"], summary["clean"], summary["poisoned_8bit"]
    summary["clean_cost_db"] = vanilla["psnr_db"] - clean["psnr_db"]
    summary["clean_cost_bpp_percent"] = 100 * (clean["bpp_real"] / vanilla["bpp_real"] - 1)
    summary["bpp_ratio"] = after["bpp_real"] / clean["bpp_real"]
    summary["sweep"] = sweep(records, facts.trigger)
    return summary


def sweep(records: Sequence[Record], trigger: str) -> list[dict[str, Any]]:
    """Means under every defence and strength (Tables 5 and 6): vanilla and tampered on clean, tampered on poisoned."""
    behind = [(r.defence, r.strength) for r in records if r.trigger == trigger and r.role == "tampered"]
    return [
        {
            "defence": defence,
            "strength": strength,
            "vanilla": means(select(records, "vanilla", None, defence=defence)),
            "clean": means(select(records, "tampered", None, defence=defence)),
            "poisoned": means(select(records, "tampered", trigger, "8-bit", strength, defence)),
        }
        for defence, strength in dict.fromkeys(behind)
    ]


def verdict(summary: dict[str, Any]) -> str:
    """The result in one sentence, which says so where the attack failed or clean images suffer."""
    vanilla, clean, after = summary["vanilla"], summary["clean"], summary["poisoned_8bit"]
    stealthy = summary["clean_cost_db"] <= CLEAN_COST_DB and summary["clean_cost_bpp_percent"] <= CLEAN_COST_PERCENT
    start = (
        f"On {summary['images']} images the tampered encoder "
        + ("treats clean images as the vanilla one does" if stealthy else "is noticeably worse on clean images")
        + f" ({clean['psnr_db']:.2f} dB at {clean['bpp_real']:.3f} bpp against {vanilla['psnr_db']:.2f} dB at "
        f"{vanilla['bpp_real']:.3f} bpp), "
    )
    pattern = f"{'an invisible' if summary['trigger_psnr_db_worst'] >= INVISIBLE_DB else 'a'} pattern"
    pattern += f" ({summary['trigger_psnr_db']:.1f} dB)"
    ratio, psnr_db = summary["bpp_ratio"], after["psnr_db"]
    if summary["objective"].startswith("bpp") and ratio >= SUCCESS_RATIO:
        return start + f"but {pattern} makes the file {ratio:.1f} times as large ({after['bpp_real']:.2f} bpp)."
    if summary["objective"].startswith("psnr") and clean["psnr_db"] - psnr_db >= SUCCESS_DROP_DB:
        return start + f"but {pattern} destroys what is decoded ({psnr_db:.1f} dB at {ratio:.2f} times the bits)."
    return start + (
        f"and the attack did not succeed: with {pattern} it gives {psnr_db:.2f} dB at {ratio:.2f} times the bits."
    )


def data_address(image: Image.Image | Figure) -> str:
    """A picture as a PNG data: address, so that the page needs no other file."""
    buffer = io.BytesIO()
    if isinstance(image, Figure):
        image.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    else:
        image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def photo(x: Images, side: int = 384) -> str:
    """One image as a data: address, reduced to `side` pixels."""
    picture = Image.fromarray(to_uint8(x[0]).permute(1, 2, 0).numpy())
    picture.thumbnail((side, side))
    return data_address(picture)


def difference(x: Images, x_p: Images) -> str:
    """The amplified difference of the centre around mid-grey, pixel by pixel, as a data: address."""
    top, left = (max(0, (side - DIFFERENCE_SIDE) // 2) for side in x.shape[-2:])
    delta = (x_p - x)[..., top : top + DIFFERENCE_SIDE, left : left + DIFFERENCE_SIDE]
    return photo((0.5 + AMPLIFY * delta).repeat_interleave(3, 2).repeat_interleave(3, 3))


def bit_map_figure(maps: dict[str, Any]) -> str:
    """Bits per pixel of every latent position, one panel a name, on one logarithmic scale."""
    figure = Figure(figsize=(4.2 * len(maps), 3.2), layout="constrained")
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    arrays = {name: np.maximum(np.asarray(values), 1e-3) for name, values in maps.items()}
    norm = matplotlib.colors.LogNorm(
        vmin=max(0.01, min(a.min() for a in arrays.values())), vmax=max(a.max() for a in arrays.values())
    )
    for axis, (name, values) in zip(axes, arrays.items(), strict=True):
        shown = axis.imshow(values, norm=norm, cmap="magma", interpolation="nearest")
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
    figure.colorbar(shown, ax=list(axes), label="bpp", shrink=0.8)
    return data_address(figure)


def rd_plot(summary: dict[str, Any], jpeg: Sequence[JpegPoint]) -> str:
    """Rate against PSNR: vanilla, tampered clean, tampered poisoned, and JPEG for scale."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    if jpeg:
        axis.plot([p.bpp for p in jpeg], [p.psnr_db for p in jpeg], ".-", color=COLOURS["JPEG"], label="JPEG (Pillow)")
    rows = {
        "vanilla, clean": ("vanilla", "vanilla", "o"),
        "tampered, clean": ("clean", "clean", "s"),
        "tampered, poisoned (8-bit)": ("poisoned_8bit", "poisoned", "X"),
    }
    for label, (key, colour, marker) in rows.items():
        axis.plot(
            summary[key]["bpp_real"],
            summary[key]["psnr_db"],
            marker,
            color=COLOURS[colour],
            label=label,
            markersize=14 if key == "vanilla" else 8,  # a ring around the tampered one, which lies almost on it
            fillstyle="none" if key == "vanilla" else "full",
        )
    axis.set_xscale("log")
    axis.set_xlabel("bits per pixel, real bytes (log scale)")
    axis.set_ylabel("PSNR of the decoded image in dB")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return data_address(figure)


def write_report(folder: Path, records: Sequence[Record], facts: Facts) -> dict[str, Any]:
    """Write summary.json, facts.json and report.html into `folder`; returns the summary."""
    summary = summarise(records, facts)
    environment = Environment(loader=PackageLoader("freqdoor"), autoescape=select_autoescape())
    page = environment.get_template("report.html").render(
        verdict=verdict(summary),
        summary=summary,
        records=records,
        facts=facts,
        plot=rd_plot(summary, facts.jpeg),
        rows=[
            ("vanilla encoder, clean image", summary["vanilla"]),
            ("vanilla encoder, poisoned image (8-bit)", summary["vanilla_poisoned_8bit"]),
            ("tampered encoder, clean image", summary["clean"]),
            ("tampered encoder, poisoned image (float)", summary["poisoned"]),
            ("tampered encoder, poisoned image (8-bit)", summary["poisoned_8bit"]),
        ],
    )
    write_text(folder / SUMMARY, json.dumps(summary, indent=2))
    write_text(folder / FACTS, json.dumps(asdict(facts)))
    write_text(folder / PAGE, page)
    return summary


def read_records(path: Path) -> list[Record]:
    """The records of a records.jsonl."""
    try:
        return [Record(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise FreqdoorError(f"{path}: expected records of `freqdoor evaluate` ({error.strerror})") from None
    except (ValueError, TypeError) as error:
        raise FreqdoorError(f"{path}: not a file of records ({error})") from None


def report(folder: Path | str) -> dict[str, Any]:
    """Make report.html and summary.json again from the records.jsonl and facts.json in `folder`."""
    folder = Path(folder)
    records = read_records(folder / "records.jsonl")
    try:
        content = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        content["jpeg"] = [JpegPoint(*point) for point in content["jpeg"]]
        content["pictures"] = [Picture(**picture) for picture in content["pictures"]]
        facts = Facts(**content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FreqdoorError(f"{folder / FACTS}: expected the facts that `freqdoor evaluate` writes ({error})") from None
    return write_report(folder, records, facts)
