import asyncio
import contextlib
import gc
import os
import signal
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs in two processes: more threads only wait

import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from freqdoor import load_codec
from freqdoor.attack.settings import PlantSettings
from freqdoor.errors import FreqdoorError
from freqdoor.measure.records import poisoned  # noqa: F401  (imports what the suite needs before time is measured)
from freqdoor.settings import make_settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background jobs ignore it; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def natural(seed: int, height: int, width: int) -> torch.Tensor:
    """A smooth random picture with edges, (1, 3, h, w): enough for a codec to have something to do."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    x = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    x = x + 0.1 * (torch.arange(width) // 7 % 2) + 0.02 * torch.randn(1, 3, height, width, generator=generator)
    return (x.clamp(0, 1) * 255).round() / 255


def write_png(path: Path, x: torch.Tensor) -> Path:
    Image.fromarray((x[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
    return path


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """A limit on the size of files, which fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def open_loops() -> Iterator[None]:
    """Gradio leaves event loops open; what is collected while the block ends complains where nobody listens."""
    gc.disable()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            asyncio.run(asyncio.sleep(0))  # afterwards none is the thread's own
            gc.collect()
        gc.enable()


def contents(folder: Path) -> dict[str, bytes]:
    """All files in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stopped_at_the_second(module: Any, monkeypatch: Any) -> list[str]:
    """The names of the images that `module.measured_image` is asked for from now on; Ctrl-C comes at the second."""
    real: Callable[..., Any] = module.measured_image
    asked: list[str] = []

    def stopped(planted: Any, path: Path, *arguments: Any, **options: Any) -> Any:
        asked.append(path.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(planted, path, *arguments, **options)

    monkeypatch.setattr(module, "measured_image", stopped)
    return asked


class Killed(Exception):
    """The end of a run, amid it."""


def kill_at(step: int) -> Callable[[int, dict[str, float]], None]:
    """The progress of a run that ends at a step, of which nothing is saved."""

    def progress(now: int, row: dict[str, float]) -> None:
        if now == step:
            raise Killed

    return progress


def check_foreign(write: Callable[..., Any], folder: Path, files: Iterable[str], monkeypatch: Any, work: str) -> None:
    """A verb refuses each of its files where another is, before the work; with `force` it comes to the work.

    Args:
        write: the verb, which is given `force` or nothing.
        work: what the verb works with, as monkeypatch takes it.
    """
    folder.mkdir(exist_ok=True)
    for name in files:
        (folder / name).write_text("mine")
        with monkeypatch.context() as patched:
            patched.setattr(work, None)
            with pytest.raises(FreqdoorError, match=rf"{re.escape(name)}: this file is there and .* did not make it"):
                write()
            with pytest.raises(TypeError, match="'NoneType' object is not callable"):
                write(force=True)
        assert contents(folder) == {name: b"mine"}
        (folder / name).unlink()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may make disks")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.cat([natural(0, 64, 64), natural(1, 64, 64)])


@pytest.fixture
def codec():
    return load_codec("factories:lite")


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(4):
        write_png(folder / f"{i}.png", natural(i, 96, 128))
    return folder


@pytest.fixture
def settings(images):
    def make(**changes) -> PlantSettings:
        content = {
            "codec": {"name": "factories:lite"},
            "images": {"folder": str(images), "crop": 64, "batch_size": 2},
            "lmbda": 0.0067,
            "steps": 6,
            "trigger": {"arguments": {"width": 8}},
            "checkpoint_minutes": 1e-6,
        }
        return make_settings(PlantSettings, content | changes)

    return make


@pytest.fixture
def odd_images(tmp_path) -> dict[str, Path]:
    """Files that cannot be used, by what is wrong with them."""
    rgb = (natural(0, 32, 32)[0] * 255).byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(rgb)
    made = {
        "grey": picture.convert("L"),
        "palette": picture.convert("P"),
        "16-bit": Image.fromarray(rgb[..., 0].astype(np.uint16) * 257),
        "alpha": picture.convert("RGBA"),
    }
    paths = {}
    for kind, image in made.items():
        paths[kind] = tmp_path / f"{kind}.png"
        image.save(paths[kind])
    paths["CMYK"] = tmp_path / "cmyk.jpg"
    picture.convert("CMYK").save(paths["CMYK"])
    paths["truncated"] = tmp_path / "truncated.png"
    whole = write_png(tmp_path / "whole.png", natural(3, 64, 64)).read_bytes()
    paths["truncated"].write_bytes(whole[: len(whole) // 2])
    paths["no image"] = tmp_path / "text.png"
    paths["no image"].write_text("not a picture")
    paths["huge"] = tmp_path / "huge.png"
    Image.new("RGB", (20_000, 1800)).save(paths["huge"])
    (tmp_path / "whole.png").unlink()
    return paths
