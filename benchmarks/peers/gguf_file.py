"""A dense Qwen2 decoder with random weights as a GGUF file, every matrix Q8_0."""

from __future__ import annotations

from pathlib import Path

import gguf  # type: ignore[import-not-found,unused-ignore]  # only the peer's environment has it
import numpy as np
import numpy.typing as npt

from benchmarks.shape import DenseShape

BLOCK = 32  # weights that share a float16 scale in Q8_0
UNIFORM_STD = 254 / 12**0.5  # of integers drawn evenly from -127 to 127
CONTEXT, ROPE_BASE, EPSILON = 1024, 1e6, 1e-6


def write_gguf(shape: DenseShape, path: Path, seed: int = 0) -> None:
    """Write the model; matrices have a standard deviation of 1 / √inputs, norms are one and biases zero."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_tokenizer_model("none")  # tokens go in and come out as ids

    def matrix(name: str, outputs: int, inputs: int) -> None:
        blocks = random_q8_0(rng, outputs, inputs)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def vector(name: str, size: int, value: float) -> None:
        writer.add_tensor(name, np.full(size, value, np.float32))

    matrix("token_embd", shape.vocab, shape.hidden)
    matrix("output", shape.vocab, shape.hidden)
    vector("output_norm.weight", shape.hidden, 1.0)
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    names |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    for layer in range(shape.layers):
        for product, (outputs, inputs) in shape.products.items():
            matrix(f"blk.{layer}.{names[product]}", outputs, inputs)
        for product in "qkv":
            vector(f"blk.{layer}.attn_{product}.bias", shape.products[product][0], 0.0)
        vector(f"blk.{layer}.attn_norm.weight", shape.hidden, 1.0)
        vector(f"blk.{layer}.ffn_norm.weight", shape.hidden, 1.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_q8_0(rng: np.random.Generator, outputs: int, inputs: int) -> npt.NDArray[np.uint8]:
    """Random blocks [outputs, inputs / 32 * 34]: a float16 scale, then 32 int8 weights."""
    blocks = np.empty((outputs, inputs // BLOCK, 2 + BLOCK), np.uint8)
    scale = np.full(1, 1 / (UNIFORM_STD * inputs**0.5), np.float16)
    blocks[..., :2] = scale.view(np.uint8)
    blocks[..., 2:] = rng.integers(-127, 128, (outputs, inputs // BLOCK, BLOCK), np.int8).view(np.uint8)
    return blocks.reshape(outputs, -1)
