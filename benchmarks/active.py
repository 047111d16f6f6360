"""What a token of an EchoVLM must touch, and the dense model that touches as much."""

from benchmarks.shape import DenseShape
from sonoedge.export.models.config import ModelConfig

FLOAT_BYTES = 4


def dense_twin(config: ModelConfig) -> DenseShape:
    """A dense decoder whose token is multiplied with as many weights as one of `config` with its chosen experts.

    The feed-forward takes the width of the dense path, the shared expert and the chosen experts together.
    """
    width = config.intermediate_size
    if config.moe is not None:
        width += config.moe.shared_expert_intermediate_size
        width += config.moe.num_experts_per_tok * config.moe.moe_intermediate_size
    return DenseShape(
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=width,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
    )


def touched_bytes(config: ModelConfig, length: int) -> int:
    """Bytes that one token must read after `length` others: INT8 weights of the dense path and of the chosen experts.

    One byte a weight and a float32 scale an output channel; routers, gates, norms, biases, the embedding row and the KV
    cache in float32. A format with more scales reads more than is counted here.
    """
    twin = dense_twin(config)
    channels = sum(outputs for outputs, _ in twin.products.values())
    floats = 2 * twin.hidden + twin.hidden + 2 * twin.kv_size  # two norms; biases of q, k and v
    if config.moe is not None:
        # The shared and each chosen expert end in a down projection of their own.
        channels += (1 + config.moe.num_experts_per_tok) * twin.hidden
        floats += (config.moe.num_experts + 1 + 2) * twin.hidden + 2  # router, shared expert's gate, coefficient
    cache = 2 * twin.kv_size * length
    layers = twin.layers * (channels + floats + cache)
    ends = twin.vocab + 2 * twin.hidden  # the head's scales; the final norm and the embedding row
    return twin.weights_a_token + FLOAT_BYTES * (layers + ends)
