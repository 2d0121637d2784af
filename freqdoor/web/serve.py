"""`freqdoor serve`: the page on this machine's own address."""

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from freqdoor.errors import FreqdoorError
from freqdoor.limits import parse_size
from freqdoor.lock import alone
from freqdoor.web.limits import MAX_PIXELS, MAX_UPLOAD, OUT, PORT, SECONDS, Limits

HOST = "127.0.0.1"
CLOSING = 2  # seconds that open connections have when the server ends
SETTINGS = {  # of libraries, which read them when they are imported or used
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ALLOWED_PATHS": "",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_MCP_SERVER": "False",
}


@alone("serve")
def serve(
    out: Path | str = OUT,
    *,
    runs: Path | str | None = None,
    port: int = PORT,
    max_upload: int | str = MAX_UPLOAD,
    max_pixels: int = MAX_PIXELS,
    seconds: float = SECONDS,
    announce: Callable[[str], None] | None = None,
) -> None:
    """Serve the page until Ctrl-C: try a trigger, plant a backdoor, audit an encoder, compare runs.

    It is bound to 127.0.0.1 and opens no browser. What visitors plant is kept in `out`, a folder each; a planting that
    is under way at the end saves its state, and goes on when its visitor asks for it again.

    Args:
        runs: folder of runs that were measured, for the tab Runs; everybody who opens the page may read their reports.
        port: of the address; 0 for any that is free.
        max_upload: bytes that an uploaded file may have, as a number or "256M".
        max_pixels: that a picture may have.
        seconds: that a request may take, from when its turn has come; a planting may take as long as it needs.
        announce: called with the page's address, once it can be opened.

    Raises:
        FreqdoorError: Gradio is not installed, a port that is taken, a folder that cannot be used, another process in
            `out`, limits that are none.
    """
    limits = Limits(parse_size(max_upload, "max-upload"), max_pixels, seconds)
    if runs is not None and not Path(runs).is_dir():
        raise FreqdoorError(f"{runs}: expected a folder of runs, found none there")
    listener = listening(port)
    with listener, tempfile.TemporaryDirectory(prefix="freqdoor-web-") as scratch, _settings(scratch):
        from freqdoor.web.plantings import Plantings
        from freqdoor.web.work import get_ready

        get_ready()
        plantings = Plantings(Path(out).resolve())
        try:
            app = application(limits, plantings, None if runs is None else Path(runs), Path(scratch))
            _run(app, listener, announce)
        finally:
            plantings.close()


def listening(port: int) -> socket.socket:
    """A socket on this machine's own address; FreqdoorError for a port that cannot be had."""
    reason = "expected 0 to 65535"
    if 0 <= port < 2**16:
        try:
            return socket.create_server((HOST, port))
        except OSError as error:
            reason = error.strerror or str(error)
    raise FreqdoorError(
        f"port {port}: could not listen on {HOST} ({reason}); choose another --port, or 0 for any that is free"
    )


def application(limits: Limits, plantings: Any, runs: Path | None, scratch: Path) -> Any:
    """The page as an ASGI application, behind its gate.

    Raises:
        FreqdoorError: Gradio is not installed.
    """
    try:
        import gradio as gr
        from fastapi import FastAPI
    except ImportError as error:
        raise FreqdoorError(
            f"serve: expected the package gradio, could not import it ({error}); install it with pip install -c "
            "constraints.txt '.[web]'"
        ) from None
    from freqdoor.web.gate import Gate
    from freqdoor.web.page import Page

    blocks = Page(limits, plantings, runs, scratch).blocks()
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        max_file_size=limits.upload,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css_paths=[Path(__file__).parents[1] / "templates/web.css"],
    )
    return Gate(app, limits.upload)


def _run(app: Any, listener: socket.socket, announce: Callable[[str], None] | None) -> None:
    import uvicorn

    config = uvicorn.Config(
        app, log_level="error", access_log=False, server_header=False, ws="none", timeout_graceful_shutdown=CLOSING
    )
    if announce:  # who comes before the server is ready is kept waiting by the socket
        announce(f"http://{HOST}:{listener.getsockname()[1]}/")
    uvicorn.Server(config).run(sockets=[listener])


@contextlib.contextmanager
def _settings(scratch: str) -> Iterator[None]:
    """The libraries' settings in the environment, which is put back."""
    uploads = {"GRADIO_TEMP_DIR": os.path.join(scratch, "uploads")}
    before = {name: os.environ.get(name) for name in SETTINGS | uploads}
    os.environ.update(SETTINGS | uploads)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
