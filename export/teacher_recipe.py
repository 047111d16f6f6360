"""The recipe that the demo teacher is trained by: TOML, checked when loaded."""

from __future__ import annotations

from pathlib import Path

import msgspec

from sonoedge.export.demo_tokenizer import SPECIAL_TOKENS
from sonoedge.export.models.config import ModelConfig, MoEConfig, VisionConfig
from sonoedge.export.recipe import Count, Least, Seed, read_toml
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer

ROPE_THETA = 1_000_000.0


class TeacherShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the model."""

    hidden_size: Count
    layers: Count
    heads: Count
    kv_heads: Count
    intermediate_size: Count
    experts: Count
    experts_per_token: Count
    expert_size: Count
    shared_expert_size: Count
    vision_width: Count
    vision_depth: Count
    vision_heads: Count
    context: Count
    image_pixels: Count


class Phase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One phase of training."""

    steps: Count
    batch: Count
    learning_rate: float
    warmup_steps: Least
    layer_drop: float
    dense_weight: float = 1.0
    balance_weight: float = 0.0


class TeacherRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that fixes the demo teacher, seeds included."""

    version: int
    seed: Seed
    first_frame_seed: Seed
    frames: Count
    vocabulary: Count
    model: TeacherShape
    vision: Phase
    joint: Phase

    def image_spec(self) -> ImageSpec:
        """How the teacher wants its pictures."""
        return ImageSpec(max_pixels=self.model.image_pixels)

    def model_config(self, vocabulary: int, tokenizer: Tokenizer) -> ModelConfig:
        """The released-format configuration of the teacher."""
        shape = self.model
        half = shape.hidden_size // shape.heads // 2
        rows = (half - half // 4) // 2
        config = ModelConfig(
            vocab_size=vocabulary,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            rms_norm_eps=1e-6,
            rope_theta=ROPE_THETA,
            mrope_section=(half - 2 * rows, rows, rows),
            image_token_id=tokenizer.image_pad,
            video_token_id=SPECIAL_TOKENS.index("<|video_pad|>"),
            vision_start_token_id=tokenizer.vision_start,
            vision_end_token_id=tokenizer.vision_end,
            vision=VisionConfig(
                depth=shape.vision_depth,
                embed_dim=shape.vision_width,
                hidden_size=shape.hidden_size,
                num_heads=shape.vision_heads,
            ),
            moe=MoEConfig(
                num_experts_per_tok=shape.experts_per_token,
                moe_intermediate_size=shape.expert_size,
                shared_expert_intermediate_size=shape.shared_expert_size,
                num_experts=shape.experts,
            ),
            max_position_embeddings=shape.context,
            pad_token_id=tokenizer.eos,
            eos_token_ids=tokenizer.stop_ids,
        )
        config.check()
        return config


def load_teacher_recipe(path: Path) -> TeacherRecipe:
    """Read and check a recipe; raises SonoEdgeError naming the file and the key."""
    return read_toml(path, TeacherRecipe)
