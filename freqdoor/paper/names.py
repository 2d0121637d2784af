"""The names of all recipes, where they stand once; nothing is loaded to list them."""

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
