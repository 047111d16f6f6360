"""Reading and writing config.json: the released flat layout, and the nested one that newer transformers write."""

from pathlib import Path
from typing import Any

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.config import ECHOVLM, QWEN2_5_VL, QWEN2_VL, ModelConfig, MoEConfig
from sonoedge.export.models.vision_json import ACTIVATION, WINDOWED_ACTIVATION, vision_fields, vision_tree

ARCHITECTURES = {"qwen2_vl": (ECHOVLM, QWEN2_VL), "qwen2_5_vl": (QWEN2_5_VL,)}  # by model_type


def read_config(path: Path) -> ModelConfig:
    """Read `config.json` of a checkpoint folder (or that file); SonoEdgeError when it describes another model."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise SonoEdgeError(f"{file} does not exist; give the folder of a checkpoint with config.json and safetensors.")
    try:
        tree = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SonoEdgeError(f"{file} is not a JSON object ({error}); copy the checkpoint again.") from error
    try:
        return parse_config(tree)
    except SonoEdgeError as error:
        raise SonoEdgeError(f"{file}: {error}") from error


def parse_config(tree: dict[str, Any]) -> ModelConfig:
    """Turn the decoded config.json into a ModelConfig; keys that do not change the computation are ignored."""
    top = _without_nulls(tree)
    text = _without_nulls(_object(top, "text_config"))
    vision = _without_nulls(_object(top, "vision_config"))
    # Newer transformers nest the decoder's keys (and even `architectures`) under text_config: theirs win.
    flat = top | text
    architecture = _architecture(top.get("model_type"), flat.get("architectures"))
    windowed = architecture == QWEN2_5_VL
    _refuse_variants(flat, vision, WINDOWED_ACTIVATION if windowed else ACTIVATION)
    rope = _object(flat, "rope_parameters") or _object(flat, "rope_scaling")
    _refuse_rope(rope)
    fields = flat | {
        "num_key_value_heads": flat.get("num_key_value_heads", flat.get("num_attention_heads")),
        "eos_token_ids": _token_ids(flat.get("eos_token_id")),
        "moe": None,
    }
    for key in ("rope_theta", "mrope_section"):
        if key in rope:
            fields[key] = rope[key]
    try:
        fields["vision_config"] = vision_fields(vision, windowed=windowed)
        moe = msgspec.convert(flat, MoEConfig) if architecture == ECHOVLM else None
        config = msgspec.structs.replace(msgspec.convert(fields, ModelConfig), moe=moe)
    except msgspec.ValidationError as error:
        raise SonoEdgeError(f"{error}; correct that key.") from error
    config.check()
    return config


def config_tree(config: ModelConfig) -> dict[str, Any]:
    """The config.json of `config` in the released flat layout, which transformers reads too when the model is dense."""
    vision = vision_tree(config.vision)
    skipped = {"vision_config", "moe", "eos_token_ids", "mrope_section"}
    flat = {
        key: value for key, value in msgspec.to_builtins(config).items() if key not in skipped and value is not None
    }
    eos = list(config.eos_token_ids)
    tree: dict[str, Any] = {"architectures": [config.architecture], "model_type": vision["model_type"]} | flat
    if config.moe is not None:
        tree |= msgspec.to_builtins(config.moe)
    return tree | {
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else eos,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": list(config.mrope_section)},
        "vision_config": vision,
    }


def _architecture(model_type: object, names: object) -> str:
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise SonoEdgeError(
            f"model_type {model_type!r} is not supported; give an EchoVLM or Qwen2-VL checkpoint (qwen2_vl), or a "
            "Qwen2.5-VL one (qwen2_5_vl)."
        )
    known = ARCHITECTURES[model_type]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in known:
        wanted = " or ".join(f"[{name!r}]" for name in known)
        raise SonoEdgeError(f"architectures {names!r} is not supported; it must be {wanted} for {model_type}.")
    return str(names[0])


def _refuse_variants(flat: dict[str, Any], vision: dict[str, Any], vision_act: str) -> None:
    activations = (("hidden_act", flat, "silu"), ("vision_config.hidden_act", vision, vision_act))
    for name, tree, expected in activations:
        found = tree.get("hidden_act", expected)
        if found != expected:
            raise SonoEdgeError(f"{name} {found!r} is not supported; only {expected!r} is.")
    sliding = flat.get("use_sliding_window", False) or "sliding_attention" in flat.get("layer_types", ())
    if sliding:
        raise SonoEdgeError("use_sliding_window is on; only full attention is supported, so set it to false.")
    heads, width = flat.get("num_attention_heads"), flat.get("hidden_size")
    if "head_dim" in flat and isinstance(heads, int) and isinstance(width, int) and flat["head_dim"] * heads != width:
        raise SonoEdgeError(
            f"head_dim {flat['head_dim']} is not hidden_size / num_attention_heads; other head sizes are not supported."
        )


def _refuse_rope(rope: dict[str, Any]) -> None:
    kinds = {rope.get("type", "mrope"), rope.get("rope_type", "default")}
    unknown = sorted(str(kind) for kind in kinds - {"mrope", "default"})
    if unknown:
        raise SonoEdgeError(f"rope type {unknown[0]!r} is not supported; only unscaled multimodal rotary embedding is.")


def _object(tree: dict[str, Any], key: str) -> dict[str, Any]:
    value = tree.get(key, {})
    if not isinstance(value, dict):
        raise SonoEdgeError(f"{key} must be an object, found {value!r}; correct that key.")
    return value


def _without_nulls(tree: dict[str, Any]) -> dict[str, Any]:
    # transformers writes null for what is not set, which means the same as an absent key
    return {key: value for key, value in tree.items() if value is not None}


def _token_ids(value: object) -> list[object]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
