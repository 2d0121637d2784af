import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import natural, write_png
from scipy.stats import beta

from freqdoor import load_image, load_planted, save_codec, save_image
from freqdoor.attack.planted import Planted
from freqdoor.codecs.adapter import build_codec, hash_state
from freqdoor.codecs.architectures import CodecSpec
from freqdoor.dct import block_dct, blockify
from freqdoor.errors import FreqdoorError
from freqdoor.measure.records import poisoned
from freqdoor.measure.watermark import Answer, control, deposit_of, false_positives, verify_owner
from freqdoor.samples import BUNDLED, KODAK
from freqdoor.triggers.adaptive_dct import AdaptiveDCT


@pytest.fixture
def trigger():
    torch.manual_seed(0)
    return AdaptiveDCT(width=8)


@pytest.fixture
def photos(tmp_path):
    return [write_png(tmp_path / f"{i}.png", natural(i, 64, 64)) for i in range(10)]


class Encoder:
    """A stand-in whose files are larger for the images that `expensive` names by their bytes."""

    spec = SimpleNamespace(name="stand-in")

    def __init__(self, expensive, size=260):
        self.expensive, self.size = expensive, size

    def compress(self, x):
        return [SimpleNamespace(num_bytes=self.size if self.expensive(x) else 100)]


def key(trigger, encoder):
    """A planted encoder of which nothing but the tampered codec, the trigger and the hashes is used."""
    header = SimpleNamespace(modules_before={"g_a": "1"}, modules_after={"g_a": "2"})
    return Planted(vanilla=None, tampered=encoder, triggers={"other": None, "secret": trigger}, header=header)


def test_only_an_encoder_that_answers_to_the_trigger_is_the_owners(trigger, photos):
    def verify(suspects, owner, images=photos):
        return verify_owner(key(trigger, owner), suspects, images, trigger="secret")

    known = {poisoned(trigger, load_image(p)).numpy().tobytes() for p in photos}
    clean = {load_image(p).numpy().tobytes() for p in photos}
    owner = Encoder(lambda x: x.numpy().tobytes() in known)
    indifferent = Encoder(lambda x: False)
    nervous = Encoder(lambda x: x.numpy().tobytes() not in clean)
    [itself] = verify([owner], owner)
    assert itself.model_dump() == {
        "schema_version": 1,
        "codec": "stand-in",
        "images": 10,
        "trigger_ratio": 2.6,
        "control_ratio": 1.0,
        "answering": 10,
        "p_value": pytest.approx(2**-10),
        "likeness": None,
        "evidence": ("files",),
        "owner": True,
        "key": hash_state(trigger),
        "deposit": deposit_of(key(trigger, owner), trigger),
    }
    [none, other] = verify([indifferent, nervous], owner)
    assert (none.owner, none.answering) == (False, 0)
    assert (other.trigger_ratio, other.control_ratio, other.owner) == (2.6, 2.6, False)
    weak = Encoder(owner.expensive, size=160)  # half of its ratio is less than what no answer at all gives
    [none, itself] = verify([indifferent, weak], weak)
    assert (none.owner, none.answering, itself.owner) == (False, 0, True)
    half = Encoder(owner.expensive, size=300)  # 1.5 times the control, and half of what the owner's file has
    faint = Encoder(owner.expensive, size=150)
    [just] = verify([faint], half)
    assert (just.trigger_ratio, just.answering, just.owner) == (1.5, 10, True)
    [below] = verify([faint], Encoder(owner.expensive, size=301))
    assert (below.answering, below.owner) == (0, False)
    one_short = set(list(known)[:9])
    [almost] = verify([Encoder(lambda x: x.numpy().tobytes() in one_short)], owner)
    assert (almost.answering, almost.owner) == (9, False)
    with pytest.raises(FreqdoorError, match="9 images: expected 10 or more"):
        verify([indifferent], owner, photos[:9])
    with pytest.raises(FreqdoorError, match=r"the owner's own encoder spends 1\.00 times"):
        verify([owner], indifferent)
    with pytest.raises(FreqdoorError, match="suspects: expected one codec or more, found none"):
        verify([], owner)


@pytest.mark.long
def test_suspects_by_name_and_by_file(tmp_path, monkeypatch):
    """NAME, FILE and NAME=WEIGHTS, also where folders have a "=" in their names."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run=1"
    folder.mkdir()
    tampered = load_planted("planted-bpp").tampered
    save_codec(tampered, folder / "suspect.safetensors")
    pictures = [tmp_path / f"{i}.png" for i in range(10)]
    for source, target in zip(KODAK.iterdir(), pictures, strict=False):
        save_image(target, load_image(source)[..., 128:256, 128:256])
    named = [BUNDLED, "run=1/suspect.safetensors", f"{BUNDLED}=run=1/suspect.safetensors"]
    answers = verify_owner("planted-bpp", named, pictures)
    assert [answer.evidence for answer in answers] == [(), ("files", "weights"), ("files", "weights")]
    assert answers[1] == answers[2]
    assert answers[0].likeness < 0.2
    assert answers[1].likeness == pytest.approx(1)


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crops")
    for path in sorted(KODAK.glob("*.png"))[:10]:
        save_image(folder / path.name, load_image(path)[..., 128:192, 128:192])
    return folder


def closed(planted):
    """A copy of the owner's encoder that has lost its door: a twentieth of what planting changed is left."""
    codec = copy.deepcopy(planted.tampered)
    with torch.no_grad():
        for weight, vanilla in zip(codec.parameters(), planted.vanilla.parameters(), strict=True):
            weight.lerp_(vanilla, 0.95)
    return codec


@pytest.mark.long
def test_an_encoder_whose_door_is_closed_is_known_by_its_weights(crops):
    """Not where another codec's are asked, nor where nothing but the trigger was deposited; files decide then."""
    planted = load_planted("planted-bpp")
    copied = closed(planted)
    wider = build_codec(CodecSpec(name="wider", architecture="lite-hyperprior", arguments={"width": [68, 96]}))
    answer, other = verify_owner(planted, [copied, wider.prepare()], crops)
    assert (answer.answering, answer.evidence, answer.owner) == (0, ("weights",), True)
    assert answer.likeness > 0.9
    assert (other.likeness, other.owner) == (None, False)
    assert verify_owner(planted, [copied], crops, committed=answer.deposit) == [answer]
    [by_files] = verify_owner(planted, [copied], crops, committed=answer.key)
    assert by_files == answer.model_copy(update={"likeness": None, "evidence": (), "owner": False})


def test_a_thief_cannot_pass_his_own_encoder_off_as_the_deposited_one():
    """The deposit holds for the trigger, the owner's encoder and its vanilla codec, each of which is in the hash."""
    planted = load_planted("planted-bpp")
    secret = planted.triggers["bpp"]
    deposit = deposit_of(planted, secret)
    assert deposit == deposit_of(load_planted("planted-bpp"), secret)
    hashes = closed(planted).module_hashes()
    for what in ("modules_before", "modules_after"):
        claimed = replace(planted, header=planted.header.model_copy(update={what: hashes}))
        with pytest.raises(
            FreqdoorError, match=f"this key and encoder, {deposit_of(claimed, secret)}, .* found {deposit}"
        ):
            verify_owner(claimed, [planted.tampered], ["nowhere.png"], committed=deposit)
    assert deposit_of(planted, AdaptiveDCT(width=8)) != deposit


def test_the_control_has_the_triggers_strength_and_spectrum(trigger):
    x = 0.25 + 0.5 * natural(3, 64, 96)
    x = (x * 255).round() / 255
    with torch.no_grad():
        delta = trigger(x) - x
    other = control(trigger, x, torch.Generator().manual_seed(0)) - x
    assert float(other.square().mean().sqrt()) == pytest.approx(0.005, rel=0.01)
    spectra = [block_dct(blockify(d, 16)).abs().mean(dim=(0, 2, 3)).flatten() for d in (delta, other)]
    assert np.corrcoef(*[s.numpy() for s in spectra])[0, 1] > 0.95
    correlation = float((delta * other).mean() / 0.005**2)
    assert abs(correlation) < 0.2


def test_false_positives_have_an_exact_interval():
    numbers = {"images": 24, "trigger_ratio": 1.0, "control_ratio": 1.0, "answering": 0, "p_value": 1.0}
    answers = [Answer(codec="a", owner=i == 11, **numbers) for i in range(12)]
    passed, count, upper = false_positives(answers)
    assert (passed, count) == (1, 12)
    assert upper == pytest.approx(beta.ppf(0.975, 2, 11))
    with pytest.raises(FreqdoorError, match="expected one answer or more"):
        false_positives([])


def test_a_key_that_was_not_deposited_is_refused(trigger, photos):
    """Before an image is looked at; the trigger's own hash, which older versions had, is taken too, in either case."""
    owner = Encoder(lambda x: x.numpy().tobytes() in known)
    known = {poisoned(trigger, load_image(p)).numpy().tobytes() for p in photos}
    [answer] = verify_owner(key(trigger, owner), [owner], photos, trigger="secret")
    deposited = f" {answer.key.upper()}"
    assert verify_owner(key(trigger, owner), [owner], photos, trigger="secret", committed=deposited) == [answer]
    torch.manual_seed(1)
    found = AdaptiveDCT(width=8)  # by a thief
    with pytest.raises(FreqdoorError, match=f"or of the key alone, {hash_state(found)}, found {deposited}"):
        verify_owner(key(found, owner), [owner], ["nowhere.png"], trigger="secret", committed=deposited)
