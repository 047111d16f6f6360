"""Probed layers: the built int8 graph beside the torch model, and the torch probe beside the model's own outputs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sonoedge.bundle import open_bundle
from sonoedge.errors import SonoEdgeError
from sonoedge.export.fidelity.answers import Asker
from sonoedge.export.fidelity.cases import PhantomCases
from sonoedge.export.fidelity.metrics import SignalToNoise, expert_sets
from sonoedge.export.fidelity.probes import OrtProbe, TorchProbe
from sonoedge.export.torch_session import TorchSession
from sonoedge.runtime.look import Prompt
from sonoedge.runtime.prompt import question_ids
from sonoedge.runtime.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def prompt(reference: TorchSession, cases: PhantomCases, tiny_tokenizer: Tokenizer) -> Prompt:
    """A picture, a question and an answer as one sequence."""
    case = cases[0]
    asker = Asker("f", reference, tiny_tokenizer)
    asker.begin(asker.look(case.images), case.language)
    return asker.whole(question_ids(tiny_tokenizer, case.asked[1].text), tiny_tokenizer.encode("A cyst."))


def test_the_torch_probe_sees_what_the_model_collects(reference: TorchSession, prompt: Prompt) -> None:
    model = reference.model
    trace = TorchProbe(model).trace(prompt)
    with torch.no_grad():
        output = model(
            torch.tensor(prompt.ids)[None],
            torch.tensor(prompt.positions)[:, None],
            image_embeds=torch.tensor(prompt.embeds),
            collect_hidden=True,
            collect_router=True,
        )
        last = model.model.norm(torch.tensor(trace.hidden[-1]))
    assert len(trace.hidden) == model.config.num_hidden_layers
    for found, wanted in zip(trace.hidden[:-1], output.hidden_states[1:-1], strict=True):
        assert found == pytest.approx(wanted[0].numpy(), abs=1e-5)
    assert last.numpy() == pytest.approx(output.hidden_states[-1][0].numpy(), abs=1e-5)  # collected after the norm
    for found, wanted in zip(trace.router, output.router_logits, strict=True):
        assert found == pytest.approx(wanted[0].numpy(), abs=1e-5)


def test_the_built_graph_shows_its_layers_and_nothing_stays_beside_it(
    tiny: Any, reference: TorchSession, prompt: Prompt
) -> None:
    graph = open_bundle(tiny.bundle).graph("decoder", "ort")
    before = sorted(graph.parent.iterdir())
    probe = OrtProbe(graph, threads=1)
    assert sorted(graph.parent.iterdir()) == before
    wanted, found = TorchProbe(reference.model).trace(prompt), probe.trace(prompt)
    again = probe.trace(prompt)
    probe.close()
    assert len(found.hidden) == len(wanted.hidden)
    assert len(found.router) == len(wanted.router)
    for layer, states in enumerate(found.hidden):
        np.testing.assert_array_equal(states, again.hidden[layer])  # the cache is empty each time
        # Each layer is closest to its own namesake, and close.
        decibels = [_decibels(other, states) for other in wanted.hidden]
        assert int(np.argmax(decibels)) == layer
        assert decibels[layer] > 20
    for mine, other in zip(wanted.router, found.router, strict=True):
        assert (expert_sets(mine, 2) == expert_sets(other, 2)).all(axis=1).mean() > 0.9


def test_a_graph_without_probes_is_refused(tiny: Any) -> None:
    vision = open_bundle(tiny.bundle).graph("vision", "ort")
    with pytest.raises(SonoEdgeError, match=r"names no value probe\.hidden\.N: export the decoder again"):
        OrtProbe(vision, threads=1)


def _decibels(wanted: np.ndarray[Any, np.dtype[np.float32]], found: np.ndarray[Any, np.dtype[np.float32]]) -> float:
    gathered = SignalToNoise()
    gathered.add(wanted, found)
    assert isinstance(gathered.decibels, float)
    return gathered.decibels


def test_nothing_can_be_written_where_there_is_no_room(tiny: Any, tmp_path: Path) -> None:
    """A folder that takes no file: not even root writes into /proc."""
    import onnx

    from sonoedge.export.fidelity.probes import _loaded_beside

    model = onnx.load(open_bundle(tiny.bundle).graph("decoder", "ort"), load_external_data=False)
    with pytest.raises(SonoEdgeError, match=r"no probed copy of decoder\.onnx can be written to /proc"):
        _loaded_beside(model, Path("/proc/decoder.onnx"), 1)
