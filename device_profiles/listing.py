"""`sonoedge profiles`: the devices that a bundle can be built for."""

import msgspec
from rich.console import Console
from rich.table import Column, Table

from sonoedge.device_profiles import list_profiles


def run(*, as_json: bool) -> None:
    """Print the packaged profiles, each in its fastest power mode."""
    profiles = list_profiles()
    if as_json:
        print(msgspec.json.encode({"profiles": profiles}).decode())
        return
    columns = (Column("profile", no_wrap=True), "device", "memory", "bandwidth", "INT8 (dense)")
    table = Table(*columns, box=None, pad_edge=False)
    for profile in profiles:
        fastest = profile.modes[0]
        capacity = profile.memory.capacity_bytes
        table.add_row(
            profile.id,
            profile.name,
            capacity if capacity == "unknown" else f"{capacity / 2**30:g} GiB",
            _with_unit(fastest.bandwidth_gb_s, "GB/s"),
            _with_unit(fastest.int8_dense_tops, "TOPS"),
        )
    Console().print(table)


def _with_unit(amount: float | str, unit: str) -> str:
    return amount if isinstance(amount, str) else f"{amount:g} {unit}"
