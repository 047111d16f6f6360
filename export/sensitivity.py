"""The sensitivity search: which blocks lose most in INT8, and the narrowest plan that keeps the recipe's floor.

Every block is measured alone; then the whole plan, whose worst block moves to the next wider scheme until the floor is
met, nothing is left to widen, or the memory budget is spent. Source: H. Wu et al., "Integer quantization for deep
learning inference", partial quantization (arXiv 2004.09602).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from torch import Tensor

from sonoedge.export.divergence import Divergence
from sonoedge.export.layout import EMBEDDING
from sonoedge.export.markers import LM_HEAD
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.quantize import products
from sonoedge.export.scheme import WIDER, CacheScheme, QuantizationPlan, Scheme
from sonoedge.progress import Advance, track

PREFIX = re.compile(
    r"visual\.patch_embed|visual\.blocks\.\d+|visual\.merger|lm_head"
    r"|model\.layers\.\d+\.(self_attn|mlp|moe\.shared_expert|moe\.experts)"
)


class Floor(msgspec.Struct, frozen=True):
    """What the recipe asks of a plan; None asks nothing."""

    largest_kl: float | None = None
    least_top1: float | None = None
    least_router: float | None = None

    def missed(self, found: Divergence) -> tuple[str, ...]:
        """What `found` misses, each in words."""
        faults = []
        if self.largest_kl is not None and not found.kl <= self.largest_kl:
            faults.append(f"kl is {found.kl:.4g}, above largest_kl = {self.largest_kl}")
        if self.least_top1 is not None and not found.top1 >= self.least_top1:
            faults.append(f"top1 is {found.top1:.4f}, below least_top1 = {self.least_top1}")
        if self.least_router is not None and not found.router >= self.least_router:
            faults.append(f"router is {found.router:.4f}, below least_router = {self.least_router}")
        return tuple(faults)


class Move(msgspec.Struct, frozen=True):
    """One step of the search: the block's products of the narrowest scheme moved to the next wider one."""

    block: str
    source: Scheme
    target: Scheme
    before: Divergence  # of the whole plan
    after: Divergence
    weight_bytes: int  # of all products, after the move


class Trace(msgspec.Struct, frozen=True):
    """What the search measured and did; encodes to JSON for the report."""

    alone: dict[str, Divergence]  # every block as the plan began, all others float, worst first
    cache: Divergence | None  # the int8 KV cache alone, when the plan has one
    start: Divergence
    moves: tuple[Move, ...]
    end: Divergence
    weight_bytes: int
    budget_bytes: int | None
    missed: tuple[str, ...]

    @property
    def met(self) -> bool:
        """Whether the floor is met within the budget."""
        return not self.missed


Evaluate = Callable[[QuantizationPlan], Divergence]
BytesOf = Callable[[str, Scheme], int]  # of one product's weights


def search(
    evaluate: Evaluate,
    plan: QuantizationPlan,
    blocks: Mapping[str, Sequence[str]],
    bytes_of: BytesOf,
    floor: Floor,
    budget: int | None,
    ladder: Sequence[Scheme] = WIDER,
) -> tuple[QuantizationPlan, Trace]:
    """The plan widened until `floor` is met, and how; where that fails the trace's `missed` says what is missing.

    blocks: products of each block; budget: bytes that the weights of all products may take; ladder: the schemes that
    the target can run, narrowest first. The block with the largest KL alone moves first.
    """
    with track("sensitivity search", None) as advance:
        return _Search(evaluate, plan, blocks, bytes_of, ladder, advance).run(floor, budget)


class _Search:
    def __init__(
        self,
        evaluate: Evaluate,
        plan: QuantizationPlan,
        blocks: Mapping[str, Sequence[str]],
        bytes_of: BytesOf,
        ladder: Sequence[Scheme],
        advance: Advance,
    ) -> None:
        self.evaluate, self.plan, self.blocks, self.bytes_of = evaluate, plan, blocks, bytes_of
        self.ladder, self.advance = ladder, advance

    def run(self, floor: Floor, budget: int | None) -> tuple[QuantizationPlan, Trace]:
        schemes = dict(self.plan.schemes)
        losses = {block: self.alone(block, schemes) for block in self.blocks}
        alone = dict(sorted(losses.items(), key=lambda item: -item[1].kl))  # of equals, the model's order
        cache = None
        if self.plan.cache is not CacheScheme.FLOAT:
            cache = self.measure(dict.fromkeys(schemes, Scheme.FLOAT), self.plan.cache, "KV cache alone")
        start = now = self.measure(schemes, self.plan.cache, "whole plan")
        moves: list[Move] = []
        while floor.missed(now):
            candidates = sorted(self.blocks, key=lambda block: -losses[block].kl)
            fitting = (move for block in candidates if (move := self.wider(block, schemes, budget)) is not None)
            found = next(fitting, None)
            if found is None:
                break
            block, source, target, schemes = found
            before, now = now, self.measure(schemes, self.plan.cache, f"{block} in {target.value}")
            moves.append(Move(block, source, target, before, now, self.total(schemes)))
            if floor.missed(now):
                losses[block] = self.alone(block, schemes)
        weight_bytes = self.total(schemes)
        missed = floor.missed(now)
        if budget is not None and weight_bytes > budget:
            missed += (f"weights take {weight_bytes} bytes, above memory_budget_bytes = {budget}",)
        trace = Trace(alone, cache, start, tuple(moves), now, weight_bytes, budget, missed)
        return msgspec.structs.replace(self.plan, schemes=schemes), trace

    def alone(self, block: str, schemes: Mapping[str, Scheme]) -> Divergence:
        """The block in its schemes, everything else float."""
        members = set(self.blocks[block])
        lone = {name: scheme if name in members else Scheme.FLOAT for name, scheme in schemes.items()}
        return self.measure(lone, CacheScheme.FLOAT, f"{block} alone")

    def measure(self, schemes: Mapping[str, Scheme], cache: CacheScheme, label: str) -> Divergence:
        found = self.evaluate(msgspec.structs.replace(self.plan, schemes=schemes, cache=cache))
        self.advance(1, f"{label}: KL {found.kl:.2g}")
        return found

    def wider(
        self, block: str, schemes: Mapping[str, Scheme], budget: int | None
    ) -> tuple[str, Scheme, Scheme, dict[str, Scheme]] | None:
        """The block with its narrowest products one step wider; None at the top, or above the budget."""
        source = min((schemes[name] for name in self.blocks[block]), key=WIDER.index)
        above = [scheme for scheme in self.ladder if WIDER.index(scheme) > WIDER.index(source)]
        if not above:
            return None
        target = min(above, key=WIDER.index)
        moved = {name: target for name in self.blocks[block] if schemes[name] is source}
        widened = {**schemes, **moved}
        return None if budget is not None and self.total(widened) > budget else (block, source, target, widened)

    def total(self, schemes: Mapping[str, Scheme]) -> int:
        return sum(self.bytes_of(name, scheme) for name, scheme in schemes.items())


def blocks_of(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Products by the block that they belong to, in the model's order."""
    blocks: dict[str, tuple[str, ...]] = {}
    for name in names:
        match = PREFIX.match(name)
        assert match is not None, name
        blocks[match[0]] = (*blocks.get(match[0], ()), name)
    return blocks


def weight_bytes_of(model: EchoVLM) -> BytesOf:
    """Bytes of each product's weights in a scheme: int8 with float32 scales a row, or a row and block; or float32."""
    linears, mixtures = products(model)
    weights: dict[str, list[Tensor]] = {
        name: [weight for weight in module.parameters() if weight.dim() > 1] for name, module in linears.items()
    }
    weights |= {name: list(module.get_submodule("experts").parameters()) for name, module in mixtures.items()}
    embeddings = model.model.embed_tokens.weight
    weights[EMBEDDING] = [embeddings]
    weights[LM_HEAD] = [embeddings]  # the head's shape, tied or not
    shapes = {name: [tuple(weight.flatten(1).shape) for weight in each] for name, each in weights.items()}
    return lambda name, scheme: sum(_weight_bytes(rows, columns, scheme) for rows, columns in shapes[name])


def _weight_bytes(rows: int, columns: int, scheme: Scheme) -> int:
    if scheme is Scheme.FLOAT:
        return 4 * rows * columns
    return rows * columns + 4 * rows * math.ceil(columns / (scheme.block or columns))
