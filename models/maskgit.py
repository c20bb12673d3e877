"""MaskGIT for inpainting: a frozen VQGAN and the transformer that completes its tokens (Chang et al. 2022).

    model = MaskGIT.from_pretrained("cat64")
    completed = model.inpaint(image, mask)        # PIL images, arrays or tensors; see `inpaint`
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .completion import inpaint
from .decoding import Round, iterative_decode, masked_positions
from .files import ModelFiles
from .kv_cache import ROWS, KVCache, filled_up, hole_places
from .local_autoencoder import condition, condition_channels
from .transformer import BidirectionalTransformer, TransformerConfig
from .vqgan import VQGAN, VQGANConfig
from .windows import Known as WindowsKnown
from .windows import WindowedModel, single_windows


class Known(NamedTuple):
    """What the known part of a picture gives: computed once, used in every round and by the decoder."""

    tokens: Tensor             # (B, N) int64, the mask token where the patch touches the hole
    hidden: Tensor             # (B, N) bool, where that is
    pixels: Tensor | None      # (B, N, pixel_dim), where the transformer takes them
    context: Tensor | None     # (B, N, D) the transformer's features, where the decoder takes them


class Completion(NamedTuple):
    images: Tensor         # (B, 3, H, W) decoded pictures in [-1, 1]
    rounds: list[Round]    # tokens and masks after every round
    known: WindowsKnown    # each picture is a window


def pixel_to_token_mask(mask: Tensor, stride: int) -> Tensor:
    """mask: (B, 1, H, W), 1 = hole.  Returns (B, N) bool, True if any pixel of the token's patch is a hole."""
    return F.max_pool2d(mask.float(), kernel_size=stride).flatten(1) > 0.5


def patch_pixels(
    image: Tensor, mask: Tensor, stride: int, takes_guess: bool = False, guess: Tensor | None = None
) -> Tensor:
    """What is known of each patch, (B, N, 4 * stride**2) or with `takes_guess` (B, N, 8 * stride**2).

    Arguments as in `models.local_autoencoder.condition`.
    """
    known = condition(image, mask, takes_guess, guess)                     # (B, 4 or 8, H, W)
    return F.pixel_unshuffle(known, stride).flatten(2).transpose(1, 2)     # (B, N, 4 or 8 stride^2)


def check_fit(vqgan: VQGANConfig, transformer: TransformerConfig) -> None:
    """Refuse two configs that can't be one model."""
    if transformer.codebook_size != vqgan.codebook_size:
        raise ValueError(
            f"transformer.codebook_size ({transformer.codebook_size}) must equal vqgan.codebook_size "
            f"({vqgan.codebook_size})"
        )
    if transformer.seq_len != vqgan.grid**2:
        raise ValueError(f"transformer.seq_len must be {vqgan.grid**2}, the VQGAN's tokens, got {transformer.seq_len}")
    channels = condition_channels(vqgan.guess)
    if transformer.pixel_dim not in (0, channels * vqgan.stride**2):
        raise ValueError(
            f"transformer.pixel_dim must be 0 or {channels * vqgan.stride**2} ({channels} numbers a pixel), "
            f"got {transformer.pixel_dim}"
        )
    if vqgan.context_dim not in (0, transformer.embed_dim):
        raise ValueError(
            f"vqgan.context_dim must be 0 or transformer.embed_dim ({transformer.embed_dim}), got {vqgan.context_dim}"
        )


class MaskGIT(nn.Module, ModelFiles):
    """VQGAN (never trained here) and transformer.

    Args:
        vqgan, transformer: the two configs, as dataclasses or as plain dicts (so that a config file can hold them).
    """

    def __init__(self, vqgan: VQGANConfig | dict, transformer: TransformerConfig | dict) -> None:
        super().__init__()
        vqgan = VQGANConfig(**vqgan) if isinstance(vqgan, dict) else vqgan
        transformer = TransformerConfig(**transformer) if isinstance(transformer, dict) else transformer
        check_fit(vqgan, transformer)
        self.vqgan = VQGAN(vqgan).requires_grad_(False)
        self.transformer = BidirectionalTransformer(transformer)
        self.train(self.training)

    def train(self, mode: bool = True) -> "MaskGIT":
        """The VQGAN stays in evaluation mode, whatever the transformer does."""
        super().train(mode)
        self.vqgan.eval()
        return self

    @property
    def image_size(self) -> int:
        return self.vqgan.config.image_size

    @property
    def mask_token_id(self) -> int:
        return self.transformer.mask_token_id

    # ---- training ----

    def forward(
        self, tokens: Tensor, masked: Tensor, pixels: Tensor | None = None, label_smoothing: float = 0.0,
        positions: Tensor | None = None,
    ) -> Tensor:    # fmt: skip
        """Masked visual token modelling: cross-entropy of the masked tokens (section 3.1, equation 1).

        Args:
            tokens: (B, N) true tokens.
            masked: (B, N) bool, the tokens to be hidden and predicted.
            pixels: (B, N, pixel_dim), see `patch_pixels`, where the transformer takes them.
            positions: (M,) positions b * N + n whose cross-entropies are returned; default: `masked_positions(masked)`.
        Returns:
            Cross-entropies of the tokens there, (M,), in nats; 0 where they are not masked.
        """
        positions = masked_positions(masked) if positions is None else positions                # (M,)
        x = self.transformer.trunk(torch.where(masked, self.mask_token_id, tokens), pixels, positions)    # (M, D)
        return self.transformer.compiled_like_blocks(MaskGIT.losses)(self, x, tokens, masked, positions, label_smoothing)

    def losses(self, x: Tensor, tokens: Tensor, masked: Tensor, positions: Tensor, label_smoothing: float) -> Tensor:
        """The rest of `forward`, (M,); x (M, D) comes from the transformer's trunk."""
        logits = self.transformer.predict(x, positions)                                             # (M, K)
        true, counts = tokens.flatten()[positions], masked.flatten()[positions]                        # (M,), (M,)
        return F.cross_entropy(logits.float(), true, label_smoothing=label_smoothing, reduction="none") * counts

    # ---- completion ----

    @torch.no_grad()
    def complete(
        self, image: Tensor, mask: Tensor, seeds: Sequence[int], precision: str | None = None, guess: Tensor | None = None,
        **options: Any,
    ) -> Completion:    # fmt: skip
        """Complete a batch of pictures of the model's own size, each with a hole of its own.

        Args:
            image: (B, 3, H, W) in [-1, 1]; what it holds inside the hole is ignored.
            mask: (B, 1, H, W), 1 = hole.
            seeds: B numbers; a picture's completion depends on its own seed only.
            precision: 'fp32' or 'bf16' (two to three times as fast where the hardware knows it) for transformer and
                decoder; None leaves it to the caller's autocast, that is float32 outside of any.
            guess: (B, 4, H, W) of the hole's content, see `models.local_autoencoder.condition`.
            options: see `models.decoding.Options`.
        Returns:
            The decoded pictures (nothing is pasted here) and the rounds.
        """
        windows = WindowedModel(self, single_windows(len(image), self.vqgan.config.grid), image, mask, guess, len(image))
        with self.autocast(precision):
            rounds, known = windows.complete([torch.Generator().manual_seed(int(s)) for s in seeds], **options)
            return Completion(windows.decode(rounds[-1].tokens, known), rounds, known)

    def autocast(self, precision: str | None) -> AbstractContextManager:
        """What `precision` means; see `complete`."""
        precision = precision or self.precision
        if precision not in (None, "fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {precision!r}")
        if precision is None:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    @torch.no_grad()
    def known(
        self, image: Tensor, mask: Tensor, guess: Tensor | None = None, caches: Sequence[KVCache] | None = None
    ) -> Known:
        """The known part of a batch of pictures; image and mask as in `complete`, guess as in `condition`.

        A sampled token is one guess out of many. A decoder that was finished with the context, the transformer's features
        while the whole hole is still masked, sees how sure that guess was and what the others were. Our addition. With
        `caches`, one for each block, the keys and values of that pass are kept there.
        """
        mask = mask.to(image.dtype)
        image = image.masked_fill(mask.bool(), 0)                           # nothing behind the hole gets any further
        hidden = pixel_to_token_mask(mask, self.vqgan.config.stride)        # (B, N)
        tokens = torch.where(hidden, self.mask_token_id, self.vqgan.encode(image))
        pixels = self.pixels_of(image, mask, guess)
        context = self.transformer.features(tokens, pixels, caches=caches) if self.vqgan.config.context_dim else None
        return Known(tokens, hidden, pixels, context)

    def pixels_of(self, image: Tensor, mask: Tensor, guess: Tensor | None = None) -> Tensor | None:
        """The transformer's second input, or None where it has none."""
        c = self.vqgan.config
        return patch_pixels(image, mask, c.stride, c.guess, guess) if self.transformer.config.pixel_dim else None

    @torch.no_grad()
    def complete_tokens(self, known: Known, seeds: Sequence[int], **options: Any) -> list[Round]:
        """All rounds, each of which computes every token; any of them can be decoded later."""
        first = [known.context]

        def logits(tokens: Tensor) -> Tensor:
            features = first.pop() if first else None                       # the first round sees what the context saw
            return self.masked_logits(tokens, known.pixels, features)

        return iterative_decode(
            known.tokens, known.hidden, logits,
            mask_token_id=self.mask_token_id, generators=[torch.Generator().manual_seed(int(s)) for s in seeds],
            own_temperature=self.transformer.config.temperature, **options,
        )    # fmt: skip

    def masked_logits(self, tokens: Tensor, pixels: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """Logits (M, K) of the tokens that are the mask token, row by row; see `BidirectionalTransformer.forward`.

        The last layers are computed for these alone, made up to as many as whole pictures have: matrix kernels for a few
        rows round differently, and a picture would depend on what it shares a batch with. `features` (B, N, D) are the
        transformer's of these tokens, where they are known already.
        """
        positions = masked_positions(tokens == self.mask_token_id)                # (M,)
        filled = filled_up(positions, tokens.shape[1])                            # (M + a few,)
        if features is None:
            features = self.transformer.features(tokens, pixels, filled)          # (M + a few, D)
        else:
            features = features.flatten(0, 1)[filled]                             # (M + a few, D)
        return self.transformer.exact_logits(features, filled)[: len(positions)]     # (M, K)

    def later_logits(
        self, tokens: Tensor, pixels: Tensor | None, hidden: Tensor, caches: Sequence[KVCache], rows: Tensor
    ) -> Tensor:
        """`masked_logits` of a round after the first: only the tokens of the hole are computed, see `models.kv_cache`.

        Args:
            hidden: (B, N) bool, the tokens of the hole, still masked or filled in a former round.
            caches: what `known` kept, one for each block.
            rows: (B,) where these pictures are in the caches.
        """
        places, own = hole_places(hidden)                                            # (B, Q) each
        tokens = tokens.gather(1, places)                                            # (B, Q)
        pixels = None if pixels is None else pixels.gather(1, places.unsqueeze(2).expand(-1, -1, pixels.shape[2]))
        positions = masked_positions((tokens == self.mask_token_id) & own)           # (M,), b * Q + q
        filled = filled_up(positions, ROWS)                                          # (M + a few,)
        caches = [cache.pick(rows, places) for cache in caches]
        features = self.transformer.features(tokens, pixels, filled, caches)         # (M + a few, D)
        return self.transformer.exact_logits(features, places.flatten()[filled])[: len(positions)]    # (M, K)

    def decode(
        self, tokens: Tensor, image: Tensor, mask: Tensor, context: Tensor | None = None, guess: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, N) to pictures (B, 3, H, W) in [-1, 1], guided by the known pixels where the decoder takes them.

        `context` (B, N, D) is computed where the decoder takes it and it is not given.
        """
        if context is None and self.vqgan.config.context_dim:
            context = self.known(image, mask, guess).context
        return self.vqgan.decode(tokens, image, mask, context, guess).float().clamp(-1, 1)

    def inpaint(
        self, image: Any, mask: Any, *, seed: int = 0, num_samples: int = 1, return_rounds: bool = False, **options: Any
    ) -> Any:
        """Complete one picture of any size, or several.

        Args:
            image: PIL image, uint8 array (H, W, 3) or (H, W), or tensor (3, H, W) (uint8, or float in [0, 1]); or a list of
                these, or a tensor (B, 3, H, W).
            mask: PIL image, or array or tensor (H, W) or (1, H, W); the hole is True, 1 or white. As many as pictures.
            seed: completion i of a picture, or picture i of a list, uses seed + i.
            num_samples: completions of a single picture.
            return_rounds: also return the pictures and masked tokens of every round.
            options: batch_size, paste, precision, on_progress; see `models.completion.complete_pictures`. Also total_iter,
                schedule, temperature and others; see `models.decoding.Options`.
        Returns:
            One picture, of the type and size of `image`, always RGB; a list of them for a list or `num_samples` > 1; a
            tensor (B, 3, H, W) for one. With `return_rounds` a pair: these, and a list of `Snapshot` or of such lists.
        Raises:
            ValueError: picture and mask don't fit together, there is no hole, or an option makes no sense.
        """
        return inpaint(self, image, mask, seed, num_samples, return_rounds, options)

    @property
    def device(self) -> torch.device:
        return self.transformer.pos_embed.device
