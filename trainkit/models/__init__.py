"""Models by config: `build()` makes one, `parameters()` and `flops_per_token()` count it without building."""

from trainkit.models.decoder import Decoder

Model = Decoder

__all__ = ["Decoder", "Model"]
