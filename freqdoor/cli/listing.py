"""The verb of what can be named: list."""

from typing import Annotated, get_args

import typer

import freqdoor
from freqdoor.cli.options import load_torch, verb
from freqdoor.cli.terminal import say
from freqdoor.listing import Kind, Listing


@verb("list")
def names(
    kind: Annotated[Kind, typer.Argument(help="What to list.", autocompletion=lambda: list(get_args(Kind)))],
) -> Listing:
    """List what can be named of one kind, with a few words on each."""
    if kind == "checks":
        load_torch()
    listing = freqdoor.names(kind)
    width = max(map(len, listing.names))
    for name, about in listing.names.items():
        say(f"{name:{width}}  {about}")
    return listing
