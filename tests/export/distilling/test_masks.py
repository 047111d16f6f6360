"""Exactly which token positions are trained: answers and their ends, for several turns and several images."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from sonoedge.errors import SonoEdgeError
from sonoedge.export.corpus import Batches, ConversationCorpus
from sonoedge.export.distilling.draws import Draws, Share
from sonoedge.export.distilling.lesson import counted
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.packing import IGNORE, Branch, Packer
from sonoedge.runtime.positions import mrope_positions
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.prompt import HINT_LANGUAGE, answer_ids, conversation_ids, prefix_ids
from sonoedge.runtime.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = ImageSpec(max_pixels=84 * 84)
TURNS = [("Which region is shown?", "liver"), ("是否可见病灶？", "可见"), ("How large?", "12 mm")]
GRIDS = {"one image": [(1, 4, 6)], "two images of different sizes": [(1, 4, 6), (1, 2, 2)]}


def chain(turns: list[tuple[str, str]]) -> list[Branch]:
    return [Branch(question, answer, follows=index > 0) for index, (question, answer) in enumerate(turns)]


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_only_answers_and_their_ends_are_trained(
    tiny_tokenizer: Tokenizer, grids: list[tuple[int, int, int]], in_order: bool
) -> None:
    branches = chain(TURNS) if in_order else [Branch(*turn) for turn in TURNS]
    packed = Packer(tiny_tokenizer, grids, SPEC).pack([branches, branches[:1]], context=400)
    answers = [answer_ids(tiny_tokenizer, answer) for _, answer in TURNS]
    for row, wanted in ((0, answers), (1, answers[:1])):
        places = (packed.labels[row] != IGNORE).nonzero().flatten().tolist()
        assert len(places) == sum(map(len, wanted))
        assert packed.labels[row, places].tolist() == [token for answer in wanted for token in answer]
        # Each place is the one before the token that it learns, so an answer's first comes from the question's end.
        assert packed.input_ids[row, [place + 1 for place in places]].tolist() == packed.labels[row, places].tolist()
        assert not {tiny_tokenizer.image_pad} & set(packed.labels[row].tolist())
        starts = [place for place in places if place - 1 not in places]
        assert len(starts) == len(wanted)


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_turns_in_order_are_the_conversation_that_the_runtime_asks(
    tiny_model: EchoVLM, tiny_tokenizer: Tokenizer, grids: list[tuple[int, int, int]]
) -> None:
    """Ids, positions and what every answer token gets to see, against the conversation written out in full."""
    t = tiny_tokenizer
    merged = [h * w // 4 for _, h, w in grids]
    packer = Packer(t, grids, SPEC)
    packed = packer.pack([[Branch("What else?", "A cyst."), *chain(TURNS)]], context=600)
    ids = prefix_ids(t, merged, HINT_LANGUAGE) + conversation_ids(t, TURNS[:-1], TURNS[-1][0])
    ids += answer_ids(t, TURNS[-1][1])
    start = packer.prefix.size
    skipped = len(ids) - start
    mine = packed.input_ids[0].tolist()
    assert mine[:start] + mine[-skipped:] == ids
    positions, _ = mrope_positions(np.array(ids), list(grids), image_token_id=t.image_pad, merge_size=2)
    assert np.array_equal(packed.positions[:, 0, -skipped:].numpy(), positions[:, start:])
    embeds = torch.randn(sum(merged), 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        bias = packed.attention_bias
        found = tiny_model(packed.input_ids, packed.positions, image_embeds=embeds, attention_bias=bias).logits[0]
        plain = torch.tensor([ids])
        wanted = tiny_model(plain, torch.from_numpy(positions)[:, None], image_embeds=embeds).logits[0]
    assert (found[-skipped:] - wanted[start:]).abs().max() < 1e-4


def test_the_turns_of_a_file_are_counted(cases: Path, tiny_tokenizer: Tokenizer) -> None:
    """Cases of one, two, three and one turns; what is trained is known token by token."""
    corpus = ConversationCorpus(cases, SPEC)
    collator = Batches(corpus, tiny_tokenizer, SPEC, size=4, seed=0, context=400)
    wanted = sum(
        len(answer_ids(tiny_tokenizer, turn["value"]))
        for case in msgspec.json.decode(cases.read_bytes())
        for turn in case["conversations"]
        if turn["from"] == "gpt"
    )
    for in_order in (False, True):
        draws = Draws(corpus, collator, seed=1, in_order=in_order)
        passes = draws.passes(range(4), 4)
        assert sorted(number for item in passes for number in item.numbers) == [0, 1, 2, 3]
        assert len(passes) == 3  # grids: two cases share one
        counts = [counted(item.batch) for item in passes]
        assert (sum(c.samples for c in counts), sum(c.answers for c in counts)) == (4, wanted)
        padding = (
            sum(int((item.batch.packed.positions[0] == 0).sum()) for item in passes) - 4
        )  # each first token's is 0
        tokens = sum(item.batch.packed.input_ids.numel() for item in passes)
        assert sum(c.tokens for c in counts) == tokens - padding


def test_an_answer_longer_than_the_context_is_named(cases: Path, tiny_tokenizer: Tokenizer) -> None:
    corpus = ConversationCorpus(cases, SPEC)
    draws = Draws(corpus, Batches(corpus, tiny_tokenizer, SPEC, size=4, seed=0, context=60), seed=1)
    with pytest.raises(SonoEdgeError, match=r"case \d of .*cases.json: a sample .* limits.context = 60: raise it"):
        draws.passes(range(4), 4)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_every_step_out(processes: int) -> None:
    shares = [Share(batch=7, process=process, processes=processes, accumulate=1) for process in range(processes)]
    for step in (0, 5):
        taken = sorted(draw for share in shares for draw in share.draws(step))
        assert taken == list(range(7 * step, 7 * step + 7))


def test_every_case_comes_once_before_any_comes_again(cases: Path, tiny_tokenizer: Tokenizer) -> None:
    corpus = ConversationCorpus(cases, SPEC)
    collator = Batches(corpus, tiny_tokenizer, SPEC, size=4, seed=0, context=400)
    draws = Draws(corpus, collator, seed=1)
    names = [draws.sample(draw).name for draw in range(12)]
    assert all(len(set(names[i : i + 4])) == 4 for i in (0, 4, 8))
    assert len({tuple(names[i : i + 4]) for i in (0, 4, 8)}) > 1
    again = Draws(corpus, collator, seed=1, distinct=3)
    assert [again.sample(draw).name for draw in range(6)] == names[:3] * 2
