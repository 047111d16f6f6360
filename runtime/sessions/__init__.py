"""Backends that run the vision tower and the decoder of a bundle."""
