"""A smaller checkpoint in the released format: some experts of each layer stay, the others and their router rows go.

The router's softmax then runs over the experts that stayed, so their weights grow by what the others took.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from sonoedge.bundle import TOKENIZER_FILE
from sonoedge.errors import SonoEdgeError
from sonoedge.export.checkpoint_files import RANDOM_KEY, is_random
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.config_json import config_tree
from sonoedge.export.models.loading import empty_model, open_checkpoint
from sonoedge.export.models.shards import TensorHeader, row_chunks
from sonoedge.export.routing_survey import Mixture
from sonoedge.export.safetensors_writer import TensorSpec, write_weights
from sonoedge.progress import track

CHUNK_VALUES = 2**22
BESIDE = (TOKENIZER_FILE, "tokenizer_config.json", "preprocessor_config.json", "generation_config.json")
Kept = Mapping[str, tuple[int, ...]]  # the experts that stay, by mixture ("model.layers.N.moe.experts"), in their order


def choose_experts(
    mixtures: Sequence[Mixture], *, experts: int | None, mass: float | None
) -> dict[str, tuple[int, ...]]:
    """The experts of each layer that carry most of the region's routing mass, equally many in every layer.

    experts: how many; else mass: as many as carry at least this share of it in the layer that spreads it most. Raises
    SonoEdgeError for more experts than the model has.
    """
    total = len(mixtures[0].use.mass)
    if experts is None:
        assert mass is not None  # the recipe has one of the two
        experts = next(
            count
            for count in range(1, total + 1)
            if count == total or all(mass_kept(mixture, mixture.heaviest(count)) >= mass for mixture in mixtures)
        )
    if experts > total:
        raise SonoEdgeError(f"preset.experts = {experts} and the model has {total} in a layer: ask for at most {total}")
    return {mixture.name: mixture.heaviest(experts) for mixture in mixtures}


def mass_kept(mixture: Mixture, kept: Sequence[int]) -> float:
    """The share of the region's routing mass that `kept` experts carry."""
    return sum(mixture.use.shares[expert] for expert in kept)


def pinned_config(config: ModelConfig, kept: Kept) -> ModelConfig:
    """The sizes of the model whose layers have only the experts `kept`."""
    assert config.moe is not None  # refused before
    count = len(next(iter(kept.values())))
    chosen = min(config.moe.num_experts_per_tok, count)
    moe = msgspec.structs.replace(config.moe, num_experts=count, num_experts_per_tok=chosen)
    return msgspec.structs.replace(config, moe=moe)


def write_pinned(checkpoint: Path, kept: Kept, out: Path, replaced: Mapping[str, TensorHeader]) -> int:
    """Write the checkpoint folder `out` with the experts `kept` of `checkpoint`; a few rows in memory at a time.

    replaced: weights of `out` by key that come from elsewhere. Returns the bytes of its weights.
    """
    config, headers = open_checkpoint(checkpoint)
    smaller = pinned_config(config, kept)
    shapes = {key: tuple(tensor.shape) for key, tensor in empty_model(smaller).state_dict().items()}
    sources = {key: source_key(key, kept) for key in shapes}
    specs = [TensorSpec(key, headers[sources[key]].dtype, shape) for key, shape in shapes.items()]
    size = sum(spec.bytes for spec in specs)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with track("write the pinned checkpoint", size) as advance:

        def content(spec: TensorSpec) -> Iterator[memoryview]:
            key, header = sources[spec.name], headers[sources[spec.name]]
            if spec.name in replaced:
                key, header = spec.name, replaced[spec.name]
            router = key.endswith(".moe.gate.weight")
            rows = kept[key.replace(".gate.weight", ".experts")] if router else None
            for piece in _pieces(header, key, rows):
                yield piece
                advance(piece.nbytes)

        write_weights(out, specs, content)
    dtype = str(torch_dtype(headers["model.embed_tokens.weight"].dtype)).removeprefix("torch.")
    tree = config_tree(smaller) | {"torch_dtype": dtype, RANDOM_KEY: is_random(checkpoint)}
    (out / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(tree), indent=2) + b"\n")
    for name in BESIDE:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)
    return size


def torch_dtype(name: str) -> torch.dtype:
    """What safetensors calls F64, F32, F16 or BF16."""
    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]


def source_key(key: str, kept: Kept) -> str:
    """Where the weight `key` of the pinned checkpoint comes from: an expert has another number there."""
    mixture, inside, rest = key.partition(".experts.")
    if not inside:
        return key
    number, _, leaf = rest.partition(".")
    return f"{mixture}.experts.{kept[f'{mixture}.experts'][int(number)]}.{leaf}"


def _pieces(header: TensorHeader, key: str, rows: Sequence[int] | None) -> Iterator[memoryview]:
    """The bytes of a tensor as the file has them, a few rows at a time; of a router only its `rows`, if given."""
    for first, chunk in row_chunks(header, key, CHUNK_VALUES):
        taken = chunk
        if rows is not None:
            taken = chunk[[row - first for row in rows if first <= row < first + chunk.shape[0]]]
        yield taken.contiguous().flatten().view(torch.uint8).numpy().data
