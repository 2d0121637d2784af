"""Copy what a run made into the package, with a JSON beside it that says how it was made.

python tools/ship.py runs/lite-hyperprior-3/codec.safetensors lite-hyperprior-3
python tools/ship.py runs/planted-bpp/planted.safetensors planted-bpp
python tools/ship.py runs/faces/planted.safetensors planted-face --config faces --hardware TEXT
python tools/ship.py --again planted-face      write what is shipped once more, as this version writes files
"""

import argparse
import hashlib
import json
from pathlib import Path

from freqdoor.codecs.loading import read_tensors, write_tensors
from freqdoor.samples import ASSETS
from freqdoor.training.run import Environment, RunFacts

IMAGENET = "595 ImageNet pictures, short side 288 pixels (EliSchwartz/imagenet-sample-images); not shipped"
FACES = "; auxiliary: 930 pictures of 62 persons of Labeled Faces in the Wild (research use); not shipped"
AUXILIARY = " --set auxiliary.folder=FACES --set auxiliary.files=LIST --set objective.arguments.network=SPEC.toml=FILE"
VERBS = {"codec": "train-codec", "planted encoder": "plant"}
FOLDERS = {"codec": "train", "planted encoder": "plant"}  # of the configs


def main(source: Path, name: str, config: str, hardware: str) -> None:
    tensors, header = read_tensors(source)
    run = RunFacts.read(source.parent / "environment.json", "what a run writes beside its files")
    made = dict(header["training"] if header["kind"] == "codec" else header["planting"])
    seconds = made.pop("seconds")
    target = ASSETS / f"{name}.safetensors"
    write_tensors(target, tensors, header)
    sidecar = {
        "file": target.name,
        **facts_of(target),
        "kind": header["kind"],
        "tampered": header["tampered"],
        "command": f"freqdoor {VERBS[header['kind']]} configs/{FOLDERS[header['kind']]}/{config}.toml "
        f"--out {source.parent.name} "
        "--set images.folder=FOLDER" + (AUXILIARY if made.get("auxiliary") else ""),
        "settings": made,
        "seconds": seconds,
        "data": IMAGENET + (FACES if made.get("auxiliary") else ""),
        "images": run.images,
        "images_sha256": run.images_sha256,
        "environment": run.model_dump(include=set(Environment.model_fields)),
        "hardware": hardware,
    }
    target.with_suffix(".json").write_text(json.dumps(sidecar, indent=2) + "\n")
    print(target, sidecar["bytes"], "bytes")


def facts_of(target: Path) -> dict[str, str | int]:
    return {"sha256": hashlib.sha256(target.read_bytes()).hexdigest(), "bytes": target.stat().st_size}


def write_again(name: str) -> None:
    target = ASSETS / f"{name}.safetensors"
    tensors, header = read_tensors(target)
    write_tensors(target, tensors, header)
    sidecar = json.loads(target.with_suffix(".json").read_text())
    target.with_suffix(".json").write_text(json.dumps(sidecar | facts_of(target), indent=2) + "\n")
    print(target, target.stat().st_size, "bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("name")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--config", help="file in configs/ that it was made with; by default the name's")
    parser.add_argument("--hardware", default="2 cores of a shared AMD EPYC, no GPU")
    given = parser.parse_args()
    if given.again:
        write_again(given.name)
    else:
        main(given.source, given.name, given.config or given.name, given.hardware)
