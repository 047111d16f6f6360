"""What an EchoVLM, Qwen2-VL or Qwen2.5-VL checkpoint is: its sizes, as frozen structs with the names of config.json."""

from typing import Annotated

import msgspec

from sonoedge.errors import SonoEdgeError

Count = Annotated[int, msgspec.Meta(gt=0)]
TokenId = Annotated[int, msgspec.Meta(ge=0)]
BlockIndex = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]

ECHOVLM = "Qwen2VLMOEForConditionalGeneration"
QWEN2_VL = "Qwen2VLForConditionalGeneration"
QWEN2_5_VL = "Qwen2_5_VLForConditionalGeneration"
DEFAULT_EXPERTS = 4  # the released config class hard-codes it, so a config.json may leave the number out


class WindowConfig(msgspec.Struct, frozen=True):
    """What Qwen2.5-VL's tower has beyond Qwen2-VL's; defaults are those of transformers' Qwen2_5_VLVisionConfig."""

    intermediate_size: Count = 3420  # of the gated feed-forwards
    window_size: Count = 112  # pixels of a window's side
    fullatt_block_indexes: tuple[BlockIndex, ...] = (7, 15, 23, 31)  # blocks that attend the whole picture
    tokens_per_second: Positive = 4  # of video, which is not read here; what is written still says it


class VisionConfig(msgspec.Struct, frozen=True):
    """Sizes of the vision tower; defaults are those of transformers' Qwen2VLVisionConfig.

    `windows` is None for Qwen2-VL's tower. Qwen2.5-VL's config.json calls embed_dim and hidden_size otherwise:
    hidden_size and out_hidden_size.
    """

    depth: Count = 32
    embed_dim: Count = 1280
    hidden_size: Count = 3584  # width of the merged image tokens, equal to the decoder's
    num_heads: Count = 16
    mlp_ratio: Positive = 4.0
    in_channels: Count = 3
    patch_size: Count = 14
    temporal_patch_size: Count = 2
    spatial_merge_size: Count = 2
    windows: WindowConfig | None = None

    @property
    def patch_values(self) -> int:
        """Values in one flattened patch (channel, time, row, column)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def mlp_size(self) -> int:
        return int(self.embed_dim * self.mlp_ratio) if self.windows is None else self.windows.intermediate_size

    @property
    def window_patches(self) -> int:
        """Patches of a window's side, whole merge blocks; 0 where nothing is attended in windows."""
        if self.windows is None:
            return 0
        merge = self.spatial_merge_size
        return self.windows.window_size // merge // self.patch_size * merge

    def attends_fully(self, block: int) -> bool:
        """Whether the patches of a picture attend all of it in this block, not only their window."""
        return self.windows is None or block in self.windows.fullatt_block_indexes


class MoEConfig(msgspec.Struct, frozen=True):
    """Sizes of the mixture of experts that EchoVLM adds to every decoder layer."""

    num_experts_per_tok: Count
    moe_intermediate_size: Count
    shared_expert_intermediate_size: Count
    num_experts: Count = DEFAULT_EXPERTS
    norm_topk_prob: bool = False


class ModelConfig(msgspec.Struct, frozen=True):
    """Everything that fixes the computation of a checkpoint; `moe` is None for dense Qwen2-VL and Qwen2.5-VL."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    rms_norm_eps: Positive
    rope_theta: Positive
    mrope_section: tuple[Count, Count, Count]
    image_token_id: TokenId
    video_token_id: TokenId
    vision_start_token_id: TokenId
    vision_end_token_id: TokenId
    vision: VisionConfig = msgspec.field(name="vision_config")
    moe: MoEConfig | None = None
    max_position_embeddings: Count = 32768
    tie_word_embeddings: bool = False
    bos_token_id: TokenId | None = None
    pad_token_id: TokenId | None = None
    eos_token_ids: tuple[TokenId, ...] = ()

    @property
    def architecture(self) -> str:
        """The class name that the checkpoint's config.json carries."""
        if self.vision.windows is not None:
            return QWEN2_5_VL
        return QWEN2_VL if self.moe is None else ECHOVLM

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def check(self) -> None:
        """Raise SonoEdgeError when sizes contradict each other."""
        windowed = self.vision.windows is not None
        inner, outer = ("hidden_size", "out_hidden_size") if windowed else ("embed_dim", "hidden_size")
        _divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
        _divides("num_key_value_heads", self.num_key_value_heads, "num_attention_heads", self.num_attention_heads)
        _divides("vision_config.num_heads", self.vision.num_heads, f"vision_config.{inner}", self.vision.embed_dim)
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise SonoEdgeError(
                f"mrope_section {list(self.mrope_section)} adds up to {sum(self.mrope_section)}; "
                f"make it half of the head size, {self.head_dim / 2:g}."
            )
        if self.vision.head_dim % 4:
            raise SonoEdgeError(
                f"vision_config gives heads of {self.vision.head_dim} values; rows and columns are rotated in pairs, "
                f"so make {inner} / num_heads a multiple of 4."
            )
        if self.vision.hidden_size != self.hidden_size:
            raise SonoEdgeError(
                f"vision_config.{outer} {self.vision.hidden_size} must equal hidden_size {self.hidden_size}, "
                "since image tokens stand among text tokens."
            )
        if self.vision.windows is not None and self.vision.window_patches == 0:
            smallest = self.vision.patch_size * self.vision.spatial_merge_size
            raise SonoEdgeError(
                f"vision_config.window_size {self.vision.windows.window_size} holds no merged patch; "
                f"make it at least {smallest}."
            )
        if self.vision.windows is not None and self.moe is not None:
            raise SonoEdgeError(
                "vision_config.window_size stands beside num_experts; only a dense decoder has windows in its vision "
                "tower, so remove one of them."
            )
        if self.moe is not None and self.moe.num_experts_per_tok > self.moe.num_experts:
            raise SonoEdgeError(
                f"num_experts_per_tok {self.moe.num_experts_per_tok} exceeds num_experts {self.moe.num_experts}; "
                "choose at most as many experts as there are."
            )


def _divides(small_name: str, small: int, large_name: str, large: int) -> None:
    if large % small:
        raise SonoEdgeError(f"{small_name} {small} does not divide {large_name} {large}; choose a divisor.")
