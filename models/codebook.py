"""Vector quantizer: the discrete bottleneck of VQ-VAE (van den Oord et al. 2017, section 3, https://arxiv.org/abs/1711.00937)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Quantized(NamedTuple):
    z_q: Tensor        # (B, codebook_dim, h, w), straight-through gradient
    indices: Tensor    # (B, h, w) int64 in [0, K)
    loss: Tensor       # scalar, codebook + commitment


class Codebook(nn.Module):
    """K codes of `codebook_dim` numbers; every latent is replaced by its nearest code.

    Args:
        codebook_size: K.
        codebook_dim: channels of a code.
        l2_normalize: compare directions only (Yu et al. 2022, ViT-VQGAN, section 3.2): latents and codes are projected on
            the unit sphere, which keeps all of a large codebook in use.
        commitment: weight of the commitment term beside the codebook term.
    """

    def __init__(
        self, codebook_size: int, codebook_dim: int, l2_normalize: bool = False, commitment: float = 0.25
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.l2_normalize = l2_normalize
        self.commitment = commitment
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        if l2_normalize:
            nn.init.normal_(self.embedding.weight)
        else:
            nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)

    def codes(self) -> Tensor:
        """The codes as they are compared: (K, codebook_dim), of unit length if `l2_normalize`."""
        return F.normalize(self.embedding.weight, dim=1) if self.l2_normalize else self.embedding.weight

    def forward(self, z: Tensor) -> Quantized:
        """Quantize latents to their nearest codes.

        Args:
            z: (B, codebook_dim, h, w) encoder output, unbounded. Always compared in float32: tokens must not depend on the
                caller's precision.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=1) if self.l2_normalize else z.float()
            indices = self.nearest(z)                                       # (B, h, w)
            z_q = self.lookup(indices)                                      # (B, d, h, w)
            loss = F.mse_loss(z_q, z.detach()) + self.commitment * F.mse_loss(z, z_q.detach())
            return Quantized(z + (z_q - z).detach(), indices, loss)

    def nearest(self, z: Tensor) -> Tensor:
        """z: (B, codebook_dim, h, w), already normalised if `l2_normalize`.  Returns (B, h, w) indices of nearest codes."""
        B, d, h, w = z.shape
        flat = z.detach().permute(0, 2, 3, 1).reshape(-1, d)                # (B h w, d)
        codes = self.codes().detach().float()                               # (K, d)
        # |z - c|^2 = |z|^2 - 2 z.c + |c|^2, and |z|^2 is the same for every code.
        distance = codes.pow(2).sum(1) - 2 * flat @ codes.T                 # (B h w, K)
        return distance.argmin(dim=1).view(B, h, w)

    def lookup(self, indices: Tensor) -> Tensor:
        """indices: (B, h, w) in [0, K).  Returns their codes, (B, codebook_dim, h, w)."""
        return F.embedding(indices, self.codes()).permute(0, 3, 1, 2)

    @torch.no_grad()
    def restart_dead(self, usage: Tensor, latents: Tensor, generator: torch.Generator) -> None:
        """Move unused codes onto random latents (Dhariwal et al. 2020, Jukebox, section 3.1).

        Args:
            usage: (K,) how often each code was used lately, summed over all processes.
            latents: (M, codebook_dim) recent encoder outputs, the same on all processes.
        """
        dead = (usage == 0).nonzero().flatten()                             # (n,)
        pick = torch.randint(len(latents), (len(dead),), generator=generator)
        fresh = latents[pick.to(latents.device)].float()                    # (n, d)
        self.embedding.weight[dead] = F.normalize(fresh, dim=1) if self.l2_normalize else fresh
