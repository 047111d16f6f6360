"""What a token must touch, counted beside the tensors of the model itself."""

from typing import Any

import msgspec
import pytest
import transformers

from sonoedge.export.make_checkpoint import named_config
from sonoedge.export.models.loading import empty_model


def test_touched_bytes_are_the_models_own() -> None:
    """Counted from the parameters' names and shapes, without the experts that are not chosen."""
    from benchmarks.active import touched_bytes

    config = named_config("echovlm-500m")
    assert config.moe is not None
    idle = tuple(f".experts.{index}." for index in range(config.moe.num_experts_per_tok, config.moe.num_experts))
    expected = config.hidden_size * 4  # the embedding row
    for name, parameter in empty_model(config).named_parameters():
        if name.startswith("visual.") or "embed_tokens" in name or any(part in name for part in idle):
            continue
        quantized = parameter.dim() == 2 and not name.endswith(
            ("moe.gate.weight", "shared_expert_gate.weight", "coefficient.weight")
        )
        expected += parameter.numel() + 4 * parameter.shape[0] if quantized else 4 * parameter.numel()
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert touched_bytes(config, 0) == expected
    assert touched_bytes(config, 100) == expected + 100 * cache


def test_the_dense_twin_touches_as_many_weights() -> None:
    """The twin's matrices are those of transformers' Qwen2, and as many as the chosen ones of the mixture."""
    from benchmarks.active import dense_twin

    config = named_config("echovlm-500m")
    assert config.moe is not None
    smaller = msgspec.structs.replace(config, num_hidden_layers=2, vocab_size=256)
    twin = dense_twin(smaller)
    qwen2: Any = transformers  # its classes carry no annotations
    theirs = qwen2.Qwen2ForCausalLM(
        qwen2.Qwen2Config(
            vocab_size=twin.vocab,
            hidden_size=twin.hidden,
            intermediate_size=twin.intermediate,
            num_hidden_layers=twin.layers,
            num_attention_heads=twin.heads,
            num_key_value_heads=twin.kv_heads,
        )
    )
    matrices = [p.numel() for n, p in theirs.named_parameters() if p.dim() == 2 and "embed" not in n]
    assert sum(matrices) == twin.weights_a_token
    unchosen = (config.moe.num_experts - config.moe.num_experts_per_tok) * 3 * config.moe.moe_intermediate_size
    gates = (config.moe.num_experts + 1 + 2) * config.hidden_size
    own = [
        p.numel()
        for n, p in empty_model(smaller).named_parameters()
        if p.dim() == 2 and not n.startswith("visual.") and "embed" not in n
    ]
    assert sum(own) - 2 * (unchosen * config.hidden_size + gates) == pytest.approx(twin.weights_a_token, abs=0)
