"""Configurations: frozen dataclasses, read from YAML, identified by a hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
BACKBONES = ("cotam", "elic")  # as made by cotam/models/backbones.py
LATENT_STRIDE = 16  # pixels a side of a position of y
HYPER_STRIDE = 4  # positions of y a side of a position of z
_MAX_NUM_Q = 128  # a quality index is an activation of the integer network
Q_STEPS = 4  # quality indexes per quality level: q = round((quality - 1) * Q_STEPS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """The shape of one codec; stored beside its weights, and enough to rebuild the modules.

    Attributes:
        backbone: the transforms: "cotam" or "elic" (``cotam.models.backbones``).
        M: channels of the latent ``y`` at 1/16.
        M_levels: "cotam": how many of them quality levels 1..L have, even and not falling; empty: all.
        N8, N16: "cotam": channels of the bodies of ``g_a`` and ``g_s`` at 1/8 and 1/16.
        analysis_blocks, synthesis_blocks: "cotam": residual blocks of ``g_a`` and ``g_s`` at 1/8 and at 1/16.
        N: "elic": channels of the transforms.
        N_z: channels of the hyper-latent ``z`` at 1/64.
        N_hyper: channels inside ``h_a`` and the integer entropy-parameter network.
        lmbdas: rate-distortion trade-off of quality levels 1..L (bpp + lmbda * 255^2 * MSE).
    """

    backbone: str = "cotam"
    M: int = 192
    M_levels: tuple[int, ...] = ()
    N8: int = 128
    N16: int = 256
    analysis_blocks: tuple[int, int] = (2, 0)
    synthesis_blocks: tuple[int, int] = (4, 0)
    N: int = 192
    N_z: int = 128
    N_hyper: int = 192
    lmbdas: tuple[float, ...] = (0.00005, 0.00014, 0.00038, 0.00104, 0.00286, 0.00786, 0.0216, 0.0594)

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, not {self.backbone!r}")
        if len(self.lmbdas) < 2 or self.lmbdas[0] <= 0 or list(self.lmbdas) != sorted(set(self.lmbdas)):
            raise ValueError(f"lmbdas must be two or more positive numbers that grow, not {self.lmbdas}")
        if self.num_q > _MAX_NUM_Q:
            raise ValueError(f"{self.num_levels} lmbdas are more quality levels than a bitstream and its integers hold")
        if self.M % 2:
            raise ValueError(f"M must be even, not {self.M}: y is coded in two halves of its channels")
        if self.M_levels:
            if self.backbone != "cotam" or len(self.M_levels) != self.num_levels:
                raise ValueError(f"M_levels is for backbone cotam, a number for each of the {self.num_levels} levels")
            widths = (2, *self.M_levels, self.M)
            if list(widths) != sorted(widths) or any(m % 2 for m in widths):
                raise ValueError(f"M_levels must be even, must not fall, and must not exceed M: {self.M_levels}")

    @property
    def num_levels(self) -> int:
        """Number of quality levels L with a gain of their own."""
        return len(self.lmbdas)

    @property
    def num_q(self) -> int:
        """Number of quality indexes."""
        return (self.num_levels - 1) * Q_STEPS + 1

    def num_channels(self, q: int) -> int:
        """How many channels ``y`` has at quality index ``q``: those of the next level that is no lower."""
        return self.M_levels[-(-q // Q_STEPS)] if self.M_levels else self.M

    def with_channels(self, num_channels: int) -> CodecConfig:
        """The shape of a model that has the first ``num_channels`` channels of ``y`` alone."""
        levels = tuple(min(m, num_channels) for m in self.M_levels)
        return dataclasses.replace(self, M=num_channels, M_levels=levels)

    def up_to(self, quality: float) -> CodecConfig:
        """The shape of a model for no more than ``quality``: with the channels that this has."""
        return self.with_channels(self.num_channels(round((quality - 1) * Q_STEPS)))


def from_mapping(cls: type[T], values: dict[str, Any], where: str = "config") -> T:
    """Build the dataclass ``cls`` from a plain mapping, nested dataclasses included.

    Raises:
        ValueError: an unknown or missing key, named with its place.
    """
    hints = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(hints))}")
    kwargs: dict[str, Any] = {}
    for name, value in values.items():
        factory = hints[name].default_factory
        nested = factory if isinstance(factory, type) and dataclasses.is_dataclass(factory) else None
        if nested is not None and isinstance(value, dict):
            value = from_mapping(nested, value, f"{where}.{name}")
        value = tuple(value) if isinstance(value, list) else value
        try:
            kwargs[name] = _as_numbers(value, hints[name].default)
        except ValueError as error:
            raise ValueError(f"{where}.{name}: {error}") from None
    try:
        return cls(**kwargs)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def _as_numbers(value: Any, like: Any) -> Any:
    """Text as numbers where ``like`` has numbers: YAML 1.1 reads 1e-3, without a point, as text."""
    if isinstance(value, tuple) and isinstance(like, tuple) and like:
        return tuple(_as_numbers(item, like[0]) for item in value)
    return float(value) if isinstance(value, str) and isinstance(like, float) else value


def load_yaml(cls: type[T], path: str | Path) -> T:
    """Read the dataclass ``cls`` from a YAML file. Raises ValueError naming the file and the key at fault."""
    values = yaml.safe_load(Path(path).read_text()) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of keys to values")
    return from_mapping(cls, values, str(path))


def config_hash(values: Any) -> str:
    """16 hex digits that identify a configuration (a dataclass or JSON-serialisable value), whatever its key order."""
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        values = dataclasses.asdict(values)
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]
