"""Measurements against peers, side by side on one machine: run as modules from the repository, one command each."""
