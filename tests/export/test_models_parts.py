"""Attention, experts, positions and the vision tower against other implementations of the same mathematics."""

# mypy: allow-untyped-calls

import pytest
import torch
from torch.nn import functional
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.attention import attention, causal_visible, padded_bias, visible_bias
from sonoedge.export.models.config import ModelConfig, MoEConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.layers import RMSNorm
from sonoedge.export.models.moe import SparseMoE
from sonoedge.export.models.rope import batch_positions

pytestmark = pytest.mark.usefixtures("one_thread")
BOUND = 2e-6


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (5, 1), (3, 3), (8, 4)])
@pytest.mark.parametrize("normalised", [False, True])
def test_experts_agree_with_sparse_routing(experts: int, top_k: int, normalised: bool) -> None:
    torch.manual_seed(experts)
    settings = {"num_experts_per_tok": top_k, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
    theirs = Qwen2MoeSparseMoeBlock(
        Qwen2MoeConfig(hidden_size=16, num_experts=experts, norm_topk_prob=normalised, **settings)
    )
    ours = SparseMoE(16, MoEConfig(**settings, num_experts=experts, norm_topk_prob=normalised))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 16)
    (mixed, logits), (wanted, wanted_logits) = ours(x), theirs(x)
    assert (mixed - wanted).abs().max() < BOUND
    assert (logits.flatten(0, 1) - wanted_logits).abs().max() < BOUND
    target = torch.randn_like(x)
    (mixed * target).sum().backward()
    (wanted * target).sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        found, expected = parameter.grad, gradients[name].grad
        assert found is not None
        # an expert that no token chose has no gradient there, and zero here
        assert (found - (0 if expected is None else expected)).abs().max() < 2e-5


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_attention_agrees_with_torch(heads: int, kv_heads: int) -> None:
    torch.manual_seed(heads)
    q, k, v = torch.randn(2, heads, 5, 8), torch.randn(2, kv_heads, 9, 8), torch.randn(2, kv_heads, 9, 8)
    visible = torch.rand(2, 1, 5, 9) > 0.4
    visible[..., 0] = True
    wanted = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    assert (attention(q, k, v, visible_bias(visible, q.dtype)) - wanted).abs().max() < BOUND
    wanted = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert (attention(q, k, v, None) - wanted).abs().max() < BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_that_sees_nothing_stays_finite(dtype: torch.dtype) -> None:
    bias = visible_bias(torch.zeros(1, 1, 2, 3, dtype=torch.bool), dtype)
    q, k, v = (torch.full((1, 1, rows, 4), -9.0, dtype=dtype) for rows in (2, 3, 3))
    assert bool(attention(q, k, v, bias).isfinite().all())


def test_padded_bias_hides_padding_and_the_future() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    bias = padded_bias(mask, 2, torch.float32)
    visible = bias[:, 0] == 0
    assert visible[0].tolist() == [[False, False, True, False], [False, False, True, True]]
    assert visible[1].tolist() == [[True, True, True, False], [True, True, True, True]]


def test_norm_in_bfloat16_scales_after_rounding() -> None:
    norm = RMSNorm(8, 1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.1, 3, 8))
    x = torch.randn(4, 8).bfloat16()
    wide = x.float()
    rounded = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert torch.equal(norm.bfloat16()(x), norm.weight * rounded)


def test_packed_sequences_with_a_block_mask_equal_separate_ones(small_model: EchoVLM) -> None:
    torch.manual_seed(0)
    parts = [torch.randint(0, 80, (1, length)) for length in (5, 3, 6)]
    places = [torch.arange(part.shape[1]).expand(3, 1, -1) for part in parts]
    owner = torch.cat([torch.full((part.shape[1],), index) for index, part in enumerate(parts)])
    visible = (owner[:, None] == owner[None, :]) & causal_visible(14, 14, owner.device)
    with torch.inference_mode():
        bias = visible_bias(visible, torch.float32)
        packed = small_model(torch.cat(parts, 1), torch.cat(places, 2), attention_bias=bias).logits
        alone = torch.cat([small_model(part, place).logits for part, place in zip(parts, places, strict=True)], 1)
    assert (packed - alone).abs().max() < 1e-5


def test_picked_rows_equal_those_of_all_logits(small_model: EchoVLM) -> None:
    ids, positions = torch.randint(0, 80, (2, 6)), torch.arange(6).expand(3, 2, -1)
    mask = torch.rand(2, 6) > 0.5
    with torch.inference_mode():
        every = small_model(ids, positions, collect_hidden=True, collect_router=True)
        rows = small_model(ids, positions, logits_rows=torch.tensor([5, 1]))
        picked = small_model(ids, positions, logits_rows=mask)
    assert torch.allclose(rows.logits, every.logits[:, [5, 1]], atol=1e-6)
    assert torch.allclose(picked.logits, every.logits[mask], atol=1e-6)
    assert (rows.hidden_states, rows.router_logits) == (None, None)
    assert every.hidden_states is not None
    assert every.router_logits is not None
    assert [tuple(state.shape) for state in every.hidden_states] == [(2, 6, 48)] * 3
    assert [tuple(logits.shape) for logits in every.router_logits] == [(2, 6, 5)] * 2


def test_images_of_one_size_equal_images_alone(small_model: EchoVLM) -> None:
    torch.manual_seed(1)
    grids = [(1, 4, 6), (2, 4, 6), (1, 2, 4)]
    patches = torch.randn(24 * 3 + 8, 1176)
    with torch.inference_mode():
        mixed = small_model.encode_images(patches, grids)
        same = small_model.encode_images(patches[:72], grids[:2])
        alone = [small_model.encode_images(part, [(1, 4, 6)]) for part in patches[:72].split(24)]
    assert mixed.shape == (20, 48)
    assert (mixed[:18] - same).abs().max() < 1e-5
    assert (torch.cat(alone) - same).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("patches", "grids", "words"),
    [(23, [(1, 4, 6)], "23 patches do not fill"), (15, [(1, 3, 5)], "do not split into blocks of 2 x 2")],
)
def test_patches_that_do_not_fit_are_refused(
    small_model: EchoVLM, patches: int, grids: list[tuple[int, int, int]], words: str
) -> None:
    with pytest.raises(SonoEdgeError, match=words):
        small_model.encode_images(torch.zeros(patches, 1176), grids)


def test_image_tokens_without_a_place_are_refused(small_model: EchoVLM) -> None:
    with pytest.raises(SonoEdgeError, match="holds 1 image tokens but the images give 2"):
        small_model.embed(torch.tensor([[4, 89, 5]]), torch.zeros(2, 48))


@pytest.mark.parametrize(
    ("ids", "grids", "words"),
    [
        ([87, 89, 86], [], "more images than grids"),
        ([4, 5, 6], [(1, 2, 2)], "1 of them have no place"),
        ([87, 89, 89], [(1, 4, 4)], "an image of 4 tokens starts at token 1 of 3"),
    ],
)
def test_text_and_grids_must_match(
    small_config: ModelConfig, ids: list[int], grids: list[tuple[int, int, int]], words: str
) -> None:
    tokens = torch.tensor([ids])
    with pytest.raises(SonoEdgeError, match=words):
        batch_positions(tokens, torch.ones_like(tokens), grids, small_config)
