"""A prompt of 256 tokens and an image through an INT8 EchoVLM, against its own graphs in float32 and against llama.cpp.

python -m benchmarks.prefill [--config echovlm-500m] [--recipe RECIPE] [--bundle BUNDLE] [--rounds 9]

llama.cpp runs a dense model with as many active weights, Q8_0. All contenders are loaded at once and take turns;
ratios are medians over rounds. The last line is JSON.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from benchmarks.active import dense_twin
from benchmarks.command_line import PREFILL_TOKENS, THREADS, machine
from benchmarks.contenders import Measured, Summary, interleave, ratio, start, summarize
from benchmarks.environments import Peer
from benchmarks.material import FLOAT_RECIPE, INT8_RECIPE, checkpoint
from benchmarks.material import bundle as made_bundle
from benchmarks.peers import bundle as sonoedge_peer
from benchmarks.peers import llama_cpp
from benchmarks.worker import Prefill, Vision
from sonoedge.export.make_checkpoint import named_config

INT8, FLOAT = sonoedge_peer.PEER.title, "ONNX Runtime float32"


class Report(msgspec.Struct, frozen=True):
    """What was measured in one run."""

    benchmark: str
    machine: str
    threads: int
    rounds: int
    config: str
    prompt_tokens: int
    tokens_s: Summary
    peers: dict[str, Measured]
    vision_ms: Summary
    float_vision_ms: Summary
    vision_ratio: float  # how many times quicker than float32
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
    """Measure prefill and vision beside peers."""
    made = checkpoint(config)
    ours = bundle if bundle is not None else made_bundle(made, recipe)
    in_float = made_bundle(made, FLOAT_RECIPE)
    contenders: dict[str, tuple[Peer, msgspec.Struct]] = {
        INT8: (sonoedge_peer.PEER, sonoedge_peer.Bundle(str(ours.resolve()))),
        FLOAT: (sonoedge_peer.PEER, sonoedge_peer.Bundle(str(in_float))),
        llama_cpp.PEER.title: (llama_cpp.PEER, dense_twin(named_config(config))),
    }
    with ExitStack() as stack:
        running, skipped = start(contenders, threads, stack)
        measures = {name: lambda one=one: one.seconds(Prefill(PREFILL_TOKENS)) for name, one in running.items()}
        prompts = interleave(measures, rounds)
        images = interleave(
            {INT8: lambda: running[INT8].seconds(Vision()), FLOAT: lambda: running[FLOAT].seconds(Vision())}, rounds
        )
    rates = {name: summarize([PREFILL_TOKENS / value for value in values]) for name, values in prompts.items()}
    tokens_s = rates.pop(INT8)
    milliseconds = {name: summarize([1e3 * value for value in values]) for name, values in images.items()}
    report = Report(
        benchmark="prefill",
        machine=machine(),
        threads=threads,
        rounds=rounds,
        config=config,
        prompt_tokens=PREFILL_TOKENS,
        tokens_s=tokens_s,
        peers={
            name: Measured(running[name].facts.version, rate, ratio(prompts[INT8], prompts[name]))
            for name, rate in rates.items()
        },
        vision_ms=milliseconds[INT8],
        float_vision_ms=milliseconds[FLOAT],
        vision_ratio=ratio(images[INT8], images[FLOAT]),
        skipped=skipped,
    )
    _print(report)
    print(msgspec.json.encode(report).decode())


def _print(report: Report) -> None:
    print(f"{f'prompt of {report.prompt_tokens} tokens':28}{'tokens/s':>9}{'times slower':>14}")
    print(f"{INT8:28}{report.tokens_s.median:9.1f}")
    for name, measured in report.peers.items():
        print(f"{name:28}{measured.tokens_s.median:9.1f}{measured.ratio:14.2f}")
    print(f"{'one image':28}{'ms':>9}{'times slower':>14}")
    print(f"{INT8:28}{report.vision_ms.median:9.1f}")
    print(f"{FLOAT:28}{report.float_vision_ms.median:9.1f}{report.vision_ratio:14.2f}")


if __name__ == "__main__":
    typer.run(main)
