"""A model of transformers that our decoder cannot be, trained as it is: its blocks and its head behind our backbone's contract.

B rows, T positions, D model width, V vocabulary.
"""

import sys
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainkit.config import Count, config, how
from trainkit.errors import UserError
from trainkit.models.adapters import Adapter
from trainkit.models.attention import Attention
from trainkit.models.layers import look_up
from trainkit.models.positions import positions_in

# what some models do to their logits after the head, which is not in the head's matrix
AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@config
class Foreign:
    """`name` is a folder, a GGUF file or the hub's OWNER/MODEL; with `pretrained` the run begins with its weights. Where our
    decoder can be that model, a run holds the decoder in place of this; else `config` is what its config.json says."""

    kind: Literal["hf"] = "hf"
    name: str | None = how(None)
    pretrained: bool = how(True)
    config: dict[str, Any] | None = None
    context: Count = 2048
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        if self.config is None:
            raise ValueError("model.name is missing: a folder, a GGUF file or the hub's OWNER/MODEL")

    def build(self) -> nn.Module:
        """The backbone with fresh weights, drawn from torch's global generator; with an adapter, that alone learns.

        Raises:
            UserError: transformers is missing or too old for it, or its logits are more than its head's product.
        """
        backbone = ForeignBackbone(self.made())
        return self.adapter.apply(backbone) if self.adapter else backbone

    def made(self) -> nn.Module:
        """The model as transformers has it, in float32."""
        transformers = _transformers()
        said = self._said
        for key in AFTER_THE_HEAD:
            if getattr(said, key, None) not in (None, 1, 1.0):
                raise UserError(f"{self._family} changes its logits after its head ({key}), which no loss here does")
        made: nn.Module = transformers.AutoModelForCausalLM.from_config(
            said, dtype=torch.float32, trust_remote_code=False
        )
        return made

    def parameters(self) -> int:
        """How many numbers it has, an adapter aside: it is made without memory, and counted."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.made().parameters())

    def flops_per_token(self, length: int, *, head: bool = True) -> float:
        """Six for each number of it but its embedding's, and what causal attention of `length` tokens takes. Of a mixture
        of experts all count, though some compute. `head` says whether logits are made."""
        ends = self.vocab * self.width
        matrices = self.parameters() - (ends if head else 2 * ends) + (ends if self._said.tie_word_embeddings else 0)
        products = 6 if self.adapter is None else 4
        return products * matrices + 6 * self.depth * self.width * length

    @property
    def vocab(self) -> int:
        """How many ids it knows."""
        return int(self._said.vocab_size)

    @property
    def width(self) -> int:
        """D."""
        return int(self._said.hidden_size)

    @property
    def attention(self) -> Attention:
        """What a task asks of: a query sees what is before it."""
        return Attention(heads=int(self._said.num_attention_heads))

    @property
    def dropout(self) -> float:
        """What its attention drops."""
        return float(getattr(self._said, "attention_dropout", 0.0) or 0.0)

    @property
    def depth(self) -> int:
        """How many blocks it has."""
        return int(self._said.num_hidden_layers)

    @property
    def _family(self) -> str:
        return str((self.config or {}).get("model_type"))

    @cached_property
    def _said(self) -> Any:
        """transformers' own object of the config."""
        transformers = _transformers()
        said = {
            key: value
            for key, value in (self.config or {}).items()
            if key not in ("model_type", "dtype", "torch_dtype")
        }
        if "auto_map" in said:
            raise UserError(f"{self._family} brings code of its own (auto_map), and nothing that is read here is run")
        try:
            return transformers.AutoConfig.for_model(self._family, **said)
        except (ValueError, TypeError) as error:
            raise UserError(f"transformers {transformers.__version__} does not know {self._family}: {error}") from error


class ForeignBackbone(nn.Module):
    """`forward(tokens_BT, documents_BT=None) -> hidden_BTD`, after the model's last norm."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner: Any = inner
        for module in inner.modules():
            if type(module) is nn.Embedding:
                module.forward = partial(_looked_up, module)  # type: ignore[method-assign]

    @property
    def decoder(self) -> nn.Module:
        """The model without its head."""
        inner = self.inner
        return inner.get_decoder() if hasattr(inner, "get_decoder") else inner.base_model

    @property
    def blocks(self) -> nn.ModuleList:
        """Its layers.

        Raises:
            UserError: they are not in one list.
        """
        depth = self.inner.config.num_hidden_layers
        lists = [m for m in self.decoder.children() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if len(lists) != 1:
            raise UserError(f"{type(self.inner).__name__} has no list of {depth} layers, over which to do anything")
        return lists[0]

    @property
    def unembed(self) -> Tensor:
        """The (V, D) matrix that turns hidden states into logits."""
        head = self.inner.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None:
            raise UserError(f"{type(self.inner).__name__} has no head, or one with a bias, which no loss here adds")
        weight: Tensor = head.weight
        return weight

    def use_attention(self, kernel: str) -> None:
        """Compute attention with these kernels from now on, by transformers' names for them."""
        if kernel != "sdpa":
            self.inner.set_attn_implementation({"flash": "flash_attention_2", "flex": "flex_attention"}[kernel])

    def caches(self) -> Any:
        """What a step of generation keeps of the positions before it."""
        return _transformers().DynamicCache(config=self.inner.config)

    def forward(
        self, tokens: Tensor, documents: Tensor | None = None, caches: Any | None = None, seen: int = 0
    ) -> Tensor:
        """`seen` positions of these rows are in `caches` already.

        Raises:
            UserError: documents share a row, and the model would let them see each other.
        """
        if documents is None:
            positions = torch.arange(seen, seen + tokens.shape[1], device=tokens.device)[None]
        elif not hasattr(sys.modules[type(self.decoder).__module__], "create_causal_mask"):
            raise UserError(
                f"{type(self.inner).__name__} does not tell documents of one row apart: give rows of one document each"
            )
        else:
            positions = positions_in(documents)  # where they begin again, transformers begins another document
        out = self.decoder(
            input_ids=tokens,
            position_ids=positions.expand_as(tokens),
            past_key_values=caches,
            use_cache=caches is not None,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden


def _looked_up(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    return look_up(ids, embedding.weight, embedding.padding_idx)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError("model=hf of this architecture is transformers' own: pip install 'trainkit[hf]'") from error
    return transformers
