"""Models by config: `build()` makes one, `parameters()` and `flops_per_token()` count it without building."""

from trainkit.models.decoder import Decoder
from trainkit.models.foreign import Foreign

Model = Decoder | Foreign

__all__ = ["Decoder", "Foreign", "Model"]
