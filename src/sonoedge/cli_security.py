"""The verbs with verbs of their own: keys of the endpoints and of bundles, and the audit log."""

from pathlib import Path
from typing import Annotated

import typer

from sonoedge.cli_options import AsJson

keys = typer.Typer(help="Make keys, show them, and keep the list of clients that a server admits.")
AllowList = Annotated[Path, typer.Argument(help="Folder of the admitted clients' public keys.", show_default=False)]


@keys.command("make")
def keys_make(
    stem: Annotated[Path, typer.Argument(help="Path of the new files, without their endings.", show_default=False)],
    signing: Annotated[bool, typer.Option("--signing", help="Keys that sign bundles, instead of CURVE's.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a pair of keys for a server, for a client, or for signing bundles."""
    from sonoedge.runtime import keys

    keys.make(stem, as_json, signing)


@keys.command("show")
def keys_show(
    key: Annotated[str, typer.Argument(help="A public key or a file that holds one.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Print a public key."""
    from sonoedge.runtime import keys

    keys.show(key, as_json)


@keys.command("allow")
def keys_allow(
    folder: AllowList,
    key: Annotated[str, typer.Argument(help="The client's public key, or its file.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="What the client is called; else its file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Admit a client."""
    from sonoedge.runtime import keys

    keys.allow(folder, key, name, as_json)


@keys.command("list")
def keys_list(folder: AllowList, as_json: AsJson = False) -> None:
    """Print who is admitted."""
    from sonoedge.runtime import keys

    keys.list_clients(folder, as_json)


@keys.command("remove")
def keys_remove(
    folder: AllowList,
    name: Annotated[str, typer.Argument(help="The client's name or public key.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Admit a client no longer."""
    from sonoedge.runtime import keys

    keys.remove(folder, name, as_json)


audit_log = typer.Typer(help="Check and read the audit log that `serve --audit` keeps.")
LogFolder = Annotated[Path, typer.Argument(help="Folder of the audit log.", show_default=False)]


@audit_log.command("verify")
def audit_verify(
    folder: LogFolder,
    head: Annotated[
        str | None, typer.Option(help="Where the chain is known to have stood.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Check every link of the log's chain; exit status 1 when it was changed or cut."""
    from sonoedge.runtime import audit_check

    return audit_check.run_verify(folder, head, as_json)


@audit_log.command("show")
def audit_show(
    folder: LogFolder,
    kind: Annotated[str | None, typer.Option(help="Records of this kind only.", show_default=False)] = None,
    last: Annotated[int | None, typer.Option(min=1, help="The newest so many.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Print what was said about which frame, by which model."""
    from sonoedge.runtime import audit_check

    audit_check.run_show(folder, kind, last, as_json)
