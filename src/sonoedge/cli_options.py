"""Arguments and options that verbs of several modules take."""

from pathlib import Path
from typing import Annotated, Literal

import typer

AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON on standard output.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that `build` made.", show_default=False)]
Backend = Annotated[
    Literal["tensorrt", "cuda", "cpu"] | None,
    typer.Option(help="What runs the bundle; else what its device profile names.", show_default=False),
]
TrustedKeys = Annotated[
    Path | None,
    typer.Option(help="Folder of the keys that may have signed a bundle; else this machine's.", show_default=False),
]
