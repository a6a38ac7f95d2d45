"""Compiled loops of inference on a CPU give what the torch operations give that they stand in for."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from cotam.config import CodecConfig
from cotam.models.codec_model import CodecModel
from cotam.models.context import context_of
from cotam.models.entropy_model import GaussianParams, amplitudes
from cotam.models.halves import half_less, merge_scaled
from cotam.models.int8_blocks import Int8Blocks, with_int8_blocks
from cotam.models.layers import init_unit
from cotam.models.planes import Planes
from cotam.models.precision import multiplies_int8
from cotam.models.transforms import AnalysisTransform, SynthesisTransform
from cotam.weights import TierWeights
from tests.corpus import photograph

M, HEIGHT, WIDTH = 160, 5, 7


def _integers(*shape: int, most: int = 3000, seed: int = 0) -> Tensor:
    values = torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()
    return values.to(memory_format=torch.channels_last)


HALF, OTHER = _integers(2, M // 2, HEIGHT, WIDTH), _integers(2, M // 2, HEIGHT, WIDTH, seed=1)
SCALE = torch.rand(2, M, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))

Q = torch.full((1, 1, 1, 1), 12.0)


@pytest.fixture
def model(tiers: tuple[TierWeights, ...]) -> CodecModel:
    """That of quality 4, as it is before it is prepared."""
    return next(tier.model for tier in tiers if tier.lowest_quality <= 4 <= tier.highest_quality)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda _: half_less(_integers(2, M, HEIGHT, WIDTH), 0, HALF, 1 / 8), id="first half"),
        pytest.param(lambda _: half_less(_integers(2, M, HEIGHT, WIDTH), 1, HALF, 1 / 8), id="second half"),
        pytest.param(lambda _: merge_scaled(HALF, OTHER, SCALE), id="merged"),
        pytest.param(lambda _: merge_scaled(HALF, OTHER.contiguous(), SCALE[:1, :, :1, :1]), id="merged, one scale"),
        pytest.param(lambda m: m.y_fixed(OTHER.short(), GaussianParams(HALF, HALF)), id="reconstructed"),
        pytest.param(lambda m: context_of(m.entropy_parameters.context, HALF), id="context"),
        pytest.param(lambda m: m.entropy_parameters.h_s.spatial2(_integers(2, 192, 6, 5, most=127)), id="depthwise"),
        pytest.param(lambda m: m.z_prediction(_integers(2, 128, 3, 4, most=127), Q), id="prediction"),
        pytest.param(lambda m: m.g_s.pixels(_integers(2, M, HEIGHT, WIDTH, most=2)), id="pixels"),
    ],
)
def test_loops_give_what_torch_gives(model: CodecModel, function: Callable[[CodecModel], Tensor]) -> None:
    with torch.inference_mode():
        fused = function(model)
    with torch.enable_grad():
        expected = function(model)
    assert len(expected.unique()) > 10
    assert torch.equal(fused.to(expected.dtype), expected)


def test_amplitudes_are_those_of_torch_but_for_the_last_bit() -> None:
    with torch.inference_mode():
        fused = amplitudes(HALF / 99)
    torch.testing.assert_close(fused, amplitudes(HALF / 99), rtol=3e-7, atol=0)
    torch.testing.assert_close(fused[:, : M // 2], torch.asinh(HALF / 99), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("low_quality", "most"), [(False, 2e-4), (True, 2e-3)])
def test_prepared_transforms_do_nearly_the_same(model: CodecModel, low_quality: bool, most: float) -> None:
    """The linear path in int8 and the body in bfloat16, or that in int8, too, where this CPU has them."""
    x = torch.from_numpy(np.array(photograph(0, 192, 128)))[None].permute(0, 3, 1, 2)
    prepared = copy.deepcopy(model)
    prepared.prepare(low_quality)
    with torch.inference_mode():
        y, linear = model.g_a(x / 255), model.g_a.linear(x / 255 - 0.5)
        torch.testing.assert_close(model.g_a.of_pixels(x), y, rtol=0, atol=1e-5)
        error = (prepared.g_a.of_pixels(x) - y).square().mean()
        assert error < most * (y - linear).square().mean()  # against all that the body adds
        coarse, fine = model.g_s._ways(y)
        coarse_too, fine_too = prepared.g_s._ways(y)
    assert torch.equal(coarse, coarse_too)
    assert (fine_too - fine).square().mean() < most * fine.square().mean()


@pytest.mark.parametrize("blocks", [(0, 0), (0, 1), (1, 2), (2, 0)], ids=str)
def test_bodies_of_every_shape_are_prepared(blocks: tuple[int, int]) -> None:
    torch.manual_seed(0)
    config = CodecConfig(M=32, M_levels=(32,) * 8, N8=16, N16=24, analysis_blocks=blocks, synthesis_blocks=blocks)
    pixels = torch.from_numpy(np.array(photograph(0, 192, 128)))[None].permute(0, 3, 1, 2)
    for transform, run in (
        (AnalysisTransform(config), lambda g_a: g_a.of_pixels(pixels)),
        (SynthesisTransform(config), lambda g_s: g_s._ways(_integers(1, 32, 8, 12, most=3))[1]),
    ):
        init_unit(transform.body[-1], 30)  # it starts at zero
        prepared = copy.deepcopy(transform)
        prepared.prepare(low_quality=True)
        with torch.inference_mode():
            expected, found = run(transform), run(prepared)
        assert (found - expected).square().mean() < 1e-3 * expected.square().mean()


@pytest.mark.skipif(not multiplies_int8(torch.device("cpu")), reason="needs a CPU that multiplies int8")
def test_blocks_in_int8_depend_on_what_is_near_alone(model: CodecModel) -> None:
    """Or images would be coded otherwise in tiles, batches and beside others."""
    blocks = with_int8_blocks(model.g_s.body)[2]
    assert isinstance(blocks, Int8Blocks)
    x = torch.randn(2, len(blocks.last.weight), 41, 57, generator=torch.Generator().manual_seed(0))
    x[1] *= torch.logspace(-40, 30, 57)  # some columns are all but zeros, others beyond what any image has
    with torch.inference_mode():
        whole, halo = blocks(x), len(blocks.blocks)
        assert torch.equal(blocks(x[1:]), whole[1:])
        tile = blocks(x[:, :, 7:30, 11:50])
    inner = slice(halo, -halo)
    assert torch.equal(tile[:, :, inner, inner], whole[:, :, 7:30, 11:50][:, :, inner, inner])
    assert whole.isfinite().all()


@pytest.mark.skipif(not multiplies_int8(torch.device("cpu")), reason="needs a CPU that multiplies int8")
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_planes_multiply_nearly_as_floats_do(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = scale * torch.randn(40, 768, generator=generator) * torch.logspace(-3, 0, 40)[:, None]
    weight[3] = 0
    bias = torch.randn(40, generator=generator)
    rows = torch.randint(-128, 128, (33, 768), dtype=torch.int8, generator=generator)
    rows[0], rows[1] = -128, 127
    expected = rows.double() @ weight.double().T + bias.double()
    unit = weight.abs().amax(1).double() / 127
    # Each weight is off by half a step of the second plane at most, and what comes out by float32's rounding.
    most = unit / (4 * 127) * rows.double().abs().sum(1, keepdim=True) + 1e-6 * expected.abs() + 1e-6
    assert ((Planes.of(weight, bias).product(rows).double() - expected).abs() <= most).all()
