"""From a planted encoder and images to a finished folder: records, pictures, report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from freqdoor.attack.planted import Planted
from freqdoor.data import load_image, usable_images
from freqdoor.measure.records import Condition, Note, bit_map, encoded, evaluate, jpeg_curve, measure, write_records
from freqdoor.measure.report import AMPLIFY, Facts, Picture, bit_map_figure, difference, photo, write_report
from freqdoor.metrics import psnr
from freqdoor.preprocessing import Preprocessing
from freqdoor.training.run import environment

RECORDS = "records.jsonl"


def examine(
    planted: Planted,
    images: Sequence[Path],
    out: Path | str,
    *,
    trigger: str | None = None,
    strengths: Sequence[float] = (1.0,),
    defences: Sequence[Preprocessing] = (),
    skip_broken: bool = False,
    note: Note | None = None,
) -> dict[str, Any]:
    """Evaluate on images and write records.jsonl, facts.json, summary.json and report.html into `out`.

    Args:
        trigger: which trigger the report is about; by default the first.
        strengths: factors on the trigger.
        defences: preprocessings between the image and the encoder.

    Returns:
        The content of summary.json.
    """
    out = Path(out)
    usable = usable_images(images, decode=True, skip_broken=skip_broken)
    name = planted.named(trigger)
    wanted = sorted({1.0, *strengths})
    write_records(out / RECORDS, [])  # an unwritable folder shows before the work, not after it
    records = list(evaluate(planted, usable, strengths=wanted, defences=defences, note=note))
    planting = planted.header["planting"]
    attack = next(a for a in planted.header["attacks"] if a["name"] == name)
    facts = Facts(
        objective=attack["objective"]["name"],
        trigger=name,
        eps=attack["arguments"]["eps"],
        preset=attack["preset"],
        seconds_planting=planting["seconds"],
        steps=planting["steps"],
        modules_before=planted.vanilla.module_hashes(),
        modules_after=planted.tampered.module_hashes(),
        environment=environment(),
        jpeg=jpeg_curve(usable),
        pictures=pictures(planted, usable[0], name),
    )
    write_records(out / RECORDS, records)
    return write_report(out, records, facts)


@torch.no_grad()
def pictures(planted: Planted, path: Path, trigger: str) -> list[Picture]:
    """Input, poisoned, amplified difference, what each encoder's file decodes to, and where the bits go."""
    x = load_image(path)
    conditions = {
        "tampered encoder, clean": Condition("tampered", None),
        "tampered encoder, poisoned": Condition("tampered", trigger),
        "vanilla encoder, poisoned": Condition("vanilla", trigger),
    }
    x_p = encoded(planted, x, conditions["tampered encoder, poisoned"])
    shown = [
        Picture("input", photo(x), path.name),
        Picture("poisoned input", photo(x_p), f"8-bit file, {float(psnr(x_p, x)):.2f} dB from the input"),
        Picture("difference", difference(x, x_p), f"centre, amplified {AMPLIFY} times around mid-grey"),
    ]
    maps = {}
    for title, condition in conditions.items():
        codec = planted.tampered if condition.role == "tampered" else planted.vanilla
        given = encoded(planted, x, condition)
        record, x_hat = measure(codec, x, given, path.name, condition)
        caption = f"{record.psnr_db:.2f} dB, {record.bpp_real:.3f} bpp in real bytes"
        shown.append(Picture(f"decoded: {title}", photo(x_hat), caption))
        maps[title] = bit_map(codec, given).numpy()
    shown.append(
        Picture("where the bits go", bit_map_figure(maps), "estimated, per latent position; log scale", wide=True)
    )
    return shown
