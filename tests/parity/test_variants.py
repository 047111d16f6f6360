"""Our model against transformers' own parts, at sizes and settings that the recorded checkpoint does not have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sonoedge.export.parity import run

VARIANTS: dict[str, dict[str, Any]] = {
    "many_experts": {"experts": 7, "top_k": 3, "layers": 3, "expert_size": 20},
    "all_experts": {"experts": 3, "top_k": 3, "kv_heads": 4},
    "one_expert_of_two": {"experts": 2, "top_k": 1, "kv_heads": 1},
    "normalised": {"normalised": True},
    "normalised_single": {"normalised": True, "top_k": 1, "experts": 5},
    "tied": {"tied": True},
    "wide_heads": {"hidden": 96, "heads": 3, "kv_heads": 1, "sections": (4, 6, 6), "vision_dim": 48, "vision_heads": 4},
    "deep_vision": {"vision_depth": 5, "vision_dim": 64, "layers": 1},
    "sharded": {"shards": 3},
    "ends": {"ends": True},
    "dense": {"experts": 0},
    "dense_tied": {"experts": 0, "tied": True, "hidden": 128, "sections": (4, 6, 6), "layers": 3},
    "dense_ends": {"experts": 0, "ends": True, "seed": 3},
    # Windows of 56 pixels hold 2 x 2 merged patches.
    "windows": {"experts": 0, "window": 56, "full_blocks": (1,), "vision_depth": 3},
    "windows_that_do_not_divide": {
        "experts": 0,
        "window": 84,
        "full_blocks": (0, 3),
        "vision_depth": 4,
        "grids": ((10, 14), (2, 2), (8, 6), (14, 4)),
        "tied": True,
        "seed": 4,
    },
    "windows_everywhere": {"experts": 0, "window": 112, "grids": ((18, 10), (16, 16)), "kv_heads": 1, "seed": 5},
    "window_larger_than_the_image": {"experts": 0, "window": 300, "full_blocks": (7, 15, 23, 31), "ends": True},
    "full_attention_everywhere": {"experts": 0, "window": 56, "full_blocks": (0, 1), "kv_heads": 4, "tied": True},
    # A window of whole merged patches fits less often than one of patches: 70 pixels hold 2 x 2 merged patches.
    "window_of_no_whole_patches": {
        "experts": 0,
        "window": 70,
        "vision_dim": 48,
        "vision_heads": 4,
        "full_blocks": (0,),
        "hidden": 128,
        "sections": (4, 6, 6),
        "grids": ((6, 10),),
        "shards": 3,
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_reproduces_transformers(
    name: str, record: Callable[[Any], Path], variant_type: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = record(variant_type(**VARIANTS[name]))
    status = run(folder, folder, as_json=True)
    line = msgspec.json.decode(capsys.readouterr().out.splitlines()[-1])
    print({case: result["max_abs_error"] for case, result in line["cases"].items()})
    assert line["cases"].keys() == {"text", "images", "batch"}
    assert line["passed"], line
    assert status == 0
