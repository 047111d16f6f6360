"""Packed questions: each branch gets what it would get alone, learns its own answer, and never sees its neighbours."""

import numpy as np
import pytest
import torch

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.packing import IGNORE, Branch, PackedBatch, Packer
from sonoedge.export.torch_session import TorchSession
from sonoedge.runtime.positions import mrope_positions
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.prompt import HINT_LANGUAGE, answer_ids, prefix_ids, question_ids
from sonoedge.runtime.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = ImageSpec(max_pixels=84 * 84)
REGION = Branch("Which region is shown?", "liver", "region")
FINDING = Branch("是否可见病灶？", "可见", "finding")
REPORT = Branch("Write a report about this image.", "Liver, good image quality. No lesion is seen.")
GRIDS = {"one image": [(1, 4, 6)], "two images of different sizes": [(1, 4, 6), (1, 2, 2)]}


def logits(model: EchoVLM, packed: PackedBatch, embeds: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, vocab] of a packed batch whose samples all have the images `embeds`."""
    repeated = embeds.repeat(packed.input_ids.shape[0], 1)
    bias = packed.attention_bias
    with torch.no_grad():
        found: torch.Tensor = model(
            packed.input_ids, packed.positions, image_embeds=repeated, attention_bias=bias
        ).logits
    return found


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_a_branch_gets_what_it_would_get_alone(
    tiny_model: EchoVLM, tiny_tokenizer: Tokenizer, grids: list[tuple[int, int, int]]
) -> None:
    packer = Packer(tiny_tokenizer, grids, SPEC)
    embeds = torch.randn(sum(h * w // 4 for _, h, w in grids), 64, generator=torch.Generator().manual_seed(1))
    packed = packer.pack([[REGION, FINDING, REPORT], [REPORT]], context=600)
    together = logits(tiny_model, packed, embeds)
    rows = [together[sample][packed.labels[sample] != IGNORE] for sample in range(2)]
    alone = []
    for branch in (REGION, FINDING, REPORT):
        single = packer.pack([[branch]], context=600)
        alone.append(logits(tiny_model, single, embeds)[0][single.labels[0] != IGNORE])
    assert (rows[0] - torch.cat(alone)).abs().max() < 1e-4
    assert (rows[1] - alone[2]).abs().max() < 1e-4
    assert (alone[0][:1] - alone[1][:1]).abs().max() > 0.1, "the model must tell the branches apart"


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_training_sees_what_the_runtime_asks(
    tiny_model: EchoVLM, tiny_tokenizer: Tokenizer, grids: list[tuple[int, int, int]]
) -> None:
    t = tiny_tokenizer
    merged = [h * w // 4 for _, h, w in grids]
    embeds = torch.randn(sum(merged), 64, generator=torch.Generator().manual_seed(1))
    packed = Packer(t, grids, SPEC).pack([[REGION, REPORT]], context=600)
    taught = logits(tiny_model, packed, embeds)[0][packed.labels[0] != IGNORE]
    answer = answer_ids(t, REPORT.answer)
    prefix = prefix_ids(t, merged, HINT_LANGUAGE)
    ids = np.array(prefix + question_ids(t, REPORT.question) + answer, np.int64)
    positions, _ = mrope_positions(ids, grids, image_token_id=t.image_pad, merge_size=2)
    rows = np.arange(len(ids) - len(answer) - 1, len(ids) - 1)
    asked = TorchSession(tiny_model, SPEC, 600).extend(ids, positions, image_embeds=embeds.numpy(), logits_rows=rows)
    assert np.abs(taught[-len(answer) :].numpy() - asked).max() < 1e-4


def test_every_answer_is_learnt_to_its_end_and_nothing_else(tiny_tokenizer: Tokenizer) -> None:
    packed = Packer(tiny_tokenizer, [(1, 4, 4)], SPEC).pack([[REGION, REPORT], [FINDING]], context=600)
    for sample, branches in enumerate(([REGION, REPORT], [FINDING])):
        labels = packed.labels[sample]
        learnt = labels[labels != IGNORE].tolist()
        assert learnt == [i for branch in branches for i in answer_ids(tiny_tokenizer, branch.answer)]
    following = packed.input_ids[:, 1:][packed.labels[:, :-1] != IGNORE]
    assert following.tolist() == packed.labels[packed.labels != IGNORE].tolist()


def test_padding_sees_only_itself(tiny_tokenizer: Tokenizer) -> None:
    packer = Packer(tiny_tokenizer, [(1, 4, 4)], SPEC)
    packed = packer.pack([[REGION, REPORT], [FINDING]], context=600)
    length = packer.prefix.size + len(question_ids(tiny_tokenizer, FINDING.question)) + 1
    length += len(answer_ids(tiny_tokenizer, FINDING.answer)) - 1
    visible = packed.attention_bias[1, 0] == 0
    assert visible[length:].nonzero().tolist() == [[n, n + length] for n in range(visible.shape[0] - length)]
    assert not visible[:length, length:].any()
    assert (packed.labels[1, length:] == IGNORE).all()


def test_a_sample_longer_than_the_context_is_refused(tiny_tokenizer: Tokenizer) -> None:
    packer = Packer(tiny_tokenizer, [(1, 4, 4)], SPEC)
    tokens = packer.pack([[REGION, REPORT]], context=600).input_ids.shape[1]
    assert packer.pack([[REGION, REPORT]], context=tokens).input_ids.shape[1] == tokens
    with pytest.raises(SonoEdgeError, match=rf"has {tokens} tokens and limits\.context = {tokens - 1}"):
        packer.pack([[FINDING], [REGION, REPORT]], context=tokens - 1)
