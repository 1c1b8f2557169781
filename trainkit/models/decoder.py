"""A transformer whose parts are chosen by config, from GPT-2's architecture to Llama's; with `attention.causal=false` an
encoder, from BERT's to ModernBERT's.

B rows, T positions, D model width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from trainkit.config import Count, Fraction, Natural, Positive, config
from trainkit.models.adapters import Adapter
from trainkit.models.attention import Attention, AttentionMixer, Cache
from trainkit.models.kernels import Kernel, Mask, additive, attention_mask
from trainkit.models.layers import Embedding, Linear
from trainkit.models.mlp import MLP, MLPBlock
from trainkit.models.positions import RopeScaling, positions_in, rope_tables


@config
class Decoder:
    """A decoder's shape. `context` is the longest row; `tied` uses the embedding as the head (Press & Wolf 2017,
    arXiv:1608.05859); `init_std` and the smaller one of residual outputs are GPT-2's (Radford et al. 2019). Of `depth` 0 it is
    a table of vectors, one a token.

    `post_norm` normalises what a layer gives after it was added (Devlin et al. 2019, arXiv:1810.04805), in place of what
    comes in. `embed_norm` normalises what comes into the blocks; before attention the first one of them has no norm then
    (Warner et al. 2024, arXiv:2412.13663), but for `post_norm`. `window_theta` is `rope_theta` where a window is."""

    kind: Literal["decoder"] = "decoder"
    vocab: Count
    width: Count
    depth: Natural
    context: Count
    norm: Literal["rmsnorm", "layernorm", "none"] = "rmsnorm"
    norm_eps: Positive = 1e-5
    position: Literal["rope", "learned", "none"] = "rope"
    rope_theta: Positive = 10_000.0
    rope_scaling: RopeScaling | None = None
    window_theta: Positive | None = None
    post_norm: bool = False
    embed_norm: bool = False
    attention: Attention
    mlp: MLP
    tied: bool = True
    bias: bool = False
    dropout: Fraction = 0.0
    init_std: Positive = 0.02
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        _, _, k = self.attention.shape(self.width)
        if self.position == "rope" and k % 2:
            raise ValueError(f"rope turns pairs, so a head's width cannot be odd ({k}): change model.attention.heads")
        if self.window_theta is not None and (self.position != "rope" or self.attention.window is None):
            raise ValueError("model.window_theta is of rope in layers with model.attention.window: there are none")

    def build(self) -> nn.Module:
        """The backbone with fresh weights, drawn from torch's global generator; with an adapter, that alone learns."""
        backbone = Backbone(self)
        backbone.init_weights()
        return self.adapter.apply(backbone) if self.adapter else backbone

    def frame(self) -> nn.Module:
        """The backbone without memory, on the meta device, for `fresh` weights."""
        with torch.device("meta"):
            return Backbone(self)

    def fresh(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of `build()`, one at a time."""
        return fresh(self)

    def parameters(self) -> int:
        """How many numbers it has, an adapter aside, by arithmetic: nothing is built."""
        norm = self.width * ((self.norm != "none") + (self.norm == "layernorm" and self.bias))
        block = self.attention.parameters(self.width, self.bias) + self.mlp.parameters(self.width, self.bias) + 2 * norm
        norms = (not self.post_norm) + self.embed_norm - (self.embed_norm and not self.post_norm and self.depth > 0)
        ends = self.vocab * self.width * (1 if self.tied else 2) + norms * norm
        return ends + self.depth * block + (self.context * self.width if self.position == "learned" else 0)

    def flops_per_token(self, length: int, *, head: bool = True) -> float:
        """Floating-point operations of forward and backward for one token of a row of `length` tokens.

        Two a multiply-add, the backward twice the forward; looking embeddings up costs none, the `head` counts if it is used;
        of causal attention only the half that is needed counts, and of a sliding window only the window. A frozen matrix has no
        gradient, which is a third less; an adapter's own products are left out.
        """
        heads, groups, k = self.attention.shape(self.width)
        matrices = self.width * k * (2 * heads + 2 * groups) + self.mlp.parameters(self.width, bias=False)
        windows = [min(self.attention.window_of(layer) or length, length) for layer in range(self.depth)]
        averages = [w * (length - (w - 1) / 2) / length for w in windows]  # positions that a query of each layer sees
        seen = sum(averages if self.attention.causal else [2 * each - 1 for each in averages])
        products = 6 if self.adapter is None else 4
        return self.depth * products * matrices + 12 * heads * k * seen + head * products * self.vocab * self.width


class Block(nn.Module):
    """`forward(x_BTD, mask, rope) -> x_BTD`: attention and MLP, each normalised before and added after, or with `post_norm`
    added and then normalised."""

    def __init__(self, cfg: Decoder, layer: int) -> None:
        super().__init__()
        self.post_norm = cfg.post_norm
        bare = cfg.embed_norm and layer == 0 and not cfg.post_norm
        self.attention_norm = nn.Identity() if bare else _norm(cfg)
        self.attention = AttentionMixer(cfg.attention, cfg.width, cfg.bias, cfg.dropout, cfg.norm_eps)
        self.attention.window = cfg.attention.window_of(layer)
        self.mlp_norm = _norm(cfg)
        self.mlp = MLPBlock(cfg.mlp, cfg.width, cfg.bias)
        self.dropout = nn.Dropout(cfg.dropout) if cfg.dropout else nn.Identity()

    def forward(self, x: Tensor, mask: Mask, rope: tuple[Tensor, Tensor] | None, cache: Cache | None = None) -> Tensor:
        if self.post_norm:
            x = self.attention_norm(x + self.dropout(self.attention(x, mask, rope, cache)))
            return self.mlp_norm(x + self.dropout(self.mlp(x)))
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, rope, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Backbone(nn.Module):
    """`forward(tokens_BT, documents_BT=None) -> hidden_BTD`, after the last norm. It has no weights before `init_weights`,
    which may be called once a backbone made on the meta device has memory.

    `documents` (B, T) int, non-decreasing along a row, says which document a position belongs to: documents do not see
    each other and positions restart in each. None: every row is one document.
    """

    def __init__(self, cfg: Decoder) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = Embedding(cfg.vocab, cfg.width)
        self.position = Embedding(cfg.context, cfg.width) if cfg.position == "learned" else None
        self.embed_norm = _norm(cfg) if cfg.embed_norm else None
        self.dropout = nn.Dropout(cfg.dropout) if cfg.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.depth))
        self.norm = nn.Identity() if cfg.post_norm else _norm(cfg)
        self.head = None if cfg.tied else Linear(cfg.width, cfg.vocab, bias=False)
        self.kernel: Kernel = "sdpa"

    def use_attention(self, kernel: Kernel) -> None:
        """Compute attention with these kernels from now on."""
        self.kernel = kernel
        for module in self.modules():
            if isinstance(module, AttentionMixer):
                module.kernel = kernel

    @property
    def unembed(self) -> Tensor:
        """The (V, D) matrix that turns hidden states into logits."""
        return self.embed.weight if self.head is None else self.head.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal weights, zero biases; what a block adds to the residual starts smaller, by the number of additions."""
        for name, module in self.named_modules():
            _draw(self.cfg, name, module)

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
        seen: int = 0,
        part: slice | None = None,
    ) -> Tensor:
        """`seen` positions of these rows are in `caches` already, one a block; the new ones are added to them. `documents` are
        of both then. With a `part` only its positions' hidden states are computed, by blocks that get keys and values of the
        others elsewhere."""
        around = self.around(tokens, documents, seen, part)
        x = self.enter(tokens if part is None else tokens[:, part], around)
        for i, block in enumerate(self.blocks):
            shared = around.shared(x, i)
            x = block(x, *shared, caches[i]) if caches else block(x, *shared)
        return self.norm(x)

    def around(self, tokens: Tensor, documents: Tensor | None, seen: int = 0, part: slice | None = None) -> "Around":
        """What all blocks need to know of rows (B, T)."""
        length, device = tokens.shape[1], tokens.device
        whole = torch.arange(seen, seen + length, device=device)
        positions = whole if documents is None else positions_in(documents)[:, seen:]
        end = seen + length
        if part is not None:
            positions, end = positions[..., part], part.stop
            documents = None if documents is None else documents[:, : part.stop]
        look, queries = self.cfg.attention, positions.shape[-1]
        masks = {
            window: attention_mask(documents, queries, end, window, device, self.kernel, causal=look.causal)
            for window in {look.window_of(layer) for layer in range(self.cfg.depth)}
        }
        return Around(self.cfg, positions, masks)

    def enter(self, tokens: Tensor, around: "Around") -> Tensor:
        """Tokens to what comes into the first block."""
        x = self.embed(tokens)
        if self.position is not None:
            x = x + self.position(around.positions)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return self.dropout(x)


class Around:
    """What blocks share: positions, a mask for every window, and rotary tables."""

    def __init__(self, cfg: Decoder, positions: Tensor, masks: dict[int | None, Mask]) -> None:
        self.positions, self._masks, self._cfg = positions, masks, cfg
        self._added: dict[int | None, Mask] = {}
        self._rope: dict[int | None, tuple[Tensor, Tensor]] = {}

    def shared(self, x: Tensor, layer: int) -> tuple[Mask, tuple[Tensor, Tensor] | None]:
        """Mask and rotary tables for a layer's block that hidden states `x` come into. They are made once, by the first."""
        cfg, window = self._cfg, self._cfg.attention.window_of(layer)
        if not self._added:
            self._added = {window: additive(mask, x) for window, mask in self._masks.items()}
            if cfg.position == "rope":
                _, _, k = cfg.attention.shape(cfg.width)
                thetas = {w: cfg.rope_theta if w is None else cfg.window_theta or cfg.rope_theta for w in self._masks}
                made = {t: rope_tables(self.positions, k, t, x.dtype, cfg.rope_scaling) for t in {*thetas.values()}}
                self._rope = {w: made[theta] for w, theta in thetas.items()}
        return self._added[window], self._rope.get(window)


def fresh(cfg: Decoder) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a new backbone, whole and on the CPU, one at a time: drawn as `init_weights` draws them, to the
    bit, so that ranks which keep slices begin with the weights of one which keeps all. One layer is held at most."""
    with torch.device("meta"):
        frame = Backbone(cfg)
    for name, module in frame.named_modules():
        if own := [key for key, _ in module.named_parameters(recurse=False)]:
            module.to_empty(device="cpu", recurse=False)
            with torch.no_grad():
                _draw(cfg, name, module)
            yield from ((f"{name}.{key}", getattr(module, key).detach()) for key in own)
            module.to_empty(device="meta", recurse=False)


def _draw(cfg: Decoder, name: str, module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        residual = name.endswith(("attention.out", "mlp.out"))
        nn.init.normal_(module.weight, std=cfg.init_std / ((2 * cfg.depth) ** 0.5 if residual else 1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=cfg.init_std)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.reset_parameters()


def _norm(cfg: Decoder) -> nn.Module:
    if cfg.norm == "none":
        return nn.Identity()
    if cfg.norm == "rmsnorm":
        return nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
    return nn.LayerNorm(cfg.width, eps=cfg.norm_eps, bias=cfg.bias)
