"""How different two pictures look to people: a learned measure, whose network's weights are a file that users have."""

import warnings
from pathlib import Path

import torch
from torch import nn

from freqdoor.codecs.loading import read_state
from freqdoor.errors import FreqdoorError
from freqdoor.files import name_and_file, sha256_of
from freqdoor.types import Images, from_uint8, to_uint8

LPIPS = "lpips"
TRUNK = "alexnet-owt-7be5be79.pth"  # as torchvision calls it, with the beginning of its SHA-256
ADDRESS = f"https://download.pytorch.org/models/{TRUNK}"
LPIPS_MIN_SIDE = 31  # pixels, from which all layers of AlexNet have an output
INSTALL = "install it with: pip install 'freqdoor[perceptual]'"


class Lpips:
    """LPIPS of two images (R. Zhang et al., CVPR 2018; version 0.1 on AlexNet): 0 for equal ones, the lower the nearer.

    The layers' weights are those of the package lpips; those of AlexNet are read from a file, of which nothing is run.

    Args:
        file: torchvision's AlexNet, a state dict; by default what PyTorch's hub has stored of it on this machine.
            Nothing is downloaded.

    Attributes:
        facts: what a report says of the measure and of the file.

    Raises:
        FreqdoorError: the package is not installed, no such file, or another network's.
    """

    def __init__(self, file: Path | None = None) -> None:
        path = file or Path(torch.hub.get_dir()) / "checkpoints" / TRUNK
        if not path.is_file():
            raise FreqdoorError(
                f"{LPIPS}: expected torchvision's weights of AlexNet at {path}, found nothing there; get them from "
                f"{ADDRESS}, or say where they are with {LPIPS}=FILE"
            )
        self._net = _network()
        _fill(self._net, path)
        digest = sha256_of(path)
        self.facts = f"LPIPS 0.1 on AlexNet, weights of SHA-256 {digest[:16]}"
        if not digest.startswith(TRUNK.removesuffix(".pth").rpartition("-")[2]):
            self.facts += f", which are not those of {TRUNK}: compare with no other figures"
            warnings.warn(f"{path}: {self.facts}", stacklevel=2)

    @torch.no_grad()
    def __call__(self, decoded: Images, reference: Images) -> float | None:
        """LPIPS of one image and another after rounding to 8 bits, or None where a side is below 31 pixels."""
        if min(reference.shape[-2:]) < LPIPS_MIN_SIDE:
            return None
        images = [from_uint8(to_uint8(image)) for image in (decoded, reference)]
        return float(self._net(*images, normalize=True))


def learned_measure(text: str) -> Lpips:
    """The measure that "lpips" or "lpips=FILE" names; FreqdoorError for another name, and as `Lpips`."""
    name, file = name_and_file(text)
    if name != LPIPS:
        raise FreqdoorError(f"perceptual: expected {LPIPS} or {LPIPS}=FILE, found {text!r}")
    return Lpips(Path(file) if file else None)


def _network() -> nn.Module:
    """LPIPS with random weights in AlexNet, which makes the package download none."""
    try:
        import lpips
    except ImportError:
        raise FreqdoorError(f"{LPIPS}: the package of this name is needed; {INSTALL}") from None
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # it asks torchvision in an old way
        net: nn.Module = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    return net


def _fill(net: nn.Module, path: Path) -> None:
    """Put the weights of a file into AlexNet's layers, whose names end with their number in torchvision's."""
    state = read_state(path)
    trunk = net.get_submodule("net")
    layers = {name.rpartition(".")[2]: part for name, part in trunk.named_modules() if isinstance(part, nn.Conv2d)}
    try:
        for number, layer in layers.items():
            layer.load_state_dict({key: state[f"features.{number}.{key}"] for key in ("weight", "bias")})
    except (KeyError, RuntimeError):
        raise FreqdoorError(
            f"{path}: expected torchvision's weights of AlexNet ({len(layers)} layers, features.0.weight and so on), "
            f"found a state dict of {', '.join(list(state)[:3]) or 'nothing'}"
        ) from None
