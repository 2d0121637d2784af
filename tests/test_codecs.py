import importlib
import pickle
from pathlib import Path

import pytest
import torch
from compressai.layers import MaskedConv2d
from conftest import natural
from factories import TINY_ARGUMENTS, tiny

from freqdoor import load_codec, save_codec
from freqdoor.codecs.adapter import Codec, build_codec
from freqdoor.codecs.architectures import ARCHITECTURES, CodecSpec, parse_name
from freqdoor.codecs.loading import write_tensors
from freqdoor.errors import FreqdoorError
from freqdoor.metrics import psnr_8bit
from freqdoor.samples import ASSETS, BUNDLED

pytestmark = pytest.mark.whole

THREADS = torch.get_num_threads()
eval_model = importlib.import_module("compressai.utils.eval_model.__main__")
torch.set_num_threads(THREADS)  # importing eval_model sets it to one

COMPRESSAIS = [architecture for architecture in ARCHITECTURES if architecture != "lite-hyperprior"]
CONTEXT_MODELS = [name for name in ARCHITECTURES if name.startswith(("cheng2020", "elic2022")) or name == "mbt2018"]


def checkpoint(tmp_path: Path, architecture: str, wrap: str | None = None) -> Path:
    state = tiny(architecture).net.state_dict()
    if wrap == "DataParallel":
        state = {f"module.{key}": value for key, value in state.items()}
    elif wrap:
        state = {"epoch": 3, wrap: state, "loss": 1.0}
    path = tmp_path / f"{architecture}.pth.tar"
    torch.save(state, path)
    return path


@pytest.mark.parametrize("architecture", COMPRESSAIS)
@pytest.mark.parametrize("size", [(64, 128), (75, 50)], ids=["aligned", "odd"])
def test_figures_equal_compressais_eval_model(tmp_path, monkeypatch, architecture, size):
    x = natural(5, *size)
    path = checkpoint(tmp_path, architecture, "state_dict")
    codec = load_codec(str(path))
    if architecture in eval_model.architectures:
        theirs = eval_model.load_checkpoint(architecture, False, str(path))
    else:
        theirs = codec.net
    bitstream = codec.compress(x)[0]
    x_hat = codec.decompress(bitstream)
    # eval_model cannot take MS-SSIM of pictures below 161 pixels
    monkeypatch.setattr("compressai.utils.eval_model.__main__.ms_ssim", lambda *a, **k: torch.zeros(()))
    expected = eval_model.inference(theirs, x[0])
    # its estimate does not pad
    estimated = eval_model.inference_entropy_estimation(theirs, x[0])["bpp"] if size[0] % 64 == 0 else None
    assert 8 * bitstream.num_bytes / (size[0] * size[1]) == expected["bpp"]
    assert float(psnr_8bit(x_hat, x)) == pytest.approx(expected["psnr-rgb"], abs=1e-3)
    if estimated is not None:
        with torch.no_grad():
            assert float(codec(x).bpp) == pytest.approx(estimated, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("architecture", COMPRESSAIS)
@pytest.mark.parametrize("wrap", [None, "DataParallel"])  # the others: test_checkpoints.py
def test_checkpoints_of_every_shape_find_their_architecture(tmp_path, architecture, wrap):
    codec = load_codec(str(checkpoint(tmp_path, architecture, wrap)))
    assert codec.spec.architecture == architecture
    assert codec.spec.arguments == TINY_ARGUMENTS[architecture]
    assert type(codec.net) is ARCHITECTURES[architecture].network
    save_codec(codec, tmp_path / "again.safetensors")
    again = load_codec(str(tmp_path / "again.safetensors"))
    assert type(again.net) is ARCHITECTURES[architecture].network
    assert again.module_hashes() == codec.module_hashes()


def test_old_entropy_bottleneck_keys_are_mapped(tmp_path):
    path = checkpoint(tmp_path, "bmshj2018-hyperprior")
    state = torch.load(path, weights_only=True)
    old = {}
    for key, value in state.items():
        for name in ("matrices", "biases", "factors"):
            key = key.replace(f"entropy_bottleneck.{name}.", f"entropy_bottleneck._{name}.")
        old[key] = value
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "old.pth")
    new, mapped = load_codec(str(path)), load_codec(str(tmp_path / "old.pth"))
    assert new.module_hashes() == mapped.module_hashes()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (64, 64), (75, 50), (130, 200)])
@pytest.mark.parametrize("name", ["factories:lite", "factories:hyperprior"])
def test_decoding_the_bytes_gives_what_the_network_gives(name, height, width):
    codec, x = load_codec(name), natural(6, height, width)
    bitstream = codec.compress(x)[0]
    with torch.no_grad():
        expected = codec(x).x_hat.clamp(0, 1)
    torch.testing.assert_close(codec.decompress(bitstream), expected, atol=1e-5, rtol=0)
    assert bitstream.image_size == (height, width)


def test_batches_are_compressed_one_by_one(codec, x):
    together = codec.compress(x)
    assert together == [codec.compress(image[None])[0] for image in x]


def test_precision_is_that_of_g_a_and_g_s_only(codec, x):
    codec.eval()
    with torch.no_grad():
        plain = codec(x)
        codec.precision = torch.bfloat16
        cast = codec(x)
        codec.precision = torch.float32
        again = codec(x)
    assert torch.equal(plain.x_hat, again.x_hat)
    assert not torch.equal(plain.x_hat, cast.x_hat)
    torch.testing.assert_close(plain.x_hat, cast.x_hat, atol=0.05, rtol=0)
    assert cast.x_hat.dtype == cast.bits.dtype == torch.float32


def test_hashes_see_every_bit(codec):
    before = codec.module_hashes()
    with torch.no_grad():
        weight = codec.net.g_s[0].weight
        weight[0, 0, 0, 0] += 1e-7 * weight[0, 0, 0, 0].abs() + 1e-9
    after = codec.module_hashes()
    assert [name for name in before if before[name] != after[name]] == ["g_s"]


@pytest.mark.parametrize("architecture", ["cheng2020-anchor-checkerboard", "mbt2018"], ids=["nested h_a", "h_a"])
def test_every_entry_of_the_state_dict_counts_in_exactly_one_hash(architecture):
    codec = tiny(architecture)
    before, decoder = codec.module_hashes(), codec.decoder_hash
    for key, tensor in codec.net.state_dict().items():
        kept = tensor.clone()
        with torch.no_grad():
            tensor.view(-1)[0] += 1
        after = codec.module_hashes()
        part = "h_a" if "h_a" in key.split(".") else key.split(".")[0]
        assert [name for name in before if before[name] != after[name]] == [part]
        assert (codec.decoder_hash != decoder) == (part not in ("g_a", "h_a"))
        with torch.no_grad():
            tensor.copy_(kept)
    assert codec.module_hashes() == before


def test_a_tensor_of_the_network_itself_is_hashed(codec):
    codec.net.gain = torch.nn.Parameter(torch.ones(3))
    before, decoder = codec.module_hashes(), codec.decoder_hash
    with torch.no_grad():
        codec.net.gain[1] = 2
    after = codec.module_hashes()
    assert [name for name in before if before[name] != after[name]] == ["gain"]
    assert codec.decoder_hash != decoder


def test_h_a_is_found_where_it_is_nested(x):
    codec = tiny("elic2022-official").freeze("g_a+h_a").train()
    trained = {name for name, p in codec.net.named_parameters() if p.requires_grad}
    wanted = ("g_a.", "latent_codec.hyper.h_a.")
    assert trained == {name for name, _ in codec.net.named_parameters() if name.startswith(wanted)}
    codec(x).bits.sum().backward()
    assert all(p.grad is not None for p in codec.part("h_a").parameters())
    with pytest.raises(FreqdoorError, match=r"expected one submodule h_a, found none.*such as g_a"):
        tiny("bmshj2018-factorized").freeze("g_a+h_a")
    codec.net.latent_codec.h_a = torch.nn.Identity()
    with pytest.raises(FreqdoorError, match=r"found latent_codec\.hyper\.h_a, latent_codec\.h_a"):
        codec.part("h_a")


def test_entropy_models_nested_in_a_latent_codec_must_be_in_the_codecs_mode(x):
    codec = tiny("elic2022-chandelier").train()
    codec.net.latent_codec.y.latent_codec["y1"].y.gaussian_conditional.eval()
    with pytest.raises(FreqdoorError, match=r"y1\.y\.gaussian_conditional is in eval mode and the codec is not"):
        codec(x)


@pytest.mark.long
@pytest.mark.parametrize("architecture", CONTEXT_MODELS)
def test_a_pass_changes_no_weight_of_a_loaded_codec(tmp_path, x, architecture):
    codec = tiny(architecture)
    masked = next(m for m in codec.net.modules() if isinstance(m, MaskedConv2d))
    torch.nn.init.ones_(masked.weight)  # as an optimiser's last step leaves it: not masked
    torch.save(codec.net.state_dict(), tmp_path / "codec.pth")
    save_codec(codec, tmp_path / "codec.safetensors")
    assert codec.module_hashes() == load_codec(str(tmp_path / "codec.safetensors")).module_hashes()
    for name in ("codec.pth", "codec.safetensors"):
        loaded = load_codec(str(tmp_path / name))
        before = loaded.module_hashes()
        loaded.compress(x)
        loaded(x)
        loaded.train()(x)
        assert loaded.module_hashes() == before


@pytest.mark.parametrize("architecture", CONTEXT_MODELS)
def test_context_models_code_deterministically(tmp_path, architecture):
    codec, x = tiny(architecture), natural(6, 50, 70)
    bitstream = codec.compress(x)[0]
    save_codec(codec, tmp_path / "codec.safetensors")
    again = load_codec(str(tmp_path / "codec.safetensors"))
    assert codec.compress(x)[0] == again.compress(x)[0] == bitstream
    assert torch.equal(again.decompress(bitstream), codec.decompress(bitstream))
    padded = torch.nn.functional.pad(x, (29, 29, 7, 7))  # the decoder finds every latent that the encoder meant
    with torch.no_grad():
        output = codec.net.compress(padded)
        expected = codec.net.decompress(output["strings"], output["shape"])["x_hat"]
    assert [s[0] for s in output["strings"]] == list(bitstream.strings)
    assert torch.equal(codec.decompress(bitstream), expected[..., 7:-7, 29:-29])


def test_names():
    spec = parse_name("cheng2020-anchor:3")
    assert spec == CodecSpec(
        name="cheng2020-anchor:3", architecture="cheng2020-anchor", quality=3, arguments={"N": 128}
    )
    assert spec.lmbda == 0.0067
    assert parse_name("bmshj2018-hyperprior:8").arguments == {"N": 192, "M": 320}
    assert parse_name("elic2022-official:4").lmbda == 0.0130
    for wrong in ("cheng2020", "cheng2020-anchor", "cheng2020-anchor:9", "no/such.thing"):
        with pytest.raises(FreqdoorError, match="expected a"):
            parse_name(wrong)


@pytest.mark.parametrize("architecture", [name for name, row in ARCHITECTURES.items() if row.defaults])
def test_names_without_published_widths_stand_for_compressais_defaults(architecture):
    theirs = ARCHITECTURES[architecture].network()
    found = (
        {"N": theirs.g_a[0].weight.shape[0]} if architecture.startswith("elic") else {"N": theirs.g_a[-1].out_channels}
    )
    if architecture.startswith("elic"):
        found |= {"M": theirs.g_s[0].conv_b[-1].out_channels, "groups": theirs.groups}
    assert parse_name(f"{architecture}:3").arguments == found


def test_bundled_codec_loads():
    codec = load_codec(BUNDLED)
    assert not codec.tampered
    assert codec.spec.lmbda == 0.0067


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    proof = tmp_path / "it ran"
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps(Bomb(proof)))
    torch.save({"state_dict": Bomb(proof)}, tmp_path / "bomb.pth.tar")
    for name in ("bomb.pth", "bomb.pth.tar"):
        with pytest.raises(FreqdoorError, match=r"refused|not a readable"):
            load_codec(str(tmp_path / name))
    assert not proof.exists()


def test_wrong_files(tmp_path, codec):
    path = checkpoint(tmp_path, "bmshj2018-hyperprior")
    with pytest.raises(FreqdoorError, match="do not fit cheng2020-anchor"):
        load_codec("cheng2020-anchor:3", path)
    with pytest.raises(FreqdoorError, match="do not fit factories:lite"):
        load_codec("factories:lite", path)
    with pytest.raises(FreqdoorError, match="found nothing there"):
        load_codec(str(tmp_path / "absent.pth.tar"))
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FreqdoorError, match="not a readable"):
        load_codec(str(tmp_path / "cut.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(FreqdoorError, match="expected a state dict"):
        load_codec(str(tmp_path / "list.pth"))
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pth")
    groups = {f"latent_codec.y.latent_codec.y{k}.context_prediction.weight": torch.ones(2, 1) for k in range(99)}
    torch.save({"g_a.0.weight": torch.ones(16, 3, 5, 5)} | groups, tmp_path / "groups.pth")
    with pytest.raises(FreqdoorError, match="do not fit"):
        load_codec(str(tmp_path / "groups.pth"))
    with pytest.raises(FreqdoorError, match="do not fit"):
        load_codec(str(tmp_path / "other.pth"))
    save_codec(codec, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    with pytest.raises(FreqdoorError, match="not a readable safetensors"):
        load_codec(str(tmp_path / "cut.safetensors"))
    for name in ("", "mbt2018:1"):
        with pytest.raises(FreqdoorError, match=r"made for factories:lite, which is code of its own"):
            load_codec(*((name, tmp_path / "whole.safetensors") if name else (str(tmp_path / "whole.safetensors"),)))
    with pytest.raises(FreqdoorError, match=r"made for lite-hyperprior, not for mbt2018"):
        load_codec("mbt2018:1", ASSETS / "lite-hyperprior-3.safetensors")
    torch.save({1: torch.ones(2)}, tmp_path / "numbers.pth")
    with pytest.raises(FreqdoorError, match="expected a state dict"):
        load_codec(str(tmp_path / "numbers.pth"))
    write_tensors(tmp_path / "half.safetensors", {"a": torch.ones(1)}, {"kind": "planted encoder"})
    with pytest.raises(FreqdoorError, match="holds planted encoder, not a whole codec"):
        load_codec(str(tmp_path / "half.safetensors"))


def test_nan_weights_are_refused(tmp_path, codec):
    with torch.no_grad():
        codec.net.g_s[0].bias[0] = float("nan")
    save_codec(codec, tmp_path / "nan.safetensors")
    with pytest.raises(FreqdoorError, match=r"NaN or infinite weights in g_s\.0\.bias"):
        load_codec("factories:lite", tmp_path / "nan.safetensors")


STRANGE = ({"quality": 11}, {"quality": [3]}, {"arguments": [1]}, {"arguments": 3}, {"architecture": ["a"]})


@pytest.mark.parametrize(
    "spec",
    [
        None,
        3,
        {},
        {"name": "x", "architecture": "lite-hyperprior", "colour": 1},
        {"name": "x", "architecture": "os:system", "arguments": {"command": "touch ran"}},
        {"name": "x", "architecture": "lite-hyperprior", "arguments": {"N": 10**9}},
        {"name": "x", "architecture": "lite-hyperprior", "arguments": {"N": "a"}},
        {"name": "x", "architecture": "lite-hyperprior", "arguments": {"P": 3}},
        *({"name": "x", "architecture": "lite-hyperprior"} | wrong for wrong in STRANGE),
        {"name": "x", "architecture": "elic2022-official", "arguments": {"N": 16, "M": 1024, "groups": [1] * 1024}},
        {"name": "x", "architecture": "elic2022-official", "arguments": {"N": 16, "M": 24, "groups": [[4, 20]]}},
        {"name": "x", "architecture": "elic2022-official", "arguments": {"N": 16, "M": 24, "groups": [4, 4]}},
        {"name": "x", "architecture": "elic2022-chandelier", "arguments": {"N": 16, "M": 24, "groups": 24}},
        {"name": "x", "architecture": "elic2022-chandelier", "arguments": {"N": 16, "M": 24}},
    ],
)
def test_headers_of_strangers_run_nothing_and_end_in_a_sentence(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {"kind": "codec", "spec": spec})
    with pytest.raises(FreqdoorError, match=r"x\.safetensors|wrong arguments"):
        load_codec(str(tmp_path / "x.safetensors"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("factories:with_batchnorm", r"g_a.* \(BatchNorm2d\) behaves differently"),
        ("factories:no_codec", "found no g_a"),
        ("factories:absent", "could not import"),
        ("no.module:f", "could not import"),
    ],
)
def test_unsuitable_factories(name, match):
    with pytest.raises(FreqdoorError, match=match):
        load_codec(name)


def test_untrained_name_without_weights_is_explained():
    with pytest.raises(FreqdoorError, match="no trained weights are bundled"):
        load_codec("lite-hyperprior:5")


def test_build_codec_is_random_and_whole():
    assert isinstance(build_codec(parse_name("lite-hyperprior:3")), Codec)
