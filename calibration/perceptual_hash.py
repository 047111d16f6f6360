"""Which pictures are the same one again: a perceptual hash that outlives resizing, JPEG and a change of brightness.

Sources: C. Zauner, "Implementation and benchmarking of perceptual image hash functions" (2010), for the signs of the
lowest cosine terms (pHash); N. Krawetz, "Kind of like that" (2013), for the signs of neighbours' differences (dHash).
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

TERMS = 8  # lowest cosine terms along each side
SIDE = 32  # of the picture that they are taken of
SLOPES = 16  # rows and columns of the differences
WORDS = 1 + SLOPES * SLOPES // 64  # of 64 bits
NEAR_TERMS_BITS = 10  # of 63: at most so many may differ
NEAR_SLOPES_BITS = 24  # of 256; see docs/decisions.md for both
BLOCK = 512  # pictures compared with all others at a time

Hashes = npt.NDArray[np.uint64]


def perceptual_hash(picture: npt.NDArray[np.uint8]) -> Hashes:
    """The hash [5] of an RGB picture [height, width, 3]: 63 signs of cosine terms, then 256 of differences."""
    grey = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY).astype(np.float32)
    small = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    terms = cv2.dct(small)[:TERMS, :TERMS].reshape(-1)[1:]  # without the mean: 63
    wide = cv2.resize(grey, (SLOPES + 1, SLOPES), interpolation=cv2.INTER_AREA)
    # Flat ground, the black around a sector, has no slope: a step that noise can turn counts as none.
    slopes = np.diff(wide, axis=1) > 1.0 + 0.02 * float(wide.max())
    bits = np.concatenate([[False], terms > np.median(terms), slopes.reshape(-1)])
    return np.packbits(bits).view(np.dtype(">u8")).astype(np.uint64)


def near(first: Hashes, second: Hashes) -> npt.NDArray[np.bool_]:
    """Whether hashes [..., 5] belong to the same picture, broadcast against each other."""
    differing = np.bitwise_count(first ^ second)
    terms, slopes = differing[..., 0], differing[..., 1:].sum(axis=-1)
    return np.asarray((terms <= NEAR_TERMS_BITS) & (slopes <= NEAR_SLOPES_BITS))


def near_pairs(hashes: Hashes) -> list[tuple[int, int]]:
    """The pairs of near pictures among hashes [n, 5], the smaller index first."""
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(hashes), BLOCK):
        block = hashes[start : start + BLOCK]
        rows, columns = np.nonzero(near(block[:, None], hashes[None, start:]))
        pairs += [(start + int(a), start + int(b)) for a, b in zip(rows, columns, strict=True) if a < b]
    return pairs


def near_groups(hashes: Sequence[Hashes]) -> list[list[int]]:
    """Indices of pictures that are near each other, directly or through others; a picture alone is its own group."""
    parents = list(range(len(hashes)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    for a, b in near_pairs(np.stack(hashes)) if hashes else []:
        parents[root(b)] = root(a)
    groups: dict[int, list[int]] = {}
    for index in range(len(hashes)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())
