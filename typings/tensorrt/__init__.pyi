"""The part of NVIDIA's `tensorrt` that comes without types: everything but `tensorrt.plugin`."""

from typing import Any

def __getattr__(name: str) -> Any: ...
