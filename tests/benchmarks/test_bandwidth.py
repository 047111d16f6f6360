"""The read bandwidth is a rate that a machine can have, and the command ends with it as JSON."""

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np

ROOT = Path(__file__).parent.parent.parent


def test_every_byte_is_read_and_the_quicker_reader_counts() -> None:
    from benchmarks.bandwidth import Readers

    readers = Readers(threads=1, buffer_bytes=1 << 26)
    sampled = [readers.sample() for _ in range(5)]
    found = readers.result()
    assert found.reader in ("torch sum", "numpy max")
    assert found.threads == 1
    # A plain copy reads and writes every byte: reading alone is not slower, and no processor reads a terabyte a second.
    source = np.ones(1 << 23, np.int64)
    began = time.perf_counter()
    source.copy()
    copied_gb_s = source.nbytes / (time.perf_counter() - began) / 1e9
    assert copied_gb_s / 2 < found.max_gb_s < 1000
    assert found.median_gb_s <= found.max_gb_s <= round(max(sampled), 2)


def test_the_command_ends_with_a_json_line() -> None:
    from benchmarks.bandwidth import Bandwidth

    command = [sys.executable, "-m", "benchmarks.bandwidth", "--threads", "1", "--rounds", "1"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
        timeout=120,
    )  # fmt: skip
    found = msgspec.json.decode(done.stdout.splitlines()[-1], type=Bandwidth)
    assert 0 < found.median_gb_s <= found.max_gb_s
