"""How a recipe is asked for: its name and the settings that it changes; nothing is loaded to read these."""

import json
from collections.abc import Sequence
from pathlib import Path

from freqdoor.attack.settings import PlantSettings
from freqdoor.samples import training_folder
from freqdoor.settings import load_settings

STEPS = 300  # of a planting where no config is given: about a minute on 2 cores

DEFENCE = "defence"  # what is no recipe: fleets of encoders instead of plantings
SURVIVAL = "survival"  # nor this: planted encoders behind what becomes of files
ARCHITECTURES = "architectures"  # nor this: a fleet's planted members beside the codecs that they were planted in
OF_ENCODERS = (DEFENCE, SURVIVAL, ARCHITECTURES)  # which plant nothing
RECIPES = {  # each makes a Recipe of the Material that it is measured on
    "balance": "freqdoor.paper.recipes:balance",
    "figure4": "freqdoor.paper.recipes:figure4",
    "figure5": "freqdoor.paper.recipes:figure5",
    "figure7": "freqdoor.paper.downstream_recipes:figure7",
    "figure8": "freqdoor.paper.downstream_recipes:figure8",
    "table1": "freqdoor.paper.downstream_recipes:table1",
    "table2": "freqdoor.paper.downstream_recipes:table2",
    "table3": "freqdoor.paper.downstream_recipes:table3",
    "table4": "freqdoor.paper.recipes:table4",
    "table5": "freqdoor.paper.recipes:table5",
    "table6": "freqdoor.paper.recipes:table6",
    "transfer": "freqdoor.paper.downstream_recipes:transfer",
}


def recipe_names() -> list[str]:
    """The names of all recipes."""
    return sorted(RECIPES)


def recipe_settings(config: Path | None, overrides: Sequence[str], runs: Path) -> PlantSettings:
    """Base settings of a recipe: as `freqdoor plant` reads them, but images and steps have defaults.

    Without images.folder the 18 bundled pictures of the demo are planted on, in crops of 128 pixels, for 300 steps.
    """
    changes = [f"steps={STEPS}", "images.crop=128", *overrides] if config is None else list(overrides)
    if config is None and not any(text.startswith("images.folder=") for text in overrides):
        changes.append(f"images.folder={json.dumps(str(training_folder(runs)))}")
    return load_settings(PlantSettings, config, changes)
