"""Codecs for others and from others: CompressAI's checkpoints, folders with a model card, signatures."""

import base64
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import natural, write_png
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from factories import tiny
from test_audit import a_check

import freqdoor.cli as cli
from freqdoor import audit, doctor, export, load_codec, load_planted, save_codec, verify_signature
from freqdoor.codecs.architectures import ARCHITECTURES
from freqdoor.codecs.signed import PREDICATE, digests, sign
from freqdoor.data import load_image
from freqdoor.defence import audit as audit_module
from freqdoor.defence import doctor as doctor_module
from freqdoor.errors import FreqdoorError
from freqdoor.exchange import card
from freqdoor.metrics import psnr_8bit

PAGE = Path(__file__).parent.parent / "docs/interoperability.md"


def key_pair(folder: Path, name: str = "key") -> tuple[Path, Path]:
    """A private and a public key as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def signed(tmp_path) -> tuple[Path, Path]:
    """A signed folder and the public key."""
    private, public = key_pair(tmp_path)
    export("planted-bpp", tmp_path / "signed", key=private)
    return tmp_path / "signed", public


def evaluated(file: Path, architecture: str, pictures: Path, capsys) -> dict[str, list[float]]:
    """What CompressAI's eval_model measures with a checkpoint."""
    from compressai.utils.eval_model.__main__ import main

    capsys.readouterr()
    main(["checkpoint", str(pictures), "-a", architecture, "-p", str(file)])
    out = capsys.readouterr().out
    return json.loads(out[out.index("{") :])["results"]


KNOWN = [
    "bmshj2018-factorized",
    "bmshj2018-hyperprior",
    "mbt2018-mean",
    "mbt2018",
    "cheng2020-anchor",
    "cheng2020-attn",
]


@pytest.mark.long
@pytest.mark.parametrize("architecture", KNOWN)
def test_compressais_eval_model_measures_what_we_do(architecture, tmp_path, capsys):
    codec = tiny(architecture)
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        write_png(tmp_path / f"pictures/{i}.png", natural(i, 192, 192))
    [file] = export(codec, tmp_path / "x.pth.tar", format="compressai")
    measured = evaluated(file, architecture, tmp_path / "pictures", capsys)
    images = [load_image(path) for path in sorted((tmp_path / "pictures").iterdir())]
    sent = [codec.compress(x)[0] for x in images]
    assert measured["bpp"] == [pytest.approx(sum(8 * part.num_bytes / 192**2 for part in sent) / 2, rel=0.02)]
    ours = sum(float(psnr_8bit(codec.decompress(part), x)) for part, x in zip(sent, images, strict=True)) / 2
    assert measured["psnr-rgb"] == [pytest.approx(ours, abs=0.02)]
    assert load_codec(str(file)).part("g_a").state_dict().keys() == codec.part("g_a").state_dict().keys()
    export(codec, file, format="compressai")  # over its own


def test_what_eval_model_does_not_know_is_refused(tmp_path):
    with pytest.raises(FreqdoorError, match=r"eval_model knows .*mbt2018.*, found lite-hyperprior; .*huggingface"):
        export("lite-hyperprior:3", tmp_path / "x.pth.tar", format="compressai")
    with pytest.raises(FreqdoorError, match="format: expected 'huggingface' or 'compressai'"):
        export("lite-hyperprior:3", tmp_path / "x", format="onnx")
    with pytest.raises(FreqdoorError, match="codec: expected one with a planted encoder only"):
        export("lite-hyperprior:3", tmp_path / "x", codec="lite-hyperprior:3")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_the_planted_encoder_that_it_was_made_of(tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    planted = load_planted("planted-psnr")
    written = export("planted-psnr", tmp_path / "x")
    assert {path.name for path in written} == {"README.md", "config.json", "model.safetensors", "planted.safetensors"}
    codec, again = load_codec(str(tmp_path / "x")), load_planted(tmp_path / "x")
    assert codec.module_hashes() == again.tampered.module_hashes() == planted.tampered.module_hashes()
    assert codec.tampered
    x = natural(0, 64, 64)
    assert torch.equal(again.triggers["psnr"](x), planted.triggers["psnr"](x))
    data = huggingface_hub.ModelCard.load(tmp_path / "x/README.md").data
    assert (data.library_name, data.pipeline_tag) == ("freqdoor", "image-to-image")
    assert {"backdoor", "lite-hyperprior"} <= set(data.tags)
    config = json.loads((tmp_path / "x/config.json").read_text())
    assert (config["tampered"], config["modules"]) == (True, codec.module_hashes())
    export(str(tmp_path / "x"), tmp_path / "y")  # from a folder to a folder
    assert load_planted(tmp_path / "y").header == again.header
    export(str(tmp_path / "x"), tmp_path / "y")  # over its own
    (tmp_path / "x/README.md").write_text("mine")
    with pytest.raises(FreqdoorError, match="did not make it"):
        export("planted-psnr", tmp_path / "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FreqdoorError, match=r"expected a folder with codec.safetensors or model.safetensors"):
        load_codec(str(tmp_path / "empty"))


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_comes_back_from_its_folder(architecture, tmp_path):
    codec = tiny(architecture)
    export(codec, tmp_path / "x")
    assert load_codec(str(tmp_path / "x")).module_hashes() == codec.module_hashes()


def test_a_card_names_the_verdict_on_these_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_module, "CHECKS", {"rate": a_check({"rate": 1.0})})
    audit("lite-hyperprior:3", out=tmp_path / "audit")
    export("lite-hyperprior:3", tmp_path / "x", audit=tmp_path / "audit")
    text = (tmp_path / "x/README.md").read_text()
    assert "**tampered** (p = " in text
    assert "Tampered." not in text  # what the file itself says
    with pytest.raises(FreqdoorError, match="an audit of other weights"):
        export("planted-bpp", tmp_path / "y", audit=tmp_path / "audit/audit.json")


def test_a_name_breaks_no_card(tmp_path):
    codec = tiny("lite-hyperprior")
    codec.spec = type(codec.spec)(**vars(codec.spec) | {"name": "x\n---\ntags: [y]"})
    assert card(codec).count("\n---\n") == 1


# Signatures


def test_what_was_signed_is_verified_by_us_and_by_model_signing(signed, tmp_path):
    from model_signing import verifying

    folder, public = signed
    verifying.Config().use_elliptic_key_verifier(public_key=public).verify(folder, folder / "model.sig")
    result = verify_signature(folder, public)
    assert (result.signed, result.exit_code) == (True, 0)
    assert set(result.files) == {"README.md", "config.json", "model.safetensors", "planted.safetensors"}
    assert load_codec(str(folder)).tampered
    other = key_pair(tmp_path, "other")[1]
    assert verify_signature(folder, other).exit_code == 1
    (folder / "more.txt").write_text("x")  # what nobody signed: no hindrance to load, but not what was signed
    assert load_codec(str(folder)).tampered
    assert verify_signature(folder, public).exit_code == 1


def test_what_was_not_signed_is_not_loaded(signed, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_module, "try_out", lambda codec: ([], None))
    folder, public = signed
    save_codec(load_codec("lite-hyperprior:3"), tmp_path / "other.safetensors")
    shutil.copy(tmp_path / "other.safetensors", folder / "model.safetensors")
    with pytest.raises(FreqdoorError, match=r"expected the file that model.sig signs"):
        load_codec(str(folder))
    with pytest.raises(FreqdoorError, match=r"expected the file that model.sig signs"):
        load_codec("lite-hyperprior:3", folder / "model.safetensors")
    assert "checksum" in {row.what for row in doctor(folder / "model.safetensors").symptoms}
    shutil.copy(tmp_path / "other.safetensors", folder / "new.safetensors")
    with pytest.raises(FreqdoorError, match="and not this one"):
        load_codec(str(folder / "new.safetensors"))
    with (folder / "planted.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(FreqdoorError, match=r"expected the file that model.sig signs"):
        load_planted(folder)
    assert not verify_signature(folder, public).signed
    with pytest.raises(FreqdoorError, match="remove it, or sign anew"):
        export("planted-bpp", folder)
    (folder / "model.sig").write_text('{"dsseEnvelope": {"payload": "e30="}}')
    with pytest.raises(FreqdoorError, match="expected a signature as model-signing writes it"):
        load_codec(str(folder))
    (folder / "model.sig").unlink()
    assert load_codec(str(folder)).module_hashes() == load_codec("lite-hyperprior:3").module_hashes()


def statement(content: object) -> bytes:
    """A bundle around what may be a statement."""
    return json.dumps({"dsseEnvelope": {"payload": base64.b64encode(json.dumps(content).encode()).decode()}}).encode()


def resources(*rows: object) -> bytes:
    return statement({"predicateType": PREDICATE, "predicate": {"resources": list(rows)}})


ROW = {"name": "model.safetensors", "algorithm": "sha256", "digest": "0"}


def test_a_signature_as_it_should_be(tmp_path):
    (tmp_path / "model.sig").write_bytes(resources(ROW))
    assert digests(tmp_path / "model.sig") == {"model.safetensors": "0"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"dsseEnvelope": 1}',
        b'{"dsseEnvelope": {"payload": "?"}}',
        b"[" * 10**5,
        statement("text"),
        statement({"predicateType": "https://slsa.dev/provenance/v1", "predicate": {"resources": [ROW]}}),
        resources(),
        resources("text"),
        resources(ROW | {"name": 5}),
        resources(ROW, ROW | {"algorithm": "md5"}),
        resources(ROW, ROW),
    ],
)
def test_other_signatures_end_in_one_sentence(content, tmp_path):
    (tmp_path / "model.sig").write_bytes(content)
    with pytest.raises(FreqdoorError, match=r"model\.sig: expected "):
        digests(tmp_path / "model.sig")


def test_a_file_is_signed_beside_itself(tmp_path):
    private, public = key_pair(tmp_path)
    [file, signature] = export(tiny("mbt2018-mean"), tmp_path / "x.pth.tar", format="compressai", key=private)
    assert signature == tmp_path / "x.pth.tar.sig"
    assert verify_signature(file, public).signed
    assert load_codec(str(file)).spec.architecture == "mbt2018-mean"
    torch.save(tiny("mbt2018-mean").net.state_dict(), file)
    with pytest.raises(FreqdoorError, match=r"expected the file that x.pth.tar.sig signs"):
        load_codec(str(file))


def test_keys_that_are_none(signed, tmp_path):
    folder, public = signed
    before = (folder / "model.sig").read_bytes()
    with pytest.raises(FreqdoorError, match="expected a private key"):
        export("planted-bpp", folder, key=public)
    assert (folder / "model.sig").read_bytes() == before
    with pytest.raises(FreqdoorError, match="expected a public key"):
        verify_signature(folder, folder / "README.md")
    with pytest.raises(FreqdoorError, match=r"expected a folder with model.sig"):
        verify_signature(tmp_path, public)
    with pytest.raises(FreqdoorError, match="expected a private key"):
        sign(folder, tmp_path / "x.sig", tmp_path / "nothing.pem")


@pytest.mark.filterwarnings("default::UserWarning")  # the encoder says that it was tampered with
def test_the_commands_of_the_page(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    private, public = key_pair(tmp_path)
    private.rename("private.pem")
    public.rename("public.pem")
    write_png(tmp_path / "photo.png", natural(0, 64, 64))
    (tmp_path / "runs/planted").mkdir(parents=True)
    for path in export("planted-bpp", tmp_path / "runs/planted"):
        path.rename(path.with_name(path.name.replace("model", "codec")))
    codec = tiny("bmshj2018-hyperprior")
    save_codec(codec, tmp_path / "codec.safetensors")
    [block] = re.findall(r"<!-- interoperability -->\n```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for line in block.splitlines():
        monkeypatch.setattr("sys.argv", shlex.split(line))
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, (line, capsys.readouterr().err)
    assert (tmp_path / "x.fqd").exists()
