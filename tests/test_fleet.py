"""Populations of encoders: what members are made of, that they are made once, and that they are what they say."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import natural, write_png

from freqdoor import FleetSettings, fleet, load_codec, load_planted, workers
from freqdoor.attack.settings import PlantSettings
from freqdoor.codecs.adapter import hash_state
from freqdoor.defence import fleet as module
from freqdoor.defence.fleet import Manifest, alter
from freqdoor.defence.settings import Alteration
from freqdoor.errors import FreqdoorError
from freqdoor.settings import load_settings, make_settings
from freqdoor.training.settings import CodecTraining

CONFIG = Path(__file__).parent.parent / "configs/fleet/bundled.toml"
ENCODER = {"g_a"}


@pytest.fixture
def in_this_process(monkeypatch):
    """Members made by threads: processes take seconds to start."""
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "photos").mkdir()
    write_png(tmp_path / "photos/a.png", natural(1, 96, 96))
    small = {"steps": 2, "images": {"folder": "photos", "crop": 64, "batch_size": 1}, "precision": "fp32"}
    content = {
        "folders": {"photos": str(tmp_path / "photos")},
        "train": small | {"codec": "lite-hyperprior:3", "lr": 1e-4},
        "plant": small,
        "measured": 1,
        "members": [
            {"name": "tuned", "train": {"seed": 3}},
            {"name": "encoder", "family": "encoder alone", "train": {"scope": "g_a", "lr": 1e-3}},
            {"name": "pruned", "base": "encoder", "alter": {"kind": "prune", "amount": 0.2}},
            {"name": "planted", "plant": {"objective": "psnr", "trigger": "ftrojan"}, "base": "tuned"},
        ],
    }
    return make_settings(FleetSettings, content)


@pytest.mark.long
@pytest.mark.whole
def test_a_fleet_is_made_once_and_each_member_is_what_it_says(settings, tmp_path, in_this_process, monkeypatch):
    out = tmp_path / "fleet"
    said: list[str] = []
    manifest = fleet(settings, out, jobs=2, note=said.append)
    facts = {member.name: member for member in manifest.members}
    assert [member.name for member in manifest.members] == ["tuned", "encoder", "pruned", "planted"]
    assert [member.tampered for member in manifest.members] == [False, False, False, True]
    assert [member.family for member in manifest.members] == ["train", "encoder alone", "alter", "plant"]
    bundled = load_codec("lite-hyperprior:3").module_hashes()
    for name, member in facts.items():
        hashes = load_codec(str(out / name / member.file)).module_hashes()
        assert hashes == member.module_hashes
        changed = {part for part in hashes if hashes[part] != bundled[part]}
        assert changed == ENCODER if name in ("encoder", "pruned") else changed > ENCODER
    assert facts["planted"].poisoned.keys() == {"psnr"}
    tuned = load_codec(str(out / "tuned/codec.safetensors"))
    assert load_planted(out / "planted", tuned).triggers.keys() == {"psnr"}
    assert facts["pruned"].module_hashes["g_a"] != facts["encoder"].module_hashes["g_a"]
    assert said[0] == "members made (0 of 4)"
    assert len(said) == 5
    assert said[-1].endswith(" (4 of 4)")
    monkeypatch.setattr(module, "_member", lambda task: pytest.fail("made twice"))
    assert fleet(settings, out) == manifest == Manifest.read(out / "fleet.json", "a manifest")
    assert str(tmp_path) not in (out / "fleet.json").read_text()


@pytest.mark.whole
def test_a_member_that_fails_does_not_stop_the_others_and_is_named(settings, tmp_path, in_this_process):
    content = settings.model_dump()
    content["members"][1]["train"]["images"] = {"folder": str(tmp_path / "nowhere")}
    content["members"] = content["members"][:3]
    broken = make_settings(FleetSettings, content)
    with pytest.raises(FreqdoorError, match=r"2 of 3 members(?s:.*)encoder: .*nowhere(?s:.*)pruned: encoder, which it"):
        fleet(broken, tmp_path / "fleet")
    assert [m.name for m in Manifest.read(tmp_path / "fleet/fleet.json", "a manifest").members] == ["tuned"]


@pytest.mark.whole
def test_only_some_and_what_they_come_from(settings, tmp_path, in_this_process):
    manifest = fleet(settings, tmp_path / "fleet", only=["pruned"])
    assert [member.name for member in manifest.members] == ["encoder", "pruned"]
    content = settings.model_dump()
    content["members"][2]["alter"]["amount"] = 0.3
    with pytest.raises(FreqdoorError, match="pruned: was made with other settings"):
        fleet(make_settings(FleetSettings, content), tmp_path / "fleet", only=["pruned"])
    with pytest.raises(FreqdoorError, match=r"only: expected some of tuned, .*, found nobody"):
        fleet(settings, tmp_path / "fleet", only=["nobody"])
    with pytest.raises(FreqdoorError, match="jobs: expected 1 or more, found 0"):
        fleet(settings, tmp_path / "fleet", jobs=0)


@pytest.mark.slow
def test_processes_make_the_same_as_threads(settings, tmp_path, monkeypatch):
    manifest = fleet(settings, tmp_path / "processes", jobs=2)
    with monkeypatch.context() as patched:
        patched.setattr(workers, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))
        threads = fleet(settings, tmp_path / "threads")
    for a, b in zip(manifest.members, threads.members, strict=True):
        assert a.model_copy(update={"seconds": 0}) == b.model_copy(update={"seconds": 0})


def weights(codec):
    return codec.part("g_a")[0].weight.detach()


def test_alterations_do_what_they_say():
    before = load_codec("lite-hyperprior:3")
    others = hash_state(before.part("g_s"))
    for kind, amount in (("prune", 0.25), ("quantise", 4), ("noise", 0.1)):
        codec = load_codec("lite-hyperprior:3")
        alter(codec, Alteration(kind=kind, amount=amount), seed=1)
        old, new = weights(before), weights(codec)
        assert hash_state(codec.part("g_s")) == others
        if kind == "prune":
            assert (new == 0).float().mean() == pytest.approx(0.25, abs=0.01)
            kept = new != 0
            assert torch.equal(new[kept], old[kept])
            assert old[~kept].abs().max() <= old[kept].abs().min()
        elif kind == "quantise":
            assert len(new.unique()) <= 2**4
            assert (new - old).abs().max() <= old.abs().max() / (2**4 - 1) + 1e-6
        else:
            assert (new - old).std() == pytest.approx(0.1 * float(old.std()), rel=0.1)
            again = load_codec("lite-hyperprior:3")
            alter(again, Alteration(kind=kind, amount=amount), seed=1)
            assert torch.equal(weights(again), new)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([{"name": "a"}], "a: expected one of train, alter and plant"),
        ([{"name": "a", "train": {}, "plant": {}}], "a: expected one of train, alter and plant"),
        ([{"name": "../a", "alter": {"kind": "noise", "amount": 1}}], "expected small letters"),
        ([{"name": "a", "alter": {"kind": "noise", "amount": 1}}] * 2, "distinct names, found a twice"),
        ([{"name": "a", "base": "b", "alter": {"kind": "noise", "amount": 1}}], "its base b is none of the members"),
        ([{"name": "a", "alter": {"kind": "prune", "amount": 1}}], "a share below 1, found 1"),
        ([{"name": "a", "alter": {"kind": "quantise", "amount": 3.5}}], "whole number of bits from 2 to 16, found 3.5"),
        ([{"name": "a", "plant": {"objective": "bits"}}], "a: objective.name: expected one of bpp"),
        ([{"name": "a", "train": {"stepz": 1}}], "a: stepz: unknown setting"),
    ],
)
def test_wrong_members_are_refused_before_anything_is_made(members, expected):
    shared = {"images": {"folder": "x"}}
    with pytest.raises(FreqdoorError, match=expected):
        make_settings(
            FleetSettings, {"members": members, "plant": shared, "train": shared | {"codec": "lite-hyperprior:3"}}
        )


def test_the_fleet_that_is_shipped_is_large_enough_and_knows_its_folders():
    settings = load_settings(FleetSettings, CONFIG, ["folders.faces=/data/faces"])
    honest = [member for member in settings.members if not member.tampered]
    assert len(honest) >= 24
    assert len(settings.members) - len(honest) >= 24
    made = {member.name: settings.settings_of(member, settings.codec) for member in settings.members}
    assert isinstance(made["bpp-1"], PlantSettings)
    assert made["bpp-1"].images.folder == "photos"
    faces, alone, trained = made["tuned-faces"], made["encoder-photos-21"], made["trained-q2-3"]
    assert isinstance(faces, CodecTraining)
    assert faces.images.folder == "/data/faces/images"
    assert (alone.scope, alone.start_from) == ("g_a", "lite-hyperprior:3")
    assert (trained.start_from, trained.codec) == (None, "lite-hyperprior:2")
    assert made["pruned-0.1"] is None
    assert json.loads(settings.model_dump_json())  # settings travel as JSON
