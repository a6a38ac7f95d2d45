"""Large images go through the networks in tiles: the integers are the same, memory is bounded."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cotam.codec import Codec
from cotam.config import LATENT_STRIDE, CodecConfig
from cotam.image import RGBImage
from cotam.models import tiling
from cotam.models.codec_model import CodecModel


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "MAX_TILE_POSITIONS", 64)
    monkeypatch.setattr(tiling, "_SIDE", 8)


@pytest.mark.parametrize("importance", [None, np.linspace(0, 1, 400).reshape(20, 20)], ids=["uniform", "mapped"])
def test_tiles_code_what_the_whole_codes(
    codec: Codec,
    photos: dict[str, RGBImage],
    importance: NDArray[np.float64] | None,
    request: pytest.FixtureRequest,
) -> None:
    image = np.tile(photos["astronaut"], (2, 2, 1))[:331, :437]
    string = codec.encode(image, 4, importance)
    (whole,) = codec.decompress([string])
    pixels = codec.decode(string)

    request.getfixturevalue("small_tiles")
    assert len(list(tiling.tiles(21, 28, 0))) == 12
    tiled_string = codec.encode(image, 4, importance)
    (tiled,) = codec.decompress([string])
    assert torch.equal(tiled.y_fixed, whole.y_fixed)
    assert np.abs(codec.decode(string).astype(int) - pixels).max() <= 1
    # Sums of other shapes round differently, so a few symbols on the edge of two values may.
    assert abs(len(tiled_string) - len(string)) < 0.002 * len(string)
    assert (codec.decompress([tiled_string])[0].y_fixed != whole.y_fixed).float().mean() < 0.002


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (17, 9), (16, 16), (8, 23), (41, 8)])
@pytest.mark.parametrize("halo", [0, 3, 12])
def test_tiles_cover_every_position_once_with_their_halo(size: tuple[int, int], halo: int) -> None:
    height, width = size
    values = torch.arange(height * width).reshape(1, height, width)
    (copy,) = tiling.map_tiles(lambda t: (t.cut(values).clone(),), height, width, halo)
    assert torch.equal(copy, values)
    count = torch.zeros(height, width)
    for rows, columns in tiling.tiles(height, width, halo):
        count[rows.keep_start : rows.keep_stop, columns.keep_start : columns.keep_stop] += 1
        for span, length in ((rows, height), (columns, width)):
            assert span.start <= max(0, span.keep_start - halo)
            assert span.stop >= min(length, span.keep_stop + halo)
    assert bool((count == 1).all())


@pytest.mark.parametrize(
    "config",
    [
        CodecConfig(M=8, N8=8, N16=8, analysis_blocks=(3, 1), synthesis_blocks=(4, 2), N_z=8, N_hyper=8),
        CodecConfig(backbone="elic", M=8, N=8, N_z=8, N_hyper=8),
    ],
    ids=["cotam", "elic"],
)
def test_transforms_look_no_further_than_their_halo(config: CodecConfig) -> None:
    torch.manual_seed(0)
    model = CodecModel(config)
    for parameter in (*model.g_a.parameters(), *model.g_s.parameters()):
        torch.nn.init.normal_(parameter, std=0.5 / parameter[0].numel() ** 0.5)
    middle = model.halo + 4  # room to see further than the halo
    side = 2 * middle + 1

    def reach(transform: torch.nn.Module, x: torch.Tensor, stride: int) -> tuple[int, int]:
        """How far, in latent positions, the gradient of the middle position reaches: up and down."""
        x.requires_grad_(True)
        out = transform(x)
        scale = LATENT_STRIDE // stride
        out[:, :, middle * scale : (middle + 1) * scale, middle * scale : (middle + 1) * scale].sum().backward()
        assert x.grad is not None
        rows = (x.grad.abs().sum((0, 1, 3)) > 0).nonzero()[:, 0] // stride
        return middle - int(rows.min()), int(rows.max()) - middle

    for transform, x, stride in (
        (model.g_a, torch.randn(1, 3, 16 * side, 16 * side), 16),
        (model.g_s, torch.randn(1, config.M, side, side), 1),
    ):
        above, below = reach(transform, x, stride)
        assert 0 < above <= model.halo
        assert 0 < below <= model.halo


@pytest.mark.slow
def test_a_hundred_megapixels_take_less_than_six_gigabytes() -> None:
    script = """
import resource, numpy as np
from cotam.codec import Codec
rng = np.random.default_rng(0)
coarse = rng.integers(0, 256, (100, 100, 3), dtype=np.uint8)
image = np.repeat(np.repeat(coarse, 100, 0), 100, 1) + rng.integers(0, 16, (10000, 10000, 1), dtype=np.uint8)
codec = Codec.load()
string = codec.encode(image)
decoded = codec.decode(string)
assert decoded.shape == image.shape
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert int(out) * 1024 < 6 * 2**30
