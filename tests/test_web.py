"""The page of `freqdoor serve`: what it answers, to whom, how much it takes, and that it asks nobody for anything."""

import asyncio
import base64
import html
import io
import json
import os
import pickle
import re
import socket
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import hostile
import pytest
import web_calls
from conftest import natural, open_loops, write_png
from PIL import Image
from typer.testing import CliRunner

import freqdoor
from freqdoor.cli import app as command_line
from freqdoor.errors import FreqdoorError
from freqdoor.measure.report import Picture
from freqdoor.samples import KODAK

pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'freqdoor[web]'")

from starlette.responses import JSONResponse, PlainTextResponse

from freqdoor.web import page, plantings, requests, serve
from freqdoor.web.gate import COOKIE, HEADERS, Gate
from freqdoor.web.limits import Limits
from freqdoor.web.page import Page, handed_over, runs_in
from freqdoor.web.plantings import Plantings, curves, rows_in
from freqdoor.web.requests import Question, compared, reported, tried
from freqdoor.web.work import StoppedWork, Work

pytestmark = pytest.mark.whole
LIMITS = Limits(upload=10_000, pixels=20_000, seconds=60)
SELF = "http://127.0.0.1"
JOIN, DATA, UPLOAD = "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/upload"
ANNE, BERT = "a" * 32, "b" * 32  # visitors


def silent(value: object) -> None:
    """Nobody looks on."""


class Answer(NamedTuple):
    code: int
    headers: dict[str, str]
    content: bytes


class Browser:
    """A visitor's requests to an ASGI application."""

    def __init__(self, app, visitor: str | None = ANNE) -> None:
        self.app, self.cookie = app, {"cookie": f"other=1; {COOKIE}={visitor}"} if visitor else {}

    def ask(self, method: str, address: str, body: bytes = b"", length: bool = True, **headers: str) -> Answer:
        path, _, query = address.partition("?")
        sent = {"host": "127.0.0.1"} | self.cookie | headers
        if method == "POST" and length:
            sent["content-length"] = str(len(body))
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in sent.items()],
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 12345),
        }
        answered: list[dict] = []
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict:
            return parts.pop() if parts else await asyncio.Event().wait()

        async def send(message: dict) -> None:
            answered.append(message)

        asyncio.run(self.app(scope, receive, send))
        start, *bodies = answered
        told = {name.decode(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], told, b"".join(part.get("body", b"") for part in bodies))

    def get(self, address: str, **headers: str) -> Answer:
        return self.ask("GET", address, **headers)

    def post(self, address: str, content: object, **headers: str) -> Answer:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.ask("POST", address, body, **headers)

    def upload(self, name: str, content: bytes, **headers: str) -> Answer:
        head = f'--cut\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        body = head.encode() + b"Content-Type: image/png\r\n\r\n" + content + b"\r\n--cut--\r\n"
        return self.post(UPLOAD, body, content_type="multipart/form-data; boundary=cut", **headers)


@pytest.fixture
def gate() -> Gate:
    """A gate before something that answers everything, and whose uploads are called after their content."""

    async def app(scope, receive, send):
        body = (await receive()).get("body", b"")
        upload = scope["path"] == "/gradio_api/upload"
        answer = JSONResponse([f"/up/{body.decode()}"]) if upload else PlainTextResponse(b"got " + body)
        await answer(scope, receive, send)

    return Gate(app, upload=1000)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The real page behind its gate."""
    folder = tmp_path_factory.mktemp("site")
    line = Plantings(folder / "out")
    with serve._settings(str(folder)):
        with open_loops():
            app = serve.application(LIMITS, line, None, folder)
        yield app
    line.close()


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:7860", 200),
        ("localhost:80", 200),
        ("[::1]:7860", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("evil.example:7860", 421),
        ("127.0.0.1@evil.example", 421),
        ("", 421),
    ],
)
def test_only_names_of_this_machine_are_answered(gate, host, code):
    assert Browser(gate).get("/", host=host).code == code


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "https://127.0.0.1"},
        {"origin": "http://127.0.0.1:8000"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
    ids=str,
)
def test_another_sites_requests_are_refused(gate, headers):
    asked = Browser(gate)
    assert asked.post(JOIN, {}, **headers).code == 403
    assert asked.get(f"{DATA}?session_hash=x", **headers).code == 403
    assert asked.get("/", **headers).code == 200  # a link may lead here
    assert asked.post(JOIN, {}, origin=SELF, sec_fetch_site="same-origin").code == 200


def test_what_the_page_does_not_use_is_not_there(gate, site):
    """Of all that Gradio serves: proxies, calls without a queue, its editor, its monitoring."""
    asked = Browser(gate)
    from gradio.routes import API_PREFIX

    for place in ("proxy=http://a.hf.space/", "run/try_it", "call/try_it", "vibe-edit", "process_recording", "runs"):
        assert asked.get(f"{API_PREFIX}/{place}").code == 404, place
        assert asked.post(f"{API_PREFIX}/{place}", {}).code == 404, place
    for place in ("/monitoring", "/login", "/deep_link", "/docs", "/openapi.json", "/assets", "/../etc/passwd"):
        assert asked.get(place).code == 404, place
    assert asked.ask("DELETE", "/").code == 405
    real = Browser(site)
    for path in ("/", "/config", "/theme.css"):
        assert real.get(path).code == 200, path
    assert real.get("/static/..%2f..%2f..%2f..%2froutes.py").code in (400, 403, 404)


def test_a_visitor_names_their_own_uploads_and_no_other_file(gate):
    anne, bert = Browser(gate), Browser(gate, BERT)
    assert json.loads(anne.post(UPLOAD, b"picture").content) == ["/up/picture"]

    def join(who: Browser, path: object) -> int:
        return who.post(JOIN, {"session_hash": str(id(who)), "data": [None, [{"deep": {"path": path}}]]}).code

    assert join(anne, "/up/picture") == 200
    assert anne.get("/gradio_api/file=/up/picture").code == 200
    assert join(bert, "/up/picture") == 403
    assert bert.get("/gradio_api/file=/up/picture").code == 403
    for other in ("/etc/passwd", "/up/../etc/passwd", "http://127.0.0.1:1/", "/up", "", None, 1, ["/up/picture"]):
        assert join(anne, other) == 403, other
        assert anne.get(f"/gradio_api/file={other}").code == 403, other
    assert anne.post(JOIN, {"data": [{"url": "http://169.254.169.254/"}]}).code == 403
    assert anne.post(JOIN, b"[" * 5000).code == 400
    assert anne.post(JOIN, [{"path": "/up/picture"}]).code == 400
    assert Browser(gate, None).post(UPLOAD, b"x").code == 403
    assert Browser(gate, "../../etc").post(UPLOAD, b"x").code == 403


def test_a_visitor_hears_the_answers_of_their_own_page(gate):
    anne, bert = Browser(gate), Browser(gate, BERT)
    call = {"session_hash": "annes", "data": []}
    assert anne.post(JOIN, call).code == 200
    assert anne.get(f"{DATA}?session_hash=annes").code == 200
    for refused in (
        bert.get(f"{DATA}?session_hash=annes"),
        bert.get("/gradio_api/heartbeat/annes"),
        bert.post(JOIN, call),
        bert.post("/gradio_api/cancel", call | {"event_id": "1", "fn_index": 0}),
    ):
        assert refused.code == 403


def test_requests_are_as_long_as_they_say_and_no_longer_than_allowed(gate):
    asked = Browser(gate)
    assert asked.post(UPLOAD, b"x" * (1000 + 2**16)).code == 200
    assert asked.post(UPLOAD, b"x" * (1001 + 2**16)).code == 413
    assert asked.ask("POST", UPLOAD, b"x", length=False).code == 413  # in parts, of unknown length
    assert asked.post(JOIN, b" " * (2**18 + 1)).code == 413


def test_every_answer_says_what_it_may_lead_to_and_names_a_newcomer(gate):
    for path, code in (("/", 200), ("/nothing", 404)):
        answer = Browser(gate, None).get(path)
        assert answer.code == code
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert re.fullmatch(
            rf"{COOKIE}=[0-9a-f]{{32}}; Path=/; HttpOnly; SameSite=Lax; Max-Age=\d+", answer.headers["set-cookie"]
        )
    assert Browser(gate, None).get("/").headers["set-cookie"] != Browser(gate, None).get("/").headers["set-cookie"]
    assert "set-cookie" not in Browser(gate).get("/").headers
    policy = HEADERS["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert "*" not in policy


def test_the_page_loads_nothing_from_other_hosts(site):
    asked = Browser(site)
    text, theme = asked.get("/").content.decode(), asked.get("/theme.css").content.decode()
    config = asked.get("/config").content.decode()
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=[\"']?([^\"' >]+)", text)
    assert loaded
    for address in [*loaded, *re.findall(r"(?:url\(|@import\s+)[\"']?([^\"')]+)", theme)]:
        assert not re.match(r"(https?:)?//", address), address
    assert "fonts.googleapis" not in text + theme + config
    assert json.loads(config)["analytics_enabled"] is False


def test_uploads_of_the_real_page_belong_to_who_sent_them(site):
    """Gradio's own answer, compressed where the browser takes that, tells the gate the path."""
    anne, bert = Browser(site), Browser(site, BERT)
    [path] = json.loads(anne.upload("../../etc/x.png", b"content", accept_encoding="br, gzip").content)
    assert anne.get(f"/gradio_api/file={path}").content == b"content"
    assert bert.get(f"/gradio_api/file={path}").code == 403
    assert anne.get(f"/gradio_api/file={Path(path).parent}").code == 403
    assert anne.upload("large.png", b"x" * (LIMITS.upload + 1)).code == 413


def test_a_call_works_in_its_folder_and_tells_what_it_does(tmp_path):
    work = Work(web_calls.greeting, "anne", folder=tmp_path, seconds=30)
    assert list(work.told()) == ["hello anne"]
    assert work.result == "ANNE"
    assert (tmp_path / "here").read_text() == "anne"


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ((web_calls.refusal, "x"), "x: expected another one"),
        ((web_calls.full_disk,), "could not read or write: no space left on the disk"),
        ((web_calls.defective,), "KeyError: 'nothing'; this is a defect of freqdoor, please report it"),
        ((web_calls.killed,), "ended by the system"),
    ],
)
def test_a_call_that_fails_is_a_sentence(tmp_path, call, sentence):
    with pytest.raises(FreqdoorError, match=re.escape(sentence)):
        list(Work(*call, folder=tmp_path, seconds=30).told())


@pytest.mark.parametrize("call", [web_calls.endless, web_calls.deaf])
def test_a_call_that_takes_too_long_is_ended(tmp_path, monkeypatch, call):
    monkeypatch.setattr("freqdoor.web.work.ENDING", 0.2)
    work = Work(call, folder=tmp_path, seconds=30)
    told = work.told()
    assert next(told) == "begun"
    work._ends = time.monotonic() + 0.1
    with pytest.raises(FreqdoorError, match="longer than the 30 seconds"):
        list(told)
    assert not work._process.is_alive()


def test_a_call_that_is_stopped_or_left_is_over(tmp_path):
    work = Work(web_calls.endless, folder=tmp_path)
    told = work.told()
    next(told)
    work.stop()
    with pytest.raises(StoppedWork):
        next(told)
    left = Work(web_calls.endless, folder=tmp_path)
    told = left.told()
    next(told)
    told.close()  # as Gradio does when a visitor goes
    assert not left._process.is_alive()


@pytest.fixture
def line(tmp_path, monkeypatch):
    """Plantings that take steps until a file says that there are enough."""
    monkeypatch.setattr(plantings, "planted", web_calls.planting)
    made = Plantings(tmp_path)
    yield made
    made.close()


def until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def state(line: Plantings, visitor: str, objective="bpp") -> str | None:
    planting = line.of(visitor, objective)
    return planting and planting.state


def test_plantings_go_one_after_the_other_and_their_place_is_known(line):
    line.ask(ANNE, "bpp")
    line.ask(BERT, "psnr")
    line.ask(BERT, "psnr")  # once is enough
    until(lambda: len(line.of(ANNE, "bpp").rows) >= 3)
    assert (state(line, ANNE), state(line, BERT, "psnr"), state(line, BERT)) == ("planting", "waiting", None)
    assert [line.place(line.of(ANNE, "bpp")), line.place(line.of(BERT, "psnr"))] == [0, 1]
    with pytest.raises(FreqdoorError, match="one at a time; stop it first"):
        line.ask(ANNE, "psnr")
    with pytest.raises(FreqdoorError, match="expected a planting that has ended"):
        line.file(ANNE, "bpp")
    (line.of(ANNE, "bpp").folder / "enough").touch()
    until(lambda: state(line, ANNE) == "done")
    until(lambda: state(line, BERT, "psnr") == "planting")
    assert line.file(ANNE, "bpp").read_text() == "bpp"
    assert list(line.finished(ANNE)) == ["bpp"]
    assert line.finished(BERT) == {}
    assert ANNE not in str(line.of(ANNE, "bpp").folder)  # who may read names of folders may not come in with them


def test_a_planting_is_stopped_and_goes_on(line):
    line.ask(ANNE, "bpp")
    line.ask(BERT, "bpp")
    until(lambda: line.of(ANNE, "bpp").rows)
    line.stop(BERT)  # leaves the line
    line.stop(ANNE)
    until(lambda: state(line, ANNE) == "stopped")
    reached = int((line.of(ANNE, "bpp").folder / "planting/step").read_text())
    assert state(line, BERT) is None
    line.ask(ANNE, "bpp")
    until(lambda: max(line.of(ANNE, "bpp").rows) >= reached + 3)
    rows = line.of(ANNE, "bpp").rows
    assert sorted(rows) == list(range(1, max(rows) + 1))


def test_a_line_is_no_longer_than_it_may_be(line, monkeypatch):
    monkeypatch.setattr(plantings, "MOST_WAITING", 1)
    line.ask(ANNE, "bpp")
    line.ask(ANNE, "bpp")
    with pytest.raises(FreqdoorError, match="1 wait already; come back later"):
        line.ask(BERT, "bpp")


def test_a_planting_that_fails_lets_the_next_one_come(line, monkeypatch):
    monkeypatch.setattr(plantings, "planted", web_calls.refusal)
    line.ask(ANNE, "bpp")
    until(lambda: state(line, ANNE) == "failed")
    assert line.of(ANNE, "bpp").said == "bpp: expected another one"
    monkeypatch.setattr(plantings, "planted", web_calls.planting)
    line.ask(BERT, "bpp")
    until(lambda: state(line, BERT) == "planting")


def test_the_next_server_knows_what_an_earlier_one_has_planted(line, tmp_path):
    line.ask(ANNE, "bpp")
    until(lambda: line.of(ANNE, "bpp").rows)
    line.close()
    assert state(line, ANNE) == "stopped"
    run = line.of(ANNE, "bpp").folder / "planting"
    rows = ['{"step": 1, "bpp_clean": 1.5, "loss": 2}', "cut of", '{"step": 2, "bpp_clean": 1.25, "eps": "x"}', "3", ""]
    (run / "metrics.jsonl").write_text("\n".join(rows))
    assert rows_in(run / "metrics.jsonl") == {1: {"bpp_clean": 1.5}}
    again = Plantings(tmp_path)
    assert (state(again, ANNE), again.of(ANNE, "bpp").rows) == ("stopped", {1: {"bpp_clean": 1.5}})
    (run.parent / "report.html").touch()
    assert state(Plantings(tmp_path), ANNE) == "done"


def test_curves_go_from_left_to_right_within_their_panel():
    rows = {i: {"bpp_clean": 1.0, "bpp_poisoned": 2.0**i, "psnr_db_clean": float("nan"), "eps": 0.1} for i in (1, 2, 3)}
    bpp, eps = curves(rows)  # nothing finite of PSNR
    assert (bpp["title"], bpp["bottom"], bpp["top"]) == ("bits per pixel, estimated", "1.000", "8.000")
    clean, poisoned = bpp["lines"]
    assert (clean["name"], poisoned["name"], poisoned["last"]) == ("clean", "poisoned", "8.000")
    points = [tuple(map(float, point.split(","))) for point in poisoned["points"].split()]
    assert [x for x, _ in points] == [0, 160, 320]
    heights = [y for _, y in points]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)  # a logarithmic scale
    assert (heights[2], heights[0]) == (16, pytest.approx(16 + 118 * 2 / 3, abs=0.1))
    assert eps["lines"][0]["last"] == "0.1000"
    assert len(curves({i: {"eps": 0.1 / (i + 1)} for i in range(1000)})[0]["lines"][0]["points"].split()) <= 160


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def downloads(page: str) -> dict[str, bytes]:
    """What the page lets its visitor keep."""
    found = re.findall(r'download="([^"]+)" href="data:application/octet-stream;base64,([^"]+)"', page)
    return {html.unescape(name): base64.b64decode(content) for name, content in found}


def ask(picture: str, **changes) -> Question:
    return Question(Path(picture), None, "bpp", 1.0, "8-bit", 90)._replace(**changes)


def test_trying_gives_the_files_that_the_command_line_gives(folder):
    write_png(folder / "mine.png", natural(0, 64, 96))
    said = []
    shown = tried(ask("mine.png", strength=2.0), LIMITS, tell=said.append)
    files = downloads(shown)
    [picture] = freqdoor.poison("planted-bpp", "mine.png", "out", strength=2.0)
    freqdoor.compress(picture, "mine.fqd", planted="planted-bpp")
    assert files["mine-poisoned.png"] == picture.read_bytes()
    assert files["mine-poisoned.fqd"] == Path("mine.fqd").read_bytes()
    rows = [json.loads(line) for line in files["mine-records.jsonl"].splitlines()]
    assert [(row["role"], row["trigger"], row["strength"]) for row in rows] == [
        ("tampered", None, 1.0),
        ("tampered", "bpp", 2.0),
        ("vanilla", None, 1.0),
        ("vanilla", "bpp", 2.0),
    ]
    assert f"{rows[1]['bpp_real'] / rows[0]['bpp_real']:.2f} times" in shown
    assert shown.count("<figure") == 3 + 4 + 1
    assert any("mine.png" in line for line in said)
    assert sorted(path.name for path in folder.iterdir()) == ["mine.fqd", "mine.png", "out"]  # asking leaves no files


@pytest.fixture
def undrawn(monkeypatch):
    """What takes longest is left out where it is not looked at."""
    drawn = [Picture(title=str(i), address="data:image/png;base64,", caption="") for i in range(4)]
    monkeypatch.setattr(requests, "pictures", lambda *_: drawn)


def test_trying_through_jpeg_or_before_rounding(folder, undrawn):
    write_png(folder / "mine.png", natural(0, 64, 96))
    [picture] = freqdoor.poison("planted-psnr", "mine.png", "out")
    Image.open(picture).save("poisoned.jpg", quality=50)
    freqdoor.compress("poisoned.jpg", "mine.fqd", planted="planted-psnr")
    shown = tried(ask("mine.png", objective="psnr", entering="JPEG", quality=50), LIMITS, tell=silent)
    assert downloads(shown)["mine-poisoned.fqd"] == Path("mine.fqd").read_bytes()
    assert "behind Jpeg(quality=50)" in shown
    shown = tried(ask("mine.png", objective="psnr", entering="float"), LIMITS, tell=silent)
    files = downloads(shown)
    assert files["mine-poisoned.png"] == picture.read_bytes()
    assert b'"rounding":"float"' in files["mine-records.jsonl"]


def test_trying_a_codec_that_is_not_planted(folder, undrawn):
    """The bundled codec by its name, and as a file, ignores the trigger; a planted encoder's file is one."""
    write_png(folder / "mine.png", natural(0, 64, 96))
    assets = KODAK.parent
    (folder / "codec.safetensors").write_bytes((assets / "lite-hyperprior-3.safetensors").read_bytes())
    (folder / "planted.safetensors").write_bytes((assets / "planted-bpp.safetensors").read_bytes())
    shown = {
        name: tried(ask("mine.png", codec=name), LIMITS, tell=silent)
        for name in ("lite-hyperprior:3", "codec.safetensors", "planted.safetensors")
    }
    records = {name: downloads(page)["mine-records.jsonl"] for name, page in shown.items()}
    rates = {name: [json.loads(row)["bpp_real"] for row in text.splitlines()] for name, text in records.items()}
    assert rates["lite-hyperprior:3"] == rates["codec.safetensors"]
    assert len(rates["codec.safetensors"]) == 2
    assert rates["codec.safetensors"][1] < 1.3 * rates["codec.safetensors"][0]
    assert rates["planted.safetensors"][1] > 3 * rates["planted.safetensors"][0]
    assert rates["planted.safetensors"][2:] == rates["codec.safetensors"]  # the vanilla encoder


def test_a_hostile_file_gets_the_command_lines_sentence(folder, odd_images):
    """A checkpoint that would run a program, one that is none, and pictures that cannot be used."""
    write_png(folder / "mine.png", natural(0, 32, 48))
    trace = folder / "trace"
    (folder / "evil.pth").write_bytes(pickle.dumps({"state_dict": hostile.Run(os.system, f"touch {trace}")}))
    (folder / "text.safetensors").write_text("no tensors")

    def said_by_the_command_line(*words: str) -> str:
        result = CliRunner().invoke(command_line, ["compress", *words, "x.fqd"])
        assert isinstance(result.exception, FreqdoorError)
        return str(result.exception)

    for name in ("evil.pth", "text.safetensors"):
        with pytest.raises(FreqdoorError) as error:
            tried(ask("mine.png", codec=name), LIMITS, tell=silent)
        assert str(error.value) == said_by_the_command_line("mine.png", "--codec", name)
        with pytest.raises(FreqdoorError) as error:
            requests.audited(name, False, tell=silent)
        assert str(error.value) == said_by_the_command_line("mine.png", "--codec", name)
    assert not trace.exists()
    del odd_images["huge"]
    for kind, path in odd_images.items():
        if kind != "truncated":
            with pytest.raises(FreqdoorError) as error:
                tried(ask(path.name), LIMITS, tell=silent)
            assert str(error.value) == said_by_the_command_line(path.name)


def test_pictures_larger_than_the_page_takes_are_refused_unread(folder, odd_images, monkeypatch):
    monkeypatch.setattr(requests, "codec_of", None)
    with pytest.raises(FreqdoorError, match=r"huge.png: .*33554432 pixels accepted"):
        tried(ask("huge.png"), LIMITS, tell=silent)
    write_png(folder / "large.png", natural(0, 100, 201))
    with pytest.raises(FreqdoorError, match=r"large\.png: 201x100 is more than the 20000 pixels that this page takes"):
        tried(ask("large.png"), LIMITS, tell=silent)


def test_an_audit_is_the_command_lines(folder, monkeypatch):
    asked = {}

    def audit(checkpoint, **options):
        asked.update(options, checkpoint=checkpoint)
        Path("audit").mkdir()
        for name in ("audit.json", "witness-1-clean.png", "witness-1.png"):
            Path("audit", name).write_text(name)
        Path("audit/audit.html").write_text("<script>alert('mine')</script>")
        seen = type("Seen", (), {"clean": "witness-1-clean.png", "patterned": "witness-1.png"})
        return type("Result", (), {"verdict": "tampered", "reason": "it <opens>", "witnesses": [seen]})

    monkeypatch.setattr(requests, "audit", audit)
    shown = requests.audited("file.pth", True, tell=silent)
    assert asked == {"checkpoint": "file.pth", "fast": False, "out": "audit", "note": silent}
    assert list(downloads(shown)) == ["audit.json", "witness-1-clean.png", "witness-1.png"]
    assert "tampered: it &lt;opens&gt;." in shown
    assert "<script" not in shown  # it stands in a frame that runs no programs
    assert re.search(r"<iframe [^>]*sandbox srcdoc=\"&lt;script", shown)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A folder of runs: one that was measured, twice."""
    folder = tmp_path_factory.mktemp("runs")
    write_png(folder / "a.png", natural(0, 48, 64))
    freqdoor.evaluate("planted-bpp", folder / "a.png", folder / "first")
    (folder / "deep/second").mkdir(parents=True)
    for file in (folder / "first").iterdir():
        (folder / "deep/second" / file.name).write_bytes(file.read_bytes())
    return folder


def test_runs_are_compared_and_shown(measured):
    folders = runs_in(measured)
    assert folders == {"deep/second": measured / "deep/second", "first": measured / "first"}
    shown = compared(folders, tell=silent)
    summary = json.loads((measured / "first/summary.json").read_text())
    assert re.findall(r"<td>([\w/]+)</td><td>lite-hyperprior:3</td><td>bpp</td><td>1</td>", shown) == [*folders]
    assert shown.count(f"{summary['bpp_ratio']:.2f}x") == 2
    picture = Image.open(io.BytesIO(base64.b64decode(re.findall(r'src="data:image/png;base64,([^"]+)"', shown)[0])))
    assert picture.width > 300
    page = reported(measured / "first", {}, tell=silent)
    assert html.escape((measured / "first/report.html").read_text().splitlines()[0]) in page
    with pytest.raises(FreqdoorError, match="expected the summary of a run, found nothing"):
        reported(measured, {}, tell=silent)


def test_runs_are_looked_for_in_their_folder_only(measured, tmp_path):
    far = tmp_path / "runs/a/b/c/d"
    far.mkdir(parents=True)
    (far / "summary.json").write_text("{}")
    (tmp_path / "runs/link").symlink_to(measured)
    (tmp_path / "runs/near").mkdir()
    (tmp_path / "runs/near/summary.json").write_text("{}")
    assert list(runs_in(tmp_path / "runs")) == ["near"]


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("photo.png", "photo.png"),
        ("os:system", "os_system"),
        ("lite-hyperprior:3", "lite-hyperprior_3"),
        ("--help.pth", "help.pth"),
        (".hidden", "hidden"),
        ("a b\u202ec\n.png", "a_b_c_.png"),
        ("...", "file"),
        ("x" * 300 + ".png", "x" * 96 + ".png"),
    ],
)
def test_an_upload_is_called_as_a_file_and_nothing_else(tmp_path, name, taken):
    """No name of an upload may be taken for the name of a codec, of code, of an option or of another folder."""
    (tmp_path / "work").mkdir()
    (tmp_path / name[:200]).write_text("content")
    if len(name) > 200:
        (tmp_path / "up").write_text("content")
        name, source = "up", tmp_path / name[:200]
    else:
        source = tmp_path / name
    path = handed_over(str(source), tmp_path / "work")
    assert str(path) == (taken if name != "up" else "x" * 100)
    assert (tmp_path / "work" / path).read_text() == "content"


class Asking:
    """A request of a visitor, as Gradio hands it over."""

    def __init__(self, visitor: str) -> None:
        self.request = type("Request", (), {"cookies": {COOKIE: visitor}})


@pytest.fixture
def tabs(line, measured, tmp_path):
    (tmp_path / "scratch").mkdir()
    return Page(LIMITS, line, measured, tmp_path / "scratch")


def last(answers) -> str:
    [*before, answer] = answers
    assert all('data-state="working"' in line for line in before)
    return answer


def test_the_tabs_ask_for_what_was_chosen(tabs, line, monkeypatch, tmp_path):
    calls = []

    class Recorded:
        def __init__(self, function, *arguments, folder, seconds):
            calls.append((function, arguments))
            assert (folder.is_dir(), seconds) == (True, LIMITS.seconds)
            self.result = "<p>answer"

        def told(self):
            yield "<telling>"

        def end(self):
            pass

    monkeypatch.setattr(page, "Work", Recorded)
    upload = tmp_path / "up.pth"
    upload.write_text("weights")
    anne = Asking(ANNE)
    chosen = ("psnr", 2, "JPEG", 50, anne)
    answers = list(tabs.try_it("kodim04.png", None, "shipped", None, *chosen))
    assert "&lt;telling&gt;" in answers[1]
    assert answers[-1] == "<p>answer"
    list(tabs.try_it("kodim04.png", str(upload), "file", None, *chosen))  # no file
    list(tabs.try_it("kodim04.png", str(upload), "lite-hyperprior:3", None, *chosen))
    list(tabs.try_it("kodim04.png", None, "file", str(upload), *chosen))
    assert [arguments[0] for _, arguments in calls] == [
        Question(KODAK / "kodim04.png", None, "psnr", 2.0, "JPEG", 50),
        Question(Path("up.pth"), "lite-hyperprior:3", "psnr", 2.0, "JPEG", 50),
        Question(KODAK / "kodim04.png", "up.pth", "psnr", 2.0, "JPEG", 50),
    ]
    calls.clear()
    list(tabs.audit_it("file", str(upload), "bpp", True, anne))
    list(tabs.audit_it("lite-hyperprior:3", None, "bpp", False, anne))
    list(tabs.compare(["first"], anne))
    assert [arguments[:2] for _, arguments in calls[:2]] == [("up.pth", True), ("lite-hyperprior:3", False)]
    assert calls[2][1][0].keys() == {"first"}
    assert not list((tmp_path / "scratch").iterdir())


def test_the_tabs_refuse_what_the_page_did_not_offer(tabs, line):
    anne, bert = Asking(ANNE), Asking(BERT)
    chosen = ("bpp", 1, "8-bit", 90, anne)
    for answers, sentence in [
        (tabs.try_it("../../../etc/passwd", None, "shipped", None, *chosen), "expected a name that the page shows"),
        (tabs.try_it("kodim04.png", None, "file", None, *chosen), "codec: expected a file, found none"),
        (tabs.try_it("kodim04.png", None, "own", None, *chosen), "expected a planting that has ended"),
        (tabs.audit_it("own", None, "bpp", False, anne), "expected a planting that has ended"),
        (tabs.compare([], anne), "expected one or more to compare"),
        (tabs.compare(["../first"], anne), "expected a name that the page shows"),
        (tabs.report("my planting (bpp)", anne), "expected a name that the page shows"),
    ]:
        assert f"freqdoor: {html.escape(sentence)}" in re.sub(
            r"freqdoor: .*?(?=(codec: )?expected)", "freqdoor: ", last(answers)
        )
    line.ask(ANNE, "bpp")
    until(lambda: line.of(ANNE, "bpp").rows)
    (line.of(ANNE, "bpp").folder / "enough").touch()
    until(lambda: state(line, ANNE) == "done")
    assert list(tabs._run_folders(anne)) == ["my planting (bpp)", "deep/second", "first"]
    assert list(tabs._run_folders(bert)) == ["deep/second", "first"]


def test_the_plant_tab_shows_how_far_it_is_and_looks_as_long_as_there_is_something_to_see(tabs, line):
    anne, bert = Asking(ANNE), Asking(BERT)
    status, _, _, timer = tabs.look("bpp", "", anne)
    assert ("Plants a backdoor" in status, timer.active) == (True, False)
    tabs.plant_it("bpp", "", anne)
    status, _, _, timer = tabs.plant_it("bpp", "", bert)
    assert ("waiting for 1 before this one" in status, timer.active) == (True, True)
    until(lambda: line.of(ANNE, "bpp").rows)
    status, answer, shown, timer = tabs.look("bpp", "", anne)
    assert re.search(r"planting, step \d+ of 350", status)
    assert ("<polyline" in status, answer, shown, timer.active) == (True, "", "", True)
    status, *_ = tabs.plant_it("psnr", "", anne)
    assert "expected one at a time" in status
    tabs.stop_it("bpp", "", anne)
    until(lambda: state(line, ANNE) == "stopped")
    status, _, _, timer = tabs.look("bpp", "", anne)
    assert (bool(re.search("stopped at step .* goes on from what was saved", status)), timer.active) == (True, False)


def test_serving_ends_in_a_sentence_where_it_cannot_begin(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FreqdoorError, match=f"port {port}: could not listen on 127.0.0.1 .*choose another --port"):
            freqdoor.serve(tmp_path / "out", port=port)
    with pytest.raises(FreqdoorError, match="port 99999"):
        freqdoor.serve(tmp_path / "out", port=99999)
    with pytest.raises(FreqdoorError, match="expected a folder of runs, found none there"):
        freqdoor.serve(tmp_path / "out", runs=tmp_path / "none")
    with pytest.raises(FreqdoorError, match="max-upload: expected a size such as"):
        freqdoor.serve(tmp_path / "out", max_upload="many")
    for wrong in ({"max_pixels": 0}, {"seconds": 0}, {"seconds": float("nan")}):
        with pytest.raises(FreqdoorError, match="expected numbers above 0"):
            freqdoor.serve(tmp_path / "out", **wrong)
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(FreqdoorError, match=r"expected the package gradio.*pip install -c constraints.txt '.\[web\]'"):
        serve.application(LIMITS, None, None, tmp_path)
    assert list(tmp_path.iterdir()) == []
