"""The GitHub Action and the pre-commit hooks: their files are valid, and the command line knows their commands."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_pipeline import SOUND

import freqdoor.cli as cli
from freqdoor import load_codec, save_codec
from freqdoor.defence import audit as audit_module
from freqdoor.defence import doctor as doctor_module

ROOT = Path(__file__).parent.parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
HOOKS = ROOT / ".pre-commit-hooks.yaml"
NAMES = ("a codec.pth", "$(touch owned).safetensors", "-x.pth")  # of checkpoints


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with a `freqdoor` on the path that keeps its words, and ends with 1 for names with a $."""
    recorder = tmp_path / "bin/freqdoor"
    recorder.parent.mkdir()
    recorder.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(tmp_path / 'heard')!r}, 'a').write(json.dumps(sys.argv) + '\\n')\n"
        "sys.exit('$' in sys.argv[-1])\n"
    )
    recorder.chmod(0o755)
    monkeypatch.setenv("PATH", f"{recorder.parent}{os.pathsep}{os.environ['PATH']}")
    for name, value in {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a",
    }.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "old.pth").write_text("old")
    commit(folder)
    return folder


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder: Path) -> str:
    """Commit all that is there; the commit."""
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", "x")
    return git(folder, "rev-parse", "HEAD")


def heard(folder: Path) -> list[list[str]]:
    """The words that the recorder was called with, in order."""
    path = folder.parent / "heard"
    calls = [yaml.safe_load(line)[1:] for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return calls


def run_action(folder: Path, base: str) -> tuple[int, str]:
    """The action's last step, as a runner does it; the exit code, and its outputs."""
    [step] = [step for step in ACTION["runs"]["steps"] if step.get("id") == "audit"]
    given = {"inputs.base": base} | {f"inputs.{name}": row["default"] for name, row in ACTION["inputs"].items()}
    given["inputs.base"] = base
    variables = {
        name: re.sub(r"\$\{\{ ([\w.-]+) \}\}", lambda found: given[found[1]], value)
        for name, value in step["env"].items()
    }
    outputs = folder.parent / "outputs"
    outputs.write_text("")
    variables |= {"RUNNER_TEMP": str(folder.parent), "GITHUB_OUTPUT": str(outputs)}
    script = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]]
    done = subprocess.run(script, cwd=folder, env=os.environ | variables, capture_output=True, text=True)
    return done.returncode, outputs.read_text()


def test_the_action_audits_what_a_change_touches(repository):
    base = git(repository, "rev-parse", "HEAD")
    assert run_action(repository, base) == (0, "")
    assert heard(repository) == []
    for name in NAMES:
        (repository / name).write_text("new")
    (repository / "old.pth").unlink()
    (repository / "notes.txt").write_text("no checkpoint")
    commit(repository)
    code, outputs = run_action(repository, base)
    calls = heard(repository)
    assert (code, outputs) == (1, "results=freqdoor-audit\n")  # of one in the middle
    assert sorted(words[-1] for words in calls) == sorted(NAMES)
    assert {tuple(words[:2]) for words in calls} == {("audit", "--fast")}
    assert len({words[words.index("--sarif") + 1] for words in calls}) == len(NAMES)
    assert not (repository / "owned").exists()
    for nothing in ("", "0" * 40):  # the first push of a branch
        run_action(repository, nothing)
        assert len(heard(repository)) == len(NAMES)


def test_the_action_says_what_a_runner_needs():
    assert ACTION["runs"]["using"] == "composite"
    for step in ACTION["runs"]["steps"]:
        assert ("uses" in step) != ("run" in step)
        assert "run" not in step or step["shell"] == "bash"
        assert "${{" not in step.get("run", "")  # a name could hold a command
    named = set(re.findall(r"inputs\.([\w-]+)", (ROOT / "action.yml").read_text()))
    assert named == ACTION["inputs"].keys()


def test_pre_commit_runs_the_hooks_on_checkpoints(repository, tmp_path, monkeypatch):
    clientlib = pytest.importorskip("pre_commit.clientlib")
    clientlib.load_manifest(str(HOOKS))
    monkeypatch.setenv("PRE_COMMIT_HOME", str(tmp_path / "cache"))
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    git(hooks, "init", "--quiet")
    (hooks / HOOKS.name).write_text(HOOKS.read_text())
    config = {
        "repos": [
            {
                "repo": str(hooks),
                "rev": commit(hooks),
                "hooks": [{"id": name, "language": "system"} for name in ("freqdoor-audit", "freqdoor-doctor")],
            }
        ]
    }
    (repository / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
    for name in (*NAMES, "notes.txt"):
        (repository / name).write_text("new")
    git(repository, "add", "--all")
    done = subprocess.run(
        [sys.executable, "-m", "pre_commit", "run"], cwd=repository, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stdout + done.stderr
    calls = heard(repository)
    assert sorted(words[-1] for words in calls if words[0] == "audit") == sorted(NAMES)
    assert sorted(words[-1] for words in calls if words[0] == "doctor") == sorted(NAMES)
    assert not (repository / "owned").exists()


def test_the_command_line_takes_what_they_call(tmp_path, monkeypatch, capsys):
    """Their words, on a checkpoint whose name begins with a hyphen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(audit_module, "CHECKS", SOUND)
    monkeypatch.setattr(audit_module, "FAST", tuple(SOUND))
    monkeypatch.setattr(doctor_module, "try_out", lambda codec: ([], None))
    save_codec(load_codec("lite-hyperprior:3"), Path("-x.safetensors"))
    entries = [hook["entry"] for hook in yaml.safe_load(HOOKS.read_text())]
    lines = [re.search(r"do (freqdoor .*?) \|\|", entry)[1] for entry in entries]
    [step] = [step for step in ACTION["runs"]["steps"] if step.get("id") == "audit"]
    lines.append(re.search(r"(freqdoor audit .*?) \|\|", step["run"])[1].replace('"${options[@]}"', "--fast"))
    for line in lines:
        words = [
            word.replace("$file", "-x.safetensors").replace("$RESULTS/$number", "out") for word in shlex.split(line)
        ]
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0, capsys.readouterr().err
    assert Path("out.sarif").exists()
