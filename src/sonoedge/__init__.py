"""SonoEdge turns an EchoVLM checkpoint into a live ultrasound assistant that runs on the scanner."""

__version__ = "0.1.0"
