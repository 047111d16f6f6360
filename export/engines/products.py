"""Which products a parsed network asks for in int8, and which of them an engine really computes so.

A builder may move an operator through a product or fold a scale elsewhere, and then unpack int8 weights to float on
every run: right in its result, but neither small nor fast. Only the engine's own list of layers tells.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from sonoedge.export.engines.inspection import Layer

Asked = Literal["int8", "int8 weights", "float"]
Factor = Literal["int8", "int8 constant", "constant", "float"]

# What may stand between a value and its product.
_THROUGH = ("SHUFFLE", "CAST", "IDENTITY", "SQUEEZE", "UNSQUEEZE", "SLICE")
_KINDS: dict[frozenset[Factor], Asked] = {
    frozenset(("int8", "int8 constant")): "int8",
    frozenset(("float", "int8 constant")): "int8 weights",
    frozenset(("int8", "constant")): "float",
    frozenset(("float", "constant")): "float",
}


class Product(msgspec.Struct, frozen=True):
    """One product with constant weights as the graph asks for it; origins name its nodes in the layers of an engine."""

    name: str
    asked: Asked
    origin: str  # of the product itself
    weights_origin: str  # of what scales its int8 weights, else of the product


class Products(msgspec.Struct, frozen=True):
    """In what types an engine computes its products with constant weights; the lists name those not built as asked."""

    int8: int  # int8 activations times int8 weights
    int8_weights: int  # float activations times weights that are read as int8
    float: int  # float weights, as asked
    not_int8: tuple[str, ...]  # asked for in int8, computed in float
    unpacked: tuple[str, ...]  # asked for with int8 weights, which are written out as float first


def asked_products(network: Any) -> tuple[Product, ...]:
    """Every product with constant weights in a parsed network."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(n).name: layer for layer in layers for n in range(layer.num_outputs)}
    return tuple(_products(layers, makers))


def built_products(asked: Sequence[Product], layers: Sequence[Layer]) -> Products:
    """Look every product up in the layers of its engine, all optimization profiles together."""
    lost = {product.name for product in asked if not _built_as_asked(product, layers)}
    kept = [product.asked for product in asked if product.name not in lost]
    return Products(
        int8=kept.count("int8"),
        int8_weights=kept.count("int8 weights"),
        float=kept.count("float"),
        not_int8=tuple(p.name for p in asked if p.name in lost and p.asked == "int8"),
        unpacked=tuple(p.name for p in asked if p.name in lost and p.asked == "int8 weights"),
    )


def _built_as_asked(product: Product, layers: Sequence[Layer]) -> bool:
    if product.asked == "float":
        return True
    own = [layer for layer in layers if product.origin in layer.origin or product.weights_origin in layer.origin]
    if any(layer.unpacks for layer in own):
        return False
    if product.asked == "int8":
        return any(layer.multiplies_int8 for layer in own)
    return any(layer.reads_int8_weights for layer in own)


def _products(layers: Sequence[Any], makers: Mapping[str, Any]) -> Iterator[Product]:
    for layer in layers:
        if layer.type.name == "MATRIX_MULTIPLY":
            factors = [_factor(layer.get_input(n), makers) for n in range(2)]
            asked = _KINDS.get(frozenset(kind for kind, _ in factors))
            if asked is not None:
                weights = next((origin for kind, origin in factors if kind == "int8 constant"), layer.metadata)
                yield Product(layer.name, asked, layer.metadata, weights)


def _factor(tensor: Any, makers: Mapping[str, Any]) -> tuple[Factor, str]:
    """Whether a factor of a product is stored or computed as int8, and the origin of what turns it into float."""
    dequantized: str | None = None
    while (maker := makers.get(tensor.name)) is not None:
        match maker.type.name:
            case "CONSTANT":
                return ("constant", "") if dequantized is None else ("int8 constant", dequantized)
            case "QUANTIZE" if dequantized is not None:
                return "int8", dequantized
            case "DEQUANTIZE":
                dequantized = maker.metadata
            case name if name not in _THROUGH:
                return "float", ""
        tensor = maker.get_input(0)
    return "float", ""
