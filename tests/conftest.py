"""Fixtures shared by all tests: the packaged codec and a few photographs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import skimage.data
import torch

from cotam.codec import Codec
from cotam.image import RGBImage
from cotam.weights import TierWeights, parse_codec, read_weights
from tests.cotam.tiny_models import TinyModels, train_tiny_models


@pytest.fixture(scope="session")
def codec() -> Codec:
    """The packaged codec that is the default."""
    return Codec.load()


@pytest.fixture(scope="session")
def tiers() -> tuple[TierWeights, ...]:
    """The models of the codec that is the default, whole and as they are in its file. Nothing may change them."""
    return tuple(parse_codec(read_weights("cotam-base"), "cotam-base").tiers)


@pytest.fixture(scope="session", params=["cotam-base", "cotam-large"])
def packaged_codec(request: pytest.FixtureRequest) -> Codec:
    """Every packaged codec."""
    return Codec.load(request.param)


@pytest.fixture(scope="session")
def photos() -> dict[str, RGBImage]:
    """Photographs that scikit-image carries, at most 256 pixels a side, no two of one size."""
    return {
        "astronaut": np.ascontiguousarray(skimage.data.astronaut()[:256, 100:356]),
        "chelsea": np.ascontiguousarray(skimage.data.chelsea()[40:240, 100:333]),
        "coffee": np.ascontiguousarray(skimage.data.coffee()[100:277, 200:456]),
    }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """A CLIP, a LLaVA and an adapter of a few training steps."""
    return train_tiny_models(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def num_threads() -> Iterator[None]:
    """Lets a test call ``torch.set_num_threads``, and puts the number back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
