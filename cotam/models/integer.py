"""Integer-exact convolutions: the same integers on every machine, in any order of summation.

Activations are integers in [-127, 127] held in float32, or in int8 in inference on a CPU; where it multiplies matrices
of int8 1x1 layers do, several times faster than in float32, with the same integers. A layer is

    acc = conv(x, W_int) + b_int + q * g_int          |acc| < 2^24, so float32 and TF32 sums are exact in any order
    out = clip(round(acc * 2^e), low, high)           2^e per output channel: multiplying by it is exact, too

with W_int, g_int in [-127, 127] and ``q`` the quality index of the position. Training runs this very forward pass, with
straight-through gradients to the real-valued parameters behind the integers, so nothing changes at export.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cotam.entropy.compiled import compiled
from cotam.models.layers import channels_last_array, clamp_ste, in_one_pass, round_ste, untraced
from cotam.models.precision import multiplies_int8

ACTIVATION_MAX = 127  # numba's cache of context.py notices no change of it
ACCUMULATOR_BOUND = 2**24
BIAS_UNIT = 16  # a real bias of 1 is 16 integer steps, so that biases learn at the pace of weights
MIN_EXPONENT = -14  # keeps integer biases small enough for the accumulator
MAX_EXPONENT = 8
_NONE = np.empty(0, dtype=np.float32)
_CAUSAL = ((1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0))


class Integers(NamedTuple):
    """What a layer computes with: integers as float32, and the output scale 2^e.

    weight: (O, I, k, k) in [-127, 127]; bias: (O,); gain: (O,) in [-127, 127]; scale: (O,) powers of two.
    """

    weight: Tensor
    bias: Tensor
    gain: Tensor
    scale: Tensor


class Int8Product(NamedTuple):
    """Channels of a 1x1 layer as a product of int8 matrices, and what finishes it.

    weight: int8 (I, O), the integers themselves. scale, bias, gain: float32 (O,): 2^e, and the others times 2^e.
    """

    weight: Tensor
    scale: NDArray[np.float32]
    bias: NDArray[np.float32]
    gain: NDArray[np.float32]


class Int8Products(NamedTuple):
    """Of a 1x1 layer: of its even output channels, its odd ones, and all of them."""

    even: Int8Product
    odd: Int8Product
    every: Int8Product


class Kernel(NamedTuple):
    """The integers times 2^e, which changes no mantissa, so sums stay exact: one operation less at every position.

    products: of a 1x1 layer where the hardware multiplies int8.
    """

    weight: Tensor
    bias: Tensor
    gain: Tensor
    products: Int8Products | None = None

    @classmethod
    def of(cls, ints: Integers) -> Kernel:
        """The kernel of a layer's integers."""
        scale = ints.scale
        return cls(ints.weight * scale[:, None, None, None], ints.bias * scale, ints.gain * scale)

    @classmethod
    def for_inference(cls, ints: Integers) -> Kernel:
        """The kernel in what the hardware multiplies."""
        kernel, weight = cls.of(ints), ints.weight
        if weight.shape[2:] != (1, 1) or weight.dtype != torch.float32 or not multiplies_int8(weight.device):
            return kernel

        def product(channels: slice) -> Int8Product:
            of_channels = (t[channels].contiguous().numpy() for t in (ints.scale, kernel.bias, kernel.gain))
            return Int8Product(weight[channels, :, 0, 0].to(torch.int8).contiguous().T, *of_channels)

        products = Int8Products(*map(product, (slice(0, None, 2), slice(1, None, 2), slice(None))))
        return kernel._replace(products=products)


class IntConv2d(nn.Module):
    """A 1x1 or depthwise 3x3 convolution on integers, with a bias that may depend on the quality index.

    Args:
        in_channels, out_channels: channel counts.
        depthwise: 3x3 with out_channels / in_channels filters a channel, which follow each other, instead of 1x1.
        causal: of the 3x3 positions only those before the middle one in raster order have weights.
        low, high: output clip; (0, 127) is a ReLU that stays in range, (-127, 127) a linear layer.
        quality_bias: add ``q`` times a learned integer to every position.
        unit: factor from a parameter to its integer-valued weight; near the ratio of output to input scale, so that
            parameters start near 1.
        in_steps, out_steps: how many integers make 1 in the input and in the output, as the parameters see them: enough
            that rounding loses nothing, few enough that the clip does not.
    """

    _mask: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        depthwise: bool = False,
        causal: bool = False,
        low: int = 0,
        high: int = ACTIVATION_MAX,
        quality_bias: bool = False,
        unit: float = 1.0,
        in_steps: int = 1,
        out_steps: int = 1,
    ) -> None:
        super().__init__()
        if depthwise and out_channels % in_channels:
            raise ValueError("a depthwise layer has a whole number of filters a channel")
        self.depthwise, self.low, self.high, self.quality_bias = depthwise, low, high, quality_bias
        # Factors that turn parameters into the unrounded integer weights, biases and gains.
        self.units = {"weight": unit * out_steps / in_steps, "bias": BIAS_UNIT * out_steps, "gain": out_steps}
        self.register_buffer("_mask", torch.tensor(_CAUSAL) if causal else None, persistent=False)
        shape = (out_channels, 1, 3, 3) if depthwise else (out_channels, in_channels, 1, 1)
        fan_in = 9 if depthwise else in_channels
        self.weight = nn.Parameter(torch.randn(shape) * (2 / fan_in) ** 0.5 * 0.7)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.gain = nn.Parameter(torch.zeros(out_channels), requires_grad=quality_bias)
        self._frozen: Integers | None = None
        self._kernel: Kernel | None = None

    def integers(self) -> Integers:
        """The integers of the current parameters; differentiable by straight-through rounding."""
        weight = (self.weight if self._mask is None else self.weight * self._mask) * self.units["weight"]
        bias, gain = self.bias * self.units["bias"], self.gain * self.units["gain"]
        with torch.no_grad():
            peak = torch.maximum(weight.abs().amax(dim=(1, 2, 3)), gain.abs())
            # frexp is exact, so every machine derives the same e: peak / 127.5 = m * 2^e with m in [0.5, 1). Then the
            # largest integer is in [64, 127], and quantising the integers times 2^e once more gives the same integers.
            exponent = torch.frexp(peak / (ACTIVATION_MAX + 0.5)).exponent.clamp(MIN_EXPONENT, MAX_EXPONENT)
            exponent = exponent.where(peak > 0, MIN_EXPONENT)  # weights too small for any integer come back as zeros
            scale = torch.ldexp(torch.ones_like(peak), exponent)
        integers = round_ste(weight / scale[:, None, None, None])
        return Integers(integers, round_ste(bias / scale), round_ste(gain / scale), scale)

    def freeze(self) -> None:
        """Fix the integers for inference, after checking that no input can overflow the accumulator.

        Raises:
            ValueError: the bound sum|W| * 127 + |b| + 127 |g| reaches 2^24 in some channel.
        """
        with torch.no_grad():
            ints = Integers(*(t.detach().clone() for t in self.integers()))
        bound = ints.weight.abs().sum(dim=(1, 2, 3), dtype=torch.float64) * ACTIVATION_MAX
        bound += ints.bias.abs() + ints.gain.abs() * ACTIVATION_MAX
        if not bool((bound < ACCUMULATOR_BOUND).all()):  # NaN fails, too
            raise ValueError(f"integer layer can overflow: accumulator bound {bound.max():.0f} reaches 2^24")
        self.freeze_as(ints)

    def freeze_as(self, ints: Integers) -> None:
        """Fix these integers for inference; that they cannot overflow has been checked."""
        self._frozen, self._kernel = ints, Kernel.for_inference(ints)

    def frozen_integers(self) -> Integers:
        """The integers fixed by ``freeze``."""
        assert self._frozen is not None, "freeze() first"
        return self._frozen

    def train(self, mode: bool = True) -> IntConv2d:
        """Training thaws the integers: they follow the parameters again."""
        if mode:
            self._frozen = self._kernel = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        if self._frozen is not None:  # follow the module to another device
            self.freeze_as(Integers(*(fn(t) for t in self._frozen)))
        return self

    def forward(self, x: Tensor, q: Tensor | None = None) -> Tensor:
        """(B, I, h, w) integers, ``q`` (B, 1, h, w) or (B, 1, 1, 1), to (B, O, h, w) integers, in float32 or int8."""
        kernel = self.current_kernel()
        if kernel.products is not None and not torch.is_grad_enabled():
            batch, _, height, width = x.shape
            q_rows = None if q is None else q.expand(batch, 1, height, width).reshape(-1, 1)
            rows = self._by_int8(kernel.products.every, [x.permute(0, 2, 3, 1).flatten(0, 2)], q_rows)
            return rows.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)
        if self.depthwise and self.weight.shape[0] == x.shape[1] and in_one_pass(kernel.weight):
            return self.by_one_filter(x, 0)
        x = x.to(kernel.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):  # 8 bits of bfloat16 do not hold these integers
            if self.depthwise and x.is_cuda and not torch.is_grad_enabled():
                out = depthwise_by_shifts(x, kernel.weight, kernel.bias)
            elif self.depthwise:
                out = F.conv2d(x, kernel.weight, kernel.bias, padding=1, groups=x.shape[1])
            else:
                out = F.conv2d(x, kernel.weight, kernel.bias)
            if self.quality_bias:
                assert q is not None
                out = out + q * kernel.gain[:, None, None]
        return self._round(out)

    def as_input(self, x: Tensor) -> Tensor:
        """``x`` in the type that ``pointwise`` multiplies: what is moved before it is then a quarter as large."""
        kernel = self.current_kernel()
        return x.to(torch.int8 if kernel.products is not None and not torch.is_grad_enabled() else kernel.weight.dtype)

    def pointwise(self, inputs: Sequence[Tensor], q: Tensor, parity: int | None = None) -> Tensor:
        """A 1x1 layer on rows: ``inputs`` (n, I_k) side by side make the I channels, ``q`` (n, 1); (n, O) comes out.

        ``inputs`` are float32 or ``as_input`` of it. With ``parity`` the even or the odd output channels alone.
        """
        kernel = self.current_kernel()
        if kernel.products is not None and not torch.is_grad_enabled():
            product = kernel.products.every if parity is None else kernel.products[parity]
            return self._by_int8(product, inputs, q)
        channels = slice(parity, None, None if parity is None else 2)
        with torch.autocast(q.device.type, enabled=False):
            weights = kernel.weight[channels, :, 0, 0].T.split([x.shape[1] for x in inputs])
            out = kernel.bias[channels].expand(len(q), -1)
            for x, weight in zip(inputs, weights, strict=True):
                out = torch.addmm(out, x, weight)
            if self.quality_bias:
                out = torch.addr(out, q[:, 0], kernel.gain[channels])
        return self._round(out)

    @untraced
    def _by_int8(self, product: Int8Product, inputs: Sequence[Tensor], q: Tensor | None) -> Tensor:
        """``pointwise`` in int8, summed in int32; int8 comes out where it holds the layer's range, else float32."""
        x = [x.to(torch.int8) for x in inputs]
        sums = torch._int_mm(torch.cat(x, dim=1) if len(x) > 1 else x[0], product.weight).numpy()
        of_rows = _NONE
        if self.quality_bias:
            assert q is not None
            of_rows = q[:, 0].contiguous().numpy()
        compact = max(-self.low, self.high) <= ACTIVATION_MAX
        out = np.empty(sums.shape, dtype=np.int8 if compact else np.float32)
        _finish(sums, *product[1:], of_rows, np.float32(self.low), np.float32(self.high), out)
        return torch.from_numpy(out)

    def by_one_filter(self, x: Tensor, which: int) -> Tensor:
        """A depthwise layer with one of the filters that each channel of ``x`` has: int8 (B, I, h, w). On a CPU."""
        assert not self.quality_bias and max(-self.low, self.high) <= ACTIVATION_MAX
        kernel = self.current_kernel()
        batch, channels, height, width = x.shape
        filters = len(kernel.bias) // channels
        padded = np.zeros((batch, height + 2, width + 2, channels), dtype=np.int8)
        padded[:, 1:-1, 1:-1] = channels_last_array(x)
        out = np.empty((batch, height, width, channels), dtype=np.int8)
        weight, bias = kernel.weight[which::filters].flatten(1).T.contiguous(), kernel.bias[which::filters].contiguous()
        _depthwise(padded, weight.numpy(), bias.numpy(), np.float32(self.low), np.float32(self.high), out)
        return torch.from_numpy(out).permute(0, 3, 1, 2)

    def current_kernel(self) -> Kernel:
        """What it computes with now."""
        return self._kernel if self._kernel is not None else Kernel.of(self.integers())

    def _round(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return clamp_ste(round_ste(x), self.low, self.high)
        return x.round_().clamp_(self.low, self.high)


def depthwise_by_shifts(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A depthwise 3x3 convolution, (B, I, h, w) to (B, O, h, w), that cannot round.

    cuDNN may choose an algorithm that transforms its input, and may be kept from it for a whole process only.
    """
    filters = weight.shape[0] // x.shape[1]
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    if filters > 1:
        padded = padded.repeat_interleave(filters, dim=1)
    out = bias[:, None, None].expand(len(x), -1, height, width)
    for row in range(3):
        for column in range(3):
            shifted = padded[:, :, row : row + height, column : column + width]
            out = torch.addcmul(out, shifted, weight[:, 0, row, column][:, None, None])
    return out


@compiled
def to_int8(value, low, high):  # type: ignore[no-untyped-def]
    """``value`` rounded to the nearest integer, half to even, in [low, high]; all float32.

    Numba's cache of context.py notices no change here.
    """
    value = np.rint(value)
    value = value if value > low else low
    return np.int8(np.int32(value if value < high else high))


# One pass through memory each, where torch makes one an operation.


@compiled
def _depthwise(x, weight, bias, low, high, out):  # type: ignore[no-untyped-def]
    """3x3, of ``x`` (B, h + 2, w + 2, C), which has a border."""
    for b in range(out.shape[0]):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                values = out[b, i, j]
                x0, x1, x2 = x[b, i, j], x[b, i, j + 1], x[b, i, j + 2]
                x3, x4, x5 = x[b, i + 1, j], x[b, i + 1, j + 1], x[b, i + 1, j + 2]
                x6, x7, x8 = x[b, i + 2, j], x[b, i + 2, j + 1], x[b, i + 2, j + 2]
                for k in range(values.shape[0]):
                    value = bias[k] + weight[0, k] * np.float32(x0[k]) + weight[1, k] * np.float32(x1[k])
                    value += weight[2, k] * np.float32(x2[k]) + weight[3, k] * np.float32(x3[k])
                    value += weight[4, k] * np.float32(x4[k]) + weight[5, k] * np.float32(x5[k])
                    value += weight[6, k] * np.float32(x6[k]) + weight[7, k] * np.float32(x7[k])
                    value += weight[8, k] * np.float32(x8[k])
                    values[k] = to_int8(value, low, high)


@compiled
def _finish(sums, scale, bias, gain, q, low, high, out):  # type: ignore[no-untyped-def]
    for i in range(sums.shape[0]):
        q_row = q[i] if len(q) > 0 else np.float32(0)
        for o in range(sums.shape[1]):
            value = np.rint(bias[o] + np.float32(sums[i, o]) * scale[o] + q_row * gain[o])
            out[i, o] = min(max(value, low), high)
