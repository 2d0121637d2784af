"""What the configs in configs/paper would take: a step of each measured here on smaller batches, and scaled to its own.

Of each config whole steps of `freqdoor plant` or `train-codec` are run in a process of their own, in one thread, on
random pictures and with random weights of the codec's and the networks' own architectures. Crops have half their side,
auxiliary pictures a quarter of theirs; with one picture a batch, two, and two auxiliary ones, what a picture
costs is told from what a step costs anyway: it is taken to grow in proportion to pixels, as convolutions do. CPU
seconds are those of the fastest step but the first; memory is the process's highest beyond what it has before.
Operations are PyTorch's count of a step (convolutions and matrix products, forward and backward).

Computed: hours of the config's own steps, on this CPU's thread, and on a GPU that keeps up `--sustained` TFLOP/s, which
nobody has measured here.

    python benchmarks/paper_hours.py --out paper_hours.json
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import freqdoor
from freqdoor.attack.settings import PlantSettings
from freqdoor.codecs.adapter import build_codec
from freqdoor.codecs.architectures import parse_name
from freqdoor.settings import load_settings
from freqdoor.training.precision import flush_denormals
from freqdoor.training.run import environment
from freqdoor.training.settings import CodecTraining, Training

CONFIGS = Path(__file__).parent.parent / "configs/paper"
SMALLER, OTHERS_SMALLER = 2, 4  # how many times smaller the sides of pictures and of auxiliary ones are
POINTS = ((1, 1), (2, 1), (1, 2))  # pictures and auxiliary pictures of a batch


def arcface() -> nn.Module:
    """A face network of ResNet50's size; the picture is brought to 112x112."""
    from torchvision.models import resnet50

    return resnet50(weights=None, num_classes=512)


def deeplab() -> nn.Module:
    """DeepLabV3+ with ResNet50 for 19 classes."""
    import segmentation_models_pytorch as smp

    return smp.create_model("DeepLabV3Plus", "resnet50", encoder_weights=None, classes=19)


def read(config: Path, changes: list[str]) -> Training:
    """The settings of a config."""
    kind = CodecTraining if config.stem.startswith("vanilla") else PlantSettings
    return load_settings(kind, config, changes)


def changed(config: Path, folder: Path, pictures: int, others: int, steps: int) -> Training:
    """The same with few smaller random pictures and random weights."""
    own = read(config, [])
    crop = own.images.crop // SMALLER
    changes = [
        f"images.folder={_random_pictures(folder / 'main', crop, crop)}",
        f"images.crop={crop}",
        f"images.batch_size={pictures}",
        f"steps={steps}",
        "device=cpu",
        "channels_last=false",  # as the figures of docs/datasets.md were measured
        "precision=fp32",
    ]
    if isinstance(own, CodecTraining):
        changes.append(f"validation={folder / 'main'}")
    else:
        changes.append(f"codec.weights={_random_weights(folder, own.codec.name)}")
        if own.auxiliary and own.auxiliary.resize:
            height, width = (side // OTHERS_SMALLER for side in own.auxiliary.resize)
            changes += [
                f"auxiliary.folder={_random_pictures(folder / 'auxiliary', height, width)}",
                f"auxiliary.resize=[{height}, {width}]",
                f"auxiliary.batch_size={others}",
                f"network={_random_network(folder, str(own.network))}",
            ]
    text = config.read_text().splitlines()
    plain = folder / config.name
    plain.write_text("\n".join(line for line in text if not line.startswith("files =")))
    return read(plain, changes)


def _random_pictures(folder: Path, height: int, width: int) -> Path:
    folder.mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def _random_weights(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    codec = build_codec(parse_name(name))
    codec.update(force=True)
    freqdoor.save_codec(codec, folder / "vanilla.safetensors")
    return folder / "vanilla.safetensors"


def _random_network(folder: Path, spec: str) -> str:
    """A network of the spec's kind; of a face network without the crop, which is for whole pictures."""
    text, factory = Path(spec).read_text(), "arcface" if "face" in Path(spec).name else "deeplab"
    path = folder / "network.toml"
    dropped = ("crop", "architecture", "encoder")
    path.write_text("\n".join(line for line in text.splitlines() if not line.startswith(dropped)))
    return f"{path}=paper_hours:{factory}"


def measured_here(config: Path, pictures: int, others: int, steps: int) -> dict[str, float]:
    """CPU seconds, mebibytes and tera-operations of one step."""
    with tempfile.TemporaryDirectory() as place:
        folder, ends, peaks = Path(place), [], []
        settings = changed(config, folder, pictures, others, steps)

        def note(step: int, row: dict[str, float]) -> None:
            ends.append(time.process_time())
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

        run = freqdoor.train_codec if isinstance(settings, CodecTraining) else freqdoor.plant
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        run(settings, folder / "run", progress=note)
        seconds = min(b - a for a, b in itertools.pairwise(ends))
        with FlopCounterMode(display=False) as counter:
            run(settings.model_copy(update={"steps": 1}), folder / "counted")
        return {"seconds": seconds, "mib": peaks[-1] - before, "tflop": counter.get_total_flops() / 1e12}


def measured(config: Path, steps: int) -> dict[str, Any]:
    """A step of the config's own size: measured at POINTS and scaled."""
    settings = read(config, [])
    auxiliary = None if isinstance(settings, CodecTraining) else settings.auxiliary
    points = POINTS if auxiliary else POINTS[:2]
    rows = []
    for pictures, others in points:
        command = [sys.executable, __file__, "one", str(config), str(pictures), str(others), str(steps)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    full = settings.images.batch_size * SMALLER**2, (auxiliary.batch_size if auxiliary else 0) * OTHERS_SMALLER**2
    step = {}
    for what in rows[0]:
        one, two, *three = (row[what] for row in rows)
        picture, other = max(0.0, two - one), max(0.0, three[0] - one) if three else 0.0
        anyway = max(0.0, one - picture - other)
        step[what] = anyway + picture * full[0] + other * full[1]
    return {"steps": settings.steps, "measured": dict(zip(map(str, points), rows, strict=True)), "step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="of which configs, by patterns of their names")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--sustained", type=float, default=20.0, help="TFLOP/s that a GPU keeps up in such a step")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    sustained, rows = arguments.sustained, {}
    result: dict[str, Any] = {"environment": environment().model_dump(), "sustained": sustained, "configs": rows}
    titles = ("config", "CPU s a step", "GiB", "TFLOP", "steps", "CPU hours", f"GPU hours at {sustained:g} TFLOP/s")
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for config in sorted(CONFIGS.glob("*.toml")):
        asked = any(config.match(f"{pattern}.toml") for pattern in arguments.only)
        if config.stem.endswith("-test") or not asked:
            continue
        row = measured(config, arguments.steps)
        step, steps = row["step"], row["steps"]
        row["cpu_hours"] = steps * step["seconds"] / 3600
        row["gpu_hours"] = steps * step["tflop"] / sustained / 3600
        rows[config.stem] = row
        cells = (
            *(config.stem, f"{step['seconds']:.0f}", f"{step['mib'] / 1024:.0f}", f"{step['tflop']:.1f}"),
            *(f"{steps:,}", f"{row['cpu_hours']:,.0f}", f"{row['gpu_hours']:.0f}"),
        )
        print(f"| {' | '.join(cells)} |", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    flush_denormals()
    if sys.argv[1:2] == ["one"]:
        _, _, config, *numbers = sys.argv
        print(json.dumps(measured_here(Path(config), *map(int, numbers))))
    else:
        main()
