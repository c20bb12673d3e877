"""Bidirectional transformer over visual tokens (Chang et al. 2022, MaskGIT, section 3.2; Devlin et al. 2019, BERT).

Tokens in, logits over the codebook out. `mask_token_id` (= codebook_size) marks the tokens to be predicted. Optionally each
position also gets the known pixels of its own patch: a patch that touches the hole has no token, yet may be partly known.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from .attention import Dropout, MultiHeadAttention
from .config import STRICT, Count, Share
from .kv_cache import KVCache
from .norms import LayerNorm


@dataclass(config=STRICT)
class TransformerConfig:
    codebook_size: Count = 1024         # K; ids 0..K-1 are image tokens, K itself is the mask token
    seq_len: Count = 256                # N = h * w
    embed_dim: Count = 768              # D
    depth: Count = 15                   # blocks
    num_heads: Count = 16               # must divide embed_dim
    mlp_dim: Count = 1536               # hidden width of a block's MLP
    dropout: Share = 0.1                # on embeddings and on each block's two outputs
    attention_dropout: Share = 0.1      # on attention weights
    pre_norm: bool = False              # normalise before each sub-layer (Xiong et al. 2020) instead of after it
    qk_norm: bool = False               # RMS-normalise queries and keys
    pixel_dim: Annotated[int, Field(ge=0)] = 0    # numbers per token of its own pixels and hole; 0: tokens only
    # What a temperature of 1 stands for when tokens are sampled: below 1 safer. Chosen after the training, see tools.export.
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads != 0:
            raise ValueError(f"embed_dim ({self.embed_dim}) must be divisible by num_heads ({self.num_heads})")


@functools.cache
def compile_once(function: Callable) -> Callable:
    """torch.compile of a function, when it is first needed: the compiler takes a second to import."""
    return torch.compile(function)


class Block(nn.Module):
    """Attention, then an MLP, each with a residual; LayerNorm before (pre-norm) or after (post-norm) each."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        D = config.embed_dim
        self.pre_norm = config.pre_norm
        self.norm1 = LayerNorm(D)
        self.attention = MultiHeadAttention(D, config.num_heads, config.attention_dropout, config.qk_norm)
        self.norm2 = LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, config.mlp_dim), nn.GELU(), nn.Linear(config.mlp_dim, D))
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, positions: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """x: (B, N, D).  Returns (B, N, D), or (M, D) at the flat positions (M,), as the MLP sees each token alone."""
        seen = self.attention(self.norm1(x) if self.pre_norm else x, cache)         # (B, N, D)
        x, dtype = x + self.dropout(seen), seen.dtype
        if self.training and torch.compiler.is_compiling():
            # Without the break the compiler computes x a second time in the backward pass: 8 % more memory traffic.
            torch._dynamo.graph_break()
        if positions is not None:
            x = x.flatten(0, 1)[positions]                                             # (M, D)
        if self.pre_norm:
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = self.normalise(self.norm1, x, dtype)
        return self.normalise(self.norm2, x + self.dropout(self.mlp(x)), dtype)

    def normalise(self, norm: LayerNorm, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Under autocast a norm returns float32. In training `dtype` (bfloat16) is kept for the next matrix product."""
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
        self.embed_norm = LayerNorm(D)
        self.dropout = Dropout(config.dropout)

        # blocks
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_norm = LayerNorm(D) if config.pre_norm else nn.Identity()

        # head
        self.head = nn.Sequential(nn.Linear(D, D), nn.GELU(), LayerNorm(D, eps=1e-12))
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
        """Compile every block with torch.compile: the last one for any number of tokens, the others for fixed shapes.

        What comes before and after the blocks is compiled as well, see `compiled_like_blocks`.
        """
        self.compiled = True
        for block in self.blocks[:-1]:
            block.compile(dynamic=False)
        self.blocks[-1].compile()

    def compiled_like_blocks(self, function: Callable) -> Callable:
        """The function, compiled if the blocks are."""
        return compile_once(function) if self.compiled else function

    def mark_dynamic(self, x: Tensor | None) -> Tensor | None:
        """Marks M, the size of x in dimension 0, as dynamic, so that torch.compile does not recompile when it changes."""
        if self.compiled and x is not None:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return x

    def forward(self, tokens: Tensor, pixels: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Logits over the codebook for every position, or for some.

        Args:
            tokens: (B, N) int64 in [0, K]; K is the mask token.
            pixels: (B, N, pixel_dim) masked pixels and hole of each patch; needed if and only if `pixel_dim` > 0.
            positions: (M,) flat positions b * N + n whose logits are needed, which saves the last MLP and the head of the
                others; None is all of them.
        Returns:
            (B, N, K) or (M, K). The mask token has no logit: it can't be predicted, in training or in decoding.
        """
        return self.predict(self.trunk(tokens, pixels, positions), positions)

    def features(
        self, tokens: Tensor, pixels: Tensor | None = None, positions: Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor:    # fmt: skip
        """The normalised features that the logits are linear in, (B, N, D) or (M, D). Arguments as in `forward`.

        Always in float32: it is a small part of the work, and decides between codes that are nearly tied. With `caches`, one
        for each block, all tokens' keys and values are kept there; or tokens and pixels are those of its `places` only,
        (B, Q) and (B, Q, pixel_dim), and positions are b * Q + q.
        """
        return self.exact_features(self.trunk(tokens, pixels, positions, caches))

    def trunk(
        self, tokens: Tensor, pixels: Tensor | None = None, positions: Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor:    # fmt: skip
        """Output of the last block, (B, N, D) or (M, D). Arguments as in `features`."""
        if (pixels is None) != (self.pixel_embed is None):
            raise ValueError(
                f"this transformer was made with pixel_dim={self.config.pixel_dim}, "
                f"so `pixels` must {'' if self.pixel_embed else 'not '}be given"
            )
        embed = self.compiled_like_blocks(BidirectionalTransformer.embed)
        x = embed(self, tokens, pixels, caches[0].places if caches else None)       # (B, N, D)
        *others, last = zip(self.blocks, caches or [None] * len(self.blocks), strict=True)
        for block, cache in others:
            x = block(x, cache=cache)                                               # (B, N, D)
        block, cache = last
        return self.mark_dynamic(block(x, self.mark_dynamic(positions), cache))     # (B, N, D) or (M, D)

    def embed(self, tokens: Tensor, pixels: Tensor | None, places: Tensor | None = None) -> Tensor:
        """Input of the first block, (B, N, D), or (B, Q, D) of the tokens at `places` (B, Q)."""
        position = self.pos_embed if places is None else self.pos_embed[places]     # (N, D) or (B, Q, D)
        x = self.token_embed(tokens) + position                                     # (B, N, D)
        if pixels is not None:
            x = x + self.pixel_embed(pixels)                                        # (B, N, D)
        return self.dropout(self.embed_norm(x))                                     # (B, N, D)

    def predict(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """From the output of `trunk` to the logits; in float32 outside of training."""
        if self.training:
            return self.logits(self.head(self.final_norm(x)), positions)
        return self.exact_logits(self.exact_features(x), positions)

    def exact_features(self, x: Tensor) -> Tensor:
        """From the output of `trunk` to the `features`."""
        with torch.autocast(x.device.type, enabled=False):
            return self.head(self.final_norm(x.float()))                            # like x

    def exact_logits(self, features: Tensor, positions: Tensor | None = None) -> Tensor:
        """`logits`, always in float32."""
        with torch.autocast(features.device.type, enabled=False):
            return self.logits(features.float(), positions)

    def logits(self, features: Tensor, positions: Tensor | None = None) -> Tensor:
        """`features` (B, N, D) to (B, N, K), or (M, D) to (M, K)."""
        K, N = self.config.codebook_size, self.config.seq_len
        bias = self.bias[:, :K] if positions is None else self.bias[positions % N, :K]     # (N, K) or (M, K)
        return features @ self.token_embed.weight[:K].T.to(features.dtype) + bias          # (B, N, K) or (M, K)
