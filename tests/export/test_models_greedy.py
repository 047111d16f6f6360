"""The KV cache, and generation that ends where the reference ends."""

from pathlib import Path

import pytest
import torch

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.cache import KVCache
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.greedy import Prompt, StopRule, greedy_tokens, read_stop_rule


def test_cached_pieces_equal_one_pass_and_rewind_forgets(small_model: EchoVLM) -> None:
    ids, positions = torch.randint(0, 80, (2, 9)), torch.arange(9).expand(3, 2, -1)
    cache = KVCache(small_model.config.num_hidden_layers)
    with torch.inference_mode():
        whole = small_model(ids, positions).logits
        small_model(ids[:, :4], positions[..., :4], cache=cache)
        small_model(torch.randint(0, 80, (2, 3)), positions[..., 4:7], cache=cache)
        cache.rewind(4)
        assert cache.length == 4
        pieces = [small_model(ids[:, a:b], positions[..., a:b], cache=cache).logits for a, b in ((4, 8), (8, 9))]
    assert cache.length == 9
    assert (torch.cat(pieces, 1) - whole[:, 4:]).abs().max() < 1e-5


@pytest.mark.parametrize("cached", [True, False])
def test_a_finished_row_is_padded(small_model: EchoVLM, cached: bool) -> None:
    torch.manual_seed(2)
    ids = torch.randint(4, 80, (2, 5))
    mask, positions = torch.ones_like(ids), torch.arange(5).expand(3, 2, -1)
    prompt = Prompt(small_model.embed(ids), mask, positions, torch.tensor([5, 5]))
    free = greedy_tokens(small_model, prompt, 6, StopRule(), cached=cached)
    end = int(free[0, 1])
    stopped = greedy_tokens(small_model, prompt, 6, StopRule((end,), pad=7), cached=cached)
    for row, wanted in zip(stopped, free, strict=True):
        first = (wanted == end).long().cumsum(0) - (wanted == end).long() == 0
        assert row.tolist() == wanted.masked_fill(~first, 7).tolist()


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, StopRule((2, 3), 0)),
        ('{"do_sample": true}', StopRule((2, 3), 0)),
        ('{"eos_token_id": 9}', StopRule((9,), 0)),
        ('{"eos_token_id": [8, 9], "pad_token_id": 5}', StopRule((8, 9), 5)),
    ],
)
def test_stop_rule_comes_from_either_file(
    small_config: ModelConfig, tmp_path: Path, content: str | None, rule: StopRule
) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_text(content)
    assert read_stop_rule(tmp_path, small_config) == rule


def test_broken_generation_config_is_named(small_config: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(SonoEdgeError, match="is not readable"):
        read_stop_rule(tmp_path, small_config)
