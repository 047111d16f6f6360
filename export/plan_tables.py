"""A plan as a person reads it: where the memory goes, where the time goes, what to know about both, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Column, Table

from sonoedge.device_profiles.advice import Advice
from sonoedge.device_profiles.memory_plan import KV_CACHE, Memory, Need
from sonoedge.device_profiles.planning import Latency, Plan, Stage
from sonoedge.device_profiles.schema import Profile

STAGE_NAMES = {
    "vision": "vision",
    "prefill": "prompt of a frame",
    "hints": "all hints behind it",
    "question": "prompt with a question",
    "decode": "one token, context full",
}
STUDENT_KEYS = (
    "vision_layers",
    "vision_mlp_size",
    "layers",
    "intermediate_size",
    "expert_size",
    "shared_expert_size",
)


def print_report(
    plan: Plan, device: Profile, verdict: str, advice: Advice | None, host_build: tuple[int, int] | None
) -> None:
    """Print everything; host_build: bytes of a build with the model whole, and block by block (None: it is built)."""
    console = Console(highlight=False)

    def line(text: str, style: str | None = None) -> None:
        console.print(text, style=style, soft_wrap=True, markup=False)

    line(f"{plan.model} ({_count(plan.parameters)} parameters) on {device.name}, mode {plan.mode}")
    for title, needs in (
        ("memory while serving", plan.memory.serving),
        ("memory while engines are built on the device", plan.memory.building),
    ):
        if needs:
            line("")
            console.print(_memory_table(title, needs))
    line("")
    console.print(_time_table(plan))
    line("")
    for note in _notes(plan, device, host_build):
        line(note, "dim")
    line("")
    line(verdict, "bold")
    if advice is not None:
        for text in _advice(advice, plan.memory, device):
            line(text)


def size(count: int) -> str:
    """Bytes in the largest decimal unit, three digits."""
    scaled, power, units = float(count), 0, ("B", "kB", "MB", "GB", "TB")
    while abs(scaled) >= 999.5 and power < len(units) - 1:
        scaled, power = scaled / 1000, power + 1
    return f"{scaled:.3g} {units[power]}"


def _memory_table(title: str, needs: tuple[Need, ...]) -> Table:
    table = Table(Column(title, min_width=46), Column("", justify="right"), box=None, pad_edge=False)
    for need in needs:
        table.add_row(f"  {need.name}", size(need.bytes))
    table.add_row("  together", size(sum(need.bytes for need in needs)), style="bold")
    return table


def _time_table(plan: Plan) -> Table:
    numbers = (Column(name, justify="right") for name in ("tokens", "at least", "expected"))
    table = Table(Column("time"), *numbers, Column("bound by"), box=None, pad_edge=False)
    for stage in plan.stages:
        time = stage.time
        times = (_ms(time.at_least_ms), _ms(time.expected_ms))
        table.add_row(f"  {STAGE_NAMES[stage.name]}", _tokens(stage), *times, time.bound_by or "")
    for name, latency in (("frame to hints", plan.frame_to_hints), ("first token of an answer", plan.first_token)):
        shown = latency or Latency(None, None)
        table.add_row(f"  {name}", "", _ms(shown.at_least_ms), _ms(shown.expected_ms), "", style="bold")
    most, expected = plan.tokens_s_at_most, plan.tokens_s_expected
    rates = ("unknown" if most is None else f"≤ {_rate(most)}", "unknown" if expected is None else _rate(expected))
    table.add_row("  tokens a second after it", "", *rates, "", style="bold")
    return table


def _notes(plan: Plan, device: Profile, host_build: tuple[int, int] | None) -> Iterator[str]:
    """What a reader must know to take the figures right."""
    use, memory = plan.use, plan.memory
    if use.prefix_tokens is None:
        yield "Frame to hints and first token are unknown: no tokenizer.json says how long their prompts are."
    if reasons := sorted({stage.time.unknown for stage in plan.stages if stage.time.unknown is not None}):
        yield f"Unknown where {'; '.join(reasons)}."
    if any(stage.time.expected_ms is not None for stage in plan.stages):
        pace = "; prompts and vision in 16 bit, which int8 products may beat" if use.int8_products else ""
        yield f"Expected: at the pace that published engines reach on devices of this class{pace}."
    if any(stage.rows != stage.tokens for stage in plan.stages):
        yield "a → b: the sizes of an engine are fixed, so a shorter input of a tokens is filled up to b."
    yield "Times are of reading and computing: launching kernels, and cropping and resizing the frame, come on top."
    yield _second_form(plan)
    if memory.building:
        where = "" if device.memory.shared_with_gpu else ", in the host's memory"
        yield f"A build keeps the weights twice{where}: the network's and the engine's; one engine after the other."
        yield "Engine workspace: the largest matrix once in 16 bit, should a product with int8 weights not be fused."
    if host_build is not None:
        whole, block = map(size, host_build)
        yield f"`sonoedge build` on the host: {whole} with the model whole in memory, else about {block}."


def _second_form(plan: Plan) -> str:
    """What weights laid out for one token at a time cost, or what doing without saves."""
    memory, second = plan.memory, size(plan.memory.second_form_bytes)
    if plan.use.one_token_form:
        return f'One form of the weights instead of two (graphs = "memory") would save {second} while serving.'
    if not memory.building:
        return f'A second form of the weights for one token at a time (graphs = "speed") takes {second} more.'
    fits = ""
    if memory.room_bytes is not None and plan.fits:
        held = memory.serving_bytes + memory.second_form_bytes <= memory.room_bytes
        fits = ", which fits too" if held else ", which does not fit"
    return f'A second engine for one token at a time (graphs = "speed", plugins) takes {second} more{fits}.'


def _advice(advice: Advice, memory: Memory, device: Profile) -> Iterator[str]:
    yield "What would help:"
    for change in advice.changes:
        enough = "enough" if change.enough else "not enough by itself"
        built = f" and {size(change.building_saves_bytes)} while building" if change.building_saves_bytes else ""
        yield f"  {change.change}: saves {size(change.serving_saves_bytes)} while serving{built}, {enough}"
    if device.backend == "tensorrt":
        cache = next(need.bytes for need in memory.serving if need.name == KV_CACHE)
        yield f"  an INT8 KV cache would save {size(cache // 2)}, but TensorRT's cache update takes 16 bit only"
    student = advice.student
    if student is None:
        kept = f"embeddings and head, {size(advice.kept_bytes)}, stay as wide"
        yield f"  a larger device, or a smaller checkpoint: no student of this one fits, since its {kept}"
    else:
        yield (
            f"  a student of {_count(student.parameters)} parameters: weights {size(student.weight_bytes)}, "
            f"peak {size(student.peak_bytes)}; in the recipe of `sonoedge distill`:"
        )
        yield "    [student]"
        for key in STUDENT_KEYS:
            yield f"    {key} = {getattr(student, key)}"


def _tokens(stage: Stage) -> str:
    return str(stage.tokens) if stage.rows == stage.tokens else f"{stage.tokens} → {stage.rows}"


def _ms(milliseconds: float | None) -> str:
    if milliseconds is None:
        return "unknown"
    return f"{milliseconds:.3g} ms" if milliseconds < 999.5 else f"{milliseconds / 1e3:.3g} s"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


def _rate(tokens_s: float) -> str:
    return f"{tokens_s:,.0f}" if tokens_s >= 99.5 else f"{tokens_s:.3g}"
