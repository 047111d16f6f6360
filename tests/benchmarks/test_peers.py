"""The models that peers are given compute what Qwen2 computes, beside transformers' own; PyTorch's mixture is exact."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
import transformers
from onnx import numpy_helper

ROOT = Path(__file__).parent.parent.parent
QWEN2: Any = transformers  # its classes carry no annotations
SIZES = {"vocab": 320, "hidden": 128, "intermediate": 192, "layers": 2, "heads": 4, "kv_heads": 2}


def reference(weights: dict[str, npt.NDArray[np.float32]]) -> Any:
    """transformers' Qwen2 with the given weights; norms are one and biases zero."""
    config = QWEN2.Qwen2Config(
        vocab_size=SIZES["vocab"],
        hidden_size=SIZES["hidden"],
        intermediate_size=SIZES["intermediate"],
        num_hidden_layers=SIZES["layers"],
        num_attention_heads=SIZES["heads"],
        num_key_value_heads=SIZES["kv_heads"],
        rope_theta=1e6,
        rms_norm_eps=1e-6,
    )
    model = QWEN2.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.tensor(weights[name]))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def error(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_the_graph_for_onnxruntime_genai_is_qwen2(tmp_path: Path) -> None:
    """Prefill, then one token on the cache that it left."""
    from benchmarks.peers.genai_folder import MODEL, write_folder
    from benchmarks.shape import DenseShape

    write_folder(DenseShape(**SIZES), tmp_path, threads=1)
    stored = {i.name: numpy_helper.to_array(i, str(tmp_path)) for i in onnx.load(tmp_path / MODEL).graph.initializer}

    def dequantized(name: str, inputs: int) -> npt.NDArray[np.float32]:
        scales = stored[f"{name}.scales"].reshape(*stored[f"{name}.weight"].shape[:2], 1)
        blocks = (stored[f"{name}.weight"].astype(np.float32) - 128) * scales
        matrix: npt.NDArray[np.float32] = blocks.reshape(len(blocks), -1)[:, :inputs]
        return matrix

    weights = {"model.embed_tokens.weight": stored["embed"], "lm_head.weight": dequantized("logits", 128)}
    for layer in range(2):
        q, k, v = np.split(dequantized(f"qkv.{layer}", 128), [128, 192])
        prefix = f"model.layers.{layer}."
        weights |= {f"{prefix}self_attn.{name}_proj.weight": part for name, part in {"q": q, "k": k, "v": v}.items()}
        weights[f"{prefix}self_attn.o_proj.weight"] = dequantized(f"o.{layer}", 128)
        for name, inputs in {"gate": 128, "up": 128, "down": 192}.items():
            weights[f"{prefix}mlp.{name}_proj.weight"] = dequantized(f"{name}.{layer}", inputs)
    ids = np.array([[5, 300, 17, 42, 256, 8]])
    with torch.no_grad():
        expected = reference(weights)(torch.from_numpy(ids)).logits.numpy()
    session = onnxruntime.InferenceSession(tmp_path / MODEL, providers=["CPUExecutionProvider"])
    empty = np.zeros((1, 2, 0, 32), np.float32)
    past = {i.name: empty for i in session.get_inputs() if i.name.startswith("past_")}
    names = [output.name for output in session.get_outputs()]
    feed = {"input_ids": ids[:, :5], "attention_mask": ids[:, :5] * 0 + 1} | past
    first = dict(zip(names, session.run(None, feed), strict=True))
    past = {name: first[name.replace("past_key_values", "present")] for name in past}
    (second, *_) = session.run(None, {"input_ids": ids[:, 5:], "attention_mask": ids * 0 + 1} | past)
    errors = error(first["logits"][0, 0], expected[0, 4]), error(second[0, 0], expected[0, 5])
    print(f"relative error of the logits: {errors}")
    assert max(errors) < 0.03  # accuracy_level 4 rounds activations to int8


def test_the_file_for_llama_cpp_is_qwen2(tmp_path: Path) -> None:
    """llama.cpp itself, in its environment, gives the logits of the dequantized weights."""
    python = ROOT / "build" / "peers" / "llama_cpp" / "bin" / "python"
    if not (python.parent.parent / ".installed").exists():
        pytest.skip("waits for the environment that `python -m benchmarks.peers.llama_cpp` makes")
    code = f"""
import ctypes, pathlib, sys
import gguf, llama_cpp, numpy as np
from benchmarks.peers.gguf_file import write_gguf
from benchmarks.shape import DenseShape
folder = pathlib.Path({str(tmp_path)!r})
write_gguf(DenseShape(**{SIZES!r}), folder / "tiny.gguf")
tensors = gguf.GGUFReader(folder / "tiny.gguf").tensors
np.savez(folder / "weights.npz", **{{t.name: gguf.dequantize(t.data, t.tensor_type) for t in tensors}})
llama = llama_cpp.Llama(str(folder / "tiny.gguf"), n_ctx=64, logits_all=True, n_threads=1, verbose=False)
llama.eval([5, 300, 17, 42, 256, 8])
np.save(folder / "logits.npy", llama.scores[:6])
"""
    subprocess.run([python, "-c", code], cwd=ROOT, check=True, timeout=120)
    stored = np.load(tmp_path / "weights.npz")
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
    names |= {"ffn_down": "mlp.down_proj"}
    weights = {"model.embed_tokens.weight": stored["token_embd.weight"], "lm_head.weight": stored["output.weight"]}
    for layer in range(2):
        for theirs, ours in names.items():
            weights[f"model.layers.{layer}.{ours}.weight"] = stored[f"blk.{layer}.{theirs}.weight"]
    with torch.no_grad():
        expected = reference(weights)(torch.tensor([[5, 300, 17, 42, 256, 8]])).logits[0].numpy()
    found = error(np.load(tmp_path / "logits.npy"), expected)
    print(f"relative error of the logits: {found}")
    assert found < 0.03


def test_pytorch_computes_only_chosen_experts_and_the_same_logits(tiny_checkpoint: Path) -> None:
    from benchmarks.peers.torch_eager import random_model, with_routed_experts

    config = str(tiny_checkpoint / "config.json")
    ids, positions = torch.arange(12)[None], torch.arange(12).expand(3, 1, -1)
    with torch.no_grad():
        expected = random_model(config, torch.float32)(ids, positions).logits
        found = with_routed_experts(random_model(config, torch.float32))(ids, positions).logits
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_contender_alone_ends_with_a_json_line(tiny_checkpoint: Path) -> None:
    """The whole way of a peer: its process, the tasks through the pipe, the report."""
    command = [sys.executable, "-m", "benchmarks.peers.torch_eager", "--config", str(tiny_checkpoint / "config.json")]
    done = subprocess.run(
        [*command, "--rounds", "2", "--threads", "1"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    report = msgspec.json.decode(done.stdout.splitlines()[-1])
    assert report["benchmark"] == "PyTorch"
    assert report["threads"] == 1
    for rates in (report["decode_tokens_s"], report["prefill_tokens_s"]):
        assert 0 < rates["least"] <= rates["median"] <= rates["largest"]
