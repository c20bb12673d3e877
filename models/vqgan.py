"""VQGAN, stage 1: encoder, codebook, decoder (Esser et al. 2021, https://arxiv.org/abs/2012.09841)."""

from dataclasses import field, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from .autoencoder import Decoder, Encoder
from .codebook import Codebook, Quantized
from .config import STRICT, Count
from .local_autoencoder import ConditionedDecoder, LocalEncoder

Counts = Annotated[list[Count], Field(min_length=1)]


@dataclass(config=STRICT)
class VQGANConfig:
    image_size: Count = 64        # H = W in pixels
    stride: Count = 4             # pixels per token side, a power of two; h = w = image_size / stride
    codebook_size: Count = 1024   # K
    codebook_dim: Count = 8       # channels of a code
    l2_normalize: bool = True     # compare latents and codes by direction
    commitment: Annotated[float, Field(ge=0)] = 0.25    # weight of the commitment term
    encoder: Literal["local", "reference"] = "local"
    decoder: Literal["conditioned", "reference"] = "conditioned"

    # local encoder
    encoder_width: Count = 256    # channels of a patch
    encoder_depth: Count = 2      # per-patch MLPs

    # reference encoder: width of the stem and of each stage; stages that end by halving
    encoder_channels: Counts = field(default_factory=lambda: [128, 128, 128, 256, 256, 512])
    encoder_down: list[int] = field(default_factory=lambda: [2, 4])

    # conditioned decoder: one width and one number of blocks a scale. Reference decoder: one width a stage.
    decoder_channels: Counts = field(default_factory=lambda: [192, 96, 48])
    decoder_blocks: list[Annotated[int, Field(ge=0)]] = field(default_factory=lambda: [4, 3, 2])
    context_dim: Annotated[int, Field(ge=0)] = 0    # conditioned only: width of the transformer's features that it sees
    guess: bool = False           # conditioned only: take a guess of the hole's content, see local_autoencoder.condition
    decoder_up: list[int] = field(default_factory=lambda: [0, 2])    # reference only: stages that end by doubling

    attention_size: Count = 16    # reference only: rows of the feature maps that get attention

    def __post_init__(self) -> None:
        if self.stride & (self.stride - 1):
            raise ValueError(f"stride must be a power of two, got {self.stride}")
        if self.image_size % self.stride:
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of stride ({self.stride})")
        scales = self.stride.bit_length()    # stride 4: the scales 1/4, 1/2 and 1
        if self.encoder == "reference":
            self._check_stages("encoder_down", len(self.encoder_channels) - 1, scales - 1)
        if self.decoder == "reference":
            if self.context_dim or self.guess:
                raise ValueError("decoder must be 'conditioned' for a context_dim or a guess")
            self._check_stages("decoder_up", len(self.decoder_channels), scales - 1)
        elif not len(self.decoder_channels) == len(self.decoder_blocks) == scales:
            raise ValueError(
                f"decoder_channels and decoder_blocks need {scales} entries each, one for every scale that stride "
                f"{self.stride} makes, got {self.decoder_channels} and {self.decoder_blocks}"
            )

    def _check_stages(self, name: str, stages: int, count: int) -> None:
        named = set(getattr(self, name))
        if len(named) != count or not named <= set(range(stages)):
            raise ValueError(
                f"{name} must name {count} of the {stages} stages, counted from 0, for stride {self.stride}, "
                f"got {getattr(self, name)}"
            )

    @property
    def grid(self) -> int:
        """h = w: tokens per side."""
        return self.image_size // self.stride


class VQGAN(nn.Module):
    """Image <-> tokens."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = c = config
        self.conditioned = c.decoder == "conditioned"
        if c.encoder == "local":
            self.encoder = LocalEncoder(c.codebook_dim, c.stride, c.encoder_width, c.encoder_depth)
        else:
            self.encoder = Encoder(c.encoder_channels, c.encoder_down, c.codebook_dim, c.image_size, c.attention_size)
        self.codebook = Codebook(c.codebook_size, c.codebook_dim, c.l2_normalize, c.commitment)
        if self.conditioned:
            self.decoder = ConditionedDecoder(c.codebook_dim, c.decoder_channels, c.decoder_blocks, c.context_dim, c.guess)
        else:
            self.decoder = Decoder(c.decoder_channels, c.decoder_up, c.codebook_dim, c.grid, c.attention_size)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Quantized]:
        """image: (B, 3, H, W); mask: (B, 1, H, W), 1 = not shown to the decoder.  Returns (reconstruction, quantized)."""
        quantized = self.codebook(self.encoder(image))
        return self.decode_latents(quantized.z_q, None if mask is None else image, mask), quantized

    def without_context(self) -> "VQGAN":
        """A copy whose decoder takes no features of a transformer, for training another transformer."""
        plain = VQGAN(replace(self.config, context_dim=0))
        plain.load_state_dict({name: x for name, x in self.state_dict().items() if "from_context" not in name})
        return plain.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """image: (B, 3, H, W) in [-1, 1].  Returns tokens (B, N), int64 in [0, K)."""
        if image.shape[-2:] != (self.config.image_size, self.config.image_size):
            size = f"{image.shape[-1]}x{image.shape[-2]}"
            raise ValueError(f"pictures must be {self.config.image_size} pixels wide and high, got {size}; resize them")
        with torch.autocast(image.device.type, enabled=False):    # tokens must not depend on the caller's precision
            return self.codebook(self.encoder(image.float())).indices.flatten(1)

    def decode(
        self, tokens: Tensor, known: Tensor | None = None, mask: Tensor | None = None, context: Tensor | None = None,
        guess: Tensor | None = None,
    ) -> Tensor:    # fmt: skip
        """Tokens to pixels.

        Args:
            tokens: (B, N) in [0, K).
            known, mask: (B, 3, H, W) image and (B, 1, H, W) hole for the conditioned decoder; without both, nothing is
                known. The reference decoder ignores them.
            context: (B, N, context_dim) of `MaskGIT.known`, or None.
            guess: (B, 4, H, W) of the hole's content, see `models.local_autoencoder.condition`.
        Returns:
            (B, 3, H, W), about [-1, 1], not clamped.
        """
        grid = self.config.grid
        return self.decode_latents(self.codebook.lookup(tokens.view(len(tokens), grid, grid)), known, mask, context, guess)

    def decode_latents(
        self, z_q: Tensor, known: Tensor | None = None, mask: Tensor | None = None, context: Tensor | None = None,
        guess: Tensor | None = None,
    ) -> Tensor:    # fmt: skip
        """Like `decode`, from (B, codebook_dim, h, w) codes."""
        if not self.conditioned:
            return self.decoder(z_q)
        if (known is None) != (mask is None):
            raise ValueError("`known` and `mask` go together: give both or neither")
        if known is None:
            size = self.config.image_size
            known = torch.zeros(len(z_q), 3, size, size, device=z_q.device)
            mask = torch.ones(len(z_q), 1, size, size, device=z_q.device)
        return self.decoder(z_q, known, mask, context, guess)
