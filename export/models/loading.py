"""From a checkpoint folder to an EchoVLM with every key used and none missing, and freshly initialised models."""

import math
from pathlib import Path

import torch

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.config_json import read_config
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.saving import save_checkpoint
from sonoedge.export.models.shards import TensorHeader, listed, read_headers, read_tensors

__all__ = ["empty_model", "init_model", "load_checkpoint", "open_checkpoint", "save_checkpoint"]

EMBEDDING_STD = 0.02


def open_checkpoint(path: Path) -> tuple[ModelConfig, dict[str, TensorHeader]]:
    """Config and tensor headers of a checkpoint that this model can hold exactly; reads no weights.

    SonoEdgeError when config.json is of another architecture, a file is missing or damaged, or keys or shapes differ.
    """
    if not path.exists():
        raise SonoEdgeError(f"{path} does not exist; give the folder of a checkpoint.")
    config = read_config(path)
    headers = read_headers(path)
    expected = {key: tuple(tensor.shape) for key, tensor in empty_model(config).state_dict().items()}
    missing, unused = expected.keys() - headers.keys(), headers.keys() - expected.keys()
    if missing or unused:
        faults = [
            f"{len(keys)} {name} ({listed(keys)})" for name, keys in (("missing", missing), ("unused", unused)) if keys
        ]
        raise SonoEdgeError(
            f"{path}: the weights do not fit {config.architecture} of this config.json, keys: {'; '.join(faults)}; "
            "use the config.json and weights of one checkpoint."
        )
    wrong = [
        f"{key} {list(header.shape)}, not {list(expected[key])}"
        for key, header in headers.items()
        if header.shape != expected[key]
    ]
    if wrong:
        raise SonoEdgeError(
            f"{path}: the shapes of weights contradict config.json: {listed(wrong)}; use the files of one checkpoint."
        )
    return config, headers


def load_checkpoint(path: Path, dtype: torch.dtype = torch.float32) -> EchoVLM:
    """Load a released-format checkpoint folder for inference or training, all weights as `dtype`, in eval mode."""
    config, headers = open_checkpoint(path)
    model = empty_model(config)
    for key, tensor in read_tensors(headers, dtype):
        owner, _, name = key.rpartition(".")
        model.get_submodule(owner).register_parameter(name, torch.nn.Parameter(tensor))
    return model.eval()


def empty_model(config: ModelConfig) -> EchoVLM:
    """The model without memory for its weights (meta tensors): names and shapes only."""
    with torch.device("meta"):
        return EchoVLM(config)


def init_model(config: ModelConfig, seed: int, *, std: float | None = None) -> EchoVLM:
    """A float32 model with seeded random weights, ready to train.

    std: of every matrix; None scales each matrix by 1 / √fan-in and the embeddings to 0.02. Norms are one, biases zero.
    """
    config.check()
    generator = torch.Generator().manual_seed(seed)
    model = empty_model(config).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif std is not None:
                parameter.normal_(0.0, std, generator=generator)
            elif name.endswith("embed_tokens.weight"):
                parameter.normal_(0.0, EMBEDDING_STD, generator=generator)
            else:
                parameter.normal_(0.0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
    return model
