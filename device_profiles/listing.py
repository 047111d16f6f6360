"""`sonoedge profiles`: the devices that a bundle can be built for."""

import msgspec
from rich.console import Console
from rich.table import Column, Table

from sonoedge.device_profiles import list_profiles


def run(*, as_json: bool) -> None:
    """Print the packaged profiles, each in its fastest power mode and with the newest software it is built for."""
    profiles = list_profiles()
    if as_json:
        print(msgspec.json.encode({"profiles": profiles}).decode())
        return
    numbers = (Column(heading, justify="right", no_wrap=True) for heading in ("SM", "GiB", "GB/s", "INT8 TOPS"))
    table = Table(
        Column("profile", no_wrap=True),
        "device",
        *numbers,
        Column("software", no_wrap=True),
        box=None,
        pad_edge=False,
        caption="GB/s and dense TOPS in the fastest power mode; everything else: --json",
        caption_justify="left",
    )
    for profile in profiles:
        fastest = profile.modes[0]
        capacity = profile.memory.capacity_bytes
        table.add_row(
            profile.id,
            profile.name,
            "-" if profile.gpu is None else str(profile.gpu.sm),
            _number(capacity if capacity == "unknown" else capacity / 2**30),
            _number(fastest.bandwidth_gb_s),
            _number(fastest.int8_dense_tops),
            f"{profile.software[0].name} {profile.software[0].version}" if profile.software else "-",
        )
    Console().print(table)


def _number(amount: float | str) -> str:
    return amount if isinstance(amount, str) else f"{amount:g}"
