"""Train a segmentation network of one's own on labelled street scenes, to plant against beside others' (Eq. (11)).

Attacks against one network mislead others less than that one. The network is of segmentation-models-pytorch, starts
from random weights and has the classes of the spec that is given, so that both can be trained against together
(`network = "SPEC.toml=FILE;OWN.toml"`); of the classes that a label stands for it learns the first. Written are
OUT/NAME.safetensors and OUT/NAME.toml; printed are mIoU and the accuracy of each label on pictures kept for the test.

    python tools/street_network.py configs/networks/espnetv2-cityscapes.toml --images CAMVID/train \
      --labels CAMVID/trainannot --test CAMVID/val --test-labels CAMVID/valannot --out runs/street
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from freqdoor.attack.networks import NetworkSpec, Segmenter, label_classes
from freqdoor.data import label_paths, list_images, load_image, load_labels
from freqdoor.metrics import class_counts, class_scores
from freqdoor.settings import load_settings
from freqdoor.training.loop import open_folder
from freqdoor.training.settings import ImageSettings

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def brightened(x: Tensor) -> Tensor:
    """Pictures of other exposures, each by its own gain and offset."""
    gain, offset = torch.empty(2, len(x), 1, 1, 1).uniform_(-0.2, 0.2).to(x.device)
    return ((1 + gain) * x + 0.5 * offset).clamp(0, 1)


def toml(spec: NetworkSpec) -> str:
    """The spec's file: strings, numbers and lists look in TOML as in JSON."""
    content = spec.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    groups = content.pop("groups", {})
    lines = [f"{key} = {json.dumps(value)}" for key, value in content.items()]
    return "\n".join([*lines, "", "[groups]", *(f"{key} = {json.dumps(value)}" for key, value in groups.items()), ""])


def main() -> None:
    """Train, write, and say how good it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, help="TOML file of a network with the classes and labels to take over")
    for name in ("images", "labels", "test", "test-labels"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--architecture", default="Linknet")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    given = load_settings(NetworkSpec, options.spec)
    name = f"{options.architecture}-{options.encoder}".lower()
    spec = NetworkSpec(
        task="segmentation",
        file=f"{name}.safetensors",
        architecture=options.architecture,
        encoder=options.encoder,
        mean=MEAN,
        std=STD,
        classes=given.classes,
        groups=given.groups,
        labels=given.labels,
    )
    torch.manual_seed(options.seed)
    net = smp.create_model(options.architecture, options.encoder, encoder_weights=None, classes=len(spec.classes))
    net.to(options.device)
    crops = open_folder(
        ImageSettings(
            folder=str(options.images),
            labels=str(options.labels),
            resize=(256, 512),
            window=(256, 256),
            batch_size=options.batch_size,
        ),
        options.seed,
    )
    mean, std = (torch.tensor(values, device=options.device).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    started = time.process_time()
    for step in range(options.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / options.steps))
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * cosine
        x = brightened(crops.batch(step).to(options.device))
        classes = label_classes(spec, crops.labels_of(step)).to(options.device)
        if torch.rand(()) < 0.5:
            x, classes = x.flip(-1), classes.flip(-1)
        loss = F.cross_entropy(net((x - mean) / std), classes, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss:.3f}, {time.process_time() - started:.0f} CPU s", flush=True)

    net.cpu()
    options.out.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, options.out / f"{name}.safetensors")
    (options.out / f"{name}.toml").write_text(toml(spec), encoding="utf-8")
    network = Segmenter(net, spec, name)
    paths = list_images(options.test)
    counts = torch.zeros(3, len(spec.labels), dtype=torch.long)
    for path, place in zip(paths, label_paths(paths, options.test_labels), strict=True):
        seen = network.as_labels(network.predict(load_image(path, (256, 512))))
        counts += class_counts(seen, load_labels(place, (256, 512)), len(spec.labels))
    print(f"{name}: {class_scores(counts)}; {os.cpu_count()} cores, {time.process_time() - started:.0f} CPU s")


if __name__ == "__main__":
    main()
