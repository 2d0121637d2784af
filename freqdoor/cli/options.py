"""What the verbs share: the application, how a function becomes a verb, and the types of options."""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec

import typer
from typer.core import TyperGroup

from freqdoor import __version__
from freqdoor.cli.terminal import answer, every_minute, harmless, note, say, stopped
from freqdoor.errors import KEPT, stop_code
from freqdoor.listing import CODECS, QUALITIES, names
from freqdoor.samples import BUNDLED

P = ParamSpec("P")


@contextmanager
def _harmless_words() -> Iterator[None]:
    """What is said of a wrong command line repeats parts of it, and these may be names of files."""
    try:
        yield
    except Exception as error:  # typer has no public name for its errors of a command line
        if isinstance(message := getattr(error, "message", None), str):
            error.message = harmless(message)  # type: ignore[attr-defined]
        raise


class _Verbs(TyperGroup):
    """The verbs, and what stands before them."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """What stands before the verb."""
        with _harmless_words():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        with _harmless_words():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Plant and measure backdoors in learned image codecs.",
)


def codecs() -> list[str]:
    """Names of codecs, those with weights at hand first."""
    return list(dict.fromkeys([BUNDLED, *(f"{name}:{quality}" for name in CODECS for quality in QUALITIES)]))


def _planted() -> list[str]:
    """Names of the planted encoders that come with the package."""
    return list(names("planted").names)


def _defences() -> list[str]:
    """Names of preprocessings and of presets of them."""
    return list(names("defences").names)


Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting, for example trigger.eps=0.003; repeatable.")
]
Config = Annotated[Path | None, typer.Argument(help="TOML file of settings; --set alone does as well.")]
CODEC = "name:quality, a checkpoint file or its folder, or package.module:factory."
CodecName = Annotated[str, typer.Option("--codec", autocompletion=codecs, help=CODEC)]
Checkpoint = Annotated[str, typer.Argument(autocompletion=codecs, help=CODEC)]
Weights = Annotated[Path | None, typer.Option(help="Take the weights from this file; --codec gives the architecture.")]
VanillaName = Annotated[
    str | None,
    typer.Option(
        "--codec", autocompletion=codecs, help="The vanilla codec; by default what the planted encoder's file names."
    ),
]
Planted = Annotated[
    Path,
    typer.Argument(
        autocompletion=_planted, help="planted.safetensors, the run directory that holds it, or planted-bpp."
    ),
]
Defences = Annotated[
    str,
    typer.Option(
        autocompletion=_defences, help="What is done before the encoder: none, paper, all, or 'Jpeg(75); Median()'."
    ),
]
TriggerName = Annotated[str | None, typer.Option(help="Which trigger; by default the first.")]
Out = Annotated[Path, typer.Option(help="Folder to write into.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that this command did not make.")]
Devices = Annotated[int, typer.Option(help="Processes on this machine that share every batch, a device each.")]
Nodes = Annotated[int, typer.Option(help="Machines that do so together, with MASTER_ADDR and NODE_RANK set.")]
RunnerName = Annotated[
    Literal["local", "ray"], typer.Option(help="Where jobs run: processes of this machine, or a Ray cluster.")
]
Json = Annotated[bool, typer.Option("--json", help="Answer with one JSON object and nothing else.")]
Broken = Annotated[bool, typer.Option("--skip-broken", help="Go on without images that cannot be used.")]


def _print_version(asked: bool) -> None:
    if asked:
        say(f"freqdoor {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the whole trace of an error; may stand anywhere.")
    ] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What reading one file may take, as 2G; default 4G; may stand anywhere."),
    ] = None,
) -> None:
    """What may stand before the verb; `main` looks for --debug and --max-memory itself, wherever they stand."""


STEPS_KEPT = "the steps so far are kept, and the same command goes on after them"
MEASURED_KEPT = "what is measured so far is kept, and the same command goes on after it"
NOTHING_KEPT = "nothing is kept, the same command begins anew"


def verb(name: str | None = None, *, kept: str = KEPT) -> Callable[[Callable[P, object]], Callable[P, None]]:
    """Make a function a verb: a log hears every minute where it is, and a stop from outside is one sentence.

    What the function returns is what the verb answers: with --json it is all that the standard output has. Its
    `exit_code`, where it has one, is what the verb ends with.

    Args:
        kept: what is said of a work that was stopped from outside.
    """

    def register(function: Callable[P, object]) -> Callable[P, None]:
        title = name or function.__name__
        signature = inspect.signature(function)
        answering = signature.return_annotation is not None  # the page answers nobody
        option = inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)

        @functools.wraps(function)
        def run(*arguments: P.args, **options: P.kwargs) -> None:
            as_json = bool(options.pop("json", False))
            # what is said to people, and what a user's own code prints, goes beside what a program reads
            beside = redirect_stdout(sys.stderr) if as_json else nullcontext()
            with every_minute(title), beside:
                try:
                    content = function(*arguments, **options)
                except KeyboardInterrupt as stop:
                    stopped(kept)
                    raise SystemExit(stop_code(stop)) from None
            if as_json:
                answer(content, title)
            if code := getattr(content, "exit_code", 0):
                raise typer.Exit(code)

        if answering:
            run.__signature__ = signature.replace(  # type: ignore[attr-defined]
                parameters=[*signature.parameters.values(), option]
            )
        app.command(title)(run)
        return run

    return register


def load_torch() -> None:
    """Load PyTorch, once the settings are known to be right: it takes seconds."""
    note("loading PyTorch")
    # threads that wait for each other spin only briefly: on a busy machine they would take the time of those at work
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a connection that is lost we say one sentence ourselves
    from freqdoor.training.precision import flush_denormals

    flush_denormals()
