"""The doctor: every thing that can be wrong is found in a checkpoint made for it, and in no healthy one."""

import json
import os
import pickle
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyModel
from compressai.models import MeanScaleHyperprior
from factories import tiny
from safetensors.torch import save_file
from strange import made
from torch import nn

import freqdoor.cli as cli
from freqdoor import doctor, load_codec, save_codec
from freqdoor.codecs.adapter import Codec, hash_state
from freqdoor.codecs.architectures import CodecSpec
from freqdoor.codecs.loading import write_tensors
from freqdoor.codecs.pickles import code_in
from freqdoor.defence import behaviour
from freqdoor.defence import doctor as module
from freqdoor.defence.behaviour import Trial, threads
from freqdoor.defence.checkpoint import is_object, name_that_fits
from freqdoor.defence.checks import crops
from freqdoor.defence.doctor import Diagnosis
from freqdoor.defence.symptoms import KINDS
from freqdoor.errors import FreqdoorError
from freqdoor.samples import ASSETS, pictures
from freqdoor.training.run import Environment

PAGE = Path(__file__).parent.parent / "docs/doctor.md"
ARCHITECTURE = "bmshj2018-hyperprior"
TABLES = ("_quantized_cdf", "_offset", "_cdf_length")
FILE: dict = {}  # what is wrong with a file or its weights -> (maker of the file, name or None, what else is found)
CODEC: dict = {}  # what a codec does -> the function that finds it and a maker of the network


def in_file(what, *, named=None, besides=()):
    def register(make):
        FILE[what] = make, named, {what, *besides}
        return make

    return register


def in_codec(what, finder):
    def register(make):
        CODEC.setdefault(what, []).append((finder, make))
        return make

    return register


class Runs:
    """What a hostile file would do."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def healthy():
    """A tiny codec that looks trained."""
    codec = tiny(ARCHITECTURE)
    with torch.no_grad():
        codec.net.entropy_bottleneck.quantiles.mul_(0.9)
    codec.net.update(force=True)
    return codec


def saved(state, path):
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def sound():
    return healthy()


@pytest.fixture
def state(sound):
    return {key: value.clone() for key, value in sound.net.state_dict().items()}


@pytest.fixture
def no_pictures(monkeypatch):
    """What is wrong with a file is found without running its codec, which is what takes time."""
    monkeypatch.setattr(module, "try_out", lambda codec: ([], None))
    monkeypatch.setattr(module, "environment", Environment)


@in_file("hostile")
def _(state, path):
    return saved({"state_dict": state, "callback": Runs()}, path)


@in_file("code")
def _(state, path):
    return saved({"state_dict": state, "psnr": np.float64(30)}, path)


@in_file("truncated")
def _(state, path):
    saved(state, path)
    path.write_bytes(path.read_bytes()[:-5000])
    return path


@in_file("not-a-checkpoint")
def _(state, path):
    path.write_text("<!DOCTYPE html><html>404</html>")
    return path


@in_file("unreadable")
def _(state, path):
    return saved({"epoch": 3, "weights_of_it": state}, path)


@in_file("oversized")
def _(state, path):
    return saved({"g_a.0.weight": torch.ones(1).expand(10**6)}, path)


@in_file("header")
def _(state, path):
    spec = {"name": "x", "architecture": "lite-hyperprior", "quality": None, "arguments": {"depth": 1024}}
    save_file({"x": torch.ones(1)}, path, {"freqdoor": json.dumps({"kind": "codec", "spec": spec})})
    return path


@in_file("not-a-codec")
def _(state, path):
    return saved({"layer1.weight": torch.ones(3), "layer2.weight": torch.ones(3)}, path)


@in_file("checksum")
def _(state, path):
    content = bytearray(saved(state, path).read_bytes())
    place = content.find(state["g_a.0.bias"].numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    return path


@in_file("wrapper")
def _(state, path):
    return saved({"epoch": 3, "state_dict": state, "optimizer": {"lr": 1.0}}, path)


@in_file("prefix")
def _(state, path):
    return saved({f"module._orig_mod.{key}": value for key, value in state.items()} | {"loss": torch.ones(1)}, path)


@in_file("old-keys")
def _(state, path):
    names = {"matrices": "_matrix", "biases": "_bias", "factors": "_factor"}

    def old(key):
        return re.sub(r"(matrices|biases|factors)\.(\d)", lambda match: names[match[1]] + match[2], key)

    return saved({old(key): value for key, value in state.items()}, path)


@in_file("leftovers")
def _(state, path):
    return saved(state | {"lpips.lin0.weight": torch.ones(3)}, path)


@in_file("architecture", named="mbt2018-mean:3")
def _(state, path):
    return saved(state, path)


@in_file("width", named=f"{ARCHITECTURE}:3")
def _(state, path):
    return saved(state, path)


@in_file("shapes")
def _(state, path):
    del state["g_s.0.bias"]
    state["g_s.2.bias"] = torch.ones(7)
    return saved(state, path)


@in_file("not-finite")
def _(state, path):
    state["g_a.0.weight"][0, 0, 0, 0] = torch.nan
    state["h_s.0.bias"][0] = torch.inf
    return saved(state, path)


@in_file("whole-numbers", besides=("quantised",))
def _(state, path):
    quantiles, w = state["entropy_bottleneck.quantiles"], state["g_a.2.weight"]
    return saved(
        state
        | {
            "entropy_bottleneck.quantiles": quantiles.to(torch.int32),
            "g_a.2.weight": (127 * w / w.abs().max()).round().to(torch.int8) | 1,
        },
        path,
    )


@in_file("half-precision", besides=("stale-tables",))
def _(state, path):
    return saved({key: value.half() if value.is_floating_point() else value for key, value in state.items()}, path)


@in_file("double-precision")
def _(state, path):
    return saved(state | {"g_a.0.weight": state["g_a.0.weight"].double()}, path)


@in_file("rounded")
def _(state, path):
    return saved(state | {"g_a.2.weight": state["g_a.2.weight"].half().float()}, path)


@in_file("constant")
def _(state, path):
    return saved(state | {"h_a.0.weight": torch.full_like(state["h_a.0.weight"], 0.1)}, path)


@in_file("pruned")
def _(state, path):
    state["g_a.2.weight"][:2] = 0
    return saved(state, path)


@in_file("quantised")
def _(state, path):
    return saved(state | {"g_a.2.weight": (90 * state["g_a.2.weight"]).round() / 90}, path)


@in_file("quantiles", besides=("stale-tables",))
def _(state, path):
    state["entropy_bottleneck.quantiles"] /= 0.9
    state["entropy_bottleneck.quantiles"].round_()
    return saved(state, path)


@in_file("no-tables")
def _(state, path):
    return saved({key: value[:0] if key.endswith(TABLES) else value for key, value in state.items()}, path)


@in_file("bad-tables")
def _(state, path):
    state["entropy_bottleneck._offset"] = state["entropy_bottleneck._offset"][:-1]
    return saved(state, path)


@in_file("stale-tables")
def _(state, path):
    state["entropy_bottleneck.quantiles"] *= 1.5
    return saved(state, path)


@in_file("absurd-tables")
def _(state, path):
    state["entropy_bottleneck.quantiles"] *= 1e5
    return saved(state, path)


@in_file("two-faced", named="strange:dropout", besides=("quantiles",))
def _(state, path):
    return None


@in_file("protocol", named="factories:no_codec")
def _(state, path):
    return None


class Strange(MeanScaleHyperprior):
    """Does not what it says, one way each."""

    darker, factor, learned, shift = False, 1.0, False, None

    def forward(self, x):
        answer = super().forward(x)
        return answer | {"likelihoods": {key: value**self.factor for key, value in answer["likelihoods"].items()}}

    def decompress(self, strings, shape):
        if self.learned:
            self.g_a(torch.zeros(1, 3, 64, 64))  # which knows the number of threads
        if self.shift:
            self.gaussian_conditional.dequantize = lambda *args: self.shift(EntropyModel.dequantize(*args))
        answer = super().decompress(strings, shape)
        return {"x_hat": answer["x_hat"] * 0.5} if self.darker else answer


class Otherwise(nn.Module):
    """A layer that changes what goes through it, by a function of itself."""

    def __init__(self, change):
        super().__init__()
        self.change, self.seen = change, 1

    def forward(self, x):
        self.seen = torch.get_num_threads()
        return self.change(self, x)


def strange(**changes):
    net = made(Strange)
    for key, value in changes.items():
        setattr(net, key, value)
    return net


def with_layer(part, place, change):
    net = strange()
    getattr(net, part).insert(place, Otherwise(change))
    return net


@in_codec("decoder", behaviour.decoder)
def _():
    return strange(darker=True)


@in_codec("rate", behaviour.rate)
def _():
    return strange(factor=2.0)


@in_codec("rough-rate", behaviour.rate)
def _():
    return strange()  # untrained


@in_codec("picture", behaviour.picture)
def _():
    return with_layer("g_s", 7, lambda layer, x: x - 1)


@in_codec("modes", behaviour.modes)
def _():
    return with_layer("g_a", 1, lambda layer, x: F.dropout(x, 0.5, layer.training))


@in_codec("modes", behaviour.modes)
def _():
    return with_layer("g_a", 7, lambda layer, x: x / x.abs().max() * 0.49)  # nothing is left of it by rounding


@in_codec("threads", behaviour.thread_count)
def _():
    return with_layer("g_s", 7, lambda layer, x: x + 0.02 * (layer.seen - 1))


@in_codec("threads", behaviour.thread_count)
def _():
    net = with_layer("h_s", 5, None)
    net.g_a.insert(0, Otherwise(lambda layer, x: x))
    net.learned = True
    net.h_s[5].change = lambda layer, x: x + 9 * (net.g_a[0].seen - 1)
    return net


@in_codec("threads", behaviour.thread_count)
def _():
    net = with_layer("g_a", 0, lambda layer, x: x)
    net.learned = True
    net.shift = lambda y_hat: y_hat + 1e-6 * (net.g_a[0].seen - 1)  # the same symbols, and nearly the same picture
    return net


@in_codec("dead-channels", behaviour.dead_channels)
def _():
    return with_layer("g_a", 7, lambda layer, x: x * torch.tensor([0.0] * 2 + [5.0] * 22)[:, None, None])


def whats(diagnosis):
    return {row.what for row in diagnosis.symptoms}


def test_every_kind_has_a_checkpoint():
    assert FILE.keys() | CODEC.keys() == KINDS.keys()
    assert not FILE.keys() & CODEC.keys()


@pytest.mark.parametrize("what", FILE)
def test_what_is_wrong_with_a_file_is_found_and_nothing_else(what, state, tmp_path, no_pictures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, name, expected = FILE[what]
    path = make(state, tmp_path / "x.pth")
    diagnosis = doctor(name, path) if name else doctor(path)
    assert whats(diagnosis) == expected
    assert not (tmp_path / "ran").exists()
    assert diagnosis.judged == (what not in CANNOT_BE_JUDGED)
    fatal = any(KINDS[row].severity != "note" for row in expected)
    assert diagnosis.exit_code == (2 if not diagnosis.judged else int(fatal))
    assert all(str(tmp_path) not in row.said and row.where for row in diagnosis.symptoms)


CANNOT_BE_JUDGED = {
    *("hostile", "code", "truncated", "not-a-checkpoint", "unreadable", "oversized", "header", "not-a-codec"),
    "protocol",
}


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_nothing_is_wrong_with_a_sound_file(state, sound, tmp_path, no_pictures, save):
    save(state, tmp_path / "x")
    assert doctor(tmp_path / "x").symptoms == ()
    save_codec(sound, tmp_path / "ours.safetensors")
    ours = doctor(tmp_path / "ours.safetensors")
    assert (ours.symptoms, ours.exit_code, ours.verdict) == ((), 0, "healthy")


def trial(net):
    return Trial(Codec(net, CodecSpec(name="x", architecture="strange:x")).prepare(), crops(pictures(), 64, 1))


@pytest.mark.parametrize(("what", "i"), [(what, i) for what, makers in CODEC.items() for i in range(len(makers))])
def test_what_a_codec_does_is_found(what, i):
    finder, make = CODEC[what][i]
    subject = trial(make())
    before, number = hash_state(subject.codec), torch.get_num_threads()
    found = list(finder(subject))
    assert {row.what for row in found} == {what}
    assert hash_state(subject.codec) == before
    assert torch.get_num_threads() == number


def test_noise_that_is_much_better_than_rounding_is_found():
    subject = trial(strange())
    [answer] = subject.estimated
    subject.__dict__["noisy"] = [answer._replace(x_hat=subject.pictures[0])]
    [row] = behaviour.modes(subject)
    assert "dB" in row.said
    subject.__dict__["noisy"] = [answer._replace(bits=2.5 * answer.bits)]
    assert len(list(behaviour.modes(subject))) == 1
    subject.__dict__["noisy"] = [answer._replace(bits=1.5 * answer.bits)]
    assert list(behaviour.modes(subject)) == []


def test_nothing_is_found_where_a_codec_does_what_it_says():
    subject = trial(strange(factor=0.8))  # so that the estimate of an untrained network is right
    finders = (behaviour.decoder, behaviour.rate, behaviour.modes, behaviour.thread_count)
    assert [row for finder in finders for row in finder(subject)] == []


@pytest.mark.whole
def test_the_bundled_codec_is_healthy():
    diagnosis = doctor("lite-hyperprior:3")
    assert (diagnosis.symptoms, diagnosis.unexamined, diagnosis.exit_code) == ((), None, 0)
    seen = diagnosis.behaviour
    assert seen.dead_channels == ()
    assert seen.bpp_real == pytest.approx(seen.bpp_estimated, rel=0.02)
    assert 29 < seen.psnr_db < 31


def test_behaviours_are_looked_at_together(monkeypatch):
    """All findings come in one run, those of a network that raises too."""
    monkeypatch.setattr(behaviour, "SIDE", 64)
    monkeypatch.setattr(behaviour, "PICTURES", 1)
    net = strange(factor=2.0, darker=True)
    found, seen = behaviour.try_out(trial(net).codec)
    assert {"rate", "decoder", "picture"} <= {row.what for row in found}
    assert seen.channels == 24
    net.g_a[0].forward = lambda x: x.reshape(3)
    found, seen = behaviour.try_out(trial(net).codec)
    assert {row.what for row in found} == {"decoder"}
    assert "RuntimeError" in found[0].said
    assert seen is None


def test_everything_comes_at_once_and_what_can_be_mended_is(state, sound, tmp_path, no_pictures):
    old = {key.replace(".matrices.", "._matrix"): value for key, value in state.items()}
    wrapped = {f"model.{key}": value for key, value in old.items() if not key.endswith(TABLES)}
    saved({"model": wrapped | {"loss": torch.ones(1)}, "epoch": 1}, tmp_path / "x.ckpt")
    diagnosis = doctor(tmp_path / "x.ckpt", fix=tmp_path / "y.safetensors", out=tmp_path / "report.json")
    assert whats(diagnosis) == {"wrapper", "prefix", "old-keys", "no-tables"}
    assert "under model, beside epoch" in diagnosis.symptoms[0].said
    assert "more beside it (loss)" in diagnosis.symptoms[1].said
    assert set(diagnosis.mended) == whats(diagnosis)
    assert diagnosis.exit_code == 0
    assert Diagnosis.read(tmp_path / "report.json", "a report") == diagnosis
    mended = load_codec(str(tmp_path / "y.safetensors"))
    assert mended.module_hashes() == sound.module_hashes()
    assert doctor(tmp_path / "y.safetensors").symptoms == ()
    doctor(tmp_path / "x.ckpt", fix=tmp_path / "y.safetensors", out=tmp_path / "report.json")  # its own files
    save_codec(sound, tmp_path / "y.safetensors")
    with pytest.raises(FreqdoorError, match=r"y\.safetensors: this file is there and .* did not make it"):
        doctor(tmp_path / "x.ckpt", fix=tmp_path / "y.safetensors")


def test_what_cannot_be_mended_is_not_written(state, tmp_path, no_pictures):
    saved({f"module.{key}": 0 * value for key, value in state.items()}, tmp_path / "x.pth")
    diagnosis = doctor(tmp_path / "x.pth", fix=tmp_path / "y.safetensors")
    assert {"prefix", "constant"} <= whats(diagnosis)
    assert diagnosis.mended == ()
    assert "constant" in diagnosis.fix
    assert diagnosis.exit_code == 1
    sound = saved(state, tmp_path / "sound.pth")
    assert doctor(sound, fix=tmp_path / "y.safetensors").fix == "nothing was written: there is nothing to mend"
    with pytest.raises(FreqdoorError, match="would overwrite the original"):
        doctor(sound, fix=sound)
    with pytest.raises(FreqdoorError, match="expected two files"):
        doctor(sound, fix=tmp_path / "z", out=tmp_path / "z")
    assert not (tmp_path / "y.safetensors").exists()


def test_metadata_of_a_tampered_codec_survives_mending(sound, tmp_path, no_pictures):
    with torch.no_grad():
        codec = healthy()
        codec.net.entropy_bottleneck.quantiles.mul_(1.5)
    save_codec(codec, tmp_path / "x.safetensors", tampered=True)
    assert doctor(tmp_path / "x.safetensors", fix=tmp_path / "y.safetensors").mended == ("stale-tables",)
    assert load_codec(str(tmp_path / "y.safetensors")).tampered


def test_good_tables_of_our_own_files_are_kept_and_a_codec_stays_as_it_was(tmp_path, no_pictures):
    codec = healthy()
    codec.net.entropy_bottleneck._quantized_cdf[0, 3] += 1  # as another machine rounds
    before = hash_state(codec)
    assert doctor(codec).symptoms == ()
    header = {"kind": "codec", "spec": asdict(codec.spec)}
    state = codec.net.state_dict()
    write_tensors(tmp_path / "x", state | {"g_a.0.weight": state["g_a.0.weight"].double()}, header)
    assert doctor(tmp_path / "x", fix=tmp_path / "y").mended == ("double-precision",)
    assert hash_state(load_codec(str(tmp_path / "y"))) == before
    codec.net.entropy_bottleneck._quantized_cdf[0, 3] += 100
    before = hash_state(codec)
    assert whats(doctor(codec)) == {"stale-tables"}
    assert hash_state(codec) == before


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_name_in_a_pickle_is_seen_and_nothing_runs(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps([Runs(), {"a": (eval, Runs())}, np.float64(1)], protocol)
    (tmp_path / "x").write_bytes(content)
    names = code_in(tmp_path / "x")
    assert {os.system.__module__ + ".system"} < set(names)
    assert any(name.endswith(".eval") for name in names)
    assert any("multiarray" in name for name in names)
    diagnosis = doctor(tmp_path / "x")
    assert whats(diagnosis) == {"hostile"}
    assert diagnosis.symptoms[0].where == names
    (tmp_path / "x").write_bytes(content[:-30])  # what comes first would have run
    assert whats(doctor(tmp_path / "x")) == {"hostile"}
    assert not (tmp_path / "ran").exists()


NAME = b"\x80\x04\x8c\x02os\x8c\x06system"  # two texts on the stack


@pytest.mark.parametrize(
    "decoy",
    [
        b"",
        b"\x8c\x0bcollections\x8c\x0bOrderedDict00",  # pushed and popped
        b"](K\x01e0",  # a list that takes a number from above a mark
        b"(K\x01K\x021",  # all above a mark
        b"(\x8c\x01x\x8c\x01y0t0",
        b"\x8c\x0bOrderedDict200",  # doubled, and popped twice
    ],
)
def test_names_that_are_put_together_on_the_stack_are_seen(tmp_path, decoy):
    (tmp_path / "x").write_bytes(NAME + decoy + b"\x93.")
    assert code_in(tmp_path / "x") == ("os.system",)


def test_code_is_seen_in_files_of_old_versions_of_pytorch(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state, "callback": Runs()}, tmp_path / "x", _use_new_zipfile_serialization=False)
    assert whats(doctor(tmp_path / "x")) == {"hostile"}
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "known"),
    [
        *(("numpy.core.multiarray.scalar", True), ("argparse.Namespace", True), ("__main__.Net", True)),
        *(("compressai.models.google.ScaleHyperprior", True), ("torch.nn.modules.conv.Conv2d", True)),
        *(("posix.system", False), ("builtins.eval", False), ("__builtin__.eval", False), ("torch.hub.load", False)),
        *(("numpy.testing._private.utils.runstring", False), ("subprocess.Popen", False), ("runpy.run_path", False)),
    ],
)
def test_objects_of_training_programs_are_told_from_what_runs_programs(name, known):
    assert is_object(name) == known


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("part", [0.05, 0.6, 0.95])
def test_files_that_are_cut_are_truncated(state, tmp_path, kind, part):
    path = tmp_path / "x"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    assert whats(doctor(path)) == {"truncated"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        (b"\x89PNG\r\n\x1a\n" + bytes(90), "picture"),
        (b"checkpoints are at\nhttps://example.org\n", "a text"),
        (b"\x1f\x8b\x08" + bytes(90), "gzip"),
        (bytes(90), "not a readable"),
    ],
)
def test_other_files_are_named(tmp_path, content, said):
    (tmp_path / "x.pth").write_bytes(content)
    [row] = doctor(tmp_path / "x.pth").symptoms
    assert row.what == "not-a-checkpoint"
    assert said in row.said


def test_the_name_that_fits_is_said(state, tmp_path, no_pictures):
    def spec(architecture, **arguments):
        return CodecSpec(name="x", architecture=architecture, arguments=arguments)

    assert name_that_fits(spec("bmshj2018-hyperprior", N=192, M=320)) == "bmshj2018-hyperprior:6 to 8"
    assert name_that_fits(spec("cheng2020-anchor", N=128)) == "cheng2020-anchor:1 to 3"
    assert name_that_fits(spec("mbt2018", N=7, M=9)) == "mbt2018 with N=7, M=9"
    path = saved(state, tmp_path / "x.pth")
    [row] = doctor("mbt2018-mean:3", path).symptoms
    assert "they are of bmshj2018-hyperprior with N=16, M=24" in row.said
    assert row.remedy == "pass the file without a name"
    [row] = doctor("bmshj2018-hyperprior:3", path).symptoms
    assert "has N=128, M=192, the weights have N=16, M=24" in row.said


def test_a_planted_encoder_alone_several_codecs_and_what_is_not_there(state, tmp_path):
    [row] = doctor(ASSETS / "planted-bpp.safetensors").symptoms
    assert (row.what, "planted encoder" in row.said) == ("not-a-codec", True)
    both = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in state.items()}
    [row] = doctor(saved(both, tmp_path / "both.pth")).symptoms
    assert (row.what, "student., teacher." in row.said) == ("not-a-codec", True)
    with pytest.raises(FreqdoorError, match="found nothing there"):
        doctor(tmp_path / "x.pth")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FreqdoorError, match="device or a pipe"):
        doctor("lite-hyperprior:3", tmp_path / "pipe")


def test_threads_come_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), threads(before + 1):
        1 / (torch.get_num_threads() - before - 1)
    assert torch.get_num_threads() == before


def test_the_page_lists_every_kind():
    rows = re.findall(
        r"^\| `([a-z-]+)` \| (fatal|wrong|note) \| (.*?) \|(?: (yes))? \|$", PAGE.read_text(), re.MULTILINE
    )
    assert {what: (severity, bool(mended)) for what, severity, _, mended in rows} == {
        what: (kind.severity, kind.mended) for what, kind in KINDS.items()
    }
    assert len(rows) == len(KINDS)


@pytest.mark.whole
def test_the_commands_of_the_page(state, tmp_path, monkeypatch, capsys, no_pictures):
    monkeypatch.chdir(tmp_path)
    saved({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "epoch-9.ckpt")
    saved({"state_dict": state, "callback": Runs()}, tmp_path / "hostile.pth")
    [block] = re.findall(r"<!-- doctor -->\n```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    codes = []
    for line in [*block.splitlines(), "freqdoor doctor hostile.pth"]:
        monkeypatch.setattr("sys.argv", shlex.split(line))
        with pytest.raises(SystemExit) as end:
            cli.main()
        codes.append(end.value.code)
    said = capsys.readouterr().out
    assert codes == [1, 0, 0, 2], said
    assert 'wrong: prefix: "module." of a wrapper' in said
    assert "fatal: hostile: " in said
    assert "mended.safetensors: healthy" in said
    assert not (tmp_path / "ran").exists()
    assert json.loads((tmp_path / "report.json").read_text())["symptoms"][0]["what"] == "wrapper"


class Averaging(nn.Module):
    """Keeps a mean while it trains, and raises if it is asked to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.broken = False

    def forward(self, x):
        if self.training:
            self.mean += x.mean()
            if self.broken:
                raise ValueError("no training")
        return x


@pytest.mark.parametrize("broken", [False, True])
def test_train_mode_leaves_no_trace(broken):
    net = strange()
    net.g_a.append(Averaging())
    subject = trial(net)
    net.g_a[-1].broken = broken
    modes = [part.training for part in subject.codec.modules()]
    if broken:
        with pytest.raises(FreqdoorError, match="no training"):
            list(behaviour.modes(subject))
    else:
        assert list(behaviour.modes(subject)) == []
    assert net.g_a[-1].mean == 0
    assert [part.training for part in subject.codec.modules()] == modes
