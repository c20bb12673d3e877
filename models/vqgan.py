"""VQGAN, stage 1: encoder, codebook, decoder (Esser et al. 2021, https://arxiv.org/abs/2012.09841)."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .autoencoder import Decoder, Encoder
from .codebook import Codebook, Quantized
from .local_autoencoder import ConditionedDecoder, LocalEncoder

ENCODERS = ("local", "reference")
DECODERS = ("conditioned", "reference")


@dataclass
class VQGANConfig:
    image_size: int = 64          # H = W in pixels
    stride: int = 4               # pixels per token side, a power of two; h = w = image_size / stride
    codebook_size: int = 1024     # K
    codebook_dim: int = 8         # channels of a code
    l2_normalize: bool = True     # compare latents and codes by direction
    commitment: float = 0.25      # weight of the commitment term
    encoder: str = "local"        # one of ENCODERS
    decoder: str = "conditioned"  # one of DECODERS

    # local encoder
    encoder_width: int = 256      # channels of a patch
    encoder_depth: int = 2        # per-patch MLPs

    # reference encoder: width of the stem and of each stage; stages that end by halving
    encoder_channels: list[int] = field(default_factory=lambda: [128, 128, 128, 256, 256, 512])
    encoder_down: list[int] = field(default_factory=lambda: [2, 4])

    # conditioned decoder: one width and one number of blocks a scale. Reference decoder: one width a stage.
    decoder_channels: list[int] = field(default_factory=lambda: [192, 96, 48])
    decoder_blocks: list[int] = field(default_factory=lambda: [4, 3, 2])
    context_dim: int = 0          # conditioned only: width of the transformer's features that it sees, 0 until the finish
    guess: bool = False           # conditioned only: take a guess of the hole's content, see local_autoencoder.condition
    decoder_up: list[int] = field(default_factory=lambda: [0, 2])    # reference only: stages that end by doubling

    attention_size: int = 16      # reference only: rows of the feature maps that get attention

    def __post_init__(self) -> None:
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}, got {self.encoder!r}")
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {self.decoder!r}")
        if self.stride < 1 or self.stride & (self.stride - 1):
            raise ValueError(f"stride must be a power of two, got {self.stride}")
        if self.image_size < self.stride or self.image_size % self.stride:
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of stride ({self.stride})")
        if self.context_dim < 0 or self.context_dim and self.decoder != "conditioned":
            raise ValueError(f"context_dim must be 0, or above it with the conditioned decoder, got {self.context_dim}")
        if self.guess and self.decoder != "conditioned":
            raise ValueError("guess needs the conditioned decoder")
        for name in ("codebook_size", "codebook_dim", "encoder_width", "encoder_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.commitment < float("inf"):
            raise ValueError(f"commitment must be 0 or more, got {self.commitment}")
        self._check_scales()

    def _check_scales(self) -> None:
        scales = self.stride.bit_length()    # stride 4: the scales 1/4, 1/2 and 1
        for name in ("encoder_channels", "decoder_channels"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must list widths of at least 1, got {getattr(self, name)}")
        for used, name, stages in (
            (self.encoder == "reference", "encoder_down", len(self.encoder_channels) - 1),
            (self.decoder == "reference", "decoder_up", len(self.decoder_channels)),
        ):
            named = set(getattr(self, name))
            if used and not (len(named) == scales - 1 and named <= set(range(stages))):
                raise ValueError(
                    f"{name} must name {scales - 1} of the {stages} stages, counted from 0, for stride {self.stride}, "
                    f"got {getattr(self, name)}"
                )
        if min(self.decoder_blocks, default=0) < 0:
            raise ValueError(f"decoder_blocks must be 0 or more at every scale, got {self.decoder_blocks}")
        if self.decoder == "conditioned" and not len(self.decoder_channels) == len(self.decoder_blocks) == scales:
            raise ValueError(
                f"decoder_channels and decoder_blocks need {scales} entries each, one for every scale that stride "
                f"{self.stride} makes, got {self.decoder_channels} and {self.decoder_blocks}"
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
        """A copy whose decoder has no input for a transformer's features: those of another one would mean nothing to it."""
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
            known, mask: (B, 3, H, W) image and (B, 1, H, W) hole (both or neither) for the conditioned decoder, which
                without them decodes as if nothing were known; the reference decoder has no use for them.
            context: (B, N, context_dim) of `MaskGIT.known`; without it the decoder works from the rest.
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
