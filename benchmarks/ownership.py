"""Who passes for the owner: every key of a fleet asked of every encoder of it, and what thieves make of the owner's.

Keys are the triggers of a fleet's members with a BPP attack that is caught, each with weights of its own. Asked are
  strangers  all other members of the same codec, honest ones and tampered ones: those with triggers of the same kind
             live in the same frequencies, and are the hardest
  thieves    of every key's own encoder: copies with noise, with 30 % of the weights pruned, with weights of 8 bits, and
             trained on by a thief for 500 steps (the encoder alone; the whole codec for every fourth)
  claims     a pattern that was searched in the stolen encoder is called a key, which only a deposited hash refutes

    python benchmarks/ownership.py --fleets fleets/bundled fleets/adaptive --photos FOLDER --out ownership

Asked on 14 bundled pictures, crops of 256 pixels from their centres. What is in OUT/answers.json is not asked again.
"""

import argparse
import copy
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from freqdoor.attack.planted import Planted, load_planted
from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.loading import load_codec
from freqdoor.data import centre, load_image, save_image
from freqdoor.defence.fleet import MANIFEST, Manifest, MemberFacts, alter, load_member
from freqdoor.defence.inversion import inverted
from freqdoor.defence.settings import Alteration
from freqdoor.errors import FreqdoorError
from freqdoor.files import write_text
from freqdoor.measure.watermark import Answer, false_positives, verify_owner
from freqdoor.samples import BUNDLED, KODAK
from freqdoor.training.settings import CodecTraining
from freqdoor.training.train import train_codec
from freqdoor.triggers.ftrojan import FTrojan
from freqdoor.triggers.pattern import Pattern

ALTERATIONS = {
    "3 % noise": Alteration(kind="noise", amount=0.03),
    "10 % noise": Alteration(kind="noise", amount=0.1),
    "30 % pruned": Alteration(kind="prune", amount=0.3),
    "8-bit weights": Alteration(kind="quantise", amount=8),
}
CAUGHT = 2.0  # times the clean bits, from which a fleet's trigger is a key
PICTURES = 14  # 13 of which have to answer
EVERY = 4  # of the keys, whose thief trains the whole codec too


class Answers:
    """What was asked so far, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def of(self, name: str, ask: Callable[[], list[Answer]]) -> list[Answer]:
        """The answers of this name, asked if they are not there."""
        if name not in self.known:
            self.known[name] = [answer.model_dump() for answer in ask()]
            write_text(self.path, json.dumps(self.known, indent=1))
        return [Answer.model_validate(content) for content in self.known[name]]


def members_of(fleets: list[Path]) -> dict[str, tuple[Path, MemberFacts]]:
    """All members of the bundled architecture by name, with their folders."""
    found = {}
    for fleet in fleets:
        for facts in Manifest.read(fleet / MANIFEST, "a fleet's manifest").members:
            if facts.architecture == BUNDLED.partition(":")[0]:
                found[facts.name] = fleet / facts.name, facts
    return found


def key_of(facts: MemberFacts) -> str | None:
    """The member's BPP trigger, where it has one that acts."""
    ratios = {name: answer.bpp / facts.clean.bpp for name, answer in facts.poisoned.items()}
    caught = [name for name, ratio in ratios.items() if ratio >= CAUGHT]
    return caught[0] if caught else None


def stolen(owner: Codec, alteration: Alteration) -> Codec:
    """A copy whose encoder was altered."""
    changed = copy.deepcopy(owner)
    alter(changed, alteration, 0)
    return changed


def trained_on(codec: Path, scope: str, photos: Path, out: Path, steps: int = 500, lr: float = 3e-4) -> Codec:
    """A copy that a thief has trained on."""
    images = {"folder": str(photos), "crop": 128, "batch_size": 8, "skip_broken": True}
    settings = CodecTraining.model_validate(
        {"codec": BUNDLED, "start_from": str(codec), "scope": scope, "steps": steps, "lr": lr, "schedule": "constant"}
        | {"seed": 7, "images": images}
    )
    return train_codec(settings, out)


def claim(owner: Planted, pictures: Path) -> list[Answer]:
    """What the same encoder answers to a pattern that was searched in it; nothing where it does not answer."""
    x = torch.cat([centre(load_image(path), 256) for path in sorted(KODAK.glob("*.png"))[-4:]])
    pattern = inverted(owner.tampered, x, "rate", lambda: Pattern(multiple=owner.tampered.multiple))
    thief = Planted(owner.vanilla, owner.tampered, {"claimed": pattern}, owner.header)
    try:
        return verify_owner(thief, [owner.tampered], pictures)
    except FreqdoorError:
        return []


def thefts(folder: Path, owner: Planted, out: Path, photos: Path, *, whole: bool) -> dict[str, Callable[[], Codec]]:
    """What thieves make of an encoder, by what they do to it."""
    made: dict[str, Callable[[], Codec]] = {
        what: partial(stolen, owner.tampered, alteration) for what, alteration in ALTERATIONS.items()
    }
    weights = folder / "codec.safetensors"
    made["encoder trained on"] = partial(trained_on, weights, "g_a", photos, out / f"{folder.name}-g_a")
    if whole:
        made["whole codec trained on"] = partial(trained_on, weights, "all", photos, out / f"{folder.name}-all")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleets", type=Path, nargs="+", required=True)
    parser.add_argument("--photos", type=Path, required=True, help="that thieves train on")
    parser.add_argument("--keys", type=int, help="so many of the fleets' keys, by default all")
    parser.add_argument("--out", type=Path, default=Path("ownership"))
    options = parser.parse_args()
    pictures = options.out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for path in sorted(KODAK.glob("*.png"))[:PICTURES]:
        if not (pictures / path.name).exists():
            save_image(pictures / path.name, centre(load_image(path), 256))
    answers, members = Answers(options.out / "answers.json"), members_of(options.fleets)
    encoder = cache(lambda name: load_member(*members[name]))
    asked: dict[str, list[Answer]] = {}
    keys: list[str] = []
    for name, (folder, facts) in members.items():
        trigger = key_of(facts)
        if trigger is None or len(keys) == options.keys:
            continue
        base = str(folder.parent / facts.base / "codec.safetensors") if facts.base else BUNDLED
        owner = load_planted(folder, load_codec(base))
        if isinstance(owner.triggers[trigger], FTrojan):
            continue  # which has no weights to keep secret
        keys.append(name)
        verify = partial(verify_owner, owner, images=pictures, trigger=trigger)
        for kind, tampered in (("honest strangers", False), ("tampered strangers", True)):
            others = [other for other, (_, m) in members.items() if other != name and m.tampered == tampered]
            rows = answers.of(f"{name}: {kind}", lambda v=verify, o=others: v([encoder(other) for other in o]))
            asked.setdefault(kind, []).extend(rows)
        for what, make in thefts(folder, owner, options.out, options.photos, whole=len(keys) % EVERY == 0).items():
            rows = answers.of(f"{name}: {what}", lambda v=verify, m=make: v([m()]))
            asked.setdefault(f"the owner's, {what}", []).extend(rows)
        rows = answers.of(f"{name}: claim", partial(claim, owner, pictures))
        asked.setdefault("a pattern that a thief has found, for a key", []).extend(rows)
        print(f"{name}: {len(keys)} keys asked", flush=True)
    print(f"\n{len(keys)} keys: {', '.join(keys)}\n\n| asked | pass for the owner's |\n|---|---|")
    for what, rows in asked.items():
        print(f"| {what} | {sum(answer.owner for answer in rows)} of {len(rows)} |")
    passed, count, upper = false_positives(asked["honest strangers"] + asked["tampered strangers"])
    print(f"\nStrangers: {passed} of {count} pass, at most {100 * upper:.2f} % (exact 95 % interval)")


if __name__ == "__main__":
    main()
