"""What is in a scene: a kind of place, objects, a sign; drawn from a seed. Coordinates are fractions of the side."""

from __future__ import annotations

import dataclasses
import math
import random

KINDS = ("beach", "city", "desert", "forest", "night", "room", "snow", "underwater")
SHAPES = ("circle", "cross", "diamond", "square", "star", "triangle")
COLOURS = ("black", "blue", "green", "orange", "pink", "red", "white", "yellow")
FONTS = ("DejaVuSans-Bold", "DejaVuSans", "DejaVuSerif-Bold", "DejaVuSansMono-Bold", "STIXGeneralBol")
WORDS = (
    "bank", "bar", "bell", "bus", "cafe", "cash", "cool", "deli", "exit", "film", "food", "free", "fuel",
    "gas", "gate", "gym", "hall", "help", "home", "hotel", "ice", "inn", "key", "lane", "mall", "menu",
    "music", "news", "north", "open", "park", "pay", "pizza", "play", "pool", "post", "push", "quiz", "rent",
    "ride", "sale", "shoe", "shop", "slow", "south", "spa", "stop", "taxi", "toys", "vote", "west", "zoo",
)  # fmt: skip
SPLITS = ("train", "test")
RADII = {"small": (0.045, 0.06), "large": (0.09, 0.12)}
_MAX_COUNT = 4
_MARGIN = 0.02
_ATTEMPTS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thing:
    """An object. ``x``, ``y``: its centre; ``radius``: of the circle around it; ``angle`` in degrees."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def name(self) -> str:
        """Colour and shape."""
        return f"{self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sign:
    """A board with ``text``. ``x``, ``y``: its centre; ``height``: of the letters; ``inverted``: light on dark."""

    text: str
    font: str
    x: float
    y: float
    height: float
    inverted: bool

    @property
    def half_width(self) -> float:
        """Half of the board's width, with room for wide letters."""
        return (0.42 * len(self.text) + 0.35) * self.height

    @property
    def half_height(self) -> float:
        """Half of the board's height."""
        return 0.85 * self.height


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """One scene.

    Attributes:
        key: its name: split and index.
        seed: what decides everything about it, textures included.
        kind: of place.
        things: objects, none of which touches another or the sign.
        sign: there is always one.
    """

    key: str
    seed: str
    kind: str
    things: tuple[Thing, ...]
    sign: Sign

    def unique_things(self) -> list[Thing]:
        """The objects that colour and shape name unmistakably."""
        names = [thing.name for thing in self.things]
        return [thing for thing in self.things if names.count(thing.name) == 1]


def sample_scene(split: str, index: int) -> Scene:
    """Scene ``index`` of a split. The seed holds the name of the split, so train and test never meet.

    Raises:
        ValueError: no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    seed = f"sceneqa-1/{split}/{index}"
    rng = random.Random(seed)
    kind = rng.choice(KINDS)
    sign = _sample_sign(rng)
    things: list[Thing] = []
    repeated = rng.choice(SHAPES)
    others = [shape for shape in SHAPES if shape != repeated]
    shapes = [repeated] * rng.randint(0, _MAX_COUNT) + rng.sample(others, rng.randint(1, 3))
    rng.shuffle(shapes)
    for shape in shapes:
        thing = _place(rng, shape, sign, things)
        if thing is not None:
            things.append(thing)
    return Scene(key=f"{split}-{index:07d}", seed=seed, kind=kind, things=tuple(things), sign=sign)


def _sample_sign(rng: random.Random) -> Sign:
    text = rng.choice(WORDS) if rng.random() < 0.5 else str(rng.randint(10, 999))
    sign = Sign(
        text=text.upper() if rng.random() < 0.5 else text,
        font=rng.choice(FONTS),
        x=0.0,
        y=0.0,
        height=rng.uniform(0.07, 0.14),
        inverted=rng.random() < 0.5,
    )
    x = rng.uniform(sign.half_width + _MARGIN, 1 - sign.half_width - _MARGIN)
    y = rng.uniform(sign.half_height + _MARGIN, 1 - sign.half_height - _MARGIN)
    return dataclasses.replace(sign, x=x, y=y)


def _place(rng: random.Random, shape: str, sign: Sign, things: list[Thing]) -> Thing | None:
    """An object of ``shape`` at a free place, or None where there is hardly one."""
    size = rng.choice(sorted(RADII))
    colour, angle = rng.choice(COLOURS), rng.uniform(-20, 20)
    for _ in range(_ATTEMPTS):
        radius = rng.uniform(*RADII[size])
        x, y = (rng.uniform(radius + _MARGIN, 1 - radius - _MARGIN) for _ in range(2))
        aside_x, aside_y = max(0.0, abs(x - sign.x) - sign.half_width), max(0.0, abs(y - sign.y) - sign.half_height)
        if math.hypot(aside_x, aside_y) < radius + _MARGIN:
            continue
        if any(math.hypot(x - t.x, y - t.y) < radius + t.radius + _MARGIN for t in things):
            continue
        return Thing(shape=shape, colour=colour, size=size, x=x, y=y, radius=radius, angle=angle)
    return None
