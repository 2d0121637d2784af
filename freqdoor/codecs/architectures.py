"""The codecs that are known by name, one row each, and what a name stands for."""

import copy
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from compressai.models import (
    Cheng2020Anchor,
    Cheng2020AnchorCheckerboard,
    Cheng2020Attention,
    Elic2022Chandelier,
    Elic2022Official,
    FactorizedPrior,
    FactorizedPriorReLU,
    JointAutoregressiveHierarchicalPriors,
    MeanScaleHyperprior,
    ScaleHyperprior,
)
from compressai.zoo.image import cfgs as COMPRESSAI_ARGUMENTS
from torch import Tensor, nn

from freqdoor.codecs.lite import LiteHyperprior
from freqdoor.codecs.protocol import complaint, surroundings
from freqdoor.errors import FreqdoorError

LAMBDAS = {1: 0.0018, 2: 0.0035, 3: 0.0067, 4: 0.0130, 5: 0.0250, 6: 0.0483, 7: 0.0932, 8: 0.1800}
MAX_GROUPS = 16  # channel groups of an ELIC, which has 5
VARIABLE_RATE = (
    "a variable-rate network holds eight qualities, of which it codes one unless it is told otherwise; give a factory "
    "that returns it, as package.module:factory, and it is used at that one"
)

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network that is known by name: how it is built, and how its arguments are read from its weights."""

    network: type[nn.Module]
    arguments: Callable[[State], dict[str, Any]]
    """The constructor's arguments, from the shapes of a state dict; KeyError where it is another network's."""
    widths: tuple[str, ...] = ()
    """The arguments in CompressAI's table of widths by quality, in its order; none: it has no row there."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """The arguments at every quality where CompressAI publishes no widths: those of its constructor, written out so
    that a file's header says all of them."""


def _first_and_last(first: str, last: str | None = None) -> Callable[[State], dict[str, Any]]:
    """N, and M where there is one, as the number of outputs of two layers."""

    def arguments(state: State) -> dict[str, Any]:
        return {key: state[layer].shape[0] for key, layer in (("N", first), ("M", last)) if layer}

    return arguments


def _lite(state: State) -> dict[str, Any]:
    """N, M, widths and depth of the bundled architecture: `depth` residual blocks stand behind two convolutions."""
    depth = sum(re.fullmatch(r"g_a\.\d+\.branch\.0\.weight", key) is not None for key in state) // 2
    latents, wide = state["h_a.0.weight"].shape[:2], state["g_a.0.weight"].shape[0]
    middle = state[f"g_a.{depth + 1}.weight"].shape[0]
    return {"N": latents[0], "M": latents[1], "width": [wide, middle], "depth": depth}


def _elic(state: State) -> dict[str, Any]:
    """N, M and the channel groups of an ELIC, which CompressAI's own from_state_dict takes to be the default ones."""
    layers = (f"latent_codec.y.latent_codec.y{k}.context_prediction.weight" for k in range(MAX_GROUPS + 1))
    groups = [state[layer].shape[1] for layer in layers if layer in state]
    return {"N": state["g_a.0.weight"].shape[0], "M": sum(groups), "groups": groups}


_google = _first_and_last("g_a.0.weight", "g_a.6.weight")
_cheng = _first_and_last("g_a.0.conv1.weight")
_NM = ("N", "M")
_ELIC = {"N": 192, "M": 320, "groups": [16, 16, 32, 64, 192]}
ARCHITECTURES: dict[str, Architecture] = {
    "lite-hyperprior": Architecture(network=LiteHyperprior, arguments=_lite),
    "bmshj2018-factorized": Architecture(network=FactorizedPrior, arguments=_google, widths=_NM),
    "bmshj2018-factorized-relu": Architecture(network=FactorizedPriorReLU, arguments=_google, widths=_NM),
    "bmshj2018-hyperprior": Architecture(network=ScaleHyperprior, arguments=_google, widths=_NM),
    "mbt2018-mean": Architecture(network=MeanScaleHyperprior, arguments=_google, widths=_NM),
    "mbt2018": Architecture(network=JointAutoregressiveHierarchicalPriors, arguments=_google, widths=_NM),
    "cheng2020-anchor": Architecture(network=Cheng2020Anchor, arguments=_cheng, widths=("N",)),
    "cheng2020-attn": Architecture(network=Cheng2020Attention, arguments=_cheng, widths=("N",)),
    "cheng2020-anchor-checkerboard": Architecture(
        network=Cheng2020AnchorCheckerboard, arguments=_cheng, defaults={"N": 192}
    ),
    "elic2022-official": Architecture(network=Elic2022Official, arguments=_elic, defaults=_ELIC),
    "elic2022-chandelier": Architecture(network=Elic2022Chandelier, arguments=_elic, defaults=_ELIC),
}


@dataclass(frozen=True, kw_only=True)
class CodecSpec:
    """What is needed to rebuild a codec's network: it travels in the metadata of every file we write."""

    name: str  # as given by the user, for example "bmshj2018-hyperprior:3"
    architecture: str  # a key of ARCHITECTURES, or "package.module:factory"
    quality: int | None = None  # 1 to 8, index of LAMBDAS
    arguments: dict[str, Any] = field(default_factory=dict)  # of the architecture's constructor

    @property
    def lmbda(self) -> float | None:
        """Lambda of R + lambda D with D = 255^2 MSE."""
        return LAMBDAS[self.quality] if self.quality else None


def parse_name(name: str) -> CodecSpec:
    """The spec that a name like "cheng2020-anchor:3" or "package.module:factory" stands for.

    Widths are those of CompressAI's zoo at this quality, or the constructor's defaults where the zoo has none.
    """
    architecture, _, rest = name.partition(":")
    if architecture in ARCHITECTURES:
        if not (rest.isdigit() and int(rest) in LAMBDAS):
            raise FreqdoorError(f"{name}: expected a quality from 1 to 8 after {architecture}, as in {architecture}:3")
        quality, row = int(rest), ARCHITECTURES[architecture]
        arguments = copy.deepcopy(row.defaults)
        if row.widths:
            by_quality = COMPRESSAI_ARGUMENTS[architecture]
            arguments = dict(zip(row.widths, by_quality[min(quality, max(by_quality))], strict=True))
        return CodecSpec(name=name, architecture=architecture, quality=quality, arguments=arguments)
    if architecture.endswith("-vbr"):
        raise FreqdoorError(f"{name}: {VARIABLE_RATE}")
    if rest and architecture.replace(".", "").isidentifier() and rest.isidentifier():
        return CodecSpec(name=name, architecture=name)
    raise FreqdoorError(
        f"{name}: expected a codec as name:quality ({', '.join(ARCHITECTURES)}), a checkpoint file, "
        "or package.module:factory"
    )


def import_object(name: str) -> Any:
    """What "package.module:name" stands for: the caller's own code, never a name that a file contains."""
    module, _, attribute = name.partition(":")
    try:
        with surroundings(name):
            return getattr(importlib.import_module(module), attribute)
    except (FreqdoorError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a module runs its own code while it is imported, and may end the program
        expected = "package.module:name, and a module in this folder needs PYTHONPATH=."
        raise complaint(f"{name}: could not import this", error, None, expected) from error
