"""Tokens a second of an INT8 EchoVLM, against peers on a dense model with as many active weights, and against PyTorch.

python -m benchmarks.decode [--config echovlm-500m] [--recipe RECIPE] [--bundle BUNDLE] [--rounds 9]

All contenders are loaded at once and take turns, so a disturbance meets all alike; ratios are medians over rounds. The
memory's read bandwidth is measured in the same rounds. The last line is JSON.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from benchmarks.active import dense_twin, touched_bytes
from benchmarks.bandwidth import Bandwidth, Readers
from benchmarks.command_line import DECODE_TOKENS, PROMPT_TOKENS, THREADS, machine
from benchmarks.contenders import Measured, Summary, interleave, ratio, start, summarize
from benchmarks.environments import Peer
from benchmarks.material import INT8_RECIPE, checkpoint
from benchmarks.material import bundle as made_bundle
from benchmarks.peers import bundle as sonoedge_peer
from benchmarks.peers import llama_cpp, onnxruntime_genai, torch_eager
from benchmarks.worker import Decode
from sonoedge.export.make_checkpoint import named_config


class Report(msgspec.Struct, frozen=True):
    """What was measured in one run."""

    benchmark: str
    machine: str
    threads: int
    rounds: int
    config: str
    active_weights: int
    touched_bytes: int  # by one token, with only the chosen experts
    bandwidth: Bandwidth
    tokens_s: Summary
    gb_s: float
    bandwidth_fraction: float
    peers: dict[str, Measured]
    skipped: dict[str, str]  # peer → why


def main(
    config: Annotated[str, typer.Option(help="Packaged config, or the path of a config.json.")] = "echovlm-500m",
    recipe: Annotated[str, typer.Option(help="As for `sonoedge build`.", show_default="int8.toml")] = INT8_RECIPE,
    bundle: Annotated[
        Path | None, typer.Option(help="A bundle of that config, instead of one made here.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Times that every contender is measured.")] = 9,
    threads: Annotated[int, typer.Option(help="Threads of every contender.")] = THREADS,
) -> None:
    """Measure decoding beside peers."""
    shape = named_config(config)
    twin = dense_twin(shape)
    ours = bundle if bundle is not None else made_bundle(checkpoint(config), recipe)
    contenders: dict[str, tuple[Peer, msgspec.Struct]] = {
        sonoedge_peer.PEER.title: (sonoedge_peer.PEER, sonoedge_peer.Bundle(str(ours.resolve()))),
        llama_cpp.PEER.title: (llama_cpp.PEER, twin),
        onnxruntime_genai.PEER.title: (onnxruntime_genai.PEER, twin),
    }
    for dtype in torch_eager.DTYPES:
        contenders[f"{torch_eager.PEER.title} {dtype}"] = (torch_eager.PEER, torch_eager.Options(config, dtype))
    with ExitStack() as stack:
        running, skipped = start(contenders, threads, stack)
        readers = Readers(threads)
        task = Decode(PROMPT_TOKENS, DECODE_TOKENS)
        measures = {name: lambda one=one: one.seconds(task) for name, one in running.items()}
        seconds = interleave(measures | {"bandwidth": readers.sample}, rounds)
        seconds.pop("bandwidth")
    own = seconds[sonoedge_peer.PEER.title]
    bandwidth = readers.result()
    # The cache grows while tokens are counted: half of them are there on average.
    touched = touched_bytes(shape, PROMPT_TOKENS + DECODE_TOKENS // 2)
    rates = {name: summarize([DECODE_TOKENS / value for value in values]) for name, values in seconds.items()}
    tokens_s = rates.pop(sonoedge_peer.PEER.title)
    gb_s = tokens_s.median * touched / 1e9
    report = Report(
        benchmark="decode",
        machine=machine(),
        threads=threads,
        rounds=rounds,
        config=config,
        active_weights=twin.weights_a_token,
        touched_bytes=touched,
        bandwidth=bandwidth,
        tokens_s=tokens_s,
        gb_s=round(gb_s, 2),
        bandwidth_fraction=round(gb_s / bandwidth.median_gb_s, 3),
        peers={
            name: Measured(running[name].facts.version, rate, ratio(own, seconds[name])) for name, rate in rates.items()
        },
        skipped=skipped,
    )
    _print(report)
    print(msgspec.json.encode(report).decode())


def _print(report: Report) -> None:
    print(f"{'':28}{'tokens/s':>9}{'times slower':>14}")
    print(f"{'SonoEdge':28}{report.tokens_s.median:9.1f}")
    for name, measured in report.peers.items():
        print(f"{name:28}{measured.tokens_s.median:9.1f}{measured.ratio:14.2f}")
    print(
        f"{report.touched_bytes / 1e6:.0f} MB a token: {report.gb_s} GB/s, {report.bandwidth_fraction:.0%} of the "
        f"{report.bandwidth.median_gb_s} GB/s that {report.threads} threads read"
    )


if __name__ == "__main__":
    typer.run(main)
