"""Guess hidden tokens from both sides: what an encoder learns from text before it embeds anything (Devlin et al. 2019,
arXiv:1810.04805).

Which tokens are hidden depends on the step, the sample and the place alone, so that neither microbatches nor ranks
change it. B rows, T positions.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn

from trainkit.config import config
from trainkit.tasks.causal_lm import CausalLM, LanguageModel
from trainkit.tasks.loss import IGNORED

Share = Annotated[float, Interval(gt=0, lt=1)]
LANES = CHOSEN, FATE, WHICH = range(3)  # what is drawn for a position
MASKED, KEPT = 0.8, 0.1  # of the chosen; the others become a token at random
_ODD = (0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


@config
class MaskedLM:
    """`share` of the tokens is to be guessed: of those 8 in 10 are hidden, 1 is another token and 1 is what it was.
    What hides is the model's last id, which no text has."""

    metrics: ClassVar[tuple[str, ...]] = ("val_loss", "val_perplexity")
    takes: ClassVar[str] = "text"
    head: ClassVar[bool] = True
    writes: ClassVar[bool] = False
    own_ids: ClassVar[int] = 1
    kind: Literal["mlm"] = "mlm"
    share: Share = 0.15

    def check(self, model: Any) -> None:
        """Raise ValueError where a model of this config cannot do it."""
        if model.attention.causal:
            raise ValueError(
                "task=mlm guesses from both sides, and this model sees one: set model.attention.causal=false"
            )

    def measured(self, data: Any) -> tuple[str, ...]:
        """The metrics that `data` holds something out for."""
        return self.metrics

    def build(self, backbone: nn.Module) -> nn.Module:
        """The model whose forward this task calls."""
        return LanguageModel(backbone)

    def backward(self, model: nn.Module, batch: Mapping[str, Tensor], *, ranks: Any, **how: Any) -> dict[str, Any]:
        """Add the gradient of the mean loss of the global batch's hidden tokens to the parameters, as
        `CausalLM.backward` does: what it takes and gives is the same."""
        key = torch.randint(1 << 62, (), device="cpu").to(batch["tokens"].device)
        key = ranks.sum(key if ranks.rank == 0 else torch.zeros_like(key))  # the first rank's word
        return CausalLM().backward(model, self.hidden(model, batch, key), ranks=ranks, **how)

    def evaluate(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Tensor]],
        *,
        ranks: Any,
        stop: Callable[[], bool],
        microbatch: int | None = None,
    ) -> dict[str, float] | None:
        """Loss (nats a hidden token) and perplexity of the batches, of which the same tokens are hidden each time; None
        when `stop()` says so in between."""

        def hidden() -> Iterator[dict[str, Tensor]]:
            for batch in batches:
                yield self.hidden(model, batch, torch.zeros_like(batch["ids"][0]))

        found = CausalLM().evaluate(model, hidden(), ranks=ranks, stop=stop, microbatch=microbatch)
        return found and {name: found[name] for name in self.metrics}

    def hidden(self, model: Any, batch: Mapping[str, Tensor], key: Tensor) -> dict[str, Tensor]:
        """`batch` with hidden tokens, whose labels they are. `key` is an int64 scalar of the step."""
        tokens = batch["tokens"]
        last = model.backbone.embed.num_embeddings - 1
        chosen, fate, which = (drawn(key, batch["ids"], tokens.shape[1], lane) for lane in LANES)
        guessed = (chosen < self.share) & (batch["labels"] != IGNORED)  # neither the ends of documents nor empty rows
        changed = torch.where(fate < MASKED, last, torch.where(fate < MASKED + KEPT, tokens, (which * last).long()))
        labels = torch.where(guessed, tokens, IGNORED)
        return {**batch, "tokens": torch.where(guessed, changed, tokens), "labels": labels}


def drawn(key: Tensor, ids: Tensor, length: int, lane: int) -> Tensor:
    """(B, T) float64 in [0, 1), a function of the key, the samples' `ids` (B,), the place and the lane: SplitMix64's
    finaliser (Steele, Lea & Flood 2014) in integers that wrap around."""
    places = torch.arange(length, device=ids.device)
    x = _mixed(ids + key * _ODD[0] + lane + 1)[:, None] + places * _ODD[0]
    return ((_mixed(x) >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _right(x, 30)) * _ODD[1]
    x = (x ^ _right(x, 27)) * _ODD[2]
    return x ^ _right(x, 31)


def _right(x: Tensor, bits: int) -> Tensor:
    """Shifted to the right without the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
