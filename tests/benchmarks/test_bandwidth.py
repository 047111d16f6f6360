"""The read bandwidth is a rate that a machine can have, and the command ends with it as JSON."""

import time
from functools import partial

import msgspec
import numpy as np
import pytest


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


def test_the_command_ends_with_a_json_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from benchmarks import bandwidth

    small = partial(bandwidth.Readers, buffer_bytes=1 << 24)
    monkeypatch.setattr(bandwidth, "Readers", small)
    bandwidth.main(threads=2, rounds=3)
    found = msgspec.json.decode(capfd.readouterr().out.splitlines()[-1], type=bandwidth.Bandwidth)
    assert found.threads == 2
    assert 0 < found.median_gb_s <= found.max_gb_s
