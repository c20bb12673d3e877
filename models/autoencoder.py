"""The reference encoder and decoder of VQGAN (Esser et al. 2021, section 3 and appendix, https://arxiv.org/abs/2012.09841).

Residual blocks with GroupNorm and Swish, self-attention at one resolution. Through GroupNorm, attention and a wide receptive
field each output depends on the whole picture; `models/local_autoencoder.py` is the pair where it does not.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .norms import GroupNorm

EPS = 1e-6    # of every norm


class ResidualBlock(nn.Module):
    """(norm, Swish, 3x3 convolution) twice, with a residual; a 1x1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            GroupNorm(in_channels, EPS), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1),
            GroupNorm(out_channels, EPS), nn.SiLU(), nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )    # fmt: skip
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W).  Returns (B, out_channels, H, W)."""
        return self.skip(x) + self.block(x)


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions of a feature map, with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, EPS)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W).  Returns (B, C, H, W)."""
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)         # (B, HW, 3C)
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)                     # each (B, 1, HW, C)
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1)        # (B, HW, C)
        return x + self.proj(out.transpose(1, 2).reshape(B, C, H, W))


class Downsample(nn.Module):
    """Halves height and width; pads on the right and below only, as VQGAN does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W).  Returns (B, C, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W).  Returns (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2))


class Encoder(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> latents (B, codebook_dim, h, w).

    Args:
        channels: width of the stem, then of each stage of two residual blocks.
        down: stages (from 0) that end by halving the resolution.
        image_size: H = W in pixels; tells where attention goes.
        attention_size: feature maps of this many rows get attention after every residual block.
    """

    def __init__(
        self, channels: list[int], down: list[int], codebook_dim: int, image_size: int, attention_size: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 3, padding=1)]
        width, size = channels[0], image_size
        for stage, out in enumerate(channels[1:]):
            for _ in range(2):
                layers.append(ResidualBlock(width, out))
                width = out
                if size == attention_size:
                    layers.append(SpatialAttention(width))
            if stage in down:
                layers.append(Downsample(width))
                size //= 2
        layers += [ResidualBlock(width, width), SpatialAttention(width), ResidualBlock(width, width)]
        layers += [GroupNorm(width, EPS), nn.SiLU(), nn.Conv2d(width, codebook_dim, 3, padding=1)]
        self.layers = nn.Sequential(*layers)
        self.to_code = nn.Conv2d(codebook_dim, codebook_dim, 1)    # VQGAN's quant_conv

    def forward(self, image: Tensor) -> Tensor:
        return self.to_code(self.layers(image))


class Decoder(nn.Module):
    """Codes (B, codebook_dim, h, w) -> image (B, 3, H, W), about [-1, 1], not clamped.

    Args:
        channels: width of each stage of three residual blocks, from the codes to the pixels.
        up: stages (from 0) that end by doubling the resolution.
        latent_size: h = w.
        attention_size: feature maps of this many rows get attention after every residual block.
    """

    def __init__(
        self, channels: list[int], up: list[int], codebook_dim: int, latent_size: int, attention_size: int
    ) -> None:
        super().__init__()
        width, size = channels[0], latent_size
        self.from_code = nn.Conv2d(codebook_dim, codebook_dim, 1)    # VQGAN's post_quant_conv
        layers: list[nn.Module] = [nn.Conv2d(codebook_dim, width, 3, padding=1)]
        layers += [ResidualBlock(width, width), SpatialAttention(width), ResidualBlock(width, width)]
        for stage, out in enumerate(channels):
            for _ in range(3):
                layers.append(ResidualBlock(width, out))
                width = out
                if size == attention_size:
                    layers.append(SpatialAttention(width))
            if stage in up:
                layers.append(Upsample(width))
                size *= 2
        layers += [GroupNorm(width, EPS), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z_q: Tensor) -> Tensor:
        return self.layers(self.from_code(z_q))
