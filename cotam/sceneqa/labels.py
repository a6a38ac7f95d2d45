"""What is in each patch of a rendered scene: the supervision of an image tower's patch tokens."""

from __future__ import annotations

import string
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cotam.sceneqa.render import character_spans
from cotam.sceneqa.scene import COLOURS, RADII, SHAPES, Scene

CHARACTERS = string.ascii_lowercase + string.digits
NUM_CLASSES = (1 + len(SHAPES), 1 + len(COLOURS), 1 + len(RADII))  # of the first fields of PatchLabels
NUM_CHARACTER_CLASSES = 1 + len(CHARACTERS)
COLUMNS_PER_PATCH = 2  # small letters are half a patch wide
_REACH = 0.7  # patches whose centre is within this fraction of an object's radius are labelled with it


class PatchLabels(NamedTuple):
    """Classes by patch, int64, 0 for nothing: (R, R), and for characters by half a patch, (R, 2 R).

    ``column`` counts from 1 everywhere: a tower that need not say where a patch is forgets it, and then no question
    about left and right can be answered.
    """

    shape: NDArray[np.int64]
    colour: NDArray[np.int64]
    size: NDArray[np.int64]
    column: NDArray[np.int64]
    character: NDArray[np.int64]


def patch_labels(scene: Scene, rows: int) -> PatchLabels:
    """Labels on a grid of ``rows`` x ``rows`` patches. An object's own patch is always labelled."""
    shape, colour, size = (np.zeros((rows, rows), np.int64) for _ in range(3))
    centres = (np.arange(rows) + 0.5) / rows
    for thing in scene.things:
        reach = max(_REACH * thing.radius, 0.5 / rows)
        near = (np.abs(centres[:, None] - thing.y) < reach) & (np.abs(centres[None] - thing.x) < reach)
        near[int(thing.y * rows), int(thing.x * rows)] = True
        shape[near] = 1 + SHAPES.index(thing.shape)
        colour[near] = 1 + COLOURS.index(thing.colour)
        size[near] = 1 + sorted(RADII).index(thing.size)
    columns = COLUMNS_PER_PATCH * rows
    character = np.zeros((rows, columns), np.int64)
    middles = (np.arange(columns) + 0.5) / columns
    row = int(scene.sign.y * rows)
    for letter, left, right in character_spans(scene.sign):
        character[row, (middles >= left) & (middles < right)] = 1 + CHARACTERS.index(letter.lower())
    column = np.tile(np.arange(1, rows + 1, dtype=np.int64), (rows, 1))
    return PatchLabels(shape, colour, size, column, character)
