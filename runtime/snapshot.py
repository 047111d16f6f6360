"""The newest picture for somebody who looks on: cropped as for the model, shrunk and compressed."""

import time

import cv2

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.preprocess import crop_to_sector
from sonoedge.runtime.protocol import MAX_PICTURE_PX, Id, Picture

JPEG_QUALITY = 80


def snapshot(frame: Frame, request_id: Id) -> Picture:
    """Return the reply to a picture request; raises SonoEdgeError when the frame cannot be compressed."""
    picture = cv2.cvtColor(crop_to_sector(frame), cv2.COLOR_RGB2BGR)
    shrink = MAX_PICTURE_PX / max(picture.shape[:2])
    if shrink < 1:
        picture = cv2.resize(picture, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    done, jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not done:
        raise SonoEdgeError(f"frame {frame.sequence} cannot be compressed: ask for another picture")
    age_ms = (time.monotonic_ns() - frame.captured_ns) / 1e6
    return Picture(request_id, jpeg.tobytes(), frame.sequence, age_ms, picture.shape[1], picture.shape[0])
