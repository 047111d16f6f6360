"""Which products a model has, and the plan that gives every one of them its scheme and its input range."""

from __future__ import annotations

from torch import nn

from sonoedge.calibration.table import CalibrationTable
from sonoedge.errors import SonoEdgeError
from sonoedge.export.layout import EMBEDDING
from sonoedge.export.markers import LM_HEAD, is_product
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import empty_model
from sonoedge.export.models.moe import SparseMoE
from sonoedge.export.models.vision import PatchEmbed
from sonoedge.export.recipe import Quantization
from sonoedge.export.scheme import QuantizationPlan, Scheme


def products(model: EchoVLM) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The modules whose first argument is a quantizable product's input, and the mixtures, by the names in graphs."""
    linears: dict[str, nn.Module] = {}
    mixtures: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, PatchEmbed):
            linears[f"{name}.proj"] = module
        elif isinstance(module, SparseMoE):
            mixtures[f"{name}.experts"] = module
        elif is_product(name, module):
            linears[name] = module
    return linears, mixtures


def product_names(config: ModelConfig) -> tuple[str, ...]:
    """The names of all products of a model of these sizes, in its order, the head last."""
    linears, mixtures = products(empty_model(config))
    return (*linears, *mixtures, LM_HEAD)


def make_plan(config: ModelConfig, table: CalibrationTable, settings: Quantization) -> QuantizationPlan:
    """Give every product its scheme; raises SonoEdgeError for a recipe entry that names no product.

    Embeddings are looked up, not multiplied: they are int8 rows unless the recipe keeps them float.
    """
    names = product_names(config)
    for prefix in settings.schemes:
        if not any(name.startswith(prefix) for name in (*names, EMBEDDING)):
            raise SonoEdgeError(
                f"quantization.schemes names {prefix!r}, with which no product begins: write names such as {names[0]!r}"
            )
    schemes = {name: settings.scheme(name) for name in names}
    schemes[EMBEDDING] = Scheme.FLOAT if settings.scheme(EMBEDDING) is Scheme.FLOAT else Scheme.W8A16
    return QuantizationPlan(schemes, table.input_maximum, settings.cache, table.cache_maximum)


def quantized_share(plan: QuantizationPlan) -> float:
    """Fraction of the products whose weights are int8."""
    schemes = [scheme for name, scheme in plan.schemes.items() if name != EMBEDDING]
    return sum(scheme is not Scheme.FLOAT for scheme in schemes) / len(schemes)
