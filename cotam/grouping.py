"""Work on items in groups of the same kind, with the results in the order of the items."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

B = TypeVar("B")
Key = TypeVar("Key", bound=tuple[Hashable, ...])


def in_groups(keys: Sequence[Key], size: Callable[..., int], function: Callable[[list[int]], list[B]]) -> list[B]:
    """Apply ``function`` to positions that share a key, ``size(*key)`` at a time; results in the original order."""
    groups: dict[Key, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    results: dict[int, B] = {}
    for key, positions in groups.items():
        count = size(*key)
        for start in range(0, len(positions), count):
            chunk = positions[start : start + count]
            results.update(zip(chunk, function(chunk), strict=True))
    return [results[k] for k in range(len(keys))]
