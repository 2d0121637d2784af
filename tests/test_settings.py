"""Settings from files of any system and from what people type, and their description."""

import re
import time
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field
from settings_page import PAGE, describe_settings, page

from freqdoor.attack.settings import PlantSettings
from freqdoor.errors import FreqdoorError
from freqdoor.settings import Settings, load_settings, make_settings, parse_override
from freqdoor.training.settings import CodecTraining


class Inner(Settings):
    """What is inside."""

    folder: str
    """Where it lies."""
    side: Annotated[int, Field(gt=0, multiple_of=8)] = 16
    """Side in pixels."""


class Outer(Settings):
    """What is outside."""

    name: str | None = None
    """What it is called | spoken to."""
    rate: Annotated[float, Field(ge=0, lt=1)] = 0.5
    size: tuple[Annotated[int, Field(gt=0)], int] | None = None
    """(height, width)."""
    names: Annotated[tuple[str, ...], Field(min_length=1)] = ("a",)
    mode: Literal["slow", "fast"] = "fast"
    either: str | tuple[str, ...] = ""
    careful: bool = False
    further: dict[str, Any] = Field(default_factory=dict)
    inner: Inner = Inner(folder="x")
    several: tuple[Inner, ...] = ()


class Faster(Outer):
    """What is faster."""

    name: str | None = "swift"


@pytest.mark.parametrize(
    "text",
    ["2024-05-01", "2024-05-01T10:00:00", "10:30:00", "001", "1e3", "0x10", "1_000", "inf", "nan", "true", "-0.0"],
)
def test_a_text_is_taken_as_it_was_typed(text):
    """TOML would have a date, a number or a truth value of it, or the same number in another form."""
    settings = load_settings(Outer, None, [f"name={text}", f"inner.folder= {text} ", f"either={text}"])
    assert (settings.name, settings.inner.folder, settings.either) == (text, text, text)


def test_other_settings_than_texts_stay_typed():
    overrides = ["rate=1e-3", "size=[16, 32]", "careful=true", 'names=["1e3", "b"]', "name='001'", "further.k=4"]
    settings = load_settings(Outer, None, [*overrides, "further.day=2024-05-01", "further.days=[2024-05-01]"])
    assert (settings.rate, settings.size, settings.careful, settings.names) == (0.001, (16, 32), True, ("1e3", "b"))
    assert settings.name == "001"  # quotes are TOML's
    assert settings.further == {"k": 4, "day": "2024-05-01", "days": ["2024-05-01"]}
    with pytest.raises(FreqdoorError, match=r"rate: Input should be a valid number"):
        load_settings(Outer, None, ["rate=2024-05-01"])
    for wrong in ("names=[1, 2]", "inner={folder=1}"):  # not texts as a whole
        with pytest.raises(FreqdoorError, match=r"(names.0|inner.folder): Input should be a valid string, found 1"):
            load_settings(Outer, None, [wrong])


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_numbers_are_finite(value):
    with pytest.raises(FreqdoorError, match=r"settings: 1 mistake\(s\):\n  lr: Input should be a finite number"):
        load_settings(PlantSettings, None, ["images.folder=x", f"lr={value}"])


def test_all_mistakes_come_at_once_beside_a_text_that_was_mended():
    with pytest.raises(FreqdoorError) as caught:
        load_settings(
            Outer, None, ["name=2024-05-01", "rate=2", "mode=slower", "inner.folder=x", "inner.side=9", "odd=1"]
        )
    assert str(caught.value).startswith("settings: 4 mistake(s):\n  ")
    assert all(f"  {name}: " in str(caught.value) for name in ("rate", "mode", "inner.side", "odd"))


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.replace("\n", "\r\n").encode("utf-8"),
        lambda text: text.encode("utf-16"),
        lambda text: text.encode("cp1252"),
    ],
    ids=["byte order mark", "CRLF", "UTF-16", "Latin-1"],
)
def test_configs_of_other_systems_are_read(tmp_path, encode):
    path = tmp_path / "windows.toml"
    path.write_bytes(encode('name = "Fotos von Jürgen"\n[inner]\nfolder = 2024-05-01\n'))
    settings = load_settings(Outer, path)
    assert (settings.name, settings.inner.folder) == ("Fotos von Jürgen", "2024-05-01")


def test_files_that_are_no_configs(tmp_path):
    for content, match in (
        (b"name = \x81\x00", "not a text"),
        (b"name =", "not valid TOML"),
        (b"name = " + b"[" * 9999, "nested too deeply"),
    ):
        (tmp_path / "a.toml").write_bytes(content)
        with pytest.raises(FreqdoorError, match=match):
            load_settings(Outer, tmp_path / "a.toml")
    with pytest.raises(FreqdoorError, match=r"could not read the config \(Is a directory\)"):
        load_settings(Outer, tmp_path)


def test_overrides_are_cut_at_the_first_equals_sign():
    assert parse_override("a.b = c=d") == (["a", "b"], "c=d")
    for text in ("a", "=a"):
        with pytest.raises(FreqdoorError, match=f"--set {text}: expected key=value"):
            parse_override(text)


def test_settings_are_described_table_by_table():
    lines = describe_settings(Faster).splitlines()
    assert [line for line in lines if line.startswith("#")] == ["## `Faster`", "## `[inner]`, `[[several]]`"]
    for line in (
        r'| `name` | text | `"swift"` | What it is called \| spoken to. |',
        "| `rate` | number >= 0, < 1 | `0.5` |  |",
        "| `size` | 2 of: integer > 0 | none | (height, width). |",
        '| `names` | list of: text at least 1 | `["a"]` |  |',
        '| `mode` | `"slow"`, `"fast"` | `"fast"` |  |',
        '| `either` | text or list of: text | `""` |  |',
        "| `careful` | true or false | `false` |  |",
        "| `further` | table |  |  |",
        "| `inner` | table |  | What is inside. |",
        "| `several` | list of: table |  | What is inside. |",
        "| `folder` | text | required | Where it lies. |",
        "| `side` | integer > 0, a multiple of 8 | `16` | Side in pixels. |",
        "What is faster.",
    ):
        assert lines.count(line) == 1, line


@pytest.mark.parametrize("kind", [PlantSettings, CodecTraining])
def test_every_setting_of_a_verb_is_described(kind):
    """Each has a sentence; the headings are TOML's, so that what a reader copies is read."""
    text = describe_settings(kind)
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.*?) \| (.*) \|$", text, re.MULTILINE)
    assert {name for name, *_ in rows} >= set(kind.model_fields)
    assert all(meaning.rstrip().endswith((".", ")")) for *_, meaning in rows)
    assert len(set(re.findall(r"^## (.+)$", text, re.MULTILINE))) == text.count("\n## ") + 1


def test_the_page_of_settings_is_up_to_date():
    """`python tools/settings_page.py` makes it."""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_keys_with_thousands_of_points_are_refused_at_once(tmp_path):
    config = tmp_path / "dots.toml"
    for text in (
        "a." * 50_000 + "a = 1",
        f"[{'a . ' * 1000}a]",
        "x = { " + "a." * 50_000 + "a = 1 }",
        "# " + "x" * 2**18,
    ):
        config.write_text(text)
        started = time.monotonic()
        with pytest.raises(FreqdoorError, match=r"dots\.toml: expected settings of at most 262144 characters"):
            load_settings(CodecTraining, config)
        assert time.monotonic() - started < 5
    config.write_text("numbers = [" + "1.5, " * 1000 + "]")
    with pytest.raises(FreqdoorError, match="numbers: unknown setting"):
        load_settings(CodecTraining, config)


def test_true_is_no_number():
    content = {"codec": "lite-hyperprior:3", "images": {"folder": "x", "batch_size": True}, "lr": True}
    with pytest.raises(FreqdoorError, match=r"2 mistake(?s:.*)images.batch_size: expected a number.*found True"):
        make_settings(CodecTraining, content)
