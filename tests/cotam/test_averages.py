"""What training sees of the trellis search is what the search does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cotam.config import Q_STEPS
from cotam.entropy.tables import NUM_SCALES, NUM_SKIPPED_SCALES, Z_ROWS, Tables
from cotam.entropy.trellis import MEAN_STEPS, reconstruct
from cotam.image import RGBImage
from cotam.models.averages import SearchAverages
from cotam.models.codec_model import CodecModel
from cotam.models.halves import split_halves
from cotam.train.rates import code_length, segments_of
from cotam.weights import parse_codec, read_weights

QUALITY = 6


@pytest.fixture(scope="module")
def model_and_tables() -> tuple[CodecModel, Tables]:
    tier = parse_codec(read_weights("cotam-base"), "packaged").tiers[-1]
    return tier.model.freeze(), tier.tables


@pytest.fixture(scope="module")
def averages(model_and_tables: tuple[CodecModel, Tables]) -> SearchAverages:
    rows = np.random.default_rng(1).geometric(0.12, 2**16) + NUM_SKIPPED_SCALES - 1  # as a model has them, about
    return SearchAverages.measure(model_and_tables[1], rows.clip(max=NUM_SCALES - 1).astype(np.uint8))


def test_drawn_levels_have_the_errors_and_bits_of_the_search(
    model_and_tables: tuple[CodecModel, Tables], averages: SearchAverages, photos: dict[str, RGBImage]
) -> None:
    model, tables = model_and_tables
    real_bits = bits = real_error = error = 0.0
    for photo in photos.values():
        x = torch.from_numpy(photo[:176, :224]).permute(2, 0, 1)[None]
        q = torch.full((1, 1, 1, 1), float((QUALITY - 1) * Q_STEPS))
        with torch.inference_mode():
            y = model.g_a(x / 255).float() * model.gains.gain(q)
            quantised = model.quantise(y, model.h_a(y).round(), q)
        segments = segments_of(model, model.pack(quantised), q)
        real_bits += code_length([s for s in segments if (s[1] < Z_ROWS).all()], tables)
        for half, levels, params in zip(split_halves(y), quantised.levels, quantised.params, strict=True):
            residual = half - params.means / MEAN_STEPS
            drawn = averages.draw(residual, params.indexes)
            assert not drawn[params.indexes < NUM_SKIPPED_SCALES].any()
            bits += float(averages.mean_bits(residual, params.indexes).sum())
            real_error += float((reconstruct(levels) / MEAN_STEPS - residual).square().sum())
            error += float((reconstruct(drawn) / MEAN_STEPS - residual).square().sum())
    assert bits == pytest.approx(real_bits, rel=0.05)
    assert error == pytest.approx(real_error, rel=0.05)


def test_slopes_are_those_of_the_means(averages: SearchAverages) -> None:
    indexes = torch.arange(NUM_SCALES).float()[:, None].expand(-1, 200)
    residual = torch.linspace(-4.5, 4.5, 200).expand(NUM_SCALES, -1).clone().requires_grad_()
    for mean in (averages.mean_bits, averages.mean_reconstruction):
        (slope,) = torch.autograd.grad(mean(residual, indexes).sum(), residual)
        a_little = 1e-3
        with torch.no_grad():
            measured = (mean(residual + a_little, indexes) - mean(residual - a_little, indexes)) / (2 * a_little)
        inside = (slope - measured).abs() < 0.05 + 0.05 * measured.abs()
        assert inside.float().mean() > 0.95  # but for corners
        assert not slope[:NUM_SKIPPED_SCALES].any()
    # A narrow Gaussian's small elements become 0 whatever they are exactly; large ones of a wide one follow.
    assert averages.mean_reconstruction(torch.tensor([0.1]), torch.tensor([8.0])).abs() < 0.03
    assert averages.mean_reconstruction(torch.tensor([-3.0]), torch.tensor([40.0])) == pytest.approx(-3, abs=0.1)


def test_scales_that_a_model_hardly_has_are_measured_too(model_and_tables: tuple[CodecModel, Tables]) -> None:
    """None of their levels is farther from an element than the search would go."""
    few = SearchAverages.measure(model_and_tables[1], np.full(1000, NUM_SKIPPED_SCALES, dtype=np.uint8))
    indexes = torch.arange(NUM_SKIPPED_SCALES + 8, NUM_SCALES).float()[:, None].expand(-1, 4000)
    residual = torch.linspace(-9, 9, 4000).expand_as(indexes)
    assert (reconstruct(few.draw(residual, indexes)) / MEAN_STEPS - residual).abs().max() < 1.7
    assert few.mean_bits(residual, indexes).min() > 0
