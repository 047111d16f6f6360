"""The weights of a checkpoint as float32, read as they are asked for: whole tensors, or some of their rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sonoedge.export.models.loading import open_checkpoint
from sonoedge.export.models.shards import open_shard, row_chunks

CHUNK_VALUES = 2**24  # 64 MiB as float32


class Weights:
    """Reads a checkpoint folder; SonoEdgeError where `open_checkpoint` raises it, or when a shard has gone."""

    def __init__(self, checkpoint: Path) -> None:
        self.config, self._headers = open_checkpoint(checkpoint)

    def tensor(self, key: str) -> Tensor:
        """A whole tensor; its rows are converted in chunks, so that it never lies in memory in two types."""
        values = torch.empty(self._headers[key].shape)
        for first, rows in self.chunks(key):
            values[first : first + rows.shape[0]] = rows
        return values

    def rows(self, key: str, picked: Sequence[int]) -> Tensor:
        """The rows `picked` of a matrix [rows, columns]."""
        header = self._headers[key]
        with open_shard(header.file) as shard:
            rows: Tensor = shard.get_slice(key)[list(picked)]
        return rows.to(torch.float32)

    @property
    def head_key(self) -> str:
        """The key of the matrix [vocab, hidden] that gives logits."""
        return "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"

    def row_count(self, key: str) -> int:
        """Rows of the tensor `key`."""
        return self._headers[key].shape[0]

    def chunks(self, key: str) -> Iterator[tuple[int, Tensor]]:
        """All rows in order, a few at a time, each with the number of its first."""
        for first, rows in row_chunks(self._headers[key], key, CHUNK_VALUES):
            yield first, rows.to(torch.float32)
