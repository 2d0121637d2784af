"""Who passes for the owner: every key of a fleet asked of every encoder of it, and what thieves make of the owner's.

Keys are the triggers of a fleet's members with a BPP attack that is caught, each with weights of its own. Asked are
  strangers  all other members of the same codec, honest ones and tampered ones: those with triggers of the same kind
             live in the same frequencies, and are the hardest
  thieves    of every key's own encoder: copies with noise, with 30 % of the weights pruned, with weights of 8 bits, and
             trained on by a thief for 500 steps, as it is and with its channels in another order and of other sizes;
             of some, with other learning rates, for 2,000 steps, the whole codec, and a trigger of the thief's own
             planted over the owner's
  claims     of a thief, who asks the owner's encoder with a pattern that he searched in it for a key, and with what he
             planted over it for the owner's encoder; only a deposited hash refutes these. And what he can make of
             honest encoders where he may choose the vanilla codec

    python benchmarks/ownership.py --fleets fleets/bundled fleets/adaptive --photos FOLDER --out ownership

Asked on 14 bundled pictures, crops of 256 pixels from their centres. What is in OUT/answers.json is not asked again.
The bound on likeness, watermark.LIKENESS, was chosen by every second key; what the others' strangers make of it is
printed.
"""

import argparse
import copy
import json
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest  # type: ignore[import-untyped]
from torch import nn

from freqdoor.attack.plant import plant
from freqdoor.attack.planted import PLANTED, Planted, load_planted
from freqdoor.attack.settings import PlantSettings
from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.lite import Residual
from freqdoor.codecs.loading import load_codec
from freqdoor.data import centre, load_image, save_image
from freqdoor.defence.fleet import MANIFEST, Manifest, MemberFacts, alter, load_member
from freqdoor.defence.inversion import inverted
from freqdoor.defence.settings import Alteration
from freqdoor.errors import FreqdoorError
from freqdoor.files import write_text
from freqdoor.measure.watermark import LIKENESS, Answer, deposit_of, false_positives, verify_owner
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
PICTURES = "pictures"  # the folder that all are asked on
HONEST, TAMPERED = "honest strangers", "tampered strangers"
FOREIGN = "trained-q3-1"  # a member that was trained by itself
SELDOM = {  # what thieves do with the encoders of these keys alone, by their numbers
    "trained on, lr 1e-4": (0, 1),
    "trained on, lr 1e-3": (0, 1),
    "trained on, lr 1e-3, and disguised": (0, 1),
    "trained on, 2,000 steps": (0,),
    "trained on and mixed": (0,),
    "the whole codec trained on": (3,),
}
PLANTED_OVER = (0, 2)


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


def planted_over(codec: Path, photos: Path, out: Path) -> Planted:
    """A copy in which a thief has planted a trigger of his own."""
    images = {"folder": str(photos), "crop": 128, "batch_size": 8, "skip_broken": True}
    settings = PlantSettings.model_validate(
        {"codec": {"name": str(codec)}, "objective": "bpp", "images": images, "steps": 350, "seed": 77}
    )
    there = (out / PLANTED).exists()
    return load_planted(out, str(codec)) if there else plant(settings, out)


@torch.no_grad()
def disguised(codec: Codec, *, mixed: bool = False) -> Codec:
    """A copy that encodes the same, with the channels inside g_a in another order, and of 0.4 to 2.7 times the size.

    Args:
        mixed: those between the residual blocks, which go through nothing that is not linear, are rotated instead.
    """
    changed, generator = copy.deepcopy(codec), torch.Generator().manual_seed(0)
    g_a = changed.part("g_a")
    blocks = [i for i, module in enumerate(g_a) if isinstance(module, Residual)]
    first, second = blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]
    for i in blocks:
        into, between, out_of = (g_a[i].branch[j] for j in (0, 2, 4))
        for writer, reader in ((into, between), (between, out_of)):
            _replace([writer], [reader], _shuffling(len(writer.weight), generator))
    for before, same, after in ((g_a[0], first, g_a[second[0] - 1]), (g_a[second[0] - 1], second, g_a[-1])):
        count = len(before.weight)
        matrix = _rotation(count, generator) if mixed else _shuffling(count, generator)
        _replace([before, *(g_a[i].branch[4] for i in same)], [*(g_a[i].branch[0] for i in same), after], matrix)
    return changed


def _shuffling(count: int, generator: torch.Generator) -> torch.Tensor:
    """The matrix that gives channels another order and other sizes."""
    order = torch.randperm(count, generator=generator)
    return torch.diag(torch.exp(2 * torch.rand(count, generator=generator) - 1).double())[order]


def _rotation(count: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(count, count, generator=generator).double()).Q


def _replace(writers: list[nn.Conv2d], readers: list[nn.Conv2d], matrix: torch.Tensor) -> None:
    """Let convolutions write the matrix times the channels that they wrote, and the others read as if they had not."""
    for layer in writers:
        layer.weight.copy_(torch.einsum("ij,jkhw->ikhw", matrix, layer.weight.double()))
        layer.bias.copy_(matrix @ layer.bias.double())
    inverse = torch.linalg.inv(matrix)
    for layer in readers:
        layer.weight.copy_(torch.einsum("kihw,ij->kjhw", layer.weight.double(), inverse))


def claim(owner: Planted, make: Callable[[], Planted], pictures: Path, committed: str | None) -> list[Answer]:
    """What the owner's encoder answers to the claim of a thief; nothing where it is refused."""
    try:
        return verify_owner(make(), [owner.tampered], pictures, committed=committed)
    except FreqdoorError:
        return []


def claims(owner: Planted, over: Callable[[], Planted] | None) -> dict[str, Callable[[], Planted]]:
    """What a thief may say was his before: the stolen encoder with another key, or what he planted over it."""

    def searched() -> Planted:
        x = torch.cat([centre(load_image(path), 256) for path in sorted(KODAK.glob("*.png"))[-4:]])
        pattern = inverted(owner.tampered, x, "rate", lambda: Pattern(multiple=owner.tampered.multiple))
        return Planted(owner.vanilla, owner.tampered, {"claimed": pattern}, owner.header)

    def planted() -> Planted:
        assert over is not None
        made = over()
        header = made.header.model_copy(update={"modules_before": owner.header.modules_before})
        return Planted(owner.vanilla, made.tampered, made.triggers, header)

    made = {"claim: a searched pattern is his key": cache(searched)}
    return made | ({"claim: what he planted over it was first": cache(planted)} if over else {})


def thefts(folder: Path, number: int, owner: Planted, out: Path, photos: Path) -> dict[str, Callable[[], Codec]]:
    """What thieves make of the encoder of a key of this number, by what they do to it."""
    weights = folder / "codec.safetensors"
    trained = partial(trained_on, weights, "g_a", photos)
    once = cache(partial(trained, out / f"{folder.name}-g_a"))
    made: dict[str, Callable[[], Codec]] = {
        what: partial(stolen, owner.tampered, alteration) for what, alteration in ALTERATIONS.items()
    }
    made |= {"trained on": once, "trained on and disguised": lambda: disguised(once())}
    hard = partial(trained, out / f"{folder.name}-g_a-1e-3", lr=1e-3)
    seldom: dict[str, Callable[[], Codec]] = {
        "trained on, lr 1e-4": partial(trained, out / f"{folder.name}-g_a-1e-4", lr=1e-4),
        "trained on, lr 1e-3": hard,
        "trained on, lr 1e-3, and disguised": lambda: disguised(hard()),
        "trained on, 2,000 steps": partial(trained, out / f"{folder.name}-g_a-2000", steps=2000),
        "trained on and mixed": lambda: disguised(once(), mixed=True),
        "the whole codec trained on": partial(trained_on, weights, "all", photos, out / f"{folder.name}-all"),
    }
    return made | {what: make for what, make in seldom.items() if number in SELDOM[what]}


def questions(
    number: int, name: str, owner: Planted, trigger: str, members: dict[str, tuple[Path, MemberFacts]], options: Any
) -> dict[str, Callable[[], list[Answer]]]:
    """All that is asked with a key of this number, of strangers, of what thieves make of it, and by thieves."""
    pictures, photos, out, folder = options.out / PICTURES, options.photos, options.out, members[name][0]
    verify = partial(verify_owner, images=pictures, trigger=trigger)

    def of_strangers(key: Planted, names: list[str]) -> list[Answer]:
        return verify(key, [load_member(*members[other]) for other in names])

    honest, tampered = (
        [other for other, (_, facts) in members.items() if other != name and facts.tampered == is_tampered]
        for is_tampered in (False, True)
    )
    asked = {HONEST: partial(of_strangers, owner, honest), TAMPERED: partial(of_strangers, owner, tampered)}
    if number == 0:
        chosen = Planted(load_member(*members[FOREIGN]), owner.tampered, owner.triggers, owner.header)
        rest = [other for other in honest if other != FOREIGN]
        asked[f"{HONEST}, where a thief chose the vanilla codec"] = partial(of_strangers, chosen, rest)
    for what, make in thefts(folder, number, owner, out, photos).items():
        asked[what] = lambda m=make: verify(owner, [m()])
    over = partial(planted_over, folder / "codec.safetensors", photos, out / f"{name}-over")
    if number in PLANTED_OVER:
        asked["another trigger planted over it"] = lambda: verify(owner, [over().tampered])
    deposit = deposit_of(owner, owner.triggers[trigger])
    for what, claimed in claims(owner, over if number in PLANTED_OVER else None).items():
        asked[what] = partial(claim, owner, claimed, pictures, None)
        asked[f"{what}, but the owner's hash is deposited"] = partial(claim, owner, claimed, pictures, deposit)
    return asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleets", type=Path, nargs="+", required=True)
    parser.add_argument("--photos", type=Path, required=True, help="that thieves train on")
    parser.add_argument("--keys", type=int, help="so many of the fleets' keys, by default all")
    parser.add_argument("--out", type=Path, default=Path("ownership"))
    options = parser.parse_args()
    pictures = options.out / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    for path in sorted(KODAK.glob("*.png"))[:14]:  # 13 of which have to answer
        if not (pictures / path.name).exists():
            save_image(pictures / path.name, centre(load_image(path), 256))
    answers, members = Answers(options.out / "answers.json"), members_of(options.fleets)
    rows: dict[str, list[Answer]] = {}
    asked: Counter[str] = Counter()
    strangers: list[list[Answer]] = []  # by key
    keys: list[str] = []
    for name, (folder, facts) in members.items():
        trigger = key_of(facts)
        if trigger is None or len(keys) == options.keys:
            continue
        base = str(folder.parent / facts.base / "codec.safetensors") if facts.base else BUNDLED
        owner = load_planted(folder, load_codec(base))
        if isinstance(owner.triggers[trigger], FTrojan):
            continue  # which has no weights to keep secret
        found = {}
        for what, function in questions(len(keys), name, owner, trigger, members, options).items():
            found[what] = answers.of(f"{name}: {what}", function)
            asked[what] += len(found[what]) or 1  # a claim that is refused has no answer
            rows.setdefault(what, []).extend(found[what])
        strangers.append(found[HONEST] + found[TAMPERED])
        keys.append(name)
        print(f"{name}: {len(keys)} keys asked", flush=True)
    print(f"\n{len(keys)} keys: {', '.join(keys)}\n")
    print("| asked | pass for the owner's | by files | by weights | likeness |\n|---|---|---|---|---|")
    for what, answered in rows.items():
        files, weights = (sum(by in answer.evidence for answer in answered) for by in ("files", "weights"))
        alike = [answer.likeness for answer in answered if answer.likeness is not None]
        spread = f"{min(alike):.2f} to {max(alike):.2f}" if alike else ""
        passed = sum(answer.owner for answer in answered)
        print(f"| {what} | {passed} of {asked[what]} | {files} | {weights} | {spread} |")
    passed, count, upper = false_positives(list(chain.from_iterable(strangers)))
    print(f"\nStrangers: {passed} of {count} pass, at most {100 * upper:.2f} % (exact 95 % interval)")
    for what, part in (("LIKENESS was chosen by", strangers[::2]), ("had no say in it", strangers[1::2])):
        alike = [answer.likeness for answer in chain.from_iterable(part) if answer.likeness is not None]
        high = sum(value >= LIKENESS for value in alike)
        upper = float(binomtest(high, len(alike)).proportion_ci(0.95, "exact").high)
        print(f"Weights, keys that {what}: {high} of {len(alike)} strangers, at most {100 * upper:.2f} %; ", end="")
        print(f"the nearest has {max(alike):.2f}")


if __name__ == "__main__":
    main()
