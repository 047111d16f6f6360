"""A dense Qwen2 decoder with random INT8 weights as a folder that onnxruntime-genai loads.

The graph has the operators that the library's own model builder emits for the CPU: packed QKV products,
GroupQueryAttention that rotates, MatMulNBits at 8 bits, logits of the last token alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.shape import DenseShape

BLOCK = 128  # weights that share a scale; as few scales as the operator reads fast
UNIFORM_STD = 256 / 12**0.5  # of bytes drawn evenly
ZERO_POINT = 128  # what MatMulNBits takes when it is given none
CONTEXT, ROPE_BASE, EPSILON = 512, 1e6, 1e-6
INLINE_BYTES = 1024
ALIGNMENT = 4096  # ONNX Runtime maps tensors that start on a page
MICROSOFT = "com.microsoft"
MODEL, DATA, CONFIG = "model.onnx", "model.onnx.data", "genai_config.json"


def write_folder(shape: DenseShape, folder: Path, threads: int, seed: int = 0) -> None:
    """Write the three files; matrices have a standard deviation of 1 / √inputs, norms are one and biases zero."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / DATA).open("wb") as data:
        model = _Builder(shape, data, np.random.default_rng(seed)).build()
    onnx.save(model, folder / MODEL)
    (folder / CONFIG).write_text(json.dumps(_config(shape, threads), indent=1))


class _Builder:
    """Appends weights to the data file and nodes to the graph as it goes through the layers."""

    def __init__(self, shape: DenseShape, data: BinaryIO, rng: np.random.Generator) -> None:
        self.shape, self.data, self.rng = shape, data, rng
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def build(self) -> onnx.ModelProto:
        shape = self.shape
        norm_std = 1 / shape.hidden**0.5
        table = self.rng.standard_normal((shape.vocab, shape.hidden), np.float32) * np.float32(norm_std)
        x = self.add("Gather", [self.weight("embed", table), "input_ids"], "embedded")
        held = self.add("ReduceSum", ["attention_mask", self.weight("axis", np.array([1]))], "held", keepdims=0)
        last = self.add("Sub", [held, self.weight("one", np.array([1]))], "last")
        last = self.add("Cast", [last], "seqlens_k", to=TensorProto.INT32)
        width = self.add("Shape", ["attention_mask"], "mask_shape", start=1, end=2)
        width = self.add("Squeeze", [width], "mask_width")
        total = self.add("Cast", [width], "total_sequence_length", to=TensorProto.INT32)
        self.rotary_tables()
        skip = x
        norm = self.weight("norm.0", np.ones(shape.hidden, np.float32))
        x = self.add("SimplifiedLayerNormalization", [x, norm], "normed.0", epsilon=EPSILON, axis=-1, stash_type=1)
        for layer in range(shape.layers):
            x, skip = self.layer(layer, x, skip, last, total)
        x = self.add("Gather", [x, self.weight("minus_one", np.array([-1]))], "last_hidden", axis=1)
        self.product("logits", x, shape.vocab, shape.hidden, output="logits")
        graph = helper.make_graph(self.nodes, "qwen2", self.inputs(), self.outputs(), initializer=self.weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def layer(self, layer: int, x: str, skip: str, last: str, total: str) -> tuple[str, str]:
        """One decoder layer: its normed input and the residual to those of the next."""
        shape, width = self.shape, self.shape.hidden + 2 * self.shape.kv_size
        qkv = self.product(f"qkv.{layer}", x, width, shape.hidden)
        qkv = self.add(
            "Add", [qkv, self.weight(f"qkv_bias.{layer}", np.zeros(width, np.float32))], f"qkv_biased.{layer}"
        )
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        node = helper.make_node(
            "GroupQueryAttention",
            [qkv, "", "", *past, last, total, "cos_cache", "sin_cache"],
            [f"attended.{layer}", *(f"present.{layer}.{part}" for part in ("key", "value"))],
            domain=MICROSOFT,
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
        )
        self.nodes.append(node)
        mixed = self.product(f"o.{layer}", f"attended.{layer}", shape.hidden, shape.hidden)
        x, skip = self.skip_norm(f"mlp.{layer}", mixed, skip)
        gate = self.product(f"gate.{layer}", x, shape.intermediate, shape.hidden)
        up = self.product(f"up.{layer}", x, shape.intermediate, shape.hidden)
        silu = self.add("Mul", [gate, self.add("Sigmoid", [gate], f"sigmoid.{layer}")], f"silu.{layer}")
        inner = self.add("Mul", [silu, up], f"inner.{layer}")
        down = self.product(f"down.{layer}", inner, shape.hidden, shape.intermediate)
        return self.skip_norm(f"layer.{layer}", down, skip)

    def skip_norm(self, name: str, x: str, skip: str) -> tuple[str, str]:
        """RMS norm of x + skip, and the sum."""
        weight = self.weight(f"{name}.norm", np.ones(self.shape.hidden, np.float32))
        outputs = [f"{name}.normed", "", "", f"{name}.sum"]
        self.nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization", [x, skip, weight], outputs, domain=MICROSOFT, epsilon=EPSILON
            )
        )
        return outputs[0], outputs[3]

    def product(self, name: str, x: str, outputs: int, inputs: int, output: str | None = None) -> str:
        """x · weightᵀ with random bytes for weights."""
        blocks = -(-inputs // BLOCK)
        weight = self.rng.integers(0, 256, (outputs, blocks, BLOCK), np.uint8)
        if (
            output == "logits"
        ):  # the end token has a logit of zero, so it is never the largest and every step is measured
            weight[-1] = ZERO_POINT
        scales = np.full(outputs * blocks, 1 / (UNIFORM_STD * inputs**0.5), np.float32)
        operands = [x, self.weight(f"{name}.weight", weight), self.weight(f"{name}.scales", scales)]
        sizes = {"K": inputs, "N": outputs, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
        return self.add("MatMulNBits", operands, output or f"{name}.product", domain=MICROSOFT, **sizes)

    def rotary_tables(self) -> None:
        half = self.shape.head_dim // 2
        frequency = ROPE_BASE ** -(np.arange(half) / half)
        angles = np.outer(np.arange(CONTEXT), frequency)  # [context, head_dim / 2]
        self.weight("cos_cache", np.cos(angles).astype(np.float32))
        self.weight("sin_cache", np.sin(angles).astype(np.float32))

    def add(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def weight(self, name: str, array: npt.NDArray[Any]) -> str:
        """An initializer; the bytes of all but small ones, which shape inference reads, go to the data file."""
        if array.nbytes < INLINE_BYTES:
            self.weights.append(numpy_helper.from_array(array, name))
            return name
        self.data.seek(-(-self.data.tell() // ALIGNMENT) * ALIGNMENT)
        tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        for key, value in (("location", DATA), ("offset", self.data.tell()), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.data.write(array.tobytes())
        self.weights.append(tensor)
        return name

    def inputs(self) -> list[onnx.ValueInfoProto]:
        ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "new"])
        mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"])
        return [ids, mask, *self.cache("past_key_values.{}.{}", "past")]

    def outputs(self) -> list[onnx.ValueInfoProto]:
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, self.shape.vocab])
        return [logits, *self.cache("present.{}.{}", "total")]

    def cache(self, pattern: str, length: str) -> list[onnx.ValueInfoProto]:
        dims: list[str | int | None] = ["batch", self.shape.kv_heads, length, self.shape.head_dim]
        names = [pattern.format(layer, part) for layer in range(self.shape.layers) for part in ("key", "value")]
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in names]


def _config(shape: DenseShape, threads: int) -> dict[str, Any]:
    caches = ("key", "value")
    decoder = {
        "session_options": {"intra_op_num_threads": threads, "log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL,
        "head_size": shape.head_dim,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask"}
        | {f"past_{part}_names": f"past_key_values.%d.{part}" for part in caches},
        "outputs": {"logits": "logits"} | {f"present_{part}_names": f"present.%d.{part}" for part in caches},
    }
    model = {
        "type": "qwen2",
        "vocab_size": shape.vocab,
        "context_length": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": shape.vocab - 1,
        "pad_token_id": 0,
        "decoder": decoder,
    }
    search = {"max_length": CONTEXT, "do_sample": False, "num_beams": 1, "past_present_share_buffer": True}
    return {"model": model, "search": search}
