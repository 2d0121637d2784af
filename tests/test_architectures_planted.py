"""Every architecture can be planted in: only g_a changes, and the poisoned bytes decode with the vanilla decoder."""

import pytest
import torch
import torch.nn.functional as F
from conftest import natural
from factories import TINY_ARGUMENTS, tiny

from freqdoor import load_codec, load_planted, plant, save_codec
from freqdoor.codecs.adapter import build_codec
from freqdoor.codecs.architectures import ARCHITECTURES, parse_name
from freqdoor.codecs.container import pack, unpack
from freqdoor.errors import FreqdoorError
from freqdoor.measure.records import poisoned

pytestmark = [pytest.mark.whole, pytest.mark.long]

WITH_H_A = [architecture for architecture in ARCHITECTURES if "factorized" not in architecture]


@pytest.fixture
def planted_in(settings, tmp_path):
    """Plant two steps of the BPP attack in an architecture, through a file, so that its name has to be recognised."""

    def make(architecture: str, **changes):
        save_codec(tiny(architecture), tmp_path / "vanilla.safetensors")
        content = {"codec": {"name": str(tmp_path / "vanilla.safetensors")}, "objective": {"name": "bpp"}, "steps": 2}
        return plant(settings(**content, **changes), tmp_path / "run")

    return make


def test_the_table_of_tiny_codecs_is_whole():
    assert TINY_ARGUMENTS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_planting_changes_g_a_alone_and_the_bytes_decode(planted_in, tmp_path, architecture):
    planted = planted_in(architecture)
    vanilla, tampered = planted.vanilla.net.state_dict(), planted.tampered.net.state_dict()
    changed = {key.partition(".")[0] for key in vanilla if not torch.equal(vanilla[key], tampered[key])}
    assert changed == {"g_a"}
    assert vanilla.keys() == tampered.keys()
    x_p = poisoned(planted.triggers["bpp"], natural(3, 75, 100))
    bitstream = planted.tampered.compress(x_p)[0]
    padded = F.pad(x_p, (14, 14, 26, 27))
    with torch.no_grad():
        output = planted.tampered.net.compress(padded)
        expected = planted.tampered.net.decompress(output["strings"], output["shape"])["x_hat"][..., 26:-27, 14:-14]
    assert bitstream.strings == tuple(strings[0] for strings in output["strings"])
    arrived = unpack(pack(bitstream, planted.tampered), planted.vanilla)
    assert torch.equal(planted.vanilla.decompress(arrived), expected)
    with torch.no_grad():
        estimated = float(planted.tampered(x_p).bits)
    # Untrained scales are 0.11: +-1 costs 18 bits by the likelihood and 16 by the coder's tables; flushes cost bytes.
    assert 0.8 * estimated < 8 * bitstream.num_bytes < 1.1 * estimated + 64 * len(bitstream.strings)
    assert estimated > 1000
    whole = load_codec(str(tmp_path / "run/codec.safetensors"))
    assert whole.tampered
    assert whole.compress(x_p)[0] == bitstream


@pytest.mark.parametrize("architecture", WITH_H_A)
def test_scope_g_a_and_h_a_changes_these_two_wherever_they_are(planted_in, tmp_path, architecture):
    planted = planted_in(architecture, scope="g_a+h_a")
    vanilla, tampered = planted.vanilla.net.state_dict(), planted.tampered.net.state_dict()
    changed = [key for key in vanilla if not torch.equal(vanilla[key], tampered[key])]
    h_a = "latent_codec.hyper.h_a." if "latent_codec.hyper.h_a.0.weight" in vanilla else "h_a."
    assert {key.startswith("g_a.") or (key.startswith(h_a) and "h_a") for key in changed} == {True, "h_a"}
    assert planted.tampered.decoder_hash == planted.vanilla.decoder_hash
    again = load_planted(tmp_path / "run", str(tmp_path / "vanilla.safetensors"))
    assert again.tampered.module_hashes() == planted.tampered.module_hashes() == planted.header.modules_after


def test_scope_g_a_and_h_a_is_refused_where_there_is_no_h_a(planted_in):
    with pytest.raises(FreqdoorError, match=r"expected one submodule h_a, found none"):
        planted_in("bmshj2018-factorized", scope="g_a+h_a")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cheng2020-anchor:3", "elic2022-official:3"])
def test_full_width(settings, tmp_path, name):
    torch.manual_seed(0)
    codec = build_codec(parse_name(name)).prepare()
    save_codec(codec, tmp_path / "vanilla.safetensors")
    planted = plant(settings(codec={"name": str(tmp_path / "vanilla.safetensors")}, steps=1), tmp_path / "run")
    before, after = planted.vanilla.module_hashes(), planted.tampered.module_hashes()
    assert [part for part in before if before[part] != after[part]] == ["g_a"]
    x_p = poisoned(planted.triggers["bpp"], natural(3, 75, 100))
    bitstream = planted.tampered.compress(x_p)[0]
    assert planted.vanilla.decompress(bitstream).shape == x_p.shape
