"""What is in each patch, as a second task for an image tower: the renderer knows, and it saves most of the training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cotam.sceneqa.labels import COLUMNS_PER_PATCH, NUM_CHARACTER_CLASSES, NUM_CLASSES, PatchLabels, patch_labels
from cotam.train.scenes import Example

_EMPTY_WEIGHT = 0.3  # of patches with nothing in them, against all others


class PatchHeads(nn.Module):
    """Linear classifiers of patch tokens, one for each field of ``PatchLabels``; left behind after training.

    Args:
        width: of the tokens.
        rows: of the patch grid, as many as columns.
    """

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.classes = nn.ModuleList(nn.Linear(width, num) for num in (*NUM_CLASSES, 1 + rows))
        self.characters = nn.Linear(width, COLUMNS_PER_PATCH * NUM_CHARACTER_CLASSES)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Tokens (B, patches, width) -> logits (B, patches, classes); (B, columns per patch x patches, classes) for
        characters, in the order of the labels flattened."""
        letters = self.characters(tokens).unflatten(2, (COLUMNS_PER_PATCH, -1)).flatten(1, 2)
        return [*(head(tokens) for head in self.classes), letters]


def stack_labels(examples: Sequence[Example], rows: int) -> tuple[Tensor, ...]:
    """The fields of ``PatchLabels`` on a grid of ``rows`` x ``rows`` patches, each int64 (B, positions)."""
    labels = [patch_labels(e.scene, rows) for e in examples]
    return tuple(torch.from_numpy(np.stack(parts)).flatten(1) for parts in zip(*labels, strict=True))


def dense_loss(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """Sum over the fields of the cross-entropy, where patches with nothing in them do not drown the others."""
    total = logits[0].new_zeros(())
    for field, target in zip(logits, labels, strict=True):
        losses = F.cross_entropy(field.float().flatten(0, 1), target.flatten(), reduction="none")
        something = (target.flatten() > 0).float()
        full = (losses * something).sum() / something.sum().clamp_min(1)
        empty = (losses * (1 - something)).sum() / (1 - something).sum().clamp_min(1)
        total = total + full + _EMPTY_WEIGHT * empty
    return total


def dense_accuracy(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, tuple[int, int]]:
    """Right positions and positions with something in them, by field."""
    counts = {}
    for name, field, target in zip(PatchLabels._fields, logits, labels, strict=True):
        something = target > 0
        counts[name] = int((field.argmax(2) == target)[something].sum()), int(something.sum())
    return counts
