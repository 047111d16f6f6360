"""Reference generation in torch: greedy, batched with left padding, with a KV cache or by running everything again."""

from pathlib import Path

import msgspec
import torch
from torch import Tensor

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.attention import padded_bias
from sonoedge.export.models.cache import KVCache
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.echovlm import EchoVLM


class StopRule(msgspec.Struct, frozen=True):
    """A sequence ends at any of `eos`; what follows in its row is `pad`."""

    eos: tuple[int, ...] = ()
    pad: int = 0


class Prompt(msgspec.Struct, frozen=True):
    """A left-padded batch, ready to decode."""

    embedded: Tensor  # [B, S, hidden], images in place
    attention_mask: Tensor  # int64 [B, S], 0 at padding
    positions: Tensor  # int64 [3, B, S]
    next_positions: Tensor  # int64 [B]


class _GenerationConfig(msgspec.Struct):
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


def read_stop_rule(checkpoint: Path, config: ModelConfig) -> StopRule:
    """The stop rule of a checkpoint: generation_config.json where it says something, else config.json."""
    file = checkpoint / "generation_config.json"
    given = _GenerationConfig()
    if file.is_file():
        try:
            given = msgspec.json.decode(file.read_bytes(), type=_GenerationConfig)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise SonoEdgeError(f"{file} is not readable ({error}); correct or remove it.") from error
    named = given.eos_token_id
    eos = config.eos_token_ids if named is None else tuple(named) if isinstance(named, list) else (named,)
    pad = config.pad_token_id if given.pad_token_id is None else given.pad_token_id
    # transformers pads with the first end token when no padding token is named
    return StopRule(eos, pad if pad is not None else eos[0] if eos else 0)


@torch.inference_mode()
def greedy_tokens(model: EchoVLM, prompt: Prompt, count: int, stop: StopRule, *, cached: bool) -> Tensor:
    """Most likely continuation int64 [B, count]; `cached` keeps keys and values, else every step runs everything."""
    batch = prompt.embedded.shape[0]
    x, positions, mask = prompt.embedded, prompt.positions, prompt.attention_mask
    following = prompt.next_positions
    tokens = torch.full((batch, count), stop.pad, dtype=torch.int64)
    finished = torch.zeros(batch, dtype=torch.bool)
    ends = torch.tensor(stop.eos, dtype=torch.int64)
    cache = KVCache(model.config.num_hidden_layers) if cached else None
    last_row = torch.tensor([-1])
    for step in range(count):
        bias = padded_bias(mask, x.shape[1], x.dtype)
        logits = model.decode(
            x, positions, attention_bias=bias, cache=cache, logits_rows=last_row
        ).logits  # [B, 1, vocab]
        chosen = logits[:, -1].argmax(dim=-1).masked_fill(finished, stop.pad)
        tokens[:, step] = chosen
        finished |= torch.isin(chosen, ends)
        if bool(finished.all()):
            break
        new_x, new_positions = model.embed(chosen[:, None]), following.expand(3, -1).unsqueeze(-1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        x = new_x if cached else torch.cat((x, new_x), dim=1)
        positions = new_positions if cached else torch.cat((positions, new_positions), dim=2)
        following = following + 1
    return tokens
