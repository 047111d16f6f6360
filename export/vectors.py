"""Recorded outputs of a reference implementation, one safetensors file a case, checked before anything runs on them."""

from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.rope import Grid


class Case(msgspec.Struct, frozen=True):
    """One recorded input with what the reference made of it."""

    name: str
    input_ids: Tensor  # int64 [B, S]
    attention_mask: Tensor  # int64 [B, S]
    position_ids: Tensor  # int64 [3, B, S]
    logits: Tensor  # [B, S, vocab]
    generated: Tensor  # int64 [B, tokens]
    pixel_values: Tensor | None  # [patches, patch_values]
    grids: tuple[Grid, ...]
    image_embeds: Tensor | None  # [merged, hidden]
    hidden: tuple[Tensor, ...]  # layers + 1 of [B, S, hidden]
    router: tuple[Tensor, ...]  # layers of [B * S, experts]


def read_cases(vectors: Path, config: ModelConfig) -> list[Case]:
    """Cases of a folder (every *.safetensors that is no model*.safetensors) or of one file, ordered by name."""
    if vectors.is_dir():
        files = sorted(file for file in vectors.glob("*.safetensors") if not file.name.startswith("model"))
        if not files:
            raise SonoEdgeError(
                f"{vectors} holds no recorded case (*.safetensors beside model*.safetensors); record some."
            )
    elif vectors.is_file():
        files = [vectors]
    else:
        raise SonoEdgeError(f"{vectors} does not exist; give a folder of recorded cases or one such file.")
    return [_read_case(file, config) for file in files]


def _read_case(file: Path, config: ModelConfig) -> Case:
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise SonoEdgeError(f"{file} is not a whole safetensors file ({error}); copy it again.") from error
    batch, length = _shape(file, tensors, "input_ids", None, None)
    _shape(file, tensors, "attention_mask", batch, length)
    _shape(file, tensors, "position_ids", 3, batch, length)
    _shape(file, tensors, "logits", batch, length, config.vocab_size)
    _shape(file, tensors, "generated", batch, None)
    ids = tensors["input_ids"]
    if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise SonoEdgeError(
            f"{file}: input_ids must hold tokens from 0 to {config.vocab_size - 1}; it is of another model."
        )
    grids: tuple[Grid, ...] = ()
    if "pixel_values" in tensors:
        _shape(file, tensors, "pixel_values", None, config.vision.patch_values)
        _shape(file, tensors, "image_grid_thw", None, 3)
        grids = tuple((int(t), int(h), int(w)) for t, h, w in tensors["image_grid_thw"])
    hidden = _numbered(file, tensors, "hidden", (batch, length, config.hidden_size), config.num_hidden_layers + 1)
    experts = 0 if config.moe is None else config.moe.num_experts
    router = _numbered(file, tensors, "router", (batch * length, experts), config.num_hidden_layers)
    return Case(
        name=file.stem,
        input_ids=ids.long(),
        attention_mask=tensors["attention_mask"].long(),
        position_ids=tensors["position_ids"].long(),
        logits=tensors["logits"].float(),
        generated=tensors["generated"].long(),
        pixel_values=tensors.get("pixel_values"),
        grids=grids,
        image_embeds=tensors.get("image_embeds"),
        hidden=hidden,
        router=router,
    )


def _shape(file: Path, tensors: dict[str, Tensor], key: str, *expected: int | None) -> torch.Size:
    """Shape of tensors[key], which must match `expected` (None: any size)."""
    if key not in tensors:
        raise SonoEdgeError(f"{file} has no {key}; record the case with it.")
    shape = tensors[key].shape
    if len(shape) != len(expected) or any(want not in (None, have) for want, have in zip(expected, shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise SonoEdgeError(
            f"{file}: {key} is {list(shape)}, not [{wanted}]; it belongs to another checkpoint or case."
        )
    return shape


def _numbered(
    file: Path, tensors: dict[str, Tensor], stem: str, shape: tuple[int, ...], most: int
) -> tuple[Tensor, ...]:
    """The tensors stem.0, stem.1, … (none, or one a layer), each of `shape`."""
    names = [name for name in tensors if name.startswith(f"{stem}.")]
    if not names:
        return ()
    if len(names) != most:
        raise SonoEdgeError(
            f"{file} records {len(names)} of {stem}.I but the checkpoint has {most}; it is of another model."
        )
    for index in range(most):
        _shape(file, tensors, f"{stem}.{index}", *shape)
    return tuple(tensors[f"{stem}.{index}"] for index in range(most))
