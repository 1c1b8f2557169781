"""A task is `build(backbone) -> model`, `backward(model, batch, ...)` and `evaluate(model, batches, ...)`.

It owns the loss and how a global batch becomes gradients, because only it knows how its loss adds up.
"""

from trainkit.tasks.causal_lm import CausalLM
from trainkit.tasks.dpo import DPO
from trainkit.tasks.embedding import Embedding
from trainkit.tasks.mlm import MaskedLM
from trainkit.tasks.sft import SFT

Task = CausalLM | SFT | DPO | Embedding | MaskedLM

__all__ = ["DPO", "SFT", "CausalLM", "Embedding", "MaskedLM", "Task"]
