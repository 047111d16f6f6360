"""The smallest checkpoint as float model and as variants, a few frames to ask about, and one comparison of them all."""

import copy
from collections.abc import Callable

import pytest
import torch

from sonoedge.calibration.pool import PhantomPool
from sonoedge.export.fidelity.cases import PhantomCases
from sonoedge.export.fidelity.measure import Variant, measure
from sonoedge.export.fidelity.probes import TorchProbe
from sonoedge.export.fidelity.result import Fidelity
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.torch_session import TorchSession
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer

CONTEXT = 480
SPEC = ImageSpec(max_pixels=84 * 84)


def damaged(model: EchoVLM, noise: float) -> Variant:
    """A variant whose every weight is off by a share of its tensor's spread; 0 is the float model."""
    torch.manual_seed(0)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            if weight.dim() > 1:
                weight.add_(noise * weight.std() * torch.randn_like(weight))
    return Variant(TorchSession(twin, SPEC, CONTEXT), TorchProbe(twin))


@pytest.fixture
def reference(tiny_model: EchoVLM) -> TorchSession:
    """The float model."""
    return TorchSession(tiny_model, SPEC, CONTEXT)


@pytest.fixture
def variant(tiny_model: EchoVLM) -> Callable[[float], Variant]:
    """Make a variant damaged by some noise."""
    return lambda noise: damaged(tiny_model, noise)


@pytest.fixture(scope="session")
def cases(frames: PhantomPool) -> PhantomCases:
    """Six phantoms, languages in turn."""
    return PhantomCases(PhantomPool(100, frames.greys[:6], frames.classes[:6], frames.truths[:6]))


@pytest.fixture
def two_cases(frames: PhantomPool) -> PhantomCases:
    """Two of them, one in each language."""
    return PhantomCases(PhantomPool(100, frames.greys[:2], frames.classes[:2], frames.truths[:2]))


@pytest.fixture
def compared(
    compared_once: dict[str, Fidelity], reference: TorchSession, cases: PhantomCases, tiny_tokenizer: Tokenizer
) -> Fidelity:
    """A much damaged variant, as if it were shipped, a little damaged one, and the float model itself."""
    if not compared_once:
        variants = {name: damaged(reference.model, noise) for name, noise in NOISE.items()}
        compared_once["all"] = measure(reference, variants, tiny_tokenizer, cases, max_tokens=5)
    return compared_once["all"]


NOISE = {"much": 0.3, "little": 0.02, "same": 0.0}


@pytest.fixture(scope="session")
def compared_once() -> dict[str, Fidelity]:
    """Keeps the comparison, which takes seconds, for all tests."""
    return {}
