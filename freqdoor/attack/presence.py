"""Whether an attack's trigger will ever act: what it acts on may be nowhere in the auxiliary set."""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from freqdoor.attack.victims import Victim
from freqdoor.data import Crops, check_image, forked, load_image, load_labels
from freqdoor.errors import FreqdoorError
from freqdoor.types import Images

LOOKED_AT = 200  # pictures at most, where a network has to be asked about each


@torch.no_grad()
def check_presence(name: str, victim: Victim, crops: Crops, device: str) -> None:
    """Raise unless something that the trigger acts on is in the auxiliary set.

    Pictures are looked at until one has it, which mostly is the first. With labels these are all pictures, without at
    most LOOKED_AT, spread evenly.

    Args:
        name: of the attack.

    Raises:
        FreqdoorError: nothing of it in any picture; names what is there instead, and how much.
    """
    step = 1 if crops.labels else -(-len(crops.paths) // LOOKED_AT)
    indices = range(0, len(crops.paths), step)
    shares: Counter[str] = Counter()
    tiles = 0
    with forked(device):  # a victim may draw
        for index in indices:
            for x, labels in _tiles(crops, index):
                acts, shown = victim.look(x.to(device), None if labels is None else labels.to(device))
                if acts:
                    return
                shares.update(shown)
                tiles += 1
    instead = ", ".join(f"{shown} {total / tiles:.1%}" for shown, total in shares.most_common())
    raise FreqdoorError(
        f"attack {name}: its trigger would never act, {victim.acts_on} is in none of {len(indices)} auxiliary pictures"
        + (f" (there are {instead})" if instead else "")
        + "; name what is in them, or give other pictures as auxiliary.folder"
    )


def _tiles(crops: Crops, index: int) -> Iterator[tuple[Images, Tensor | None]]:
    """One picture in pieces of the size that training takes, which a network can be shown, with their labels."""
    path = crops.paths[index]
    try:
        x = load_image(path, crops.resize)
        labels = load_labels(crops.labels[index], crops.resize, check_image(path)) if crops.labels else None
    except FreqdoorError:
        if crops.skip_broken:
            return
        raise
    height, width = crops.size
    for top in _starts(x.shape[-2], height):
        for left in _starts(x.shape[-1], width):
            place = (..., slice(top, top + height), slice(left, left + width))
            yield x[place], None if labels is None else labels[place]


def _starts(whole: int, part: int) -> list[int]:
    """Where parts begin that cover the whole, the last one flush with its end."""
    return [*range(0, whole - part, part), whole - part]
