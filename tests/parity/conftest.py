"""An independent EchoVLM of any size, put together from transformers' Qwen2-VL and Qwen2-MoE, and its recordings.

Qwen2-VL and Qwen2.5-VL are transformers' own.
"""

# mypy: allow-untyped-calls

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

IMAGE, VIDEO, START, END = 199, 198, 197, 196
TEXT_TOKENS = 190
Record = Callable[["Variant"], Path]


class Variant(msgspec.Struct, frozen=True):
    """Sizes of one random model; experts 0 makes it dense, a window in pixels makes it a Qwen2.5-VL."""

    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    layers: int = 2
    sections: tuple[int, int, int] = (2, 3, 3)
    intermediate: int = 80
    experts: int = 4
    top_k: int = 2
    normalised: bool = False
    expert_size: int = 24
    shared_size: int = 40
    vision_dim: int = 32
    vision_heads: int = 2
    vision_depth: int = 2
    window: int = 0
    full_blocks: tuple[int, ...] = ()  # that attend the whole picture, of a Qwen2.5-VL
    grids: tuple[tuple[int, int], ...] = ((4, 6), (8, 4))  # rows and columns of the images in one sequence
    tied: bool = False
    shards: int = 1
    ends: bool = False  # the recorded generation meets end tokens, in one row earlier than in the other
    seed: int = 0


class TwoPaths(nn.Module):
    """EchoVLM's feed-forward, standing where transformers has the dense one."""

    def __init__(self, dense: nn.Module, variant: Variant) -> None:
        super().__init__()
        self.dense = dense
        self.moe = Qwen2MoeSparseMoeBlock(
            Qwen2MoeConfig(
                hidden_size=variant.hidden,
                num_experts=variant.experts,
                num_experts_per_tok=variant.top_k,
                norm_topk_prob=variant.normalised,
                moe_intermediate_size=variant.expert_size,
                shared_expert_intermediate_size=variant.shared_size,
            )
        )
        self.coefficient = nn.Linear(variant.hidden, 2)
        self.router_logits: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        mixed, self.router_logits = self.moe(x)
        blend = torch.softmax(self.coefficient(x), dim=-1)
        stacked = torch.stack((mixed, self.dense(x)), dim=-1)
        return (stacked @ blend.unsqueeze(-1)).squeeze(-1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """Write a random checkpoint of the variant and three recorded cases into one folder."""

    def write(variant: Variant) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        model = build_reference(variant)
        cases = {name: record_case(model, inputs) for name, inputs in inputs_of_cases(variant).items()}
        ends: list[int] = []
        if variant.ends:
            ends = [int(cases["batch"]["generated"][0, 2]), int(cases["batch"]["generated"][1, 4])]
            cases = {name: record_case(model, inputs, ends) for name, inputs in inputs_of_cases(variant).items()}
            assert int((cases["batch"]["generated"] == 0).sum()) > 0, "no row ended before the other"
        for name, tensors in cases.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
        write_checkpoint(model, variant, folder, ends)
        return folder

    return write


def build_reference(variant: Variant) -> Any:
    """transformers' Qwen2-VL or Qwen2.5-VL with random weights large enough that every part matters."""
    torch.manual_seed(variant.seed)
    config_type: Any = Qwen2_5_VLConfig if variant.window else Qwen2VLConfig
    model_type: Any = Qwen2_5_VLForConditionalGeneration if variant.window else Qwen2VLForConditionalGeneration
    config = config_type(
        text_config={
            "vocab_size": 200,
            "hidden_size": variant.hidden,
            "intermediate_size": variant.intermediate,
            "num_hidden_layers": variant.layers,
            "num_attention_heads": variant.heads,
            "num_key_value_heads": variant.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"type": "mrope", "mrope_section": list(variant.sections)},
            "tie_word_embeddings": variant.tied,
            "pad_token_id": 0,
        },
        vision_config=windowed_tower(variant) if variant.window else plain_tower(variant),
        tie_word_embeddings=variant.tied,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    config._attn_implementation = "eager"
    model: Any = model_type(config)
    if variant.experts:
        for layer in model.model.language_model.layers:
            layer.mlp = TwoPaths(layer.mlp, variant)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
            else:
                parameter.normal_(0.0, 1.5 / parameter[0].numel() ** 0.5)
    return model.eval()


def plain_tower(variant: Variant) -> dict[str, Any]:
    """vision_config of a Qwen2-VL."""
    return {
        "depth": variant.vision_depth,
        "embed_dim": variant.vision_dim,
        "hidden_size": variant.hidden,
        "num_heads": variant.vision_heads,
    }


def windowed_tower(variant: Variant) -> dict[str, Any]:
    """vision_config of a Qwen2.5-VL."""
    return {
        "depth": variant.vision_depth,
        "hidden_size": variant.vision_dim,
        "out_hidden_size": variant.hidden,
        "intermediate_size": 5 * variant.vision_dim // 4 + 2,
        "num_heads": variant.vision_heads,
        "window_size": variant.window,
        "fullatt_block_indexes": list(variant.full_blocks),
    }


def inputs_of_cases(variant: Variant) -> dict[str, dict[str, Tensor]]:
    """A text, images of different size in one sequence, and a left-padded batch whose last row has no image."""
    generator = torch.Generator().manual_seed(variant.seed + 1)

    def text(count: int) -> list[int]:
        return torch.randint(1, TEXT_TOKENS, (count,), generator=generator).tolist()

    def image(rows: int, columns: int) -> list[int]:
        return [START, *[IMAGE] * (rows * columns // 4), END]

    def inputs(sequences: list[list[int]], grids: list[list[int]]) -> dict[str, Tensor]:
        width = max(len(sequence) for sequence in sequences)
        ids = [[0] * (width - len(sequence)) + sequence for sequence in sequences]
        mask = [[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences]
        tensors = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        if grids:
            patches = sum(t * h * w for t, h, w in grids)
            tensors["pixel_values"] = torch.randn(patches, 1176, generator=generator)
            tensors["image_grid_thw"] = torch.tensor(grids)
        return tensors

    pictured = text(2)
    for index, (rows, columns) in enumerate(variant.grids):
        pictured += image(rows, columns) + text(5 if index == len(variant.grids) - 1 else 1)
    return {
        "text": inputs([text(9)], []),
        "images": inputs([pictured], [[1, rows, columns] for rows, columns in variant.grids]),
        "batch": inputs([text(3) + image(4, 4) + text(6), image(2, 6) + text(4), text(7)], [[1, 4, 4], [1, 2, 6]]),
    }


@torch.inference_mode()
def record_case(model: Any, inputs: dict[str, Tensor], ends: list[int] | None = None) -> dict[str, Tensor]:
    """What the reference makes of one input, in the layout of the recorded vectors."""
    grids = inputs.get("image_grid_thw")
    output = model(**inputs, output_hidden_states=True)
    # transformers mistakes a dense list of end tokens for absent when empty, so it is only passed when there is one
    stop = {"eos_token_id": ends} if ends else {}
    generated = model.generate(**inputs, max_new_tokens=7, do_sample=False, pad_token_id=0, **stop)
    tensors = dict(inputs)
    mask = inputs["attention_mask"]
    tensors["position_ids"] = model.model.get_rope_index(inputs["input_ids"], grids, attention_mask=mask)[0]
    tensors["logits"] = output.logits
    tensors["generated"] = generated[:, inputs["input_ids"].shape[1] :]
    tensors |= {f"hidden.{index}": hidden for index, hidden in enumerate(output.hidden_states)}
    model(**inputs)  # generation has overwritten the router logits
    for index, layer in enumerate(model.model.language_model.layers):
        if isinstance(layer.mlp, TwoPaths):
            assert layer.mlp.router_logits is not None
            tensors[f"router.{index}"] = layer.mlp.router_logits
    if grids is not None:
        tensors["image_embeds"] = model.model.visual(inputs["pixel_values"], grid_thw=grids)
    return {key: value.clone() for key, value in tensors.items()}


def write_checkpoint(model: Any, variant: Variant, folder: Path, ends: list[int]) -> None:
    """The reference's weights under the released names, with a flat config.json, in one file or several."""
    tree: dict[str, Any] = {
        **model.config.text_config.to_dict(),
        **model.config.to_dict(),
        "architectures": [type(model).__name__],
        "eos_token_id": ends or None,
        "pad_token_id": 0,
        "rope_scaling": {"type": "mrope", "mrope_section": list(variant.sections)},
    }
    del tree["text_config"]
    if variant.experts:
        tree |= {
            "architectures": ["Qwen2VLMOEForConditionalGeneration"],
            "num_experts": variant.experts,
            "num_experts_per_tok": variant.top_k,
            "norm_topk_prob": variant.normalised,
            "moe_intermediate_size": variant.expert_size,
            "shared_expert_intermediate_size": variant.shared_size,
        }
    (folder / "config.json").write_bytes(msgspec.json.encode(tree))
    weights = {}
    for key, tensor in model.state_dict().items():
        name = re.sub(r"^model\.(language_model\.)?(visual\.)?", lambda found: found[2] or "model.", key)
        name = (
            name.replace(".mlp.dense.", ".mlp.")
            .replace(".mlp.moe.", ".moe.")
            .replace(".mlp.coefficient", ".coefficient")
        )
        if not (variant.tied and name == "lm_head.weight"):
            weights[name] = tensor.clone()
    if variant.shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = {
        key: f"model-{1 + index % variant.shards:05}-of-{variant.shards:05}.safetensors"
        for index, key in enumerate(weights)
    }
    for name in set(files.values()):
        save_file({key: weights[key] for key in weights if files[key] == name}, folder / name)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_bytes(msgspec.json.encode(index))


@pytest.fixture
def variant_type() -> type[Variant]:
    """The class of variants, for tests, which cannot import from here."""
    return Variant
