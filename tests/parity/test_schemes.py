"""One model in every scheme: torch with fake quantization, ONNX Runtime's graphs and the portable graph, same inputs.

Where two compute the same numbers, the bound is that of float32 sums in another order; where ONNX Runtime rounds
activations on its own, the bound is what that rounding costs, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from sonoedge.calibration.smoothing import Smoothing
from sonoedge.export.fake_quant import fake_quantized
from sonoedge.export.graphs import OPSET, export_decoder
from sonoedge.export.layout import EMBEDDING, plan_layout
from sonoedge.export.lowering import lowered
from sonoedge.export.markers import DOMAIN
from sonoedge.export.models.attention import Attend, SelfAttention
from sonoedge.export.models.config import ModelConfig, MoEConfig, VisionConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import init_model, load_checkpoint, open_checkpoint, save_checkpoint
from sonoedge.export.models.moe import SparseMoE
from sonoedge.export.passes.products import Purpose
from sonoedge.export.quantize import products
from sonoedge.export.scheme import CacheScheme, QuantizationPlan, Scheme, quantize_weight
from sonoedge.export.torch_session import TorchSession
from sonoedge.export.weight_file import write_weights
from sonoedge.runtime.preprocess import ImageSpec, Patches
from sonoedge.runtime.sessions.ort import load_graph

Floats = npt.NDArray[np.float32]
EXPERTS = "model.layers.0.moe.experts"
SHRUNK = 0.9  # of the largest input: int8 saturates now and then


class Exactness(Enum):
    """How far two computations of one thing may be apart.

    mixture: largest error over largest value, of one mixture. best, worst: relative distance of all logits of the whole
    model, of the best and the worst of several sequences.
    """

    # The same numbers: what is left is the order of float32 sums.
    SAME = (1e-5, 1e-5, 1e-5)
    # The same numbers, rounded: the order of float32 sums lets an activation fall to the neighbouring level now and
    # then, which shows in one sequence and not in all of them.
    SAME_LEVELS = (1e-5, 1e-5, 3e-2)
    # MatMulNBits with accuracy_level 4 and QMoE round their inputs to int8 by themselves, a scale a block.
    OWN_ROUNDING = (2e-2, 6e-2, 1.5e-1)
    # Attention, and products of floats with int8 weights, in 16 bit; which also moves an activation to another level.
    IN_16_BIT = (2e-3, 2e-3, 5e-3)
    LEVELS_IN_16_BIT = (1e-5, 6e-2, 1e-1)

    @property
    def mixture(self) -> float:
        return self.value[0]

    @property
    def best(self) -> float:
        return self.value[1]

    @property
    def worst(self) -> float:
        return self.value[2]


class Meant(NamedTuple):
    """What a graph computes: the scheme of the torch model to compare with, and how exactly it does."""

    scheme: Scheme
    exactness: Exactness


SAME, SAME_LEVELS, OWN_ROUNDING, IN_16_BIT, LEVELS_IN_16_BIT = Exactness
MEANT: dict[tuple[Purpose, Scheme], Meant] = {
    (Purpose.PORTABLE, Scheme.FLOAT): Meant(Scheme.FLOAT, SAME),
    (Purpose.PORTABLE, Scheme.W8A8): Meant(Scheme.W8A8, SAME_LEVELS),
    # Standard operators have no int8 scale a token that TensorRT reads: weights alone are int8.
    (Purpose.PORTABLE, Scheme.W8A8_DYNAMIC): Meant(Scheme.W8A16, SAME),
    (Purpose.PORTABLE, Scheme.W8A16): Meant(Scheme.W8A16, SAME),
    (Purpose.PORTABLE, Scheme.W8A16_BLOCK): Meant(Scheme.W8A16_BLOCK, SAME),
    (Purpose.TENSORRT, Scheme.FLOAT): Meant(Scheme.FLOAT, IN_16_BIT),
    (Purpose.TENSORRT, Scheme.W8A8): Meant(Scheme.W8A8, LEVELS_IN_16_BIT),
    (Purpose.TENSORRT, Scheme.W8A8_DYNAMIC): Meant(Scheme.W8A16, IN_16_BIT),
    (Purpose.TENSORRT, Scheme.W8A16): Meant(Scheme.W8A16, IN_16_BIT),
    (Purpose.TENSORRT, Scheme.W8A16_BLOCK): Meant(Scheme.W8A16_BLOCK, IN_16_BIT),
    (Purpose.ROWS, Scheme.FLOAT): Meant(Scheme.FLOAT, SAME),
    (Purpose.ROWS, Scheme.W8A8): Meant(Scheme.W8A8, SAME_LEVELS),
    (Purpose.ROWS, Scheme.W8A8_DYNAMIC): Meant(Scheme.W8A8_DYNAMIC, SAME_LEVELS),
    # Many rows at once have no quick weight-only product: inputs are rounded with a scale a token.
    (Purpose.ROWS, Scheme.W8A16): Meant(Scheme.W8A8_DYNAMIC, SAME_LEVELS),
    (Purpose.ROWS, Scheme.W8A16_BLOCK): Meant(Scheme.W8A16_BLOCK, OWN_ROUNDING),
    (Purpose.TOKEN, Scheme.FLOAT): Meant(Scheme.FLOAT, SAME),
    (Purpose.TOKEN, Scheme.W8A8): Meant(Scheme.W8A16, OWN_ROUNDING),
    (Purpose.TOKEN, Scheme.W8A8_DYNAMIC): Meant(Scheme.W8A16, OWN_ROUNDING),
    (Purpose.TOKEN, Scheme.W8A16): Meant(Scheme.W8A16, OWN_ROUNDING),
    (Purpose.TOKEN, Scheme.W8A16_BLOCK): Meant(Scheme.W8A16_BLOCK, OWN_ROUNDING),
}
ALL = [pytest.param(*key, id=f"{key[0].value}-{key[1].value}") for key in MEANT]


def relative(found: Floats, wanted: Floats) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


class Ranges:
    """The largest magnitude of every product's input and of the cache while a float model runs, a little shrunk."""

    def __init__(self, model: EchoVLM) -> None:
        self.model = model
        self.names = [name for found in products(model) for name in found] + ["lm_head"]
        self.inputs: dict[str, float] = {}
        self.cache: dict[str, float] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        linears, mixtures = products(self.model)
        handles = [
            module.register_forward_pre_hook(partial(self._input, name))
            for name, module in (linears | mixtures).items()
        ]
        handles.append(self.model.model.norm.register_forward_hook(self._head))
        for name, module in self.model.named_modules():
            if isinstance(module, SelfAttention):
                handles.append(module.register_forward_pre_hook(partial(self._cache, name)))
        with torch.no_grad():
            yield
        for handle in handles:
            handle.remove()

    def plan(self, scheme: Scheme, cache: CacheScheme = CacheScheme.FLOAT, *, only: str = "") -> QuantizationPlan:
        """The products that begin with `only` and ran in `scheme`, the others and the embeddings float."""
        schemes = {
            name: scheme if name.startswith(only) and name in self.inputs else Scheme.FLOAT for name in self.names
        }
        return QuantizationPlan(schemes, self.inputs, cache, self.cache)

    def _input(self, name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._note(self.inputs, name, arguments[0])
        if isinstance(module, SparseMoE):
            for expert, hidden in enumerate(module.expert_hidden(arguments[0]).unbind(-2)):
                self._note(self.inputs, f"{name}.{expert}.down_proj", hidden)

    def _head(self, _module: nn.Module, _arguments: object, result: Tensor) -> None:
        self._note(self.inputs, "lm_head", result)

    def _cache(
        self, name: str, _module: nn.Module, arguments: tuple[Tensor, Tensor, Tensor, Attend]
    ) -> tuple[Tensor, Tensor, Tensor, Attend]:
        x, cos, sin, attend = arguments

        def noted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._note(self.cache, f"{name}.key", k)
            self._note(self.cache, f"{name}.value", v)
            return attend(q, k, v)

        return x, cos, sin, noted

    def _note(self, kept: dict[str, float], name: str, values: Tensor) -> None:
        kept[name] = max(kept.get(name, 0.0), SHRUNK * float(values.abs().max()))


def sizes(*, hidden: int = 64, moe: MoEConfig | None, tied: bool = False, layers: int = 1) -> ModelConfig:
    """A decoder of heads of 16 values, vocabulary 90."""
    heads = hidden // 16
    return ModelConfig(
        vocab_size=90,
        hidden_size=hidden,
        intermediate_size=hidden + 24,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=1,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        mrope_section=(2, 3, 3),
        image_token_id=89,
        video_token_id=88,
        vision_start_token_id=87,
        vision_end_token_id=86,
        vision=VisionConfig(depth=1, embed_dim=32, hidden_size=hidden, num_heads=2, mlp_ratio=2.0),
        moe=moe,
        tie_word_embeddings=tied,
        eos_token_ids=(2,),
    )


def experts(chosen: int, count: int, inner: int, *, normalised: bool = False) -> MoEConfig:
    return MoEConfig(chosen, inner, 24, num_experts=count, norm_topk_prob=normalised)


# hidden, mixture, and whether one token at a time goes through QMoE: its blocks divide both widths.
MIXTURES: dict[str, tuple[int, MoEConfig, bool]] = {
    "as the smallest checkpoint": (64, experts(2, 4, 48), True),
    "blocks of 128 fit": (256, experts(2, 4, 384), True),
    "no block of 16 divides the experts' width": (64, experts(2, 5, 20), False),
    "widths of no multiple of 128": (208, experts(2, 3, 144), True),
    "weights renormalised over the chosen": (64, experts(2, 4, 48, normalised=True), True),
    "one of three": (64, experts(1, 3, 32), True),
    "one of three, renormalised": (48, experts(1, 3, 24, normalised=True), False),
}


def experts_graph(config: ModelConfig) -> ir.Model:
    """A graph of one mixture's mark: x [1, n, hidden] and weights [1, n, experts] to y."""
    assert config.moe is not None
    hidden, inner, count = config.hidden_size, config.moe.moe_intermediate_size, config.moe.num_experts
    float_type = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape([1, "n", hidden]), type=float_type)
    weights = ir.Value(name="weights", shape=ir.Shape([1, "n", count]), type=float_type)
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    held = [
        ir.Value(name=f"{EXPERTS}.{expert}.{part}.weight", shape=ir.Shape(shape), type=float_type)
        for expert in range(count)
        for part, shape in shapes.items()
    ]
    node = ir.node("Experts", [x, weights, *held], attributes={"name": EXPERTS}, domain=DOMAIN)
    node.outputs[0].name, node.outputs[0].type = "y", float_type
    node.outputs[0].shape = ir.Shape([1, "n", hidden])
    opsets = {"": OPSET, DOMAIN: 1}
    graph = ir.Graph([x, weights], node.outputs, nodes=[node], initializers=held, opset_imports=opsets, name="mixture")
    return ir.Model(graph, ir_version=10)


class Mixture:
    """One mixture of a random model, its input, and its graphs by scheme and purpose."""

    def __init__(self, name: str, folder: Path, runnable: Callable[[ir.Model], ir.Model]) -> None:
        self.runnable = runnable
        hidden, moe, self.quick = MIXTURES[name]
        self.folder = folder
        self.config = sizes(hidden=hidden, moe=moe)
        self.model = init_model(self.config, seed=3, std=0.12).eval()
        save_checkpoint(self.model, folder / "checkpoint")
        found = self.model.get_submodule(EXPERTS.removesuffix(".experts"))
        assert isinstance(found, SparseMoE)
        self.moe = found
        self.x = torch.randn(1, 21, hidden, generator=torch.Generator().manual_seed(7))
        self.ranges = Ranges(self.model)
        with self.ranges.listening():
            self.moe(self.x)

    @torch.no_grad()
    def fake_quantized(self, scheme: Scheme) -> Floats:
        """What the torch model makes of it, fake-quantized, without the shared expert."""
        shared = torch.sigmoid(self.moe.shared_expert_gate(self.x)) * self.moe.shared_expert(self.x)
        with fake_quantized(self.model, self.ranges.plan(scheme, only=EXPERTS)):
            return np.asarray(self.moe(self.x)[0] - shared)

    @torch.no_grad()
    def run_graph(self, scheme: Scheme, purpose: Purpose) -> tuple[Floats, ir.Model]:
        """What the graph makes of it, one token at a time where that is its purpose."""
        config, headers = open_checkpoint(self.folder / "checkpoint")
        plan = self.ranges.plan(scheme, only=EXPERTS)
        layout = plan_layout(config, plan)
        folder = self.folder / f"{scheme.value}-{purpose.value}"
        folder.mkdir()
        write_weights(folder / "w", layout, headers, Smoothing.none(), identity="")
        graph = self.runnable(lowered(experts_graph(config), config, plan, layout, folder / "w", purpose))
        ir.save(graph, folder / "mixture.onnx")
        session: Any = load_graph(folder / "mixture.onnx", 1)
        shares = self.moe.route(self.moe.gate(self.x)).numpy()
        x, step = self.x.numpy(), 1 if purpose is Purpose.TOKEN else self.x.shape[1]
        found = [
            session.run(None, {"x": x[:, n : n + step], "weights": shares[:, n : n + step]})[0]
            for n in range(0, x.shape[1], step)
        ]
        return np.concatenate(found, axis=1), graph


@pytest.fixture(scope="module")
def mixtures(
    tmp_path_factory: pytest.TempPathFactory, without_bfloat16: Callable[[ir.Model], ir.Model]
) -> Callable[[str], Mixture]:
    made: dict[str, Mixture] = {}

    def get(name: str) -> Mixture:
        if name not in made:
            made[name] = Mixture(name, tmp_path_factory.mktemp("mixture"), without_bfloat16)
        return made[name]

    return get


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(("purpose", "scheme"), ALL)
def test_one_mixture_alone(mixtures: Callable[[str], Mixture], name: str, purpose: Purpose, scheme: Scheme) -> None:
    mixture, meant = mixtures(name), MEANT[purpose, scheme]
    found, graph = mixture.run_graph(scheme, purpose)
    wanted = mixture.fake_quantized(meant.scheme)
    error = relative(found, wanted)
    print(f"{name}: largest error {error:.1e} of {meant.exactness.mixture:.0e}")
    assert error < meant.exactness.mixture
    used = {node.op_type for node in graph.graph}
    blocks = scheme is not Scheme.W8A16_BLOCK or name == "blocks of 128 fit"
    assert ("QMoE" in used) == (purpose is Purpose.TOKEN and scheme is not Scheme.FLOAT and mixture.quick and blocks)
    if scheme is not Scheme.FLOAT:
        assert relative(mixture.fake_quantized(Scheme.FLOAT), wanted) > 1e-3  # the schemes are not all one


class Sequence(msgspec.Struct, frozen=True):
    """Tokens with their pictures, or with the embeddings that stand for pictures."""

    ids: npt.NDArray[np.int64]  # [s]
    positions: npt.NDArray[np.int64]  # [3, s]
    images: tuple[Patches, ...] = ()
    embeds: Floats | None = None

    def answer(self, session: Any, *, one_at_a_time: bool = False) -> Floats:
        """Logits [s, vocab]; `one_at_a_time`: of the tokens behind the pictures."""
        embeds = self.embeds
        if self.images:
            embeds = np.concatenate([session.encode_image(image) for image in self.images])
        session.rewind(0)
        pictures = np.flatnonzero(self.ids == session.spec.image_token_id)
        first = len(self.ids)
        if one_at_a_time:
            first = 1 + int(pictures[-1]) if len(pictures) else 1
        rest = [slice(n, n + 1) for n in range(first, len(self.ids))]
        parts = [
            session.extend(
                self.ids[:first], self.positions[:, :first], image_embeds=embeds, logits_rows=np.arange(first)
            ),
            *(session.extend(self.ids[part], self.positions[:, part]) for part in rest),
        ]
        return np.concatenate(parts)


class Case(msgspec.Struct, frozen=True):
    """A model, its graphs before any pass, and sequences that all are given."""

    model: EchoVLM
    checkpoint: Path
    graphs: Mapping[CacheScheme, Mapping[str, ir.Model]]
    context: int
    sequences: tuple[Sequence, ...]

    def fake_quantized(self, plan: QuantizationPlan) -> list[Floats]:
        """What the fake-quantized torch model answers."""
        with fake_quantized(self.model, plan):
            session = TorchSession(self.model, ImageSpec(), self.context)
            return [sequence.answer(session) for sequence in self.sequences]

    def ranges(self) -> Ranges:
        """What calibration on these very sequences would measure."""
        ranges = Ranges(self.model)
        with ranges.listening():
            session = TorchSession(self.model, ImageSpec(), self.context)
            for sequence in self.sequences:
                sequence.answer(session)
        return ranges

    def check(self, compiled: Any, ranges: Ranges, scheme: Scheme, cache: CacheScheme) -> None:
        """All forms of the graphs beside the torch model."""
        answers: dict[tuple[Scheme, CacheScheme], list[Floats]] = {}
        for purpose in Purpose:
            meant = MEANT[purpose, scheme]
            # TensorRT updates a cache of floats only.
            stored = CacheScheme.FLOAT if purpose is Purpose.TENSORRT else cache
            if (meant.scheme, stored) not in answers:
                answers[meant.scheme, stored] = self.fake_quantized(ranges.plan(meant.scheme, stored))
            session = compiled.open(purpose)
            errors, largest = [], 0.0
            for sequence, wanted in zip(self.sequences, answers[meant.scheme, stored], strict=True):
                found = sequence.answer(session, one_at_a_time=purpose is Purpose.TOKEN)
                errors.append(float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)))
                largest = max(largest, relative(found, wanted))
            session.close()
            exactness = meant.exactness
            if exactness is SAME and cache is CacheScheme.INT8:  # what goes into the cache is rounded
                exactness = SAME_LEVELS
            print(f"{purpose.value}: {', '.join(f'{error:.1e}' for error in errors)}; largest error {largest:.1e}")
            assert min(errors) < exactness.best
            assert max(errors) < exactness.worst


@pytest.fixture(scope="module")
def recorded(golden_folder: Path, tiny_checkpoint: Path, marked: Any) -> Case:
    """The smallest checkpoint and three recorded sequences, with pictures and without."""
    sequences = []
    for name in ("text", "image", "two_images"):
        tensors = load_file(golden_folder / "echovlm_tiny" / f"{name}.safetensors")
        grids = [tuple(int(n) for n in row) for row in tensors.get("image_grid_thw", np.empty((0, 3)))]
        ends = np.cumsum([t * h * w for t, h, w in grids], dtype=int)
        images = tuple(
            Patches(tensors["pixel_values"][end - t * h * w : end], (t, h, w))
            for (t, h, w), end in zip(grids, ends, strict=True)
        )
        sequences.append(Sequence(tensors["input_ids"][0], tensors["position_ids"][:, 0], images))
    graphs = {cache: {"vision": marked.vision(), "decoder": marked.decoder(cache)} for cache in CacheScheme}
    return Case(load_checkpoint(tiny_checkpoint), tiny_checkpoint, graphs, marked.context, tuple(sequences))


@pytest.mark.parametrize("cache", CacheScheme)
@pytest.mark.parametrize("scheme", Scheme)
def test_the_whole_model(
    recorded: Case, compile_graphs: Callable[..., Any], tmp_path: Path, scheme: Scheme, cache: CacheScheme
) -> None:
    ranges = recorded.ranges()
    plan = ranges.plan(scheme, cache)
    compiled = compile_graphs(recorded.checkpoint, recorded.graphs[cache], plan, tmp_path / "g", recorded.context)
    recorded.check(compiled, ranges, scheme, cache)
    if cache is CacheScheme.INT8:
        wanted, without = (recorded.fake_quantized(ranges.plan(scheme, other)) for other in (cache, CacheScheme.FLOAT))
        assert all(relative(a, b) > 1e-4 for a, b in zip(wanted, without, strict=True))  # it is another computation


VARIANTS: dict[str, tuple[ModelConfig, CacheScheme]] = {
    "tied, one expert of three that no block divides, renormalised": (
        sizes(hidden=48, moe=experts(1, 3, 20, normalised=True), tied=True),
        CacheScheme.FLOAT,
    ),
    "dense Qwen2-VL, widths of no multiple of 128, int8 cache": (sizes(hidden=208, moe=None), CacheScheme.INT8),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, CacheScheme]:
    """A random model of one layer, its decoder exported."""
    config, cache = VARIANTS[request.param]
    checkpoint = tmp_path_factory.mktemp("variant") / "checkpoint"
    model = init_model(config, seed=5, std=0.1).eval()
    save_checkpoint(model, checkpoint)
    rng = np.random.default_rng(0)
    sequences = []
    for image_tokens in (0, 2, 6):
        ids = np.concatenate([rng.integers(5, 80, 4), np.full(image_tokens, 89), rng.integers(5, 80, 5)])
        embeds = rng.normal(0, 1, (image_tokens, config.hidden_size)).astype(np.float32) if image_tokens else None
        sequences.append(Sequence(ids, np.tile(np.arange(len(ids)), (3, 1)), embeds=embeds))
    graphs = {cache: {"decoder": export_decoder(config, 32, cache)}}
    return Case(model, checkpoint, graphs, 32, tuple(sequences)), cache


@pytest.mark.parametrize("scheme", Scheme)
def test_other_architectures(
    variant: tuple[Case, CacheScheme], compile_graphs: Callable[..., Any], tmp_path: Path, scheme: Scheme
) -> None:
    case, cache = variant
    ranges = case.ranges()
    compiled = compile_graphs(case.checkpoint, case.graphs[cache], ranges.plan(scheme, cache), tmp_path / "g", 32)
    case.check(compiled, ranges, scheme, cache)


def test_int8_embeddings(recorded: Case, compile_graphs: Callable[..., Any], tmp_path: Path) -> None:
    """Rows are looked up in int8 and given their scale: what a float model with those rows computes."""
    plan = recorded.ranges().plan(Scheme.FLOAT)
    plan = msgspec.structs.replace(plan, schemes={**plan.schemes, EMBEDDING: Scheme.W8A16})
    graphs = recorded.graphs[CacheScheme.FLOAT]
    compiled = compile_graphs(recorded.checkpoint, graphs, plan, tmp_path / "g", recorded.context)
    model = load_checkpoint(recorded.checkpoint)
    with torch.no_grad():
        rows = model.model.embed_tokens.weight
        int8, scale = quantize_weight(rows.numpy())
        rows.copy_(torch.from_numpy(int8 * scale[:, None]))
    session = TorchSession(model, ImageSpec(), recorded.context)
    for purpose in Purpose:
        graph_session = compiled.open(purpose)
        for sequence in recorded.sequences:
            error = relative(sequence.answer(graph_session), sequence.answer(session))
            print(f"{purpose.value}: largest error {error:.1e}")
            assert error < (IN_16_BIT.worst if purpose is Purpose.TENSORRT else 1e-4)
        graph_session.close()


@pytest.mark.parametrize("cache", CacheScheme)
@pytest.mark.parametrize("scheme", [Scheme.W8A8, Scheme.W8A16])
def test_both_graphs_take_turns_at_one_cache(
    recorded: Case, compile_graphs: Callable[..., Any], tmp_path: Path, scheme: Scheme, cache: CacheScheme
) -> None:
    """One token at a time answers as all at once does, and a rewound cache forgets whichever graph wrote it."""
    plan = recorded.ranges().plan(scheme, cache)
    compiled = compile_graphs(recorded.checkpoint, recorded.graphs[cache], plan, tmp_path / "g", recorded.context)
    session = compiled.open(Purpose.ROWS, both=True)
    alone = compiled.open(Purpose.ROWS)
    for sequence in recorded.sequences:
        whole, single = sequence.answer(alone), sequence.answer(session, one_at_a_time=True)
        error = float(np.linalg.norm(single - whole) / np.linalg.norm(whole))
        print(f"one at a time: {error:.1e}")
        assert 1e-6 < error < OWN_ROUNDING.worst
        assert session.length == len(sequence.ids)
        assert np.array_equal(sequence.answer(session), whole)
        ids, positions, count = sequence.ids, sequence.positions, len(sequence.ids)

        def ending(ids: npt.NDArray[np.int64] = ids, positions: npt.NDArray[np.int64] = positions) -> list[Floats]:
            """Logits of the last three tokens by one graph, and of the last by the other, behind the same prefix."""
            session.rewind(len(ids) - 3)
            three = session.extend(ids[-3:], positions[:, -3:], logits_rows=np.arange(3))
            session.rewind(len(ids) - 1)
            return [three, session.extend(ids[-1:], positions[:, -1:])]

        before = ending()
        for strange in (np.full(1, 77), np.full(3, 78)):  # each graph writes behind the prefix
            session.rewind(count - 3)
            session.extend(strange, positions[:, -len(strange) :])
            assert all(np.array_equal(a, b) for a, b in zip(ending(), before, strict=True))
        assert relative(before[0], whole[-3:]) < OWN_ROUNDING.worst
    session.close()
    alone.close()
