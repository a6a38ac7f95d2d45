"""CIDEr-D, how much a caption agrees with those that people wrote (Vedantam et al. 2015)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

CIDER_MAX = 10.0
_MAX_N = 4
_SIGMA = 6.0  # of the Gaussian penalty on a difference in length, in bigrams
_Grams = tuple[Counter[tuple[str, ...]], ...]  # of n = 1 to 4 words


def cider_d(corpus: Iterable[Sequence[str]]) -> Callable[[str, Sequence[str]], float]:
    """The score of a caption against its references, in [0, CIDER_MAX] (section 3 and the -D of section 4.2).

    Papers give its mean over images times 100. Words are split at white space and punctuation, which is dropped; the
    original's tokeniser also splits contractions.

    Args:
        corpus: the references of every image. An n-gram counts less the more images have it in one of theirs.
    """
    num_images, having = 0, Counter[tuple[str, ...]]()
    for references in corpus:
        num_images += 1
        having.update({gram for reference in references for grams in _grams(reference) for gram in grams})
    log_num = math.log(max(1, num_images))

    def weigh(grams: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {gram: count * (log_num - math.log(max(1, having[gram]))) for gram, count in grams.items()}

    def score(prediction: str, references: Sequence[str]) -> float:
        candidate = _grams(prediction)
        total = 0.0
        for reference in map(_grams, references):
            length = candidate[1].total() - reference[1].total()
            penalty = math.exp(-(length**2) / (2 * _SIGMA**2))
            for a, b in zip(map(weigh, candidate), map(weigh, reference), strict=True):
                norm = math.hypot(*a.values()) * math.hypot(*b.values())
                if norm:  # of n-grams that every image has nothing is left
                    total += penalty * sum(min(w, b[gram]) * b[gram] for gram, w in a.items() if gram in b) / norm
        return CIDER_MAX * total / (_MAX_N * len(references))

    return score


def _grams(caption: str) -> _Grams:
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)?", caption.lower())
    return tuple(Counter(zip(*(words[k:] for k in range(n)), strict=False)) for n in range(1, _MAX_N + 1))
