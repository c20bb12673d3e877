"""Bidirectional transformer over visual tokens (Chang et al. 2022, MaskGIT, section 3.2; Devlin et al. 2019, BERT).

Tokens in, logits over the codebook out. `mask_token_id` (= codebook_size) marks the tokens to be predicted. Optionally every
token also sees the pixels of its own patch and which of them are missing: a partly known patch has no token, but its known
pixels say a lot.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import Dropout, MultiHeadAttention


@dataclass
class TransformerConfig:
    codebook_size: int = 1024         # K; ids 0..K-1 are image tokens, K itself is the mask token
    seq_len: int = 256                # N = h * w
    embed_dim: int = 768              # D
    depth: int = 15                   # blocks
    num_heads: int = 16               # must divide embed_dim
    mlp_dim: int = 1536               # hidden width of a block's MLP
    dropout: float = 0.1              # on embeddings and on each block's two outputs
    attention_dropout: float = 0.1    # on attention weights
    pre_norm: bool = False            # normalise before each sub-layer (Xiong et al. 2020) instead of after it
    qk_norm: bool = False             # RMS-normalise queries and keys
    pixel_dim: int = 0                # numbers per token of its own pixels and hole; 0: tokens only, as in the reference

    def __post_init__(self) -> None:
        for name in ("codebook_size", "seq_len", "embed_dim", "depth", "num_heads", "mlp_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.pixel_dim < 0:
            raise ValueError(f"pixel_dim must be 0 or more, got {self.pixel_dim}")
        if self.embed_dim % self.num_heads != 0:
            raise ValueError(f"embed_dim ({self.embed_dim}) must be divisible by num_heads ({self.num_heads})")


@functools.cache
def compiled(function: Callable) -> Callable:
    """torch.compile of a function, made when it is first needed: the compiler takes a second to import."""
    return torch.compile(function)


class Block(nn.Module):
    """Attention, then an MLP, each with a residual; LayerNorm before (pre-norm) or after (post-norm) each."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        D = config.embed_dim
        self.pre_norm = config.pre_norm
        self.norm1 = nn.LayerNorm(D)
        self.attention = MultiHeadAttention(D, config.num_heads, config.attention_dropout, config.qk_norm)
        self.norm2 = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, config.mlp_dim), nn.GELU(), nn.Linear(config.mlp_dim, D))
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, wanted: Tensor | None = None) -> Tensor:
        """x: (B, N, D).  Returns (B, N, D), or (M, D) at the M flat positions `wanted`: the MLP sees each token alone."""
        seen = self.attention(self.norm1(x) if self.pre_norm else x)                # (B, N, D)
        x, dtype = x + self.dropout(seen), seen.dtype
        if self.training and torch.compiler.is_compiling():
            # In two parts x is there for both backward passes; in one, the compiler makes it anew: 8 % more memory traffic.
            torch._dynamo.graph_break()
        if wanted is not None:
            x = x.flatten(0, 1)[wanted]                                             # (M, D)
        if self.pre_norm:
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = self.normalise(self.norm1, x, dtype)
        return self.normalise(self.norm2, x + self.dropout(self.mlp(x)), dtype)

    def normalise(self, norm: nn.LayerNorm, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Autocast lets a norm give float32; in training half of that is kept, as what comes next multiplies in half."""
        return norm(x).to(dtype) if self.training else norm(x)


class BidirectionalTransformer(nn.Module):
    """Predicts every token from all the others.

    The output embedding is tied to the input embedding, with a bias of its own for each position and code.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        D = config.embed_dim

        # embeddings
        self.token_embed = nn.Embedding(config.codebook_size + 1, D)    # the last row is the mask token
        self.pos_embed = nn.Parameter(torch.zeros(config.seq_len, D))
        self.pixel_embed = nn.Linear(config.pixel_dim, D) if config.pixel_dim else None
        self.embed_norm = nn.LayerNorm(D)
        self.dropout = Dropout(config.dropout)

        # blocks
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(D) if config.pre_norm else nn.Identity()

        # head
        self.head = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D, eps=1e-12))
        self.bias = nn.Parameter(torch.zeros(config.seq_len, config.codebook_size + 1))
        self.compiled = False
        self.init_weights()

    @property
    def mask_token_id(self) -> int:
        return self.config.codebook_size

    def init_weights(self) -> None:
        """BERT's rule: normal with standard deviation 0.02, zero biases. In pre-norm models the outputs of each block are
        scaled by 1 / sqrt(2 depth), so that the residual stream keeps its size whatever the depth (GPT-2, section 2.3)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.config.pre_norm:
            for block in self.blocks:
                for layer in (block.attention.proj, block.mlp[2]):
                    layer.weight.data.mul_((2 * self.config.depth) ** -0.5)

    def compile_blocks(self) -> None:
        """torch.compile for every block: for the shapes that it meets, and the last one for any number of tokens.

        What comes before and after them is compiled as well, see `like_blocks`.
        """
        self.compiled = True
        for block in self.blocks[:-1]:
            block.compile(dynamic=False)
        self.blocks[-1].compile()

    def like_blocks(self, function: Callable) -> Callable:
        """The function, compiled where the blocks are."""
        return compiled(function) if self.compiled else function

    def of_any_number(self, x: Tensor | None) -> Tensor | None:
        """The same tensor. M differs from call to call: what is compiled and takes x is compiled once for all."""
        if self.compiled and x is not None:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return x

    def forward(self, tokens: Tensor, pixels: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        """Logits over the codebook for every position, or for some.

        Args:
            tokens: (B, N) int64 in [0, K]; K is the mask token.
            pixels: (B, N, pixel_dim) masked pixels and hole of each patch; needed if and only if `pixel_dim` > 0.
            wanted: (M,) positions b * N + n whose logits are needed; saves the others' share of the last MLP and the head.
        Returns:
            (B, N, K), or (M, K) for the `wanted` ones: the mask token itself can't be predicted, in training or in decoding.
        """
        return self.predict(self.trunk(tokens, pixels, wanted), wanted)

    def features(self, tokens: Tensor, pixels: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        """What the transformer knows of every position, or of some: (B, N, D) or (M, D), normalised. Arguments as above.

        The logits are linear in them. In float32, whatever autocast says: a small part of the work, which decides between
        codes that are nearly tied.
        """
        return self.exact_features(self.trunk(tokens, pixels, wanted))

    def trunk(self, tokens: Tensor, pixels: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        """What comes out of the last block, (B, N, D) or (M, D). Arguments as above."""
        if (pixels is None) != (self.pixel_embed is None):
            raise ValueError(
                f"this transformer was made with pixel_dim={self.config.pixel_dim}, "
                f"so `pixels` must {'' if self.pixel_embed else 'not '}be given"
            )
        x = self.like_blocks(BidirectionalTransformer.embed)(self, tokens, pixels)  # (B, N, D)
        for block in self.blocks[:-1]:
            x = block(x)                                                            # (B, N, D)
        return self.of_any_number(self.blocks[-1](x, self.of_any_number(wanted)))   # (B, N, D) or (M, D)

    def embed(self, tokens: Tensor, pixels: Tensor | None) -> Tensor:
        """What goes into the first block, (B, N, D)."""
        x = self.token_embed(tokens) + self.pos_embed                               # (B, N, D)
        if pixels is not None:
            x = x + self.pixel_embed(pixels)                                        # (B, N, D)
        return self.dropout(self.embed_norm(x))                                     # (B, N, D)

    def predict(self, x: Tensor, wanted: Tensor | None = None) -> Tensor:
        """From the `trunk` to the logits; in float32 outside of training."""
        if self.training:
            return self.logits(self.head(self.final_norm(x)), wanted)
        return self.exact_logits(self.exact_features(x), wanted)

    def exact_features(self, x: Tensor) -> Tensor:
        """From the `trunk` to the `features`."""
        with torch.autocast(x.device.type, enabled=False):
            return self.head(self.final_norm(x.float()))                            # like x

    def exact_logits(self, features: Tensor, wanted: Tensor | None = None) -> Tensor:
        """`logits` in float32, whatever autocast says."""
        with torch.autocast(features.device.type, enabled=False):
            return self.logits(features.float(), wanted)

    def logits(self, features: Tensor, wanted: Tensor | None = None) -> Tensor:
        """`features` (B, N, D) to (B, N, K), or (M, D) to (M, K)."""
        K, N = self.config.codebook_size, self.config.seq_len
        bias = self.bias[:, :K] if wanted is None else self.bias[wanted % N, :K]    # (N, K) or (M, K)
        return features @ self.token_embed.weight[:K].T.to(features.dtype) + bias    # (B, N, K) or (M, K)
