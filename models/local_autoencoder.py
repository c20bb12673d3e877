"""The default pair: an encoder that sees one patch at a time, and a decoder that also sees the known pixels.

An encoder with global operations carries the hole into every token. This one computes each token from its own patch, so a
token whose patch does not touch the hole is exactly the token of the whole picture (compare PUT, Liu et al. 2022,
https://arxiv.org/abs/2205.05076). The decoder gets the codes and, at every scale, the known pixels and the hole (compare the
asymmetric VQGAN of Zhu et al. 2023, https://arxiv.org/abs/2306.04632).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norms import ChannelNorm, LayerNorm


def condition_channels(guess: bool) -> int:
    """Channels of `condition`: known colours and hole, and with a guess as many again."""
    return 8 if guess else 4


def condition(image: Tensor, mask: Tensor, takes_guess: bool, guess: Tensor | None = None) -> Tensor:
    """What is known of a picture, as channels: colours with the hole blanked, the hole, and the guess of its content.

    Args:
        image: (B, 3, H, W) in [-1, 1]; what it holds inside the hole is ignored.
        mask: (B, 1, H, W), 1 = hole.
        takes_guess: whether there are channels for a guess; they are 0 where `guess` is None.
        guess: (B, 4, H, W): colours in [-1, 1], and 1 where they are a guess, 0 elsewhere. Outside the hole it is ignored.
    Returns:
        (B, 4, H, W), or (B, 8, H, W) with `takes_guess`.
    """
    hole = mask.bool()
    known = image.masked_fill(hole, 0)                                      # not a product, which would let NaN through
    parts = [known, mask.to(image.dtype)]
    if takes_guess:
        if guess is None:
            parts.append(known.new_zeros(len(known), 4, *known.shape[2:]))
        else:
            guessed = hole & guess[:, 3:].bool()                            # (B, 1, H, W)
            parts += [guess[:, :3].masked_fill(~guessed, 0), guessed.to(image.dtype)]
    elif guess is not None:
        raise ValueError("this model takes no guess; use weights trained with vqgan.guess: true")
    return torch.cat(parts, dim=1)


class PixelMLP(nn.Module):
    """Normalise, widen, GELU, narrow, with a residual: the MLP half of a transformer block, at every position alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width).  Returns the same shape."""
        return x + self.layers(x)


class LocalEncoder(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> latents (B, codebook_dim, h, w); each latent depends on its own patch only.

    Args:
        stride: side of a patch in pixels; h = H / stride.
        width, depth: channels and number of per-patch MLPs.
    """

    def __init__(self, codebook_dim: int, stride: int, width: int, depth: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, stride, stride=stride)
        self.blocks = nn.Sequential(*(PixelMLP(width) for _ in range(depth)))
        self.to_code = nn.Sequential(LayerNorm(width), nn.Linear(width, codebook_dim))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).permute(0, 2, 3, 1)                       # (B, h, w, width)
        return self.to_code(self.blocks(x)).permute(0, 3, 1, 2)         # (B, codebook_dim, h, w)


class ConvBlock(nn.Module):
    """Norm, then (Swish, 3x3 convolution) twice, with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            ChannelNorm(channels),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        nn.init.zeros_(self.layers[-1].weight)    # every block starts as the identity
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W).  Returns the same shape."""
        return x + self.layers(x)


class ConditionedDecoder(nn.Module):
    """Codes and known pixels -> image (B, 3, H, W), about [-1, 1], not clamped.

    Args:
        channels: width at each scale, from the codes to the pixels; one doubling between two scales.
        blocks: residual blocks at each scale.
        context_dim: width of the transformer's features that it gets at each position, 0: none; see `MaskGIT.known`.
        guess: whether it also takes a guess of the hole's content; see `condition_channels`.
    """

    def __init__(
        self, codebook_dim: int, channels: list[int], blocks: list[int], context_dim: int = 0, guess: bool = False
    ) -> None:
        super().__init__()
        self.guess = guess
        self.factors = [2**i for i in reversed(range(len(channels)))]    # pixels per position: 4, 2, 1
        self.from_code = nn.Conv2d(codebook_dim, channels[0], 3, padding=1)
        self.from_context = nn.Linear(context_dim, channels[0], bias=False) if context_dim else None
        if context_dim:
            nn.init.zeros_(self.from_context.weight)    # the finish begins with the decoder of stage 1
        self.condition = nn.ModuleList(
            nn.Conv2d(condition_channels(guess) * f * f, c, 3, padding=1)
            for f, c in zip(self.factors, channels, strict=True)
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvBlock(c) for _ in range(n))) for n, c in zip(blocks, channels, strict=True)
        )
        self.widen = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in zip(channels[:-1], channels[1:], strict=True)
        )
        self.to_image = nn.Sequential(
            ChannelNorm(channels[-1]), nn.SiLU(), nn.Conv2d(channels[-1], 3, 3, padding=1)
        )

    def forward(
        self, z_q: Tensor, known: Tensor, mask: Tensor, context: Tensor | None = None, guess: Tensor | None = None
    ) -> Tensor:
        """Decode.

        Args:
            z_q: (B, codebook_dim, h, w) codes.
            known: (B, 3, H, W) image in [-1, 1]; what it holds inside the hole is ignored.
            mask: (B, 1, H, W), 1 = hole. All ones makes this a plain decoder.
            context: (B, h * w, context_dim), or None. Where nothing is known it is ignored.
            guess: (B, 4, H, W), see `condition`; needs a decoder made with `guess`.
        """
        condition_ = condition(known, mask, self.guess, guess)              # (B, 4 or 8, H, W)
        x = self.from_code(z_q)                                             # (B, C0, h, w)
        if context is not None:
            context = self.from_context(context).transpose(1, 2)            # (B, C0, h w)
            x = x + context.view_as(x) * (mask.amin((2, 3), True) < 1)      # (B, C0, h, w)
        for i, f in enumerate(self.factors):
            if i > 0:
                x = self.widen[i - 1](F.interpolate(x, scale_factor=2))     # (B, Ci, H/f, W/f)
            x = x + self.condition[i](F.pixel_unshuffle(condition_, f))      # (B, Ci, H/f, W/f)
            x = self.stages[i](x)                                           # (B, Ci, H/f, W/f)
        return self.to_image(x)                                             # (B, 3, H, W)
