"""The sizes of a dense Qwen2 decoder, the model that peers without experts are given."""

import msgspec


class DenseShape(msgspec.Struct, frozen=True):
    """Sizes of the decoder; the embedding table and the output head are two matrices."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_size(self) -> int:
        """Width of the keys, and of the values, of one token."""
        return self.kv_heads * self.head_dim

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each matrix of a layer."""
        return {
            "q": (self.hidden, self.hidden),
            "k": (self.kv_size, self.hidden),
            "v": (self.kv_size, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    @property
    def weights_a_token(self) -> int:
        """Weights of the matrices that every token is multiplied with, the output head included."""
        layer = sum(outputs * inputs for outputs, inputs in self.products.values())
        return self.layers * layer + self.vocab * self.hidden
