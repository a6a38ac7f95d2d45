"""Building blocks of the floating-point transforms and the straight-through helpers of training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., object])
Module = TypeVar("Module", bound=nn.Module)


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes through unchanged."""
    rounded = torch.round(x)
    return x + (rounded - x).detach() if torch.is_grad_enabled() else rounded


def clamp_ste(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp, with the gradient kept where it leads back into the range."""
    return _ClampSTE.apply(x, low, high)


class _ClampSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.low, ctx.high = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        (grad,) = grads
        # A step of gradient descent moves x by -grad: outside the range only inward moves are let through.
        keep = ((x >= ctx.low) | (grad < 0)) & ((x <= ctx.high) | (grad > 0))
        return grad * keep, None, None


class Analysis(nn.Module):
    """A ``g_a``: float RGB (B, 3, H, W) in [0, 1], H and W multiples of 16, to ``y`` (B, M, H/16, W/16)."""

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """``y`` of ``pixels``, uint8 (B, 3, H, W), in float32."""
        y: Tensor = self(pixels.float().div_(255)).float()
        return y

    def prepare(self, low_quality: bool) -> None:
        """Let ``of_pixels`` compute as is fast on this CPU, for good: weights are rounded, and no longer looked at.

        ``low_quality``: the qualities of all images will be low enough for int8.
        """


class Synthesis(nn.Module):
    """A ``g_s``: ``y_hat`` (B, M, h, w) to float RGB (B, 3, 16 h, 16 w), not clipped."""

    def pixels(self, y_hat: Tensor) -> Tensor:
        """The image that it makes of ``y_hat``, uint8 (B, 3, 16 h, 16 w)."""
        return self(y_hat).float().mul_(255).round_().clamp_(0, 255).to(torch.uint8)

    def prepare(self, low_quality: bool) -> None:
        """As ``Analysis.prepare``, for ``pixels``."""


class DepthwiseBlock(nn.Module):
    """Residual block: depthwise 3x3, gated 1x1 expansion, 1x1 projection; (B, N, H, W) in and out, 3 N^2 + 9 N MACs."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(num_channels, num_channels, 3, padding=1, groups=num_channels)
        self.expand = nn.Conv2d(num_channels, 2 * num_channels, 1)
        self.project = nn.Conv2d(num_channels, num_channels, 1)
        for conv, gain in ((self.spatial, 1.0), (self.expand, 1.0), (self.project, 0.3)):
            init_unit(conv, gain)  # a branch starts small, so that depth does not amplify noise

    def forward(self, x: Tensor) -> Tensor:
        # Bounded gates: with unbounded ones a stack of blocks is a polynomial, and one extreme crop ends a training.
        return x + self.project(_glu(self.expand(self.spatial(x))))


def _glu(x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return F.glu(x, dim=1)
    a, b = x.chunk(2, dim=1)
    return a * torch.sigmoid(b)  # on a CPU the backward pass of F.glu takes twice as long


def init_unit(conv: nn.Conv2d, gain: float = 1.0) -> nn.Conv2d:
    """Start a convolution so that unit-variance inputs give outputs of deviation ``gain``; returns it.

    torch's default shrinks a signal by the square root of 3 in every layer.
    """
    nn.init.normal_(conv.weight, std=gain / conv.weight[0].numel() ** 0.5)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def start_at_zero(conv: Module) -> Module:
    """Set a convolution's parameters to zero, so that what it ends adds nothing at first; returns it."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


def join_blocks(blocks: Tensor, side: int) -> Tensor:
    """(B, 3 side^2, h, w), channels in the order row, column, colour, to images (B, 3, side h, side w), channels last.

    In that order whole rows of a block are copied at once: four times faster than ``pixel_shuffle``.
    """
    b, _, h, w = blocks.shape
    grid = blocks.permute(0, 2, 3, 1).reshape(b, h, w, side, side * 3)
    return grid.transpose(2, 3).reshape(b, h * side, w * side, 3).permute(0, 3, 1, 2)


def in_one_pass(x: Tensor) -> bool:
    """Whether compiled loops, which go through memory once, stand in for torch's operations: in inference on a CPU."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.uint8)


def untraced(function: Function) -> Function:
    """``function``, which torch.compile calls as it is.

    As ``torch.compiler.disable`` does, which imports torch's whole compiler where it is written: a second, 160 MiB.
    """

    @functools.wraps(function)
    def call(*arguments: Any) -> object:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*arguments)
        return function(*arguments)

    return cast(Function, call)


def channels_last_array(x: Tensor) -> NDArray[Any]:
    """(B, C, h, w) on a CPU as a contiguous array (B, h, w, C)."""
    return x.permute(0, 2, 3, 1).contiguous().numpy()


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Replicate the last row and column of (B, C, H, W) until H and W are multiples of ``multiple``."""
    bottom, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x
