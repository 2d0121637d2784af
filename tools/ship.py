"""Copy what a run made into the package, with a JSON beside it that says how it was made.

python tools/ship.py runs/lite-hyperprior-3/codec.safetensors lite-hyperprior-3
python tools/ship.py runs/planted-bpp/planted.safetensors planted-bpp
"""

import hashlib
import json
import sys
from pathlib import Path

from freqdoor.loading import ASSETS, read_tensors, write_tensors

VERBS = {"codec": "train-codec", "planted encoder": "plant"}


def main(source: Path, name: str) -> None:
    tensors, header = read_tensors(source)
    run = json.loads((source.parent / "environment.json").read_text())
    made = dict(header["training"] if header["kind"] == "codec" else header["planting"])
    seconds = made.pop("seconds")
    made["images"]["folder"] = Path(made["images"]["folder"]).name
    target = ASSETS / f"{name}.safetensors"
    write_tensors(target, tensors, header)
    sidecar = {
        "file": target.name,
        "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
        "bytes": target.stat().st_size,
        "kind": header["kind"],
        "tampered": header["tampered"],
        "command": f"freqdoor {VERBS[header['kind']]} configs/{name}.toml --out {source.parent.name} "
        "--set images.folder=FOLDER",
        "settings": made,
        "seconds": seconds,
        "data": "595 ImageNet pictures, short side 288 pixels (EliSchwartz/imagenet-sample-images); not shipped",
        "images": run["images"],
        "images_sha256": run["images_sha256"],
        "environment": {key: run[key] for key in ("versions", "python", "machine", "threads", "gpu", "commit")},
        "hardware": "2 cores of a shared AMD EPYC, no GPU",
    }
    target.with_suffix(".json").write_text(json.dumps(sidecar, indent=2) + "\n")
    print(target, sidecar["bytes"], "bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
