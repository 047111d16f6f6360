"""The expert kernels on a CUDA GPU, against what its memory and matrix units reach and against computing otherwise.

python -m benchmarks.expert_kernels [--activation float16] [--rounds 21]

All results are compared with the oracle first. Then EchoVLM's widths (4 experts of which 2 are taken), 28 layers of
distinct weights in one CUDA graph, so that no cache helps, medians: decode of 1 to 8 tokens, also at widths eight times
larger, and prefill. The last line is JSON. Without a CUDA GPU: one sentence and exit status 2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, cast, get_args

import msgspec
import torch
import typer

from benchmarks.expert_check import Checked, check
from benchmarks.expert_layers import Buffers, kernels_for, outputs, random_inputs, random_layer, run_layers, tuned
from benchmarks.expert_rivals import all_experts, bfloat16_weights, int8_products, loop_over_experts
from benchmarks.gpu_clock import ROUNDS, copy_gb_s, eager_ms, graph_ms, int8_tops
from sonoedge.export.plugins.dispatch import DECODE_TOKENS, Activation, Experts, default_block_rows

ECHOVLM = Experts(experts=4, chosen=2, hidden=3584, inner=1408, norm_topk_prob=False)
LARGER = 8  # times, for widths at which a launch costs nothing beside its reads
LAYERS = 28
MEMORY_SHARE = 0.6  # of what is free on the GPU, for weights
DECODE_COUNTS = tuple(range(1, DECODE_TOKENS + 1))
PREFILL_COUNTS = (256, 1024, 4096)
CHECKED_COUNTS = (1, 5, 8, 150)


class Passes(msgspec.Struct, frozen=True, kw_only=True):
    """One pass over a layer's experts; ratios say how many times longer another way takes, None where not measured."""

    hidden: int
    inner: int
    tokens: int
    block_rows: int | None  # of prefill
    layers: int
    ms: float  # a layer
    share: float  # decode: of the copy bandwidth; prefill: of the int8 matrix rate
    gb_s: float | None  # decode: of the weights that the tokens chose
    tops: float | None  # prefill: without padding
    operators_ms: dict[str, float]  # a layer, each alone with its quickest tile
    tiles: dict[str, str]
    loop_bfloat16: float | None
    dense_bfloat16: float | None
    dense_int8_products: float | None  # of the products alone


class Report(msgspec.Struct, frozen=True):
    """What was measured in one run."""

    benchmark: str
    gpu: str
    torch: str
    triton: str
    activation: Activation
    copy_gb_s: float
    int8_tops: float
    checked: Checked
    decode: tuple[Passes, ...]
    prefill: tuple[Passes, ...]


def main(
    activation: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    rounds: Annotated[int, typer.Option(help="Times that each work is measured.")] = ROUNDS,
) -> None:
    """Measure the expert kernels on this machine's GPU."""
    if activation not in get_args(Activation):
        raise typer.BadParameter(f"{activation}: choose one of {', '.join(get_args(Activation))}")
    if not torch.cuda.is_available():
        print("This machine has no CUDA GPU that torch can use: run the bench of the expert kernels where one is.")
        raise typer.Exit(2)
    import triton

    kind = cast(Activation, activation)
    checked = check(ECHOVLM, CHECKED_COUNTS, kind)
    print(f"{checked.launches} results agree with the oracle, float results within {checked.largest_error:.1e}")
    bandwidth, rate = copy_gb_s(), int8_tops()
    print(f"{torch.cuda.get_device_name()}: copies {bandwidth:.0f} GB/s, int8 products {rate:.0f} TOPS")
    larger = msgspec.structs.replace(ECHOVLM, hidden=LARGER * ECHOVLM.hidden, inner=LARGER * ECHOVLM.inner)
    decode = [
        measured(experts, tokens, kind, bandwidth, rate, rounds)
        for experts in (ECHOVLM, larger)
        for tokens in DECODE_COUNTS
    ]
    prefill = []
    for tokens in PREFILL_COUNTS:
        rows = default_block_rows(tokens, ECHOVLM.experts, ECHOVLM.chosen)
        experts = msgspec.structs.replace(ECHOVLM, block_rows=rows)
        prefill.append(measured(experts, tokens, kind, bandwidth, rate, rounds))
    report = Report(
        benchmark="expert_kernels",
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=triton.__version__,
        activation=kind,
        copy_gb_s=round(bandwidth, 1),
        int8_tops=round(rate, 1),
        checked=checked,
        decode=tuple(decode),
        prefill=tuple(prefill),
    )
    print(table(report))
    print(msgspec.json.encode(report).decode())


def measured(
    experts: Experts, tokens: int, activation: Activation, bandwidth: float, rate: float, rounds: int
) -> Passes:
    """The kernels over many layers in one graph, and at EchoVLM's own widths what they replace."""
    count = layers_that_fit(experts, torch.cuda.mem_get_info()[0])
    kernels = kernels_for(tokens)
    room = outputs(kernels, experts, tokens, activation, "cuda")  # shared: layers follow each other
    layers = [
        {**random_layer(experts, seed), **random_inputs(experts, tokens, activation, seed), **room}
        for seed in range(count)
    ]
    quickest = tuned(kernels, experts, tokens, layers, partial(graph_ms, rounds=rounds))
    ms = graph_ms(lambda: run_layers(kernels, experts, tokens, layers, quickest.tiles), rounds) / count
    decode = tokens <= DECODE_TOKENS
    gb_s = sum(touched_bytes(experts, layer) for layer in layers) / count / ms / 1e6
    tops = operations(experts, tokens) / ms / 1e9
    own_widths = experts.hidden == ECHOVLM.hidden
    rivals = rival_ms(experts, tokens, layers, rounds) if own_widths else (None, None, None)
    loop, dense, products = (None if other is None else round(other / ms, 2) for other in rivals)
    return Passes(
        hidden=experts.hidden,
        inner=experts.inner,
        tokens=tokens,
        block_rows=None if decode else experts.block_rows,
        layers=count,
        ms=round(ms, 5),
        share=round(gb_s / bandwidth if decode else tops / rate, 3),
        gb_s=round(gb_s, 1) if decode else None,
        tops=None if decode else round(tops, 1),
        operators_ms={name: round(each, 5) for name, each in quickest.ms.items()},
        tiles={name: tile.name for name, tile in quickest.tiles.items()},
        loop_bfloat16=loop,
        dense_bfloat16=dense,
        dense_int8_products=products,
    )


def rival_ms(experts: Experts, tokens: int, layers: list[Buffers], rounds: int) -> tuple[float, float, float | None]:
    """Milliseconds a layer: the loop over experts, all experts densely, and for prefill their int8 products alone."""
    wide = [(layer["x"].bfloat16(), layer["logits"], bfloat16_weights(layer)) for layer in layers]

    def each(way: Callable[..., object]) -> Callable[[], None]:
        def work() -> None:
            for x, logits, weights in wide:
                way(x, logits, weights, experts)

        return work

    loop = eager_ms(each(loop_over_experts), rounds) / len(layers)
    dense = graph_ms(each(all_experts), rounds) / len(layers)
    if tokens <= DECODE_TOKENS:
        return loop, dense, None
    inner = torch.randint(-127, 128, (tokens, experts.inner), dtype=torch.int8, device="cuda")

    def products() -> None:
        for layer in layers:
            int8_products(layer["x_int8"], inner, layer, experts)

    return loop, dense, graph_ms(products, rounds) / len(layers)


def layers_that_fit(experts: Experts, free_bytes: int) -> int:
    """How many layers to measure: as many as EchoVLM has, fewer where their weights would not fit, at least two."""
    layer = 3 * experts.experts * experts.hidden * experts.inner
    return max(2, min(LAYERS, int(MEMORY_SHARE * free_bytes) // layer))


def touched_bytes(experts: Experts, layer: Buffers) -> int:
    """Bytes of weights and scales of the experts that some token of a layer chose."""
    chosen = layer["logits"].topk(experts.chosen, dim=1).indices.unique().numel()
    scales = 4 * (2 * experts.inner + experts.hidden)
    return int(chosen) * (3 * experts.hidden * experts.inner + scales)


def operations(experts: Experts, tokens: int) -> int:
    """Multiplications and additions of the chosen experts' products."""
    return 2 * tokens * experts.chosen * 3 * experts.hidden * experts.inner


def table(report: Report) -> str:
    """The figures for a person."""
    lines = [f"{'hidden':>7}{'tokens':>7}{'ms':>9}{'share':>7}{'loop':>7}{'dense':>7}{'int8':>7}  tiles"]
    for row in (*report.decode, *report.prefill):
        ratios = (row.loop_bfloat16, row.dense_bfloat16, row.dense_int8_products)
        shown = "".join(f"{'' if ratio is None else f'{ratio:.2f}':>7}" for ratio in ratios)
        tiles = " ".join(row.tiles.values())
        lines.append(f"{row.hidden:7}{row.tokens:7}{row.ms:9.4f}{row.share:7.1%}{shown}  {tiles}")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
