"""`freqdoor poison`: images as the attacker hands them over, as files."""

from collections.abc import Sequence
from pathlib import Path

from freqdoor.attack.planted import Planted, opened
from freqdoor.codecs.adapter import Codec
from freqdoor.data import image_paths, load_image, save_image, usable_images
from freqdoor.errors import FreqdoorError
from freqdoor.files import check_outputs, refuse_overwriting
from freqdoor.measure.records import poisoned
from freqdoor.notes import Note, numbered


def poison(
    planted: Planted | Path | str,
    images: Path | str | Sequence[Path],
    out: Path | str,
    *,
    trigger: str | None = None,
    strength: float = 1.0,
    codec: Codec | str | None = None,
    weights: Path | str | None = None,
    skip_broken: bool = False,
    force: bool = False,
    note: Note | None = None,
) -> list[Path]:
    """Write every image poisoned, as an 8-bit PNG of the same name, into the folder `out`.

    Args:
        planted: a planted encoder, or its name as for `load_planted`; `codec` and `weights` too are as there.
        images: a folder, an image, or several of both.
        trigger: which one; by default the first.
        strength: factor on the trigger.
        force: overwrite files that are there and that `poison` did not make.

    Returns:
        The files written, in the images' order.

    Raises:
        FreqdoorError: an unknown trigger, images that cannot be used, that have one name, or a file in the way.
    """
    encoder, out = opened(planted, codec, weights), Path(out)
    chosen = encoder.triggers[encoder.named(trigger)]
    paths = usable_images(image_paths(images), decode=True, skip_broken=skip_broken)
    stems = [path.stem for path in paths]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise FreqdoorError(f"several images are named {', '.join(twice[:3])}; poison their folders one at a time")
    targets = [out / f"{stem}.png" for stem in stems]
    sources = {path.resolve() for path in paths}
    for target in targets:  # a link may lead to another image than the one of its name
        if target.resolve() in sources:
            refuse_overwriting(target, target)
    check_outputs(targets, "poison", force=force)
    told = numbered(note, len(targets))
    for path, target in zip(paths, targets, strict=True):
        save_image(target, poisoned(chosen, load_image(path), strength=strength), "poison")
        told(str(target))
    return targets
