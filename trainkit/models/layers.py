"""Layers that draw no weights when they are made: `Backbone.init_weights` draws all of them, once and in one order.

So a backbone made on the meta device and filled later gets the weights of one made in place, and a large one is not
drawn twice.
"""

from torch import nn


class Linear(nn.Linear):
    """torch's, without weights yet."""

    def reset_parameters(self) -> None:
        """Nothing: see above."""


class Embedding(nn.Embedding):
    """torch's, without weights yet."""

    def reset_parameters(self) -> None:
        """Nothing: see above."""
