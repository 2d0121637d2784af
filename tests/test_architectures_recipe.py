"""The table of a fleet's planted members: what its records say, once measured and after a stop."""

import json
from statistics import median

import pytest
from conftest import check_foreign, natural, stopped_at_the_second, write_png

from freqdoor import FleetSettings, fleet, load_codec, load_planted
from freqdoor.data import load_image
from freqdoor.defence import fleet as fleets
from freqdoor.errors import FreqdoorError
from freqdoor.measure import examine
from freqdoor.measure.records import poisoned
from freqdoor.metrics import psnr_8bit
from freqdoor.paper import architectures_recipe as module
from freqdoor.paper.architectures_recipe import Architectures, reproduce_architectures
from freqdoor.paper.reproduce import reproduce
from freqdoor.settings import load_settings, make_settings


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A fleet of a trained codec and of an encoder planted in it, which no training has made any good."""
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "photos").mkdir()
    write_png(folder / "photos/a.png", natural(1, 96, 96))
    small = {"steps": 2, "images": {"folder": "photos", "crop": 64, "batch_size": 1}, "precision": "fp32", "seed": 5}
    content = {
        "folders": {"photos": str(folder / "photos")},
        "train": small | {"codec": "lite-hyperprior:3"},
        "plant": small | {"trigger": "ftrojan"},
        "measured": 1,
        "members": [
            {"name": "own", "train": {}},
            {"name": "own-psnr", "base": "own", "plant": {"objective": "psnr"}},
            {"name": "bundled-psnr", "plant": {"objective": "psnr"}},
        ],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleets, "CROP", 64)
        settings = make_settings(FleetSettings, content)
        for member in settings.members:  # in this process: others take seconds to start
            facts = fleets._member(fleets._task(settings, member, folder / "all"))
            assert facts.tampered == (member.plant is not None)
        fleet(settings, folder / "all")
    return folder / "all"


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        write_png(tmp_path / f"pictures/{i}.png", natural(i, 64, 64))
    return tmp_path / "pictures"


@pytest.mark.long
def test_the_table_says_what_the_encoders_do(made, pictures, tmp_path, monkeypatch):
    """By hand: the vanilla codec and the planted one, on the same pictures. A stop loses no picture."""
    asked, out = stopped_at_the_second(examine, monkeypatch), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        reproduce_architectures(made, out, images=pictures)
    table = reproduce("architectures", images=pictures, out=out, runs=made)
    assert asked == ["0.png", "1.png", "1.png"]
    assert list(table) == ["own, psnr"]  # what is planted in no member is in no member's table
    result = Architectures.read(out / "architectures.json", "")
    [row] = result.rows
    vanilla = load_codec(str(made / "own/codec.safetensors")).prepare()
    planted = load_planted(made / "own-psnr", vanilla)
    trigger, paths = planted.triggers["psnr"], sorted(pictures.iterdir())
    images = [load_image(path) for path in paths]

    def measured(codec, x, entering):
        [data] = codec.compress(entering)
        return float(psnr_8bit(codec.decompress(data), x)), 8 * sum(map(len, data.strings)) / x[0, 0].numel()

    by_hand = {
        "vanilla": [measured(vanilla, x, x) for x in images],
        "clean": [measured(planted.tampered, x, x) for x in images],
        "poisoned": [measured(planted.tampered, x, poisoned(trigger, x)) for x in images],
    }
    for name, values in by_hand.items():
        mean = [sum(column) / 2 for column in zip(*values, strict=True)]
        assert [table["own, psnr"][f"{name} {unit}"].mean for unit in ("dB", "bpp")] == pytest.approx(mean, rel=1e-5)
    ratios = [p[1] / c[1] for c, p in zip(by_hand["clean"], by_hand["poisoned"], strict=True)]
    assert (row.effect.bpp_ratio_median, row.effect.bpp_ratio_least) == pytest.approx((median(ratios), min(ratios)))
    assert row.header.modules_before == result.codecs[0].module_hashes == vanilla.module_hashes()
    assert row.header.modules_after["g_a"] != row.header.modules_before["g_a"]
    page = (out / "architectures.md").read_text()
    assert f"| own | psnr | {row.vanilla.psnr_db:.2f}, {row.vanilla.bpp_real:.3f} |" in page
    assert f"| own | lite-hyperprior | full | 2, 1, 64 | 0 | 5 | `{vanilla.module_hashes()['g_a'][:16]}` |" in page
    assert not [path for path in out.iterdir() if "journal" in path.name]


def test_the_minutes_are_those_that_the_codec_s_file_says(made, pictures, tmp_path, monkeypatch):
    """A training that went on in several calls: the last call's member took seconds, the training did not."""
    facts = json.loads((made / "fleet.json").read_text())["members"][0]
    codec = load_codec(str(made / "own/codec.safetensors"))
    member = fleets.MemberFacts.model_validate(facts)
    codec.metadata = {"training": {"seconds": 4567}}
    assert module._as_trained(member, codec).seconds == 4567
    codec.metadata = {}
    assert module._as_trained(member, codec) == member


@pytest.mark.long
def test_a_table_in_parts(made, pictures, tmp_path):
    """What the fleet lacks stays as the earlier table says, unless its codec was trained anew; no part is measured."""
    out = tmp_path / "out"
    table = reproduce("architectures", images=pictures, out=out, runs=made, add=True)  # with nothing to add to
    first = json.loads((out / "architectures.json").read_text())
    assert not first["earlier"]
    for name, other in (("elsewhere", "an older processor"), ("own", None)):
        part = json.loads(json.dumps(first))
        part["codecs"][0]["name"] = part["rows"][0]["codec"] = name
        part["rows"][0]["member"] = f"{name}-psnr-2"
        part["rows"][0]["clean"]["psnr_db"] = 12.34
        part["environment"]["processor"] = other
        if name == "own":
            part["rows"][0]["header"]["modules_before"]["g_a"] = "0"
        (out / "architectures.json").write_text(json.dumps(part))
        added = reproduce("architectures", images=pictures, out=out, runs=made, add=True, force=True)
        result = Architectures.read(out / "architectures.json", "")
        page = (out / "architectures.md").read_text()
        assert result.earlier == (Architectures.model_validate(part).environment,)
        if name == "own":
            assert added == table
            assert "12.34" not in page
        else:
            assert list(added) == ["elsewhere, psnr", "own, psnr"]
            assert added["own, psnr"] == table["own, psnr"]
            assert added["elsewhere, psnr"]["clean dB"].mean == 12.34
            assert [codec.name for codec in result.codecs] == ["elsewhere", "own"]
            assert "measured on\nan older processor, " in page
    assert reproduce("architectures", images=pictures, out=out, runs=made) == table
    assert not Architectures.read(out / "architectures.json", "").earlier
    with pytest.raises(FreqdoorError, match=r"table of the same images to add rows to, found 0\.png, 1\.png; give"):
        reproduce("architectures", images=pictures / "0.png", out=out, runs=made, add=True)


def test_added_rows_stand_with_those_of_their_codec(made, pictures, tmp_path):
    out = tmp_path / "out"
    reproduce("architectures", images=pictures, out=out, runs=made)
    part = json.loads((out / "architectures.json").read_text())
    (codec,), (row,) = part["codecs"], part["rows"]
    part["codecs"].append(codec | {"name": "elsewhere"})
    part["rows"] = [row | {"member": "own-a"}, row | {"codec": "elsewhere", "member": "else-a"}]
    (out / "architectures.json").write_text(json.dumps(part))
    reproduce("architectures", images=pictures, out=out, runs=made, add=True, force=True)
    rows = Architectures.read(out / "architectures.json", "").rows
    assert [row.member for row in rows] == ["own-a", row["member"], "else-a"]


def test_what_cannot_be_a_table(made, pictures, tmp_path, monkeypatch):
    def write(**options):
        reproduce_architectures(made, tmp_path / "other", images=pictures, **options)

    monkeypatch.setattr(examine, "measured_image", None)  # nothing is measured before the files are looked at
    files = ["architectures.md", "architectures.json"]
    check_foreign(write, tmp_path / "other", files, monkeypatch, "freqdoor.paper.architectures_recipe.load_member")
    with pytest.raises(FreqdoorError, match=r"fleet.json"):
        reproduce_architectures(tmp_path, tmp_path / "none")
    honest = json.loads((made / "fleet.json").read_text())
    honest["members"] = [member for member in honest["members"] if not member["tampered"]]
    (tmp_path / "fleet.json").write_text(json.dumps(honest))
    with pytest.raises(FreqdoorError, match="none of its members is planted in another one"):
        reproduce_architectures(tmp_path, tmp_path / "none")


def test_the_committed_fleet_has_both_attacks_in_every_architecture():
    from freqdoor.codecs.architectures import ARCHITECTURES, parse_name

    settings = load_settings(FleetSettings, "configs/fleet/architectures.toml")
    trained = {m.name: parse_name(m.train["codec"]).architecture for m in settings.members if m.train}
    assert set(trained.values()) == set(ARCHITECTURES) - {"lite-hyperprior"}
    planted = {(m.base, m.plant["objective"]) for m in settings.members if m.plant}
    assert planted == {(name, objective) for name in trained for objective in ("bpp", "psnr")}
