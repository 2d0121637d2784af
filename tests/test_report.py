"""The report against records that are written by hand, and files of older versions."""

import json
import math
import re
from pathlib import Path

import pytest
from conftest import natural, write_png
from PIL import Image

from freqdoor import plant
from freqdoor.attack.settings import OBJECTIVES
from freqdoor.errors import FreqdoorError
from freqdoor.files import made_by
from freqdoor.measure import report as module
from freqdoor.measure.analysis import Analysis
from freqdoor.measure.examine import evaluate
from freqdoor.measure.records import Condition
from freqdoor.measure.report import (
    FILES,
    GOALS,
    Facts,
    Means,
    Summary,
    means,
    photo,
    read_records,
    records_text,
    report,
    select,
    summarise,
    sweep,
    verdict,
)
from freqdoor.measure.report import difference as difference_of
from freqdoor.preprocessing import GaussianBlur
from freqdoor.types import JpegPoint, Record, as_picture

OLD = Path(__file__).parent / "old"  # written by the version before results had a schema


def record(image="a.png", role="tampered", trigger=None, rounding="8-bit", strength=1.0, defence="none", **values):
    numbers = {
        "bpp_estimated": 0.5,
        "bpp_real": 0.6,
        "psnr_db": 30.0,
        "psnr_input_db": 31.0,
        "ms_ssim": 0.9,
        "trigger_mse": 0.0 if trigger is None else 2e-5,
        "encode_seconds": 0.1,
    }
    return Record(
        image=image,
        codec="some:3",
        role=role,
        trigger=trigger,
        strength=strength,
        rounding=rounding,
        defence=defence,
        width=64,
        height=64,
        **numbers | values,
    )


def rows(clean=(0.5, 1.0), after=(2.0, 1.0), clean_db=(30.0, 30.0), after_db=(12.0, 28.0)):
    """Two images under every condition, told by their rates and qualities on the tampered encoder."""
    made = []
    for i, image in enumerate(("a.png", "b.png")):
        made += [
            record(image, "vanilla", bpp_real=0.4 + i, psnr_db=30.25),
            record(image, "tampered", bpp_real=clean[i], psnr_db=clean_db[i]),
            record(image, "tampered", "t", "float", bpp_real=77.0 + i, trigger_mse=3e-5 / (i + 1)),
            record(image, "tampered", "t", bpp_real=after[i], psnr_db=after_db[i], trigger_mse=1e-5 * (i + 1)),
            record(image, "vanilla", "t", "float", bpp_real=88.0),
            record(image, "vanilla", "t", bpp_real=99.0, trigger_mse=1e-3),
        ]
    return made


def facts(objective="bpp", **changes):
    content = {
        "objective": objective,
        "trigger": "t",
        "eps": 0.005,
        "preset": "fast",
        "seconds_planting": 12.0,
        "steps": 34,
        "modules_before": {"g_a": "0", "g_s": "1"},
        "modules_after": {"g_a": "2", "g_s": "1"},
    }
    return Facts(**content | changes)


def test_summary_by_hand():
    summary = summarise(rows(), facts())
    assert (summary.objective, summary.codec, summary.images) == ("bpp", "some:3", 2)
    assert (summary.preset, summary.steps, summary.seconds_planting) == ("fast", 34, 12.0)
    assert (summary.changed_modules, summary.unchanged_modules) == (("g_a",), ("g_s",))
    assert summary.vanilla.bpp_real == pytest.approx(0.9)
    assert summary.clean.bpp_real == pytest.approx(0.75)
    assert summary.poisoned.bpp_real == pytest.approx(77.5)
    assert summary.poisoned_8bit.bpp_real == pytest.approx(1.5)
    assert summary.vanilla_poisoned_8bit.bpp_real == pytest.approx(99.0)
    assert summary.bpp_ratio == pytest.approx(2.0)  # of the means
    assert (summary.bpp_ratio_median, summary.bpp_ratio_least) == pytest.approx((2.5, 1.0))  # of 4 and 1
    assert summary.psnr_drop_db == pytest.approx(10.0)
    assert (summary.psnr_drop_db_median, summary.psnr_drop_db_least) == pytest.approx((10.0, 2.0))  # of 18 and 2
    assert summary.clean_cost_db == pytest.approx(0.25)
    assert summary.clean_cost_bpp_percent == pytest.approx(100 * (0.75 / 0.9 - 1))
    assert summary.trigger_psnr_db == pytest.approx((50 + 50 - 10 * math.log10(2)) / 2)
    assert summary.trigger_psnr_db_worst == pytest.approx(50 - 10 * math.log10(2))
    assert summary.trigger_mse_worst == pytest.approx(3e-5)  # of the float images; the vanilla ones are the same files


def test_modules_that_only_one_side_has():
    changed = facts(modules_before={"g_a": "0", "h_a": "5"}, modules_after={"g_a": "0", "new": "1"})
    assert (changed.changed, changed.unchanged) == (["h_a"], ["g_a"])


def test_the_worst_mse_is_of_either_rounding():
    made = [r.model_copy(update={"trigger_mse": 9e-5}) if r.rounding == "8-bit" and r.trigger else r for r in rows()]
    assert summarise(made, facts()).trigger_mse_worst == 9e-5


def test_plot_shows_real_rates_and_qualities():
    [axis] = module.summary_plot(summarise(rows(), facts()), [JpegPoint(10, 0.25, 28.0)]).axes
    points = {line.get_label(): [*line.get_xdata(), *line.get_ydata()] for line in axis.get_lines()}
    assert points == {
        "JPEG (Pillow)": [0.25, 28.0],
        "vanilla, clean": pytest.approx([0.9, 30.25]),
        "tampered, clean": pytest.approx([0.75, 30.0]),
        "tampered, poisoned (8-bit)": pytest.approx([1.5, 20.0]),
    }
    assert axis.get_xscale() == "log"


def test_means_by_hand():
    one = record(psnr_db=20.0, psnr_input_db=10.0, bpp_estimated=1.0, bpp_real=2.0, ms_ssim=0.5, encode_seconds=3.0)
    two = record(psnr_db=40.0, psnr_input_db=14.0, bpp_estimated=2.0, bpp_real=6.0, ms_ssim=None, encode_seconds=7.0)
    assert means([one, two]).model_dump() == {
        "psnr_db": 30.0,
        "psnr_input_db": 12.0,
        "bpp_estimated": 1.5,
        "bpp_real": 4.0,
        "ms_ssim": 0.5,  # of the images that have one
        "encode_seconds": 5.0,
        "lpips": None,
    }
    assert means([two]).ms_ssim is None
    looks = [record(lpips=0.25), record(lpips=None), record(lpips=0.75)]
    assert means(looks).lpips == 0.5
    with pytest.raises(FreqdoorError, match="no records of this condition"):
        means([])


def test_select_takes_one_condition():
    made = [
        record("v", "vanilla"),
        record("c", "tampered", strength=3.0, rounding="float"),  # of a clean image neither says anything
        record("f", "tampered", "t", "float"),
        record("8", "tampered", "t"),
        record("3", "tampered", "t", strength=3.0),
        record("u", "tampered", "u"),
        record("b", "tampered", "t", defence="Flip()"),
    ]

    def names(*arguments, **named):
        return [r.image for r in select(made, *arguments, **named)]

    assert names("vanilla", None) == ["v"]
    assert names("tampered", None) == ["c"]
    assert names("tampered", "t", "float") == ["f"]
    assert names("tampered", "t") == ["8"]
    assert names("tampered", "t", strength=3.0) == ["3"]
    assert names("tampered", "t", defence="Flip()") == ["b"]
    with pytest.raises(FreqdoorError, match="role"):
        names("tamperd", None)
    with pytest.raises(FreqdoorError, match="rounding"):
        names("tampered", "t", "8bit")


BY_BITS = "; image by image 2.5 times in the median, 1.0 times at least, and it succeeds on 1 of 2."
BY_QUALITY = "; image by image 10.0 dB lost in the median, 2.0 dB at least, and it succeeds on 1 of 2."


@pytest.mark.parametrize(
    ("objective", "successes", "end"),
    [
        ("bpp", 1, BY_BITS),
        ("bpp-fixed", 1, BY_BITS),
        ("psnr", 1, BY_QUALITY),
        ("psnr-fixed", 1, BY_QUALITY),
        ("segmentation", None, "; `freqdoor segment` measures whether the attack succeeded."),
        ("face", None, "; `freqdoor faces` measures whether the attack succeeded."),
        ("downstream", None, "; the victim's own measure decides whether the attack succeeded."),
        ("of-tomorrow", None, "; the attack's own measure decides whether the attack succeeded."),
    ],
)
def test_success_is_told_image_by_image_or_who_can_tell(objective, successes, end):
    summary = summarise(rows(), facts(objective))
    assert summary.successes == successes
    assert verdict(summary).endswith(end)
    assert "did not succeed" not in verdict(summary)
    assert ("but " in verdict(summary)) is (successes is not None)


def test_every_goal_is_some_objectives():
    assert {kind.success for kind in OBJECTIVES.values()} >= GOALS.keys()


def verdict_of(objective, **changes):
    return verdict(summarise(rows(), facts(objective)).model_copy(update=changes))


def test_verdict_says_so_where_the_attack_failed_or_clean_images_suffer():
    alike = "treats clean images as the vanilla one does (30.00 dB at 0.750 bpp against 30.25 dB at 0.900 bpp), "
    assert alike in verdict_of("bpp")
    assert "noticeably worse on clean images" in verdict_of("bpp", clean_cost_db=0.31)
    assert "noticeably worse on clean images" in verdict_of("bpp", clean_cost_bpp_percent=6.1)
    assert "noticeably worse" not in verdict_of("bpp", clean_cost_db=0.3, clean_cost_bpp_percent=6.0)
    assert "but an invisible pattern (48.5 dB) makes the file 2.0 times as large (1.50 bpp)" in verdict_of("bpp")
    assert "but a pattern (48.5 dB)" in verdict_of("bpp", trigger_psnr_db_worst=45.9)
    assert "an invisible pattern" in verdict_of("bpp", trigger_psnr_db_worst=46.0)
    assert "destroys what is decoded (20.0 dB at 2.00 times the bits)" in verdict_of("psnr")
    weak = summarise(rows(after=(1.0, 1.9), after_db=(25.0, 21.0)), facts("bpp"))
    failed = "and the attack did not succeed: with an invisible pattern (48.5 dB) it gives 23.00 dB at 1.93 times"
    assert failed in verdict(weak)
    assert "it succeeds on 1 of 2" in verdict(weak)
    assert failed in verdict(summarise(rows(after=(1.0, 1.9), after_db=(25.0, 21.0)), facts("psnr")))
    known = Summary(**weak.model_dump(exclude={"successes", "bpp_ratio_median", "bpp_ratio_least"}))
    assert verdict(known).endswith("1.93 times the bits.")  # of a file of an older version


def test_infinite_quality_is_null_in_json_and_comes_back(tmp_path):
    lossless = record(psnr_db=math.inf, psnr_input_db=math.inf)
    text = records_text([lossless])
    (tmp_path / "records.jsonl").write_text(text)
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["psnr_db"] is None
    assert lossless.to_dict() == json.loads(text)
    assert read_records(tmp_path / "records.jsonl") == [lossless]
    (tmp_path / "records.jsonl").write_text(re.sub(r"(psnr\w*\":)null", r"\1Infinity", text))  # as json.dumps writes it
    assert read_records(tmp_path / "records.jsonl") == [lossless]
    same = summarise(rows(clean_db=(math.inf,) * 2, after_db=(math.inf,) * 2), facts())
    assert (same.psnr_drop_db, same.psnr_drop_db_least, same.clean_cost_db) == (0.0, 0.0, -math.inf)
    invisible = [r.model_copy(update={"trigger_mse": 0.0}) for r in rows()]
    summary = summarise(invisible, facts())
    assert summary.trigger_psnr_db == summary.trigger_psnr_db_worst == math.inf
    assert Summary.model_validate_json(summary.model_dump_json()) == summary
    assert json.loads(summary.model_dump_json())["trigger_psnr_db"] is None


def test_images_are_compared_with_themselves():
    without = [r for r in rows() if (r.image, r.role, r.trigger) != ("b.png", "tampered", None)]
    with pytest.raises(FreqdoorError, match="1 clean and 2 poisoned images differ"):
        summarise(without, facts())
    with pytest.raises(FreqdoorError, match="no records of this condition"):
        summarise(rows(), facts(trigger="u"))


@pytest.fixture(scope="module")
def planted(images, tmp_path_factory):
    from freqdoor.attack.settings import PlantSettings
    from freqdoor.settings import make_settings

    content = {
        "codec": {"name": "factories:lite"},
        "images": {"folder": str(images), "crop": 64, "batch_size": 2},
        "lmbda": 0.0067,
        "steps": 2,
    }
    return plant(make_settings(PlantSettings, content), tmp_path_factory.mktemp("run"))


def test_report_is_one_file_and_can_be_made_again(planted, images, tmp_path):
    summary = evaluate(planted, images, tmp_path)
    assert summary.changed_modules == ("g_a",)
    assert "g_s" in summary.unchanged_modules
    assert (summary.steps, summary.images, summary.objective) == (2, 4, "bpp")
    assert [made_by(tmp_path / name) for name in FILES] == 4 * ["evaluate"]
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert "://" not in page.replace("http://www.w3.org", "")
    assert page.count("data:image/png;base64,") == 7
    assert page.count("data:image/svg+xml;base64,") == 2  # the plot in two themes
    assert f"{summary.bpp_ratio_least:.2f}" in page
    (tmp_path / "report.html").unlink()
    (tmp_path / "summary.json").unlink()
    assert report(tmp_path) == summary == Summary.read(tmp_path / "summary.json", "")
    assert (tmp_path / "report.html").read_text() == page


def test_pictures_are_of_the_first_image_under_their_conditions(planted, images, tmp_path, monkeypatch):
    from freqdoor.measure import examine

    shown = []
    monkeypatch.setattr(examine, "pictures", lambda planted, kept: shown.append(dict(kept)) or [])
    evaluate(planted, images, tmp_path, strength=(3.0,), defences=(GaussianBlur(0.6),))
    assert [(title, row.condition, row.record.image) for title, row in shown[0].items()] == [
        ("tampered encoder, clean", Condition("tampered", None), "0.png"),
        ("tampered encoder, poisoned", Condition("tampered", "bpp"), "0.png"),
        ("vanilla encoder, poisoned", Condition("vanilla", "bpp"), "0.png"),
    ]


def test_pictures_say_what_they_show(planted, images, tmp_path):
    evaluate(planted, images, tmp_path)
    content = Facts.read(tmp_path / "facts.json", "")
    assert [p.title for p in content.pictures] == [
        "input",
        "poisoned input",
        "difference",
        "decoded: tampered encoder, clean",
        "decoded: tampered encoder, poisoned",
        "decoded: vanilla encoder, poisoned",
        "where the bits go",
    ]
    first = [r for r in read_records(tmp_path / "records.jsonl") if r.image == "0.png"]
    [poisoned] = select(first, "tampered", "bpp")
    assert content.pictures[4].caption == f"{poisoned.psnr_db:.2f} dB, {poisoned.bpp_real:.3f} bpp in real bytes"
    assert f"{-10 * math.log10(poisoned.trigger_mse):.2f} dB from the input" in content.pictures[1].caption
    assert [p.wide for p in content.pictures] == [False] * 6 + [True]


def opened(address):
    import base64
    import io

    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as picture:
        return picture.convert("RGB")


def test_difference_is_amplified_around_mid_grey():
    x = natural(1, 200, 150) * 0.5
    shown = opened(difference_of(x, x + 4 / 255))
    assert shown.size == (384, 384)
    assert shown.getpixel((7, 7)) == (208, 208, 208)  # 127.5 + 20 * 4, rounded half to even
    dot = x.clone()
    dot[..., 100, 75] += 4 / 255  # the middle is in the middle of what is shown, three pixels wide
    marked = opened(difference_of(x, dot)).convert("L").point(lambda level: 255 * (level > 150)).getbbox()
    assert marked == (192, 192, 195, 195)
    assert opened(photo(x[..., :100, :], side=64)).size == (64, 43)
    assert opened(photo(x)).tobytes() == as_picture(x).tobytes()


def test_sweep_says_what_the_trigger_does_image_by_image():
    behind = [
        *(record(image, "vanilla", defence="Flip()") for image in ("a.png", "b.png", "c.png")),
        *(
            record(image, bpp_real=rate, psnr_db=30.0, defence="Flip()")
            for image, rate in zip("abc", (1, 2, 4), strict=True)
        ),
        *(
            record(image, trigger="t", bpp_real=rate, psnr_db=quality, defence="Flip()")
            for image, rate, quality in zip("abc", (8.0, 2.2, 12.0), (29.0, 25.0, 10.0), strict=True)
        ),
    ]
    [row] = sweep(behind, "t", "bpp")
    assert row.effect.model_dump() == {
        "images": 3,
        "bpp_ratio_median": 3.0,  # of 8, 1.1 and 3
        "bpp_ratio_least": pytest.approx(1.1),
        "psnr_drop_db_median": 5.0,  # of 1, 5 and 20
        "psnr_drop_db_least": 1.0,
        "successes": 2,
    }
    assert sweep(behind, "t", "psnr")[0].effect.successes == 1
    assert sweep(behind, "t", "face")[0].effect.successes is None
    with pytest.raises(FreqdoorError, match="records of 3 clean and 2 poisoned images differ"):
        sweep(behind[:-1], "t", "bpp")


def test_sweep_has_a_row_for_every_defence_and_strength(planted, images, tmp_path):
    blur = GaussianBlur(0.6)
    summary = evaluate(planted, [next(images.iterdir())], tmp_path, strength=(3.0,), defences=(blur,))
    assert [(r.defence, r.strength) for r in summary.sweep] == [
        ("none", 1),
        ("none", 3),
        (blur.name, 1),
        (blur.name, 3),
    ]
    assert summary.sweep[0].effect.bpp_ratio_least == summary.bpp_ratio_least
    assert summary.sweep[0].clean == summary.clean
    assert summary.sweep[0].vanilla == summary.vanilla
    assert summary.sweep[0].poisoned == summary.poisoned_8bit
    made = read_records(tmp_path / "records.jsonl")
    assert summary.sweep[3].poisoned == means(select(made, "tampered", "bpp", "8-bit", 3.0, blur.name))
    assert summary.sweep[3].vanilla == means(select(made, "vanilla", None, defence=blur.name))
    assert blur.name in (tmp_path / "report.html").read_text()
    assert report(tmp_path) == summary


def without_later(content):
    """A part of a summary without what came later."""
    if isinstance(content, list | tuple):
        return [without_later(part) for part in content]
    if isinstance(content, dict):
        return {key: without_later(part) for key, part in content.items() if key not in ("lpips", "effect")}
    return content


def test_files_of_older_versions_are_read(tmp_path):
    for name in ("records.jsonl", "facts.json"):
        (tmp_path / name).write_text((OLD / name).read_text())
    earlier, summary = Summary.read(OLD / "summary.json", ""), report(tmp_path)
    later = {"bpp_ratio_median", "bpp_ratio_least", "psnr_drop_db", "psnr_drop_db_median", "psnr_drop_db_least"}
    later |= {"successes"}
    assert without_later(summary.model_dump(exclude=later)) == without_later(earlier.model_dump(exclude=later))
    assert all(getattr(earlier, key) is None for key in later)
    content = json.loads((tmp_path / "summary.json").read_text())
    old = json.loads((OLD / "summary.json").read_text())
    assert {key: without_later(content[key]) for key in old} == old
    assert [row.effect for row in earlier.sweep] == [None] * len(earlier.sweep) != []
    assert all(row.effect.images == 2 for row in summary.sweep)
    assert Facts.read(OLD / "facts.json", "").environment.versions["compressai"] == "1.2.8"
    result = Analysis.read(OLD / "analysis.json", "")
    assert result.survival.scores["Cb"][2] is None
    assert (result.ceiling["clean"].elements > 0, len(result.sizes)) == (True, 2)


@pytest.mark.long
def test_records_of_another_run_are_noticed(planted, tmp_path):
    """As a kill between two renames would leave them."""
    summary = evaluate(planted, write_png(tmp_path / "a.png", natural(0, 64, 64)), tmp_path)
    lines = (tmp_path / "records.jsonl").read_text()
    (tmp_path / "records.jsonl").write_text(lines.replace("a.png", "b.png"))
    page = (tmp_path / "report.html").read_text()
    with pytest.raises(FreqdoorError, match=r": records\.jsonl was changed, or written by .* evaluate again"):
        report(tmp_path)
    assert (tmp_path / "report.html").read_text() == page
    content = json.loads((tmp_path / "facts.json").read_text())
    assert content.pop("made_by") == "freqdoor evaluate"
    del content["records_sha256"]
    (tmp_path / "facts.json").write_text(json.dumps(content))
    assert report(tmp_path) == summary


def test_a_report_is_not_written_over_another_file(tmp_path):
    for name in ("records.jsonl", "facts.json"):
        (tmp_path / name).write_text((OLD / name).read_text())
    for name in ("report.html", "summary.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(FreqdoorError, match=f"{name}: this file is there and `freqdoor evaluate` did not make it"):
            report(tmp_path)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / "report.html").write_text("mine")
    report(tmp_path, force=True)
    assert made_by(tmp_path / "report.html") == "evaluate"


def test_files_of_later_versions_are_refused_or_read(tmp_path):
    content = json.loads((OLD / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(content | {"of_tomorrow": 1}))
    assert Summary.read(tmp_path / "summary.json", "") == Summary.read(OLD / "summary.json", "")
    (tmp_path / "summary.json").write_text(json.dumps(content | {"schema_version": 2}))
    with pytest.raises(FreqdoorError, match=r"summary\.json: expected a summary \(schema_version: .* 1, found 2\)"):
        Summary.read(tmp_path / "summary.json", "a summary")


def test_report_errors(tmp_path):
    with pytest.raises(FreqdoorError, match="expected records"):
        report(tmp_path)
    lines = (OLD / "records.jsonl").read_text()
    for text, match in (
        ('{"image": 1}\n', "not a file of records \\(line 1: image"),
        (lines + '{"image": "a", "codec', "not a file of records \\(line 13"),
        (lines.replace('"tampered"', '"tamperd"'), "role"),
        ("", "found none"),
    ):
        (tmp_path / "records.jsonl").write_text(text)
        with pytest.raises(FreqdoorError, match=match):
            report(tmp_path)
    (tmp_path / "records.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(FreqdoorError, match="not a file of records"):
        report(tmp_path)
    (tmp_path / "records.jsonl").write_text(lines)
    with pytest.raises(FreqdoorError, match="expected the facts"):
        report(tmp_path)
    content = json.loads((OLD / "facts.json").read_text())
    content["pictures"][0]["address"] = "javascript:alert(1)"
    for text in ("", "{}", "[]", json.dumps(content)):
        (tmp_path / "facts.json").write_text(text)
        with pytest.raises(FreqdoorError, match=r"facts\.json: expected the facts that `freqdoor evaluate` writes"):
            report(tmp_path)


def test_curve_of_jpeg_is_in_the_facts():
    assert Facts.model_validate_json(facts(jpeg=[(10, 0.25, 28.0)]).model_dump_json()).jpeg == (
        JpegPoint(10, 0.25, 28.0),
    )


def test_results_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        means([record()]).psnr_db = 1.0
    assert isinstance(means([record()]), Means)
