"""Exactness: the integer network computes the same integers however, and on whatever, it runs.

One machine can decode what another encoded because of this, so it is tested against integer arithmetic itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cotam.codec import Codec
from cotam.config import Q_STEPS
from cotam.image import RGBImage
from cotam.models.causal import CausalPredictor
from cotam.models.entropy_model import MEAN_MAX, MEAN_STEPS, EntropyParameters
from cotam.models.halves import split_halves
from cotam.models.integer import ACCUMULATOR_BOUND, ACTIVATION_MAX, IntConv2d, depthwise_by_shifts
from cotam.models.precision import multiplies_int8
from cotam.weights import TierWeights


class Inputs(NamedTuple):
    """z_hat (B, N_z, hz, wz), q (B, 1, h, w) and y_first (B, M/2, h, w) of the whole integer network."""

    z_hat: Tensor
    q: Tensor
    y_first: Tensor


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Run = Callable[[EntropyParameters, Inputs], list[Tensor]]


@pytest.fixture(scope="module")
def network(tiers: tuple[TierWeights, ...]) -> EntropyParameters:
    return tiers[-1].model.entropy_parameters


@pytest.fixture(scope="module")
def inputs(codec: Codec) -> Inputs:
    """Eight latents of 9x13: four as in photographs, four as extreme as a hostile bitstream can make them."""
    config, generator = codec.config, torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 3.0, 9.0, 27.0, 81.0, 200.0, 1e3, 1e6])[:, None, None, None]
    z_hat = (torch.randn(8, config.N_z, 3, 4, generator=generator) * spread).round()
    y_first = (torch.randn(8, config.M // 2, 9, 13, generator=generator) * spread * MEAN_STEPS).round()
    return Inputs(
        z_hat.clamp(-ACTIVATION_MAX, ACTIVATION_MAX),
        torch.randint(config.num_q, (8, 1, 9, 13), generator=generator).float(),
        y_first.clamp(-(2**18), 2**18),
    )


@torch.no_grad()
def _run(network: EntropyParameters, inputs: Inputs) -> list[Tensor]:
    hyper = network.hyper(inputs.z_hat, inputs.q, *inputs.q.shape[-2:])
    first = network.first_params(hyper, inputs.q)
    second = network.second_params(hyper, inputs.y_first, inputs.q)
    return [*hyper, *first, *second]


def _one_at_a_time(network: EntropyParameters, inputs: Inputs) -> list[Tensor]:
    outputs = [_run(network, Inputs(*(t[k : k + 1] for t in inputs))) for k in range(len(inputs.q))]
    return [torch.cat(tensors) for tensors in zip(*outputs, strict=True)]


def _in_memory_format(memory_format: torch.memory_format) -> Run:
    def run(network: EntropyParameters, inputs: Inputs) -> list[Tensor]:
        network = copy.deepcopy(network).to(memory_format=memory_format)  # type: ignore[call-overload]
        return _run(network, Inputs(*(t.contiguous(memory_format=memory_format) for t in inputs)))

    return run


def _with_threads(num_threads: int) -> Run:
    def run(network: EntropyParameters, inputs: Inputs) -> list[Tensor]:
        torch.set_num_threads(num_threads)
        return _run(network, inputs)

    return run


def _without_mkldnn(network: EntropyParameters, inputs: Inputs) -> list[Tensor]:
    with torch.backends.mkldnn.flags(enabled=False):
        return _run(network, inputs)


def _compiled(network: EntropyParameters, inputs: Inputs) -> list[Tensor]:
    return torch.compile(_run)(network, inputs)  # type: ignore[no-any-return]


def _on_gpu(network: EntropyParameters, inputs: Inputs) -> list[Tensor]:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    return _run(copy.deepcopy(network).cuda(), Inputs(*(t.cuda() for t in inputs)))


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize(
    "run",
    [
        pytest.param(_with_threads(1), id="1 thread"),
        pytest.param(_with_threads(2), id="2 threads"),
        pytest.param(_one_at_a_time, id="batches of 1"),
        pytest.param(_in_memory_format(torch.contiguous_format), id="contiguous"),
        pytest.param(_in_memory_format(torch.channels_last), id="channels_last"),
        pytest.param(_without_mkldnn, id="without oneDNN"),
        pytest.param(_compiled, id="compiled", marks=pytest.mark.slow),
        pytest.param(_on_gpu, id="TF32 on a GPU", marks=[pytest.mark.gpu, NEEDS_GPU]),
    ],
)
def test_network_equals_its_float64_reference(network: EntropyParameters, inputs: Inputs, run: Run) -> None:
    expected = _run(copy.deepcopy(network).double(), Inputs(*(t.double() for t in inputs)))
    for actual, reference in zip(run(network, inputs), expected, strict=True):
        assert len(reference.unique()) > 20, "the inputs do not exercise the network"
        assert torch.equal(actual.cpu().double(), reference)


def test_every_layer_equals_integer_arithmetic(network: EntropyParameters) -> None:
    """Also for the inputs that drive one channel's accumulator to its extreme."""
    generator = torch.Generator().manual_seed(0)
    layers = [m for m in network.modules() if isinstance(m, IntConv2d)]
    assert len(layers) > 10
    for layer in layers:
        weight = layer.frozen_integers().weight
        num_in = len(weight) if layer.depthwise else weight.shape[1]
        x = torch.randint(-ACTIVATION_MAX, ACTIVATION_MAX + 1, (2, num_in, 5, 6), generator=generator).float()
        x[1] = ACTIVATION_MAX * (weight[:, 0, :1, :1] if layer.depthwise else weight[0]).sign()
        q = torch.randint(0, 29, (2, 1, 5, 6), generator=generator).float()
        with torch.inference_mode():
            actual = layer(x, q).numpy()
            if layer.depthwise:
                integers = layer.frozen_integers()
                kernel = integers.weight.float(), integers.bias.float()
                expected = F.conv2d(x, *kernel, padding=1, groups=num_in)
                np.testing.assert_array_equal(depthwise_by_shifts(x, *kernel), expected)  # as on a GPU
            else:
                x_rows, q_rows = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (x, q))
                rows = layer.pointwise(x_rows.split([3, num_in - 3], dim=1), q_rows, parity=1)
                np.testing.assert_array_equal(rows.unflatten(0, (2, 5, 6)).permute(0, 3, 1, 2), actual[:, 1::2])
        np.testing.assert_array_equal(
            actual, _integer_conv(layer, x.numpy().astype(np.int64), q.numpy().astype(np.int64))
        )


def _integer_conv(layer: IntConv2d, x: NDArray[np.int64], q: NDArray[np.int64]) -> NDArray[np.int64]:
    weight, bias, gain = (t.numpy().astype(np.int64) for t in layer.frozen_integers()[:3])
    exponent = np.log2(layer.frozen_integers().scale.numpy()).astype(np.int64)[:, None, None]
    if layer.depthwise:
        _, _, h, w = x.shape
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        acc = sum(
            weight[:, 0, i, j, None, None] * padded[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)
        )
    else:
        acc = np.einsum("oi,bihw->bohw", weight[:, :, 0, 0], x)
    acc = acc + bias[:, None, None] + (q * gain[:, None, None] if layer.quality_bias else 0)
    assert np.abs(acc).max() < ACCUMULATOR_BOUND
    shift = np.maximum(-exponent, 0)  # round half to even, in integers
    half_even = np.where(shift > 0, (1 << np.maximum(shift - 1, 0)) - 1 + (acc >> shift & 1), 0)
    return np.clip((acc << np.maximum(exponent, 0)) + half_even >> shift, layer.low, layer.high)


@pytest.mark.parametrize(("num_in", "weight"), [(1041, 127.0), (4, float("nan"))])
def test_layer_that_could_overflow_is_refused(num_in: int, weight: float) -> None:
    layer = IntConv2d(num_in, 2, low=-MEAN_MAX, high=MEAN_MAX)
    with torch.no_grad():
        layer.weight.fill_(weight)
    with pytest.raises(ValueError, match=r"accumulator bound .* reaches 2\^24"):
        layer.freeze()


def test_largest_layer_that_cannot_overflow_is_exact() -> None:
    """1040 * 127 * 127 is just below 2^24: every summand and the sum stay exact in float32."""
    layer = IntConv2d(1040, 2, low=-MEAN_MAX, high=MEAN_MAX)
    with torch.no_grad():
        layer.weight.fill_(127.0)
    layer.freeze()
    x = torch.full((1, 1040, 1, 1), float(ACTIVATION_MAX))
    x[0, ::2] -= 1
    with torch.inference_mode():
        actual = layer(x).numpy()
    np.testing.assert_array_equal(
        actual, _integer_conv(layer, x.numpy().astype(np.int64), np.zeros((1, 1, 1, 1), np.int64))
    )


def test_a_model_cut_to_fewer_channels_computes_the_same_integers(
    codec: Codec, network: EntropyParameters, inputs: Inputs
) -> None:
    whole = network
    for num_channels, model in codec.tiers[-1].models.items():
        highest = max(q for q in range(codec.config.num_q) if codec.config.num_channels(q) == num_channels)
        q = inputs.q.clamp_max(highest)
        y_first = inputs.y_first * whole.in_use(q)  # what is not there has no symbols
        expected = _run(whole, Inputs(inputs.z_hat, q, y_first))
        actual = _run(model.entropy_parameters, Inputs(inputs.z_hat, q, y_first[:, : num_channels // 2]))
        assert torch.equal(actual[0], expected[0])
        for cut, full in zip(actual[1:], expected[1:], strict=True):
            assert cut.shape[1] == num_channels // 2
            assert torch.equal(cut, full[:, : num_channels // 2])
            assert not full[:, num_channels // 2 :].any()


@pytest.mark.parametrize("tier", range(8))
def test_hidden_layers_neither_idle_nor_clip(
    tiers: tuple[TierWeights, ...], photos: dict[str, RGBImage], tier: int
) -> None:
    """Activations that round to 0 say nothing, nor do those at the end of their range."""
    lowest, highest, model, _ = tiers[tier]
    seen: dict[str, Tensor] = {}
    network = copy.deepcopy(model.entropy_parameters)
    for name, layer in network.named_modules():
        if isinstance(layer, IntConv2d) and layer.high == ACTIVATION_MAX and name != "context":  # latents are mostly 0
            for method in ("forward", "pointwise"):
                compute = getattr(layer, method)

                def keep(*inputs: Any, name: str = name, compute: Callable[..., Tensor] = compute) -> Tensor:
                    seen[name] = compute(*inputs)
                    return seen[name]

                setattr(layer, method, keep)
    x = torch.from_numpy(photos["astronaut"]).permute(2, 0, 1)[None].float() / 255
    for quality in {math.ceil(lowest), math.floor(highest)}:
        q = torch.full((1, 1, x.shape[2] // 16, x.shape[3] // 16), (quality - 1.0) * Q_STEPS)
        with torch.no_grad():
            y = model.g_a(x).float() * model.gains.gain(q)
            hyper = network.hyper(model.h_a(y).round(), q, *y.shape[2:])
            params = network.first_params(hyper, q)
            first = model.y_fixed(model._search(split_halves(y)[0] - params.means / MEAN_STEPS, params)[0], params)
            network.second_params(hyper, first, q)
        assert len(seen) == 9
        for name, out in seen.items():
            assert float((out == 0).float().mean()) < 0.7, f"{name} idles at quality {quality}"
            assert float((out.abs() == ACTIVATION_MAX).float().mean()) < 0.002, f"{name} clips at quality {quality}"


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (6, 9)])
def test_the_hyper_latent_comes_back_from_what_it_differs_by_from_its_prediction(
    tiers: tuple[TierWeights, ...], shape: tuple[int, int]
) -> None:
    model, generator = tiers[-1].model, torch.Generator().manual_seed(1)
    integers, num_channels = model.z_context.frozen_integers(), model.config.N_z
    assert integers.weight.unflatten(0, (num_channels, -1)).flatten(2).any(-1).any(0).all(), "a level predicts nothing"
    for spread in (1.0, 5.0, 200.0):
        z = torch.randn(1, num_channels, *shape, generator=generator) * spread
        z = z.round().clamp(-ACTIVATION_MAX, ACTIVATION_MAX)
        q = torch.randint(model.config.num_q, (1, 1, 4 * shape[0], 4 * shape[1]), generator=generator).float()
        residuals = (z - model.z_prediction(z, q))[0].short().numpy()
        restored = CausalPredictor(integers, num_channels).restore(residuals, model.z_levels(q)[0].numpy())
        np.testing.assert_array_equal(restored, z[0].numpy())


@pytest.mark.skipif(not multiplies_int8(torch.device("cpu")), reason="needs a CPU that multiplies int8")
def test_layers_multiply_int8_where_the_hardware_does(network: EntropyParameters, inputs: Inputs) -> None:
    """The same integers as in float32; and that this path is taken is what makes the codec fast."""
    pointwise = [m for m in network.modules() if isinstance(m, IntConv2d) and not m.depthwise]
    assert len(pointwise) == 12
    assert all(layer.current_kernel().products is not None for layer in pointwise)
    in_float = copy.deepcopy(network)
    for layer in in_float.modules():
        if isinstance(layer, IntConv2d):
            layer._kernel = layer.current_kernel()._replace(products=None)
    for actual, expected in zip(_run(network, inputs), _run(in_float, inputs), strict=True):
        assert expected.dtype == torch.float32 and torch.equal(actual.float(), expected)


def test_hardware_that_saturates_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that sums pairs of products in 16 bits would give other integers: nobody could decode its files."""
    monkeypatch.setattr("cotam.models.precision._cpu_flags", lambda: frozenset({"avx_vnni"}))

    def saturating(a: Tensor, b: Tensor) -> Tensor:
        # AVX2 without VNNI multiplies unsigned by signed bytes, so 128 is added to one side and taken off at the end.
        shifted, b = (a.float() + 128).unflatten(1, (-1, 2)), b.float().unflatten(0, (-1, 2))
        pairs = torch.einsum("mkp,kpn->kmn", shifted, b).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(0) - 128 * b.sum((0, 1))).int()

    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.double() @ b.double()).int())
    assert multiplies_int8.__wrapped__(torch.device("cpu"))
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not multiplies_int8.__wrapped__(torch.device("cpu"))
