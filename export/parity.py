"""`sonoedge parity`: does this model reproduce the outputs that a reference implementation recorded?"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sonoedge.export.models.attention import padded_bias
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.greedy import Prompt, StopRule, greedy_tokens, read_stop_rule
from sonoedge.export.models.loading import load_checkpoint
from sonoedge.export.models.rope import batch_positions
from sonoedge.export.vectors import Case, read_cases
from sonoedge.progress import track

TOLERANCE = 1e-4
SMALL_HIDDEN = 512


class CaseResult(msgspec.Struct, frozen=True):
    """How far one case is from its recording; errors at positions that are not padding."""

    name: str
    positions_equal: bool
    max_abs_error: float  # of the logits
    image_error: float  # of the image tokens, as a fraction of their largest value where that is above 1
    hidden_error: float  # of the hidden states, likewise
    router_error: float  # of the router logits, likewise
    cached_tokens_equal: bool
    uncached_tokens_equal: bool

    @property
    def tokens_equal(self) -> bool:
        return self.cached_tokens_equal and self.uncached_tokens_equal

    @property
    def passed(self) -> bool:
        errors = (self.max_abs_error, self.image_error, self.hidden_error, self.router_error)
        # Written so that NaN fails.
        return self.positions_equal and self.tokens_equal and all(error <= TOLERANCE for error in errors)


def run(checkpoint: Path, vectors: Path, as_json: bool) -> int:
    """Compare `checkpoint` with the recorded cases in `vectors`; 0 when all agree, 1 when not.

    SonoEdgeError when the checkpoint or a recording cannot be used at all.
    """
    model = load_checkpoint(checkpoint)
    cases = read_cases(vectors, model.config)
    stop = read_stop_rule(checkpoint, model.config)
    results = []
    with _fitting_threads(model), track("parity", len(cases)) as advance:
        for case in cases:
            results.append(compare(model, case, stop))
            advance(1)
    passed = all(result.passed for result in results)
    if as_json:
        print(_json_line(passed, results))
    else:
        _print_table(passed, results)
    return 0 if passed else 1


@torch.inference_mode()
def compare(model: EchoVLM, case: Case, stop: StopRule) -> CaseResult:
    """Run one case and measure its distance from the recording."""
    positions, following = batch_positions(case.input_ids, case.attention_mask, case.grids, model.config)
    image_embeds = None if case.pixel_values is None else model.encode_images(case.pixel_values.float(), case.grids)
    prompt = Prompt(model.embed(case.input_ids, image_embeds), case.attention_mask, positions, following)
    bias = padded_bias(case.attention_mask, case.input_ids.shape[1], prompt.embedded.dtype)
    output = model.decode(prompt.embedded, positions, attention_bias=bias, collect_hidden=True, collect_router=True)
    real = case.attention_mask.bool()  # [B, S]
    routers = [logits.flatten(0, 1) for logits in output.router_logits or ()]  # [B * S, experts] a layer
    count = case.generated.shape[1]
    stop = stop if _stops(case.generated, stop) else StopRule()
    tokens = [greedy_tokens(model, prompt, count, stop, cached=cached) for cached in (True, False)]
    return CaseResult(
        name=case.name,
        positions_equal=torch.equal(positions, case.position_ids),
        max_abs_error=_largest(output.logits[real] - case.logits[real]),
        image_error=0.0 if case.image_embeds is None else _scaled_error([image_embeds], [case.image_embeds], None),
        hidden_error=_scaled_error(output.hidden_states or (), case.hidden, real),
        router_error=_scaled_error(routers, case.router, real.flatten()),
        cached_tokens_equal=torch.equal(tokens[0], case.generated),
        uncached_tokens_equal=torch.equal(tokens[1], case.generated),
    )


@contextmanager
def _fitting_threads(model: EchoVLM) -> Iterator[None]:
    """One thread for a tiny model: threads that wait for each other after every small product cost 20x when busy."""
    threads = torch.get_num_threads()
    if model.config.hidden_size < SMALL_HIDDEN:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _stops(generated: Tensor, stop: StopRule) -> bool:
    """Whether the reference obeyed the stop rule: a recording that goes on after an end token was made without it."""
    ended = torch.isin(generated, torch.tensor(stop.eos, dtype=torch.int64)).long().cumsum(dim=1)
    after = torch.cat((torch.zeros_like(ended[:, :1]), ended[:, :-1]), dim=1) > 0  # [B, tokens]: past the first end
    return bool((generated[after] == stop.pad).all())


def _scaled_error(found: Sequence[Tensor | None], recorded: Sequence[Tensor], real: Tensor | None) -> float:
    """Largest error over all recorded tensors, each relative to its largest value where that is above 1."""
    worst = 0.0
    for ours, theirs in zip(found, recorded, strict=False):
        if ours is None or ours.shape != theirs.shape:
            return float("inf")
        kept, wanted = (ours, theirs) if real is None else (ours[real], theirs[real])
        error = _largest(kept - wanted) / max(1.0, _largest(wanted))
        worst = error if not error <= worst else worst
    return worst


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _json_line(passed: bool, results: list[CaseResult]) -> str:
    cases = {
        result.name: {"max_abs_error": result.max_abs_error, "tokens_equal": result.tokens_equal} for result in results
    }
    return msgspec.json.encode({"passed": passed, "cases": cases}).decode()


def _print_table(passed: bool, results: list[CaseResult]) -> None:
    table = Table(title=f"Parity with the recorded reference (bound {TOLERANCE:g})", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("case", overflow="fold")
    # `cached` and `uncached`: greedy tokens with the KV cache and without
    for heading in ("positions", "images", "hidden", "router", "logits", "cached", "uncached"):
        table.add_column(heading, no_wrap=True)
    for result in results:
        errors = (result.image_error, result.hidden_error, result.router_error, result.max_abs_error)
        equal = (result.cached_tokens_equal, result.uncached_tokens_equal)
        table.add_row(
            result.name,
            _word(result.positions_equal),
            *(f"{error:.1e}" for error in errors),
            *(_word(same) for same in equal),
        )
    console = Console()
    console.print(table)
    console.print("passed" if passed else "[bold red]not passed[/]: the model does not reproduce the recording")


def _word(equal: bool) -> str:
    return "equal" if equal else "[bold red]differ[/]"
