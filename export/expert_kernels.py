"""The kernels of a bundle's plugins: which a device takes, compiled into the bundle."""

from __future__ import annotations

from sonoedge.bundle import BundleWriter, ExpertsSpec, Graph
from sonoedge.device_profiles import Profile
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.plugins.artifact import INDEX_FILE, KERNELS_FOLDER
from sonoedge.export.plugins.dispatch import Experts
from sonoedge.export.plugins.kernel_set import ACTIVATION, experts_for, prefill_counts, targets, write_kernels


def experts_spec(config: ModelConfig) -> ExpertsSpec | None:
    """What a manifest says of a model's routed experts, None for a dense model."""
    moe = config.moe
    if moe is None:
        return None
    width = moe.moe_intermediate_size
    return ExpertsSpec(moe.num_experts, moe.num_experts_per_tok, config.hidden_size, width, moe.norm_topk_prob)


def plugin_experts(spec: ExpertsSpec | None, device: Profile) -> Experts | None:
    """What plugins on a device are told of a model's experts; None for a dense model or a device without plugins."""
    if spec is None or device.buckets is None or not targets(device, plugins_only=True):
        return None
    return experts_for(spec, device.buckets.prefill_tokens[-1])


def add_kernels(
    experts: Experts | None, device: Profile, graphs: tuple[Graph, ...], writer: BundleWriter
) -> str | None:
    """Compile what the bundle's plugin graphs run; gives the path of the kernels' index, None where none are needed."""
    if experts is None or device.buckets is None or not any(graph.formulation == "trt-plugins" for graph in graphs):
        return None
    write_kernels(
        lambda name: writer.add(f"{KERNELS_FOLDER}/{name}"),
        experts,
        ACTIVATION,
        prefill_counts(device.buckets),
        targets(device, plugins_only=True),
    )
    return f"{KERNELS_FOLDER}/{INDEX_FILE}"
