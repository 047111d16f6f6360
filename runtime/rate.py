"""How many requests a client may send: a token bucket each."""

from collections import OrderedDict
from collections.abc import Hashable


class RateLimit:
    """Lets each client send `per_s` requests a second on average and `burst` at once.

    At most `clients` buckets are kept; the one that was used longest ago goes first, and is as good as full by then.
    """

    def __init__(self, per_s: float, burst: int, clients: int = 4096) -> None:
        self._per_s, self._burst, self._clients = per_s, burst, clients
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()  # client → tokens, at which second

    def take(self, client: Hashable, now_s: float) -> int | None:
        """Take one token and return None, or return in how many milliseconds there will be one."""
        tokens, since_s = self._buckets.pop(client, (float(self._burst), now_s))
        tokens = min(float(self._burst), tokens + max(0.0, now_s - since_s) * self._per_s)
        allowed = tokens >= 1.0
        self._buckets[client] = (tokens - allowed, now_s)
        while len(self._buckets) > self._clients:
            self._buckets.popitem(last=False)
        return None if allowed else max(1, round((1.0 - tokens) / self._per_s * 1000))
