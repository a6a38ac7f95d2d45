"""Scenes to pixels: procedural backgrounds or photographs, objects, and a sign, antialiased."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cotam.image import RGBImage
from cotam.sceneqa.scene import Scene, Sign, Thing

_OVERSAMPLING = 2
_METRICS_PX = 100  # size of the letters that are measured
_RGB = {
    "black": (25, 25, 25), "blue": (40, 80, 220), "green": (40, 150, 60), "orange": (245, 140, 25),
    "pink": (245, 130, 180), "red": (215, 35, 35), "white": (250, 250, 250), "yellow": (250, 220, 40),
}  # fmt: skip
# Colours at the top, above and below the horizon, at the bottom; height of the horizon; strength of the texture.
_PLACES = {
    "beach": (((90, 170, 235), (190, 225, 245), (60, 140, 190), (235, 210, 150)), 0.45, 10),
    "city": (((150, 160, 175), (200, 205, 210), (95, 95, 100), (70, 70, 75)), 0.72, 8),
    "desert": (((240, 190, 120), (250, 225, 180), (215, 165, 95), (190, 130, 70)), 0.5, 14),
    "forest": (((120, 170, 150), (70, 120, 80), (50, 90, 45), (60, 70, 35)), 0.55, 20),
    "night": (((8, 8, 35), (30, 25, 70), (18, 18, 30), (10, 10, 18)), 0.8, 4),
    "room": (((205, 190, 170), (220, 208, 190), (150, 105, 70), (120, 80, 50)), 0.7, 6),
    "snow": (((165, 190, 220), (215, 225, 240), (235, 240, 248), (250, 250, 252)), 0.5, 6),
    "underwater": (((60, 170, 195), (30, 120, 165), (15, 80, 130), (10, 45, 90)), 0.55, 9),
}


def render(scene: Scene, side_px: int = 256, photograph: RGBImage | None = None) -> RGBImage:
    """Draw a scene.

    Args:
        scene: what to draw.
        side_px: sides of the image.
        photograph: background instead of the scene's own, uint8 RGB of any size.

    Returns:
        uint8 RGB (side_px, side_px, 3), the same on every machine for the same libraries.
    """
    rng = np.random.default_rng(list(scene.seed.encode()))
    if photograph is None:
        background = Image.fromarray(_background(scene.kind, side_px, rng))
    else:
        background = ImageOps.fit(Image.fromarray(photograph), (side_px, side_px))
    side = side_px * _OVERSAMPLING
    canvas = background.resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    if photograph is None:
        _draw_place(draw, scene.kind, side, rng)
    for thing in scene.things:
        _draw_thing(draw, thing, side)
    _draw_sign(draw, scene.sign, side)
    return np.array(canvas.resize((side_px, side_px), Image.Resampling.BOX))


def character_spans(sign: Sign) -> list[tuple[str, float, float]]:
    """Each character of a sign with where it begins and ends, as fractions of the side."""
    font = _font(sign.font, _METRICS_PX)
    ends = [font.getlength(sign.text[:k]) for k in range(len(sign.text) + 1)]
    scale = sign.height / _METRICS_PX
    left = sign.x - ends[-1] * scale / 2
    pairs = zip(sign.text, ends[:-1], ends[1:], strict=True)
    return [(letter, left + start * scale, left + end * scale) for letter, start, end in pairs]


def _background(kind: str, side: int, rng: np.random.Generator) -> RGBImage:
    colours, horizon, strength = _PLACES[kind]
    stops = np.array([0, horizon - 0.01, horizon + 0.01, 1])
    rows = np.linspace(0, 1, side)
    palette = np.array(colours, dtype=np.float64) + rng.normal(0, 6, (4, 3))
    gradient = np.stack([np.interp(rows, stops, palette[:, c]) for c in range(3)], axis=1)[:, None]
    texture = strength * np.sum([_noise(side, cells, rng) for cells in (4, 16, 64)], axis=0)
    return (gradient + texture[:, :, None]).clip(0, 255).astype(np.uint8)


def _noise(side: int, cells: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Smooth noise of unit deviation with ``cells`` cells a side."""
    coarse = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)


def _draw_place(draw: ImageDraw.ImageDraw, kind: str, side: int, rng: np.random.Generator) -> None:
    """What tells places apart besides their colours; nothing that could be taken for an object."""
    horizon = _PLACES[kind][1] * side
    thin = max(1, side // 200)
    if kind == "city":
        for left in range(0, side, side // 8):
            roof = horizon - rng.uniform(0.15, 0.6) * side
            grey = int(rng.integers(70, 140))
            draw.rectangle([left, roof, left + side // 8 - side // 64, horizon], fill=(grey, grey, grey + 8))
            for window in np.arange(roof + side / 40, horizon - side / 40, side / 16):
                for x in (left + side // 40, left + side // 14):
                    draw.rectangle([x, window, x + side // 48, window + side // 40], fill=(225, 215, 150))
    elif kind == "forest":
        for base in np.sort(horizon + rng.uniform(-0.05, 0.3, 14) * side):
            middle, height = rng.uniform(0, side), rng.uniform(0.2, 0.45) * side
            trunk = height / 24
            draw.rectangle([middle - trunk, base - height / 2, middle + trunk, base + height / 8], fill=(70, 50, 35))
            green = (int(rng.integers(20, 50)), int(rng.integers(70, 115)), int(rng.integers(25, 50)))
            for foot in (0.0, 0.22, 0.44):
                spread = (1 - foot) * height / 4
                tip, low = base - (foot + 0.56) * height, base - foot * height
                draw.polygon([(middle, tip), (middle - spread, low), (middle + spread, low)], fill=green)
    elif kind == "night":
        for x_star, y_star in rng.uniform(0, 1, (70, 2)) * (side, horizon):
            r = rng.uniform(0.5, 1.6) * side / 256
            draw.ellipse([x_star - r, y_star - r, x_star + r, y_star + r], fill=(235, 235, 210))
    elif kind == "room":
        x0, y0 = rng.uniform(0.05, 0.6) * side, 0.08 * side
        x1, y1 = x0 + 0.3 * side, y0 + 0.28 * side
        draw.rectangle([x0, y0, x1, y1], fill=(170, 210, 240), outline=(250, 250, 250), width=3 * thin)
        draw.line([(x0 + x1) / 2, y0, (x0 + x1) / 2, y1], fill=(250, 250, 250), width=2 * thin)
        for plank in np.linspace(horizon, side, 6):
            draw.line([0, plank, side, plank], fill=(100, 66, 42), width=thin)
    elif kind == "snow":
        for _ in range(4):
            middle, height = rng.uniform(0, side), rng.uniform(0.2, 0.4) * side
            top = horizon - height
            draw.polygon([(middle - height, horizon), (middle, top), (middle + height, horizon)], fill=(140, 155, 180))
            cap = height / 3
            white = [(middle - cap, top + cap), (middle, top), (middle + cap, top + cap)]
            draw.polygon(white, fill=(245, 248, 252))
    elif kind == "underwater":
        for x_bubble, y_bubble in rng.uniform(0, side, (25, 2)):
            r = rng.uniform(0.005, 0.02) * side
            box = [x_bubble - r, y_bubble - r, x_bubble + r, y_bubble + r]
            draw.ellipse(box, outline=(190, 230, 240), width=thin)
    elif kind == "beach":
        for wave in np.linspace(horizon + 0.03 * side, 0.62 * side, 4):
            end = wave + rng.uniform(-0.01, 0.01) * side
            draw.line([0, wave, side, end], fill=(225, 240, 245), width=2 * thin)
    else:
        for _ in range(3):
            middle, height = rng.uniform(0, side), rng.uniform(0.08, 0.2) * side
            box = [middle - 2.5 * height, horizon - height, middle + 2.5 * height, horizon + height]
            draw.pieslice(box, 180, 360, fill=(225, 180, 110))


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
    x, y, r = thing.x * side, thing.y * side, thing.radius * side
    fill = _RGB[thing.colour]
    outline = (250, 250, 250) if thing.colour == "black" else (20, 20, 20)
    width = max(1, side // 200)
    if thing.shape == "circle":
        draw.ellipse([x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r], fill=fill, outline=outline, width=width)
        return
    corners = []
    for radius, angle in _corners(thing.shape):
        turned = math.radians(angle + thing.angle)
        corners.append((x + r * radius * math.cos(turned), y + r * radius * math.sin(turned)))
    draw.polygon(corners, fill=fill, outline=outline, width=width)


@functools.cache
def _corners(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners in polar coordinates: fractions of the radius, degrees."""
    if shape == "square":
        return tuple((1.0, 45 + 90 * k) for k in range(4))
    if shape == "triangle":
        return tuple((1.0, 120 * k - 90) for k in range(3))
    if shape == "diamond":
        return tuple((1.0 if k % 2 else 0.6, 90.0 * k) for k in range(4))
    if shape == "star":
        return tuple((0.42 if k % 2 else 1.0, 36 * k - 90) for k in range(10))
    arm = math.degrees(math.atan2(0.3, 0.95))
    inner = (math.hypot(0.3, 0.3), 45.0)
    return tuple((radius, angle + 90 * k) for k in range(4) for radius, angle in ((1.0, -arm), (1.0, arm), inner))


def _draw_sign(draw: ImageDraw.ImageDraw, sign: Sign, side: int) -> None:
    dark, light = (30, 30, 40), (245, 243, 235)
    board, ink = (dark, light) if sign.inverted else (light, dark)
    x, y = sign.x * side, sign.y * side
    half_width, half_height = sign.half_width * side, sign.half_height * side
    box = [x - half_width, y - half_height, x + half_width, y + half_height]
    draw.rounded_rectangle(box, radius=0.3 * half_height, fill=board, outline=ink, width=max(1, side // 150))
    draw.text((x, y), sign.text, font=_font(sign.font, round(sign.height * side)), fill=ink, anchor="mm")


@functools.lru_cache(maxsize=256)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"  # fonts that are the same on every machine
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size, layout_engine=ImageFont.Layout.BASIC)
