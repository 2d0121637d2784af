"""`freqdoor list`: what can be named of each kind, from the tables that the names are looked up in.

Nothing heavy is loaded to list names, because a shell asks for them at every press of Tab; only the checks of an audit
stand beside the networks that they run.
"""

import re
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from freqdoor.attack.settings import OBJECTIVES
from freqdoor.errors import FreqdoorError
from freqdoor.paper.settings import ARCHITECTURES, DEFENCE, OF_ENCODERS, SURVIVAL, recipe_names
from freqdoor.preprocessing import PREPROCESSINGS, PRESETS
from freqdoor.samples import BUNDLED, SHIPPED
from freqdoor.settings import Arguments
from freqdoor.triggers.arguments import TRIGGERS

Kind = Literal["codecs", "planted", "triggers", "objectives", "defences", "checks", "recipes"]
QUALITIES = range(1, 9)
CODECS = {  # ARCHITECTURES in a few words: these are read without PyTorch
    "lite-hyperprior": f"small hyperprior; {BUNDLED} comes with the package",
    "bmshj2018-factorized": "factorized prior, GDN (Ballé et al. 2018)",
    "bmshj2018-factorized-relu": "factorized prior, ReLU",
    "bmshj2018-hyperprior": "scale hyperprior (Ballé et al. 2018)",
    "mbt2018-mean": "mean and scale hyperprior (Minnen et al. 2018)",
    "mbt2018": "the same with an autoregressive context model",
    "cheng2020-anchor": "residual blocks and a context model (Cheng et al. 2020)",
    "cheng2020-attn": "the same with attention",
    "cheng2020-anchor-checkerboard": "the first with a checkerboard context model (He et al. 2021)",
    "elic2022-official": "groups of channels and a checkerboard context model (He et al. 2022)",
    "elic2022-chandelier": "the same as reimplemented by Chandelier (2023)",
}
BEYOND = {  # recipes that are no table or figure of the paper
    "balance": "ways to keep the clean codec while planting",
    "transfer": "attacks on networks behind the codec that were not trained against",
    ARCHITECTURES: "both attacks in every architecture that can be named",
    DEFENCE: "audit, guard and repair on fleets of encoders",
    SURVIVAL: "triggers in files that are passed on",
}


class Listing(BaseModel):
    """What there is of one kind: a name, and a few words on it."""

    model_config = ConfigDict(frozen=True)

    kind: Kind
    names: dict[str, str]


def names(kind: Kind) -> Listing:
    """What can be named: codecs, planted encoders, triggers, objectives, defences, checks of an audit, or recipes.

    Raises:
        FreqdoorError: another kind.
    """
    if kind == "codecs":
        found = {name: f"{about}; {name}:{QUALITIES[0]} to :{QUALITIES[-1]}" for name, about in CODECS.items()}
    elif kind == "planted":
        found = {name: "comes with the package" for name in SHIPPED}
    elif kind == "triggers":
        found = {name: _arguments(row.arguments) for name, row in TRIGGERS.items()}
    elif kind == "objectives":
        found = {name: _arguments(row.arguments) for name, row in OBJECTIVES.items()}
    elif kind == "defences":
        found = {name: row.form() for name, row in PREPROCESSINGS.items()}
        found |= {name: f"{len(several)} of these" for name, several in PRESETS.items()}
    elif kind == "checks":
        from freqdoor.defence.checks import CHECKS, FAST

        found = {name: "with --fast too" if name in FAST else "without --fast" for name in CHECKS}
    elif kind == "recipes":
        found = {name: BEYOND.get(name, "") or _of_the_paper(name) for name in [*recipe_names(), *OF_ENCODERS]}
    else:
        raise FreqdoorError(f"kind: expected {', '.join(get_args(Kind))}, found {kind!r}")
    return Listing(kind=kind, names=found)


def _of_the_paper(recipe: str) -> str:
    """What a recipe reproduces, by its name; nothing of a user's own."""
    found = re.fullmatch(r"(table|figure)(\d+)", recipe)
    return f"{found[1].capitalize()} {found[2]} of the paper" if found else ""


def _arguments(model: type[Arguments]) -> str:
    """The arguments that a model takes."""
    return ", ".join(model.model_fields)
