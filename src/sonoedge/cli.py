"""The command line: one verb, one module, imported when the verb is called."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from sonoedge import __version__
from sonoedge.cli_options import AsJson, Backend, BundlePath, TrustedKeys
from sonoedge.cli_scanner import scanner
from sonoedge.cli_security import audit_log, keys
from sonoedge.refusals import sentence

REFUSED = 2
INTERRUPTED = 130

app = typer.Typer(name="sonoedge", add_completion=False)
app.add_typer(scanner)
app.add_typer(keys, name="keys")
app.add_typer(audit_log, name="audit")

Checkpoint = Annotated[Path, typer.Argument(help="Folder of a checkpoint in the released format.", show_default=False)]
Recipe = Annotated[
    str | None, typer.Option(help="TOML file, or the name of a packaged recipe; else the demo's.", show_default=False)
]
Profile = Annotated[str, typer.Option(help="Device profile: an id from `profiles`, or a TOML file.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 2 for a refusal told in one sentence, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    try:
        with command.make_context("sonoedge", list(argv)) as context:
            result = command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:
        if not isinstance(stop.__context__, BrokenPipeError):  # which rich turns into an exit of its own
            raise
        return _refuse(str(sentence(stop.__context__)), argv)
    except Exception as error:
        message = sentence(error)
        if message is None:
            raise
        return _refuse(message, argv)
    return result if isinstance(result, int) else 0


def _refuse(message: str, argv: Sequence[str]) -> int:
    """Tell a refusal: a sentence on standard error and, with --json, an object on standard output."""
    print(f"sonoedge: error: {message}", file=sys.stderr)
    try:
        if "--json" in argv:
            print(msgspec.json.encode({"error": message}).decode())
        sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads any more; Python flushes once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return REFUSED


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"sonoedge {__version__}")
        raise typer.Exit


@app.callback()
def sonoedge(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say it.")] = False,
) -> None:
    """Turn an EchoVLM checkpoint into a live ultrasound assistant that runs on the scanner."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the bundle, the contact sheet and the summary.")] = Path(
        "demo_out"
    ),
    as_json: AsJson = False,
) -> None:
    """Show the whole pipeline on the packaged checkpoint and a real clip."""
    from sonoedge.export import demo

    demo.run(out, as_json=as_json)


@app.command()
def inspect(checkpoint: Checkpoint, as_json: AsJson = False) -> None:
    """Say what a checkpoint is: architecture, parameters, experts, which profiles it fits."""
    from sonoedge.export import inspect

    inspect.run(checkpoint, as_json=as_json)


@app.command()
def parity(
    checkpoint: Checkpoint,
    vectors: Annotated[Path, typer.Argument(help="Folder of recorded inputs and outputs.", show_default=False)],
    as_json: AsJson = False,
) -> int:
    """Check that our model reproduces recorded reference outputs."""
    from sonoedge.export import parity

    return parity.run(checkpoint, vectors, as_json=as_json)


@app.command()
def distill(
    checkpoint: Checkpoint,
    data: Annotated[str, typer.Option(help="EchoVLM conversations (JSON), or `phantoms`.")],
    out: Annotated[Path, typer.Option(help="Folder for the student checkpoint.")],
    recipe: Recipe = None,
    as_json: AsJson = False,
) -> None:
    """Train a smaller student to answer as the checkpoint does."""
    from sonoedge.export import distill

    distill.run(checkpoint, recipe, data, out, as_json=as_json)


@app.command()
def prune(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder for the student checkpoint.")],
    recipe: Recipe = None,
    data: Annotated[str | None, typer.Option(help="What importance is measured on, as for `build`.")] = None,
    as_json: AsJson = False,
) -> None:
    """Cut a smaller student out of a checkpoint of any size, without training it."""
    from sonoedge.export.prune import verb

    verb.run(checkpoint, recipe, data, out, as_json=as_json)


@app.command()
def make_checkpoint(
    config: Annotated[str, typer.Option(help="Packaged config such as echovlm-7b, or the path of a config.json.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
    random: Annotated[bool, typer.Option("--random", help="Draw the weights: nothing else can be made.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights.")] = 0,
    dtype: Annotated[Literal["bf16", "f16", "f32"], typer.Option(help="Of the weights.")] = "bf16",
    as_json: AsJson = False,
) -> None:
    """Write a random checkpoint of any size in the released format, for benches."""
    from sonoedge.export import make_checkpoint

    make_checkpoint.run(config, random, out, seed, dtype, as_json=as_json)


@app.command()
def build(
    checkpoint: Checkpoint,
    profile: Profile,
    calibration: Annotated[
        str, typer.Option(help="EchoVLM conversations (JSON), a folder of pictures, DICOM, or `phantoms`.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the bundle.")],
    recipe: Recipe = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Region whose measured routing chooses the experts that stay.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a checkpoint to INT8 for a device and write the bundle that the device serves."""
    from sonoedge.export import build

    build.run(checkpoint, profile, recipe, calibration, out, preset, as_json=as_json)


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(help="Checkpoint or bundle.", metavar="CHECKPOINT|BUNDLE")],
    profile: Profile,
    recipe: Recipe = None,
    mode: Annotated[
        str | None, typer.Option(help="Power mode of the device; else its fastest.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Say whether a model fits a device and how fast it will be, before anything is built; exit status 1: no."""
    from sonoedge.export import plan

    return plan.run(model, profile, recipe, mode, as_json=as_json)


@app.command()
def engine(
    bundle: BundlePath,
    profile: Annotated[
        str | None, typer.Option(help="Device profile; else the one of the bundle.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compile the kernels and say what would be built.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compile a bundle's graphs into TensorRT engines, on the device that will run them."""
    from sonoedge.export.engines import engine

    engine.run(bundle, profile, dry_run, as_json=as_json)


@app.command()
def check_data(
    data: Annotated[
        list[Path],
        typer.Argument(
            help="EchoVLM conversations (JSON), or a folder with a folder of pictures for each class; several: "
            "sets that must share no picture, such as training and test.",
            show_default=False,
        ),
    ],
    as_json: AsJson = False,
) -> int:
    """Say what data holds and what is wrong with it, near-duplicate pictures included; exit status 1: not usable."""
    from sonoedge.calibration import check_data

    return check_data.run(data, as_json=as_json)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Checkpoint or bundle.", metavar="CHECKPOINT|BUNDLE")],
    data: Annotated[
        str,
        typer.Option(
            help="EchoVLM conversations (JSON), a folder with a folder of pictures for each class, or `phantoms`."
        ),
    ] = "phantoms",
    frames: Annotated[int, typer.Option(min=1, help="Fresh phantoms to make, or at most this many cases.")] = 500,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Another checkpoint or bundle, on the same cases; may be repeated.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page and every answer; else none.", show_default=False)
    ] = None,
    backend: Backend = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well checkpoints and bundles answer, side by side."""
    from sonoedge.export import evaluate

    evaluate.run(model, data, frames, as_json=as_json, backend=backend, against=against or (), out=out)


@app.command()
def verify(bundle: BundlePath, backend: Backend = None, trusted: TrustedKeys = None, as_json: AsJson = False) -> None:
    """Check a bundle: every hash, who signed it, then the recorded outputs."""
    from sonoedge import verify

    verify.run(bundle, as_json=as_json, backend=backend, trusted=trusted)


@app.command()
def profiles(as_json: AsJson = False) -> None:
    """List the devices that a bundle can be built for."""
    from sonoedge.device_profiles import listing

    listing.run(as_json=as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can do, and what it lacks."""
    from sonoedge.runtime import doctor

    doctor.run(as_json=as_json)


@app.command()
def sign(
    bundle: BundlePath,
    key: Annotated[Path, typer.Option(help="Secret key that `keys make --signing` wrote (.pem).")],
    as_json: AsJson = False,
) -> None:
    """Vouch for a bundle: check every file, then write an Ed25519 signature beside its manifest."""
    from sonoedge import signing

    signing.run(bundle, key, as_json=as_json)
