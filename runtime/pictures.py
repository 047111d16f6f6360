"""Pictures for those who look on: the sector alone, as the model sees it, shrunk and compressed."""

import queue
import threading
from collections.abc import Callable

import cv2
import msgspec

from sonoedge.runtime.hint_engine import POOR_FRAME
from sonoedge.runtime.model import Model
from sonoedge.runtime.protocol import MAX_PICTURE_PX, Id, Picture
from sonoedge.runtime.sight import Sight
from sonoedge.runtime.wire import Envelope

JPEG_QUALITY = 80
WAITING = 16  # requests of all clients
RETRY_MS = 100


class Order(msgspec.Struct, frozen=True):
    """Who wants a picture of what."""

    envelope: Envelope
    request_id: Id
    sight: Sight


class Pictures:
    """Makes pictures on the thread that runs it, so that none holds up a hint."""

    def __init__(self, model: Model, on_made: Callable[[Envelope, Picture], None]) -> None:
        """on_made: is called on that thread."""
        self._model = model
        self._on_made = on_made
        self._orders: queue.Queue[Order] = queue.Queue(WAITING)

    def order(self, order: Order) -> bool:
        """Take an order, from any thread; False when too many wait."""
        try:
            self._orders.put_nowait(order)
        except queue.Full:
            return False
        return True

    def run(self, stop: threading.Event) -> None:
        """Make what is ordered until `stop`; a picture that several want is made once."""
        sight, picture = None, None
        while not stop.is_set():
            try:
                order = self._orders.get(timeout=0.1)
            except queue.Empty:
                continue
            if picture is None or order.sight is not sight:
                sight, picture = order.sight, self._make(order.sight)
            self._on_made(order.envelope, msgspec.structs.replace(picture, id=order.request_id, age_ms=sight.age_ms))

    def _make(self, sight: Sight) -> Picture:
        shrink = min(1.0, MAX_PICTURE_PX / max(sight.frame.image.shape[:2]))
        how = cv2.INTER_AREA if shrink < 0.5 else cv2.INTER_LINEAR  # which is several times faster
        small = cv2.resize(sight.frame.image, None, fx=shrink, fy=shrink, interpolation=how)
        picture = cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
        _, jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        return Picture(
            id=0,
            jpeg=jpeg.tobytes(),
            frame=sight.frame.sequence,
            age_ms=0.0,
            width=picture.shape[1],
            height=picture.shape[0],
            model=self._model.id,
            intended_use=self._model.intended_use,
            reason=None if sight.poor is None else f"{POOR_FRAME}: {sight.poor}",
        )
