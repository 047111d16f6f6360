"""Normal anatomy, one drawer a region; each sets the organ in which lesions may lie."""

from collections.abc import Callable

from sonoedge.calibration.phantom.anatomy.abdomen import gynaecology, kidney, liver
from sonoedge.calibration.phantom.anatomy.cardiovascular import heart, vessel
from sonoedge.calibration.phantom.anatomy.superficial import breast, thyroid
from sonoedge.calibration.phantom.anatomy.untrained import lung, musculoskeletal
from sonoedge.calibration.phantom.canvas import Canvas

DRAWERS: dict[str, Callable[[Canvas], None]] = {
    "breast": breast,
    "gynaecology": gynaecology,
    "heart": heart,
    "kidney": kidney,
    "liver": liver,
    "thyroid": thyroid,
    "vessel": vessel,
    "lung": lung,
    "musculoskeletal": musculoskeletal,
}

DEPTH_MM = {  # a usual imaging depth; a frame varies it by a twelfth
    "breast": 45.0,
    "gynaecology": 110.0,
    "heart": 150.0,
    "kidney": 120.0,
    "liver": 150.0,
    "thyroid": 40.0,
    "vessel": 40.0,
    "lung": 80.0,
    "musculoskeletal": 50.0,
}
