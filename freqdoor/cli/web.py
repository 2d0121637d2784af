"""The verb of the page: serve."""

from pathlib import Path
from typing import Annotated

import typer

import freqdoor
from freqdoor.cli.options import load_torch, verb
from freqdoor.cli.terminal import note, say
from freqdoor.web.limits import MAX_PIXELS, MAX_UPLOAD, OUT, PORT, SECONDS


@verb()
def serve(
    out: Annotated[Path, typer.Option(help="Folder that keeps what visitors plant.")] = Path(OUT),
    runs: Annotated[Path | None, typer.Option(help="Folder of runs that the page shows and compares.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 for any that is free.")] = PORT,
    max_upload: Annotated[str, typer.Option(help="Largest file that may be uploaded.")] = MAX_UPLOAD,
    max_pixels: Annotated[int, typer.Option(help="Pixels of the largest picture.")] = MAX_PIXELS,
    seconds: Annotated[float, typer.Option(help="That a request may take, from when its turn has come.")] = SECONDS,
) -> None:
    """Serve a page on this machine to try, plant, audit and compare in a browser; Ctrl-C ends it."""
    load_torch()

    def announce(address: str) -> None:
        say(f"Open {address} in a browser; Ctrl-C ends it.")
        note(f"serving at {address}")

    freqdoor.serve(
        out, runs=runs, port=port, max_upload=max_upload, max_pixels=max_pixels, seconds=seconds, announce=announce
    )
