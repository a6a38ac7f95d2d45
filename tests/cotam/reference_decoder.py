"""A second decoder, written from docs/format.md alone: numpy and int64, one symbol after another.

It shares nothing with the package but the file of weights, so the document is complete and true as long as both agree.
"""

from __future__ import annotations

import json
import math
import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

Ints = NDArray[np.int64]


_AROUND = ((0, 0, 1), (0, 1, 2), (0, 2, 1), (1, 0, 2))  # in a grid with a border: above left, above, above right, left


class Decoded(NamedTuple):
    """``y_fixed`` (M, h, w) in both halves, quality indexes (h, w), and the size of the image."""

    y_fixed: Ints
    quality_index: Ints
    width: int
    height: int


class ReferenceDecoder:
    """Decodes bitstreams with the bytes of a codec file."""

    def __init__(self, weights: bytes) -> None:
        self.every = load(weights)
        header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
        config = json.loads(header["__metadata__"]["config"])
        self.num_levels, self.num_z = len(config["lmbdas"]), config["N_z"]
        self.levels = np.array(config["M_levels"] or [config["M"]] * self.num_levels)

    def decode(self, data: bytes) -> Decoded:
        """The integers of one bitstream."""
        assert data[0] == 6 and zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little")
        flags, lowest = data[5], data[6]
        tier = f"{flags >> 3}."
        self.arrays = {name.removeprefix(tier): a for name, a in self.every.items() if name.startswith(tier)}
        self.num_channels = self.arrays["gains.log_gain"].shape[1]
        width, at = _varint(data, 7)
        height, at = _varint(data, at)
        h, w = -(-height // 16), -(-width // 16)
        has_map = bool(flags & 4)
        rans = _Rans(data[at + has_map : -4], 1 << (flags & 3), self.arrays)
        q = np.full((h, w), lowest)
        if has_map:
            q += _quality_map(rans, data[at] & 63, h, w) << (data[at] >> 6)
        bottom, right = -h % 4, -w % 4
        q_padded = np.pad(q, ((0, bottom), (0, right)), "edge")
        z = self._z(rans, q_padded)

        x = _shuffle(self._layer("h_s.up1", z))
        x = self._layer("h_s.mix1", self._layer("h_s.spatial1", x, low=-127))
        x = _shuffle(self._layer("h_s.up2", x))
        features = self._layer("h_s.mix2", self._layer("h_s.spatial2", x, low=-127), q_padded)[:, :h, :w]
        coarse = _interpolate(self._layer("h_s.coarse", z, low=-32767, high=32767))[:, :h, :w]
        channels = np.arange(self.num_channels)[:, None, None]
        in_use = channels < self.levels[-(-q // 4)]
        coarse = coarse * in_use

        parity = np.add.outer(np.arange(h), np.arange(w)) % 2
        is_first = (channels + parity) % 2 == 0
        half = np.where(is_first, self._half(rans, "first", features, coarse, q, in_use, parity), 0)
        fine = np.where(is_first, half - coarse, 0)
        views = np.concatenate([fine, _shifted(fine, np.array(-4)), abs(fine)]).clip(-127, 127)
        context = self._layer("squeeze", self._layer("context", views, low=-127), low=-127)
        inputs = np.concatenate([features, context])
        second = self._half(rans, "second", inputs, coarse, q, in_use, 1 - parity)
        rans.finish()
        return Decoded(np.where(is_first, half, second), q, width, height)

    def _z(self, rans: _Rans, q: Ints) -> Ints:
        h, w = q.shape[0] // 4, q.shape[1] // 4
        mean = q.reshape(h, 4, w, 4).sum((1, 3)) / 16
        levels = np.floor(mean / 4 + 0.5).astype(int)
        indexes, layer = self.arrays["z_indexes"].astype(int), "z_context"
        weight, bias, exponent = (self.arrays[f"{layer}.{k}"].astype(np.int64) for k in ("weight", "bias", "exponent"))
        z = np.zeros((self.num_z, h + 1, w + 2), np.int64)  # zeros above, left and right
        means = [rans.mean_magnitude(192 + k) for k in range(64)]
        inside = np.pad(np.ones((h, w), np.int64), ((1, 0), (1, 1)))
        sums, counts = np.zeros((2, h, w), np.int64)
        rans.begin()
        for c in range(self.num_z):
            near = np.zeros((h + 1, w + 2), np.int64)
            for i in range(h):
                for j in range(w):
                    at = c * self.num_levels + levels[i, j]
                    before = weight[at, 0, 0] @ z[c, i, j : j + 3] + weight[at, 0, 1, 0] * z[c, i + 1, j]
                    predicted = _shifted(before + bias[at], exponent[at]).clip(-127, 127)
                    around = sum(n * near[i + a, j + b] for a, b, n in _AROUND) + 32
                    around //= sum(n * inside[i + a, j + b] for a, b, n in _AROUND) + 2
                    beside = [(max(i - 1, 0), j), (min(i + 1, h - 1), j), (i, max(j - 1, 0)), (i, min(j + 1, w - 1))]
                    in_others = 4 * sums[i, j] + sum(sums[at] for at in beside) + 1024
                    activity = around + 2 * (in_others // (8 * (counts[i, j] + 8)))
                    k = indexes[levels[i, j], c]
                    residual = rans.symbol(128 + min(max(k + round(4 * math.log2(activity / 48)), 0), 63))
                    z[c, i + 1, j + 1] = predicted + residual
                    near[i + 1, j + 1] = min((abs(residual) << 20) // max(means[k], 4096), 96)
            counting = np.array(means)[indexes[levels, c]] >= 4096
            counts += counting
            sums += counting * near[1:, 1:-1]
        return z[:, 1:, 1:-1]

    def _half(
        self, rans: _Rans, name: str, inputs: Ints, coarse: Ints, q: Ints, in_use: NDArray[np.bool_], parity: Ints
    ) -> Ints:
        """``y_fixed`` where a half is; channel 2k + parity of every position, for every k."""
        inputs = np.concatenate([inputs, self._layer(f"{name}.mix", inputs, q)])
        means = self._layer(f"{name}.means", inputs, low=-32767, high=32767) * in_use
        rows = self._layer(f"{name}.indexes", inputs, q, high=63) * in_use
        levels = np.zeros_like(means)
        rans.begin()
        num_coded, states = 0, [0] * 4
        for i, j in np.ndindex(q.shape):
            for c in range(parity[i, j], self.num_channels, 2):
                if rows[c, i, j] >= 6:
                    state = states[num_coded % 4]
                    odd = (state & 0x375).bit_count() % 2
                    symbol = rans.symbol(int(rows[c, i, j]) + 64 * odd)
                    levels[c, i, j] = 2 * symbol - odd * np.sign(symbol)
                    bit = (symbol + odd + (state & 0x691).bit_count()) % 2
                    states[num_coded % 4] = (2 * state + bit) % 2048
                    num_coded += 1
        return 5 * levels + np.sign(levels) + means + coarse

    def _layer(self, name: str, x: Ints, q: Ints | None = None, low: int = 0, high: int = 127) -> Ints:
        weight, bias, gain, exponent = (
            self.arrays[f"entropy_parameters.{name}.{k}"].astype(np.int64)
            for k in ("weight", "bias", "gain", "exponent")
        )
        if weight.shape[2] == 1:
            acc = np.einsum("oi,ihw->ohw", weight[:, :, 0, 0], x)
        else:
            _, h, w = x.shape
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
            shifts = [(i, j) for i in range(3) for j in range(3)]
            acc = sum((weight[:, 0, i, j, None, None] * padded[:, i : i + h, j : j + w] for i, j in shifts), 0 * x)
        acc = acc + bias[:, None, None] + (0 if q is None else q * gain[:, None, None])
        assert q is not None or not gain.any()
        assert abs(acc).max() < 2**24
        return _shifted(acc, exponent[:, None, None]).clip(low, high)


class _Rans:
    def __init__(self, string: bytes, num_lanes: int, arrays: dict[str, NDArray[Any]]) -> None:
        self._states = [int.from_bytes(string[5 * k : 5 * k + 5], "little") for k in range(num_lanes)]
        self._words = iter(np.frombuffer(string, "<u2", offset=5 * num_lanes).astype(int).tolist())
        self._cdf, self._start, self._radius = (arrays[f"tables.{k}"].astype(int) for k in ("cdf", "start", "radius"))
        self._num_symbols = 0

    def begin(self) -> None:
        """A segment starts at lane 0."""
        self._num_symbols = 0

    def mean_magnitude(self, row: int) -> int:
        """Times 65536."""
        cdf, radius = self._cdf[self._start[row] : self._start[row + 1]], int(self._radius[row])
        return sum(abs(k - radius) * int(cdf[k + 1] - cdf[k]) for k in range(2 * radius + 1))

    def symbol(self, row: int) -> int:
        lane = self._num_symbols % len(self._states)
        self._num_symbols += 1
        x = self._states[lane]
        cdf = self._cdf[self._start[row] : self._start[row + 1]]
        slot = x % 65536
        k = int(np.searchsorted(cdf, slot, side="right")) - 1
        x = int(cdf[k + 1] - cdf[k]) * (x >> 16) + slot - int(cdf[k])
        if x < 2**24:
            x = x << 16 | next(self._words)
        value = k - int(self._radius[row])
        if value == self._radius[row] + 1:  # the escape
            value = x % 65536 - 32768
            x = x >> 16 << 16 | next(self._words)
        self._states[lane] = x
        return value

    def finish(self) -> None:
        assert all(x == 2**24 for x in self._states) and next(self._words, None) is None


def _quality_map(rans: _Rans, scale: int, h: int, w: int) -> Ints:
    k = np.zeros((h, w), np.int64)
    rans.begin()
    for i, j in np.ndindex(h, w):
        left = k[i, j - 1] if j else 0
        if i == 0:
            k[i, j] = left + rans.symbol(198 + scale)
            continue
        above = k[i - 1, j]
        left, corner = (left, k[i - 1, j - 1]) if j else (above, above)
        above_right = k[i - 1, j + 1] if j + 1 < w else above
        is_flat = left == corner == above == above_right
        k[i, j] = sorted((left, above, left + above - corner))[1] + rans.symbol((192 if is_flat else 198) + scale)
    return k


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = data[at] & 127, 7
    while data[at] >= 128:
        at += 1
        value |= (data[at] & 127) << shift
        shift += 7
    return value, at + 1


def _shifted(acc: Ints, exponent: Ints) -> Ints:
    """round(acc 2^exponent), half to even: exact in float64."""
    return np.rint(np.ldexp(acc.astype(np.float64), exponent.astype(int))).astype(np.int64)


def _shuffle(x: Ints) -> Ints:
    y = np.zeros((len(x) // 4, 2 * x.shape[1], 2 * x.shape[2]), np.int64)
    for row in range(2):
        for column in range(2):
            y[:, row::2, column::2] = x[2 * row + column :: 4]
    return y


def _interpolate(x: Ints) -> Ints:
    weights = ((3, 5, 0), (1, 7, 0), (0, 7, 1), (0, 5, 3))
    for axis in (1, 2):
        x = np.moveaxis(x, axis, 0)
        around = np.stack([x[[0, *range(len(x) - 1)]], x, x[[*range(1, len(x)), -1]]])
        x = np.moveaxis(np.einsum("rk,kn...->nr...", weights, around).reshape(-1, *x.shape[1:]), 0, axis)
    return _shifted(x, np.array(-6))
