"""Graph passes: each a file with what it requires and what it ensures; `lower` runs them in their order."""
