"""From evidence to the sector: which pieces belong to it, the outline about them, and how sure that is."""

from collections.abc import Sequence

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.runtime.sector.fit import fit
from sonoedge.runtime.sector.live_area import Evidence
from sonoedge.runtime.sector.outline import Floats, Mask, Outline, spans

EMPTY_COST = 0.2  # of a pixel of nothing inside; a pixel of tissue is worth 2
DARK_GAP = 0.3  # of that cost, between pieces of tissue
RIM_WORTH = 0.8  # a pixel of tissue that is no thick part of it: it may be writing that touches
WRITING_COST = 0.6
LEAST_SHARE = 0.01  # of the picture: a smaller piece is no sector's main part
SPANNED = 0.6  # of the sector's width or depth: a piece apart that spans so much is a layer or side of it
CLEAR = (0.985, 0.93, 0.95)  # captured, filled, support: no faint evidence can do better
FAINT = (0.95, 0.8, 0.65)  # what an outline from faint evidence needs at least
LARGER = 1.12  # and by so much it is larger than the plain one
KEPT = 0.96  # of which it keeps so much
HALO = 0.15  # mean faint evidence about writing, from which on it is compression's
MARGIN = 0.3  # of the tissue's width, about it: how far an outline may reach
LEAST_SUPPORT = 0.68  # an outline about a piece that was joined has at least so much


class Found(msgspec.Struct, frozen=True):
    """An outline in pixels of a thumb, and how well it agrees with the evidence: shares from 0 to 1."""

    outline: Outline
    captured: float  # of the tissue that is inside
    filled: float  # of the inside that is something
    support: float  # of the rim that has something near
    share: float  # of the picture that is inside

    @property
    def is_clear(self) -> bool:
        """Whether no more evidence can do better."""
        return all(has >= least for has, least in zip(_marks(self), CLEAR, strict=True))


def find(kinds: Sequence[Evidence]) -> Found | None:
    """Return the outline that the evidence speaks for, faint evidence only where it adds; None without tissue."""
    plain = kinds[0]
    visible = np.asarray(np.where(plain.panels > 0, 0, plain.something), np.float32)
    best = _about_main(plain, visible)
    if best is not None and best.is_clear:
        return best
    for faint in kinds[1:]:
        found = _about_main(faint, visible)
        if found is None or not all(has >= least for has, least in zip(_marks(found), FAINT, strict=True)):
            continue
        inside = found.outline.mask(*visible.shape)
        if best is not None:
            known = best.outline.mask(*visible.shape)
            area = cv2.countNonZero(known)
            kept = cv2.countNonZero(cv2.bitwise_and(known, inside))
            if kept < KEPT * area or cv2.countNonZero(inside) < LARGER * area:
                continue
        if not _noisy(faint, visible, inside):
            best = found
    return best


def _marks(found: Found) -> tuple[float, float, float]:
    return found.captured, found.filled, found.support


def _noisy(faint: Evidence, visible: Floats, inside: Mask) -> bool:
    """Whether the faint evidence is about writing outside too: then compression made it."""
    outside = np.asarray((visible > 0.3) & (cv2.dilate(inside, np.ones((9, 9), np.uint8)) == 0), np.uint8)
    halo = cv2.dilate(outside, np.ones((9, 9), np.uint8)) - cv2.dilate(outside, np.ones((5, 5), np.uint8))
    halo = (np.asarray(halo) > 0) & (cv2.dilate(inside, np.ones((13, 13), np.uint8)) == 0)
    return bool(halo.any() and faint.something[halo].mean() > HALO)


def _about_main(seen: Evidence, visible: Floats) -> Found | None:
    """The outline about the largest thick piece and those that belong to it."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(seen.thick)
    if count < 2:
        return None
    main = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    if stats[main, cv2.CC_STAT_AREA] < LEAST_SHARE * seen.thick.size:
        return None
    something = np.asarray(np.where(seen.panels > 0, 0, seen.something), np.float32)
    tissue = _grown(labels == main, something)
    found = _judged(something, tissue, _fitted(something, visible, tissue, seen.thick))
    for _ in range(2):
        joined = _joined(something, seen.changed, tissue, found.outline)
        if joined is None:
            break
        core = seen.thick | (joined & ~tissue)
        tissue = joined
        wider = _judged(something, tissue, _fitted(something, visible, tissue, core, DARK_GAP))
        if wider.support < min(LEAST_SUPPORT, found.support - 0.05):
            break  # an outline about it has too empty a rim: it was no tissue
        found = wider
    return found


def _grown(core: npt.NDArray[np.bool_], something: Floats) -> Mask:
    """The pieces of something that a core is part of. [height, width]"""
    visible = np.asarray(something > 0.3, np.uint8)
    _, labels = cv2.connectedComponents(visible)
    touched = np.unique(labels[core])
    near = cv2.dilate(core.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    return np.asarray((np.isin(labels, touched[touched > 0]) & near) | core, np.uint8)


def _fitted(something: Floats, visible: Floats, tissue: Mask, core: Mask, gap: float = 1.0) -> Outline:
    contours, _ = cv2.findContours(tissue, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    between = cv2.fillConvexPoly(np.zeros_like(tissue), cv2.convexHull(np.concatenate(contours)), (1,)) > 0
    near = between | (cv2.dilate(tissue, np.ones((5, 5), np.uint8)) > 0)
    other = (tissue == 0) & (np.maximum(something, visible) > 0.3)
    worth = np.where(core > 0, 2.0, RIM_WORTH)
    # what lies between pieces of tissue may well be dark tissue
    weights = np.where(tissue > 0, worth * something, 0) - EMPTY_COST * (1 - something) * np.where(between, gap, 1)
    weights = np.where(other, np.where(near, 0, -WRITING_COST), weights).astype(np.float32)
    x, y, wide, high = cv2.boundingRect(tissue)
    first = max(0, x - round(MARGIN * wide) - 4)  # columns further away only take time
    near_by = np.ascontiguousarray(weights[:, first : x + round((1 + MARGIN) * wide) + 4])
    found = fit(near_by, (x - first, y, x - first + wide, y + high))
    return msgspec.structs.replace(found, axis=found.axis + first)


def _joined(something: Floats, changed: Mask, tissue: Mask, outline: Outline) -> Mask | None:
    """The tissue with pieces apart that belong to the sector; None when there is none."""
    places = coordinates(outline, *tissue.shape)
    apart = np.asarray((something > 0.3) & (tissue == 0), np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(apart)
    solid = cv2.morphologyEx(apart, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)) > 0
    added, of_tissue = np.zeros(count, np.uint8), cv2.countNonZero(tissue)
    least = 0.25 * min(outline.half * 2 + 10, outline.bottom - outline.top)
    for index in range(1, count):
        x, y, wide, high, area = (int(value) for value in stats[index])
        if max(wide, high) < least:
            continue
        window = np.s_[y : y + high, x : x + wide]
        part = labels[window] == index
        thick = float((part & solid[window]).sum() / area)
        if thick > 0.2:
            part &= solid[window]  # lines that it hangs together with do not count
        depth, across = (values[window][part] for values in places)
        full = float(part.sum() / (_extent(part.any(axis=0)) * _extent(part.any(axis=1))))
        lively = float(changed[window][part].mean()) > 0.5
        piece = _Piece(*_ends(across), *_ends(depth), thick, full, float(part.sum() / of_tissue), lively)
        added[index] = piece.belongs
    return tissue | added[labels] if added.any() else None


class _Piece(msgspec.Struct, frozen=True):
    """Something apart, in a sector's coordinates: -1 to 1 from edge to edge, 0 to 1 from the face to the bottom."""

    left: float
    right: float
    top: float
    bottom: float
    thick: float  # share that is no thin line
    full: float  # share of its own box
    size: float  # of the tissue
    lively: bool

    @property
    def belongs(self) -> bool:
        """Whether it is a layer across the sector, its face, a side behind a shadow, or moves as tissue does."""
        aligned = abs(self.left + 1) < 0.12 and abs(self.right - 1) < 0.12
        if aligned and self.thick > 0.7 and self.size > 0.2:  # the larger half of a sector that a vessel cuts in two
            return True
        if not (self.top > -1.5 and self.bottom < 2.5 and self.left > -2.2 and self.right < 2.2):
            return False
        layer = aligned and (self.bottom < 0.5 or self.thick > 0.4)
        middling = abs(self.left + self.right) < 0.25 and 2 * SPANNED < self.right - self.left < 3.4
        face = middling and self.bottom < 0.1 and (self.top > -0.5 or self.thick > 0.3)
        deep = self.bottom - self.top > SPANNED and self.top > -0.1 and self.bottom < 1.1
        side = deep and self.right - self.left > 0.15 and self.thick > 0.7 and self.full > 0.6 and self.size > 0.04
        near = max(-self.left, self.right) < 1.6 and self.top > -0.5 and self.bottom < 1.35
        moving = self.lively and near and self.thick > 0.5 and self.full > 0.5 and self.size > 0.02
        return layer or face or side or moving


def _ends(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, (0.02, 0.98))
    return float(low), float(high)


def _extent(places: npt.NDArray[np.bool_]) -> int:
    return int(np.ptp(np.flatnonzero(places))) + 1


def coordinates(outline: Outline, height: int, width: int) -> tuple[Floats, Floats]:
    """Depth (0 the face, 1 the bottom) and place across (-1 to 1, the edges) of every pixel. [height, width] each"""
    x = np.arange(width, dtype=np.float32)[None, :] - np.float32(outline.axis)
    y = np.arange(height, dtype=np.float32)[:, None]
    edge = np.maximum(outline.half + outline.slope * (y - outline.top), 1.0)
    across = x / edge
    if outline.face > 0 and outline.slope > 0.02:
        apex = outline.top - 1 / outline.face
        radius = np.hypot(x, y - apex)
        depth = (radius - 1 / outline.face) / (outline.bottom - outline.top)
    else:
        # between a flat face and a bottom that may be bowed
        _, bottom = spans(outline.numbers[None], width)
        depth = (y - outline.top) / np.maximum(bottom[0][None, :] - outline.top, 1)
    return np.asarray(depth, np.float32), np.asarray(np.broadcast_to(across, depth.shape), np.float32)


def _judged(something: Floats, tissue: Mask, outline: Outline) -> Found:
    mask = outline.mask(*tissue.shape)
    inside = mask > 0
    alive = something * tissue
    rim = inside & (cv2.erode(mask, np.ones((7, 7), np.uint8), borderValue=0.0) == 0)
    near = cv2.blur(something, (5, 5))
    return Found(
        outline,
        captured=float(alive[inside].sum() / max(float(alive.sum()), 1e-6)),
        filled=float(something[inside].mean()) if inside.any() else 0.0,
        support=float((near[rim] > 0.15).mean()) if rim.any() else 0.0,
        share=float(inside.mean()),
    )
