"""State dicts in whatever trainers wrap them, and coding tables that do or do not belong to the weights."""

import warnings

import pytest
import torch
from conftest import natural
from factories import tiny
from safetensors.torch import save_file

from freqdoor import load_codec, save_codec
from freqdoor.errors import FreqdoorError

PREFIXES = ("module.", "net.", "model.", "_orig_mod.", "module._orig_mod.", "model.module.net.", "codec.")
WRAPPERS = ("state_dict", "model", "net", "network", "net_state_dict", "model_state_dict", "ema", "model_ema")
TABLES = ("_quantized_cdf", "_offset", "_cdf_length")


@pytest.fixture(scope="module", params=["bmshj2018-hyperprior", "lite-hyperprior"])
def codec(request):
    return tiny(request.param)


def same(codec, path, name=None):
    loaded = load_codec(name or str(path), path if name else None)
    assert loaded.spec.architecture == codec.spec.architecture
    assert loaded.spec.arguments == {
        key: list(v) if isinstance(v, tuple) else v for key, v in codec.spec.arguments.items()
    }
    assert loaded.module_hashes() == codec.module_hashes()


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_taken_off(tmp_path, codec, prefix):
    state = {prefix + key: value for key, value in codec.net.state_dict().items()}
    losses = {"loss.lpips.weight": torch.ones(3), "n_averaged": torch.tensor(7)}  # Lightning's and AveragedModel's own
    torch.save({"state_dict": state | losses, "global_step": 3}, tmp_path / "epoch=3-step=100.ckpt")
    same(codec, tmp_path / "epoch=3-step=100.ckpt")


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_state_dict_is_found_in_a_training_state(tmp_path, codec, wrapper):
    state = codec.net.state_dict()
    torch.save({"epoch": 3, wrapper: state, "optimizer": {"state": {}}, "loss": 1.0}, tmp_path / "latest")
    same(codec, tmp_path / "latest")
    torch.save({"model": {wrapper: state}}, tmp_path / "nested")
    same(codec, tmp_path / "nested")


def test_weights_stand_before_their_averages(tmp_path, codec):
    averages = {key: 0.5 * value for key, value in codec.net.state_dict().items()}
    torch.save({"ema": averages, "model": codec.net.state_dict()}, tmp_path / "both.pth")
    same(codec, tmp_path / "both.pth")


def test_safetensors_of_others_under_any_name(tmp_path, codec):
    state = {f"module.{key}": value for key, value in codec.net.state_dict().items()}
    for name in ("weights.safetensors", "no-suffix", "a=b.bin"):
        save_file(state, tmp_path / name)
        same(codec, tmp_path / name)
    same(codec, tmp_path / "no-suffix", f"{codec.spec.architecture}:3")


def test_our_own_files_under_any_name(tmp_path, codec):
    save_codec(codec, tmp_path / "step=3")
    assert load_codec(str(tmp_path / "step=3")).module_hashes() == codec.module_hashes()


def test_before_update_and_in_half_precision(tmp_path, codec):
    state = codec.net.state_dict()
    empty = {key: value[:0] if key.endswith((*TABLES, "scale_table")) else value for key, value in state.items()}
    torch.save(empty, tmp_path / "empty.pth")
    same(codec, tmp_path / "empty.pth")
    torch.save({key: value for key, value in state.items() if not key.endswith(TABLES)}, tmp_path / "without.pth")
    same(codec, tmp_path / "without.pth")
    halves = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    halves["g_a.0.weight"] = 4000 * torch.ones_like(halves["g_a.0.weight"])  # finite, but for its sum in half precision
    torch.save(halves, tmp_path / "half.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the tables are those of the unrounded weights
        loaded = load_codec(str(tmp_path / "half.pth"))
    for key, value in loaded.net.state_dict().items():
        if not key.endswith((*TABLES, "scale_table")):
            assert torch.equal(value, halves[key].float() if halves[key].is_floating_point() else halves[key])
            assert value.dtype == state[key].dtype


def test_several_codecs_in_one_file_are_named(tmp_path, codec):
    state = codec.net.state_dict()
    both = {f"{prefix}.{key}": value for prefix in ("student", "teacher") for key, value in state.items()}
    torch.save(both, tmp_path / "both.pth")
    with pytest.raises(FreqdoorError, match=r"holds several codecs \(student\., teacher\.\)"):
        load_codec(str(tmp_path / "both.pth"))


def test_what_holds_no_state_dict_says_what_it_holds(tmp_path):
    torch.save({"epoch": 3, "weights_of_it": {"a": torch.ones(1)}}, tmp_path / "x.pth")
    with pytest.raises(FreqdoorError, match=r"expected a state dict .*found dict of epoch, weights_of_it"):
        load_codec(str(tmp_path / "x.pth"))


def with_tables_of(state, other):
    tables = {key: value for key, value in other.items() if key.endswith(TABLES) and "bottleneck" in key}
    assert any(not torch.equal(state[key], value) for key, value in tables.items())
    return state | tables


@pytest.mark.parametrize("name", ["lite-hyperprior:3", "factories:lite"])
def test_tables_are_computed_from_the_weights_wherever_these_come_from(tmp_path, name):
    fresh = tiny("lite-hyperprior")
    state = fresh.net.state_dict()
    with torch.no_grad():
        other = tiny("lite-hyperprior")
        other.net.entropy_bottleneck.quantiles.mul_(1.5)
        other.net.update(force=True)
    torch.save(with_tables_of(state, other.net.state_dict()), tmp_path / "stale.pth")
    torch.save(state, tmp_path / "fresh.pth")
    with pytest.warns(UserWarning, match=r"stale\.pth: its coding tables did not belong to its weights"):
        stale = load_codec(name, tmp_path / "stale.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_codec(name, tmp_path / "fresh.pth")
    assert stale.module_hashes() == loaded.module_hashes() == fresh.module_hashes()
    x = natural(1, 64, 64)
    assert stale.compress(x) == fresh.compress(x)


def test_tables_of_our_own_files_are_kept(tmp_path):
    codec = tiny("lite-hyperprior")
    with torch.no_grad():
        codec.net.entropy_bottleneck.quantiles.mul_(1.01)  # the tables are those from before
        codec.net.entropy_bottleneck.biases[0].add_(0.5)
    save_codec(codec, tmp_path / "ours.safetensors")
    assert load_codec(str(tmp_path / "ours.safetensors")).module_hashes() == codec.module_hashes()


def test_a_scale_table_of_the_file_is_its_own_and_compressais_stays_as_it_is(tmp_path):
    codec = tiny("bmshj2018-hyperprior")
    default = codec.module_hashes()
    state = codec.net.state_dict()
    torch.save(
        state | {"gaussian_conditional.scale_table": state["gaussian_conditional.scale_table"] * (1 + 1e-7)},
        tmp_path / "rounded.pth",
    )
    assert load_codec(str(tmp_path / "rounded.pth")).module_hashes() == default
    codec.net.update(scale_table=torch.linspace(0.2, 30, 20), force=True)
    torch.save(codec.net.state_dict(), tmp_path / "own.pth")
    loaded = load_codec(str(tmp_path / "own.pth"))
    assert loaded.module_hashes() == codec.module_hashes() != default
    assert loaded.net.gaussian_conditional.scale_table.numel() == 20
    assert load_codec("strange:scaled").net.gaussian_conditional.scale_table.numel() == 20


def test_keys_of_a_strangers_network_are_not_renamed(tmp_path, monkeypatch):
    """`downsample` is CompressAI's old name of a part of its own; Swin's networks have parts of that name."""
    (tmp_path / "swinlike.py").write_text(
        "import strange\nfrom torch import nn\n"
        "class Block(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.downsample = nn.Conv2d(24, 24, 1)\n"
        "    def forward(self, x):\n        return self.downsample(x)\n"
        "def make():\n    return strange.appended(Block())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    codec = load_codec("swinlike:make")
    assert "g_a.7.downsample.weight" in codec.net.state_dict()
    torch.save(codec.net.state_dict(), tmp_path / "swin.pth")
    assert load_codec("swinlike:make", tmp_path / "swin.pth").module_hashes() == codec.module_hashes()
