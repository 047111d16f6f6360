"""Writing a checkpoint in the released format: the folder appears complete or not at all."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.config_json import config_tree
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.shards import SINGLE_FILE

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# Qwen2-VL's own statistics (CLIP's), and Qwen2.5-VL's; at most 196 merged tokens an image, which is what EchoVLM was
# trained with.
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "min_pixels": 4 * 28 * 28,
    "max_pixels": 196 * 28 * 28,
}


def save_checkpoint(
    model: EchoVLM,
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer_files_from: Path | None = None,
    extra_config: Mapping[str, Any] | None = None,
    preprocessor: Mapping[str, Any] | None = None,
) -> None:
    """Write `model` as a released-format folder: config, weights, tokenizer, preprocessor and generation settings.

    tokenizer_files_from: checkpoint folder whose tokenizer (and preprocessor, generation settings) is copied.
    extra_config: further keys of config.json. preprocessor: keys that override preprocessor_config.json.
    SonoEdgeError when `path` exists and is not an empty folder, or when the tokenizer files are not there.
    """
    if dtype not in DTYPE_NAMES:
        raise SonoEdgeError(
            f"dtype {dtype} is not a checkpoint format; choose one of {', '.join(DTYPE_NAMES.values())}."
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise SonoEdgeError(f"{path} exists and is not an empty folder; choose another place or remove it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise SonoEdgeError(f"{path} cannot be written ({error.strerror}); choose a folder that can.") from error
    try:
        write_config_files(model.config, partial, dtype, tokenizer_files_from, extra_config or {}, preprocessor or {})
        tensors = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in model.state_dict().items()}
        save_file(tensors, partial / SINGLE_FILE, metadata={"format": "pt"})
        partial.chmod(0o755)  # mkdtemp makes it private
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_config_files(
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    source: Path | None,
    extra_config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
) -> None:
    """Write config.json, preprocessor and generation settings, and tokenizer files where there is a source."""
    tree = config_tree(config) | {"torch_dtype": DTYPE_NAMES[dtype], **extra_config}
    _write_json(folder / "config.json", tree)
    if source is not None:
        for name in TOKENIZER_FILES:
            if not (source / name).is_file():
                raise SonoEdgeError(f"{source / name} does not exist; give a checkpoint folder with its tokenizer.")
            shutil.copyfile(source / name, folder / name)
    vision = config.vision
    own = {"processor_class": "Qwen2VLProcessor" if vision.windows is None else "Qwen2_5_VLProcessor"}
    geometry = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    image = {**PREPROCESSOR, **own, **_copied(source, "preprocessor_config.json"), **geometry, **preprocessor}
    _write_json(folder / "preprocessor_config.json", image)
    tokens = {
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": tree["eos_token_id"],
    }
    generation = {key: value for key, value in tokens.items() if value is not None} | {"do_sample": False}
    _write_json(folder / "generation_config.json", _copied(source, "generation_config.json") or generation)


def _copied(source: Path | None, name: str) -> dict[str, Any]:
    if source is None or not (source / name).is_file():
        return {}
    try:
        return msgspec.json.decode((source / name).read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SonoEdgeError(f"{source / name} is not a JSON object ({error}); copy the checkpoint again.") from error


def _write_json(file: Path, tree: Mapping[str, Any]) -> None:
    file.write_bytes(msgspec.json.format(msgspec.json.encode(tree), indent=2) + b"\n")
