"""A float matrix as two of int8, for products with int8 rows: nearly float32's precision in a fraction of its time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotam.entropy.compiled import compiled

_MAX = 127
_FINER = 2 * _MAX  # so many steps of the second plane make one of the first


class Planes(NamedTuple):
    """A linear layer for int8 rows.

    weight: int8 (I, 2 O), of all outputs the leading digits, then what they lack. scale, bias: float32 (O,).
    """

    weight: Tensor
    scale: NDArray[np.float32]
    bias: NDArray[np.float32]

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor) -> Planes:
        """The planes of ``weight`` (O, I), off by at most 1/500 of a 127th of the largest of its row."""
        scale = (weight.abs().amax(1, keepdim=True) / _MAX).clamp_min(1e-30)
        leading = (weight / scale).round()
        rest = ((weight / scale - leading) * _FINER).round()
        planes = torch.cat([leading, rest]).to(torch.int8).contiguous()
        return cls(planes.T, scale[:, 0].float().numpy(), bias.float().numpy())

    def product(self, rows: Tensor) -> Tensor:
        """Of int8 ``rows`` (n, I): float32 (n, O). Sums are exact: I has to stay below 2^17."""
        sums = torch._int_mm(rows, self.weight).numpy()
        out = np.empty((len(sums), len(self.scale)), dtype=np.float32)
        _put_together(sums, self.scale, self.bias, np.float32(1 / _FINER), out)
        return torch.from_numpy(out)


@compiled
def _put_together(sums, scale, bias, finer, out):  # type: ignore[no-untyped-def]
    num = out.shape[1]
    for i in range(out.shape[0]):
        leading, rest, values = sums[i, :num], sums[i, num:], out[i]
        for k in range(num):
            values[k] = (np.float32(leading[k]) + np.float32(rest[k]) * finer) * scale[k] + bias[k]
