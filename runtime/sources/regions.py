"""Where a DICOM picture shows ultrasound, and how large its pixels are."""

import math

import msgspec
import pydicom

TWO_DIMENSIONAL = 1  # RegionSpatialFormat
LARGEST_MM = 100.0  # of a pixel
CENTIMETRES = 3  # PhysicalUnitsXDirection and YDirection


class Region(msgspec.Struct, frozen=True):
    """The sector (x0, y0, x1, y1; x1 and y1 outside it) and its pixel spacing, None when unknown or not square."""

    sector: tuple[int, int, int, int]
    spacing_mm: float | None


def find_region(dataset: pydicom.Dataset, rows: int, columns: int) -> Region | None:
    """Return the largest two-dimensional ultrasound region that fits the picture. Source: DICOM PS3.3 C.8.5.5."""
    regions = [
        region
        for item in dataset.get("SequenceOfUltrasoundRegions") or []
        if (region := _read(item, rows, columns)) is not None
    ]
    return max(regions, key=lambda r: (r.sector[2] - r.sector[0]) * (r.sector[3] - r.sector[1]), default=None)


def _read(item: pydicom.Dataset, rows: int, columns: int) -> Region | None:
    try:
        return _measure(item, rows, columns)
    except (TypeError, ValueError, OverflowError):  # an element without a number in it, or with several
        return None


def _measure(item: pydicom.Dataset, rows: int, columns: int) -> Region | None:
    if int(item.get("RegionSpatialFormat", 0)) != TWO_DIMENSIONAL:
        return None
    corners = [
        item.get(f"RegionLocation{name}") for name in ("MinX0", "MinY0", "MaxX1", "MaxY1")
    ]  # the last two are inside the region
    if any(corner is None for corner in corners):
        return None
    x0, y0, x1, y1 = (int(corner) for corner in corners)
    # Some scanners shrink the picture for a clip and leave its regions in pixels of their screen.
    shrink = max(1, math.ceil((x1 + 1) / columns), math.ceil((y1 + 1) / rows))
    x0, y0, x1, y1 = x0 // shrink, y0 // shrink, (x1 + 1) // shrink, (y1 + 1) // shrink
    if shrink > 4 or x0 < 0 or y0 < 0 or x1 <= x0 or y1 <= y0:
        return None
    return Region((x0, y0, x1, y1), _spacing_mm(item, shrink))


def _spacing_mm(item: pydicom.Dataset, shrink: int) -> float | None:
    units = [int(item.get(f"PhysicalUnits{axis}Direction", 0)) for axis in "XY"]
    dx, dy = (abs(float(item.get(f"PhysicalDelta{axis}") or 0)) for axis in "XY")
    if units != [CENTIMETRES, CENTIMETRES] or not math.isclose(dx, dy, rel_tol=0.01):
        return None
    return known_spacing_mm(dx * 10 * shrink)


def known_spacing_mm(spacing_mm: float) -> float | None:
    """Return the size of a pixel, None when it cannot be one."""
    return spacing_mm if 0 < spacing_mm <= LARGEST_MM else None
