"""Which engines a bundle gets: the graph of each stage, and the sizes that it is built for."""

from pathlib import Path
from typing import Literal

import msgspec

from sonoedge.bundle import Bundle
from sonoedge.device_profiles.schema import Buckets
from sonoedge.engine_manifest import Bucket
from sonoedge.export.engines.buckets import (
    Extent,
    cache_tokens,
    decode_buckets,
    decoder_extents,
    grown_buckets,
    prefill_buckets,
    vision_buckets,
    vision_extents,
)
from sonoedge.export.engines.library import Abilities

Name = Literal["vision", "decoder", "decode"]
Experts = Literal["plugins", "functions", "none"]
Formulation = Literal["trt-plugins", "trt", "qdq"]

_Decoder = tuple[Name, Formulation, tuple[Bucket, ...]]  # an engine of the decoder: its stage, graph and sizes


class Stage(msgspec.Struct, frozen=True):
    """One engine to build."""

    name: Name
    graph: Path
    buckets: tuple[Bucket, ...]
    extents: list[dict[str, Extent]]  # of the graph's inputs, in each bucket
    cache_in_place: bool

    @property
    def plan(self) -> str:
        """The name of its file."""
        return f"{self.name}.plan"


class Plan(msgspec.Struct, frozen=True):
    """All engines of a bundle for a profile, before any is built."""

    stages: tuple[Stage, ...]
    experts: Experts


def plan_stages(bundle: Bundle, wanted: Buckets, abilities: Abilities) -> Plan:
    """Choose graphs and buckets; raises SonoEdgeError for a bundle without the graphs."""
    manifest, context, rows = bundle.manifest, bundle.manifest.decoder.context, abilities.decode_rows
    if not abilities.cache_in_place:
        grown = grown_buckets(wanted, context, rows)
        return _plan(bundle, wanted, [("decoder", "qdq", grown)], context)
    plugins = abilities.plugins and manifest.kernels is not None
    many: Formulation = "trt-plugins" if plugins and bundle.find_graph("decoder", "trt-plugins") else "trt"
    prefill, decode = prefill_buckets(wanted, context, rows), decode_buckets(wanted, context, rows)
    # Without a graph of its own, one token at a time is more profiles of the same engine: weights are stored once.
    if plugins and bundle.find_graph("decode", "trt-plugins"):
        stages: list[_Decoder] = [("decoder", many, prefill), ("decode", "trt-plugins", decode)]
    else:
        stages = [("decoder", many, prefill + decode)]
    return _plan(bundle, wanted, stages, cache_tokens(context, prefill + decode))


def _plan(bundle: Bundle, wanted: Buckets, decoders: list[_Decoder], cached: int) -> Plan:
    """The vision tower's engine, and those of the decoder's graphs."""
    manifest = bundle.manifest
    formulations = [formulation for _, formulation, _ in decoders]
    in_place = "qdq" not in formulations
    pictures = vision_buckets(wanted, manifest.image)
    vision = bundle.graph("vision", "trt" if in_place else "qdq")
    stages = [Stage("vision", vision, pictures, vision_extents(pictures, manifest.image), in_place)]
    for name, formulation, buckets in decoders:
        extents = decoder_extents(buckets, manifest.decoder, cached)
        stages.append(Stage(name, bundle.graph(name, formulation), buckets, extents, in_place))
    functions: Experts = "plugins" if "trt-plugins" in formulations else "functions"
    return Plan(tuple(stages), "none" if manifest.experts is None else functions)
