"""Where the inputs of quantizable products can be seen in a block of the model, and which products share one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sonoedge.errors import SonoEdgeError
from sonoedge.export.markers import is_product
from sonoedge.export.models.vision import PatchEmbed
from sonoedge.export.routed_moe import RoutedMoE
from sonoedge.export.smoothing_groups import SmoothingGroup
from sonoedge.export.streamed_model import FINAL_NORM, Block

HEAD = "lm_head"


def product_inputs(block: Block) -> dict[str, nn.Module]:
    """The module where each input of the block can be seen, by product; every expert's down projection has its own."""
    found = {}
    for leaf, child in block.module.named_modules():
        name = f"{block.name}.{leaf}" if leaf else block.name
        if name == FINAL_NORM:
            found[HEAD] = child
        elif isinstance(child, PatchEmbed):
            found[f"{name}.proj"] = child
        elif isinstance(child, RoutedMoE):
            found[f"{name}.experts"] = child
        elif is_product(name, child) or (".experts." in name and name.endswith(".down_proj")):
            found[name] = child
    return found


@contextmanager
def listening(inputs: Mapping[str, nn.Module], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While the enclosed code runs, call `note` with each product's name and input [..., columns].

    inputs: some of `product_inputs`. Raises SonoEdgeError naming the product whose input is not finite.
    """

    def finite(product: str, values: Tensor) -> None:
        require_finite(product, values)
        note(product, values)

    handles = [_listen(product, module, partial(finite, product)) for product, module in inputs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def require_finite(name: str, values: Tensor) -> None:
    """Raise SonoEdgeError when the input called `name` holds NaN or infinity."""
    smallest, largest = values.aminmax()
    if not bool(torch.isfinite(smallest) & torch.isfinite(largest)):
        raise SonoEdgeError(
            f"the input of {name} is not finite: check the checkpoint's weights and the calibration frames"
        )


def _listen(product: str, module: nn.Module, note: Callable[[Tensor], None]) -> RemovableHandle:
    if product == HEAD:  # its weight is never read whole, but what the final norm gives is its input
        return module.register_forward_hook(lambda _module, _arguments, result: note(result))
    return module.register_forward_pre_hook(lambda _module, arguments: note(arguments[0]))


def product_of(key: str) -> str:
    """The product that a group's consumer, the weight `key`, belongs to: all routed experts of a layer read as one."""
    name = key.removesuffix(".weight")
    experts, inside, _ = name.partition(".experts.")
    return f"{experts}.experts" if inside and not name.endswith(".down_proj") else name


def input_sources(groups: Sequence[SmoothingGroup]) -> dict[str, str]:
    """For each product that shares its input with others: the first of them, whose input need be measured alone."""
    return {product_of(key): product_of(group.consumers[0]) for group in groups for key in group.consumers}
