"""The one exception that SonoEdge raises on purpose; anything else that escapes is a defect and keeps its traceback."""

import errno


class SonoEdgeError(Exception):
    """A refusal that its reader can act on: one sentence naming the key or file, the value, and the way out."""


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # errno of an OSError that freeing space mends
