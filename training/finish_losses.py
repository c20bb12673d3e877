"""The losses of the finish: of the decoder, and of the discriminators on pixels and on features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.discriminator import feature_matching, hinge_loss, mean_score
from models.perceptual import detail_gap, laplacian_distance, perceptual_distance, seam_gap
from training.losses import hole_l1

if TYPE_CHECKING:
    from training.finish import FinishRun
    from training.sampled_batches import Batch

Both = tuple[Tensor, Tensor]    # of originals, and of completed pictures


def decoder_terms(run: FinishRun, batch: Batch) -> tuple[dict[str, Tensor], Both, list[Both]]:
    """The weighted terms of the decoder's loss; originals and completed pictures; and each feature map of both."""
    c, grid = run.config, run.model.vqgan.config.grid
    image, mask, tokens, context, guess = batch
    true = run.true_of(image)
    z_q = run.model.vqgan.codebook.lookup(tokens.view(-1, grid, grid))           # (B, d, h, w)
    output = run.decoder(z_q, image, mask, context, guess).float()                      # (B, 3, H, W)
    pasted = torch.where(mask.bool(), output, image)
    with torch.no_grad():
        original = run.features(image)
    made = run.features(pasted)
    distance = perceptual_distance(made, original, mask)                         # (B,)
    terms = {
        "l1": c.l1 * hole_l1(output[:true], image[:true], mask[:true]),
        "laplacian": c.laplacian * laplacian_distance(pasted[:true], image[:true]),
        "perceptual": c.perceptual * distance[:true].mean(),
        "sampled_l1": c.sampled_l1 * hole_l1(output[true:], image[true:], mask[true:]),
        "sampled_perceptual": c.sampled_perceptual * distance[true:].mean(),
        "seam": c.seam * seam_gap(pasted, image, mask).mean(),
        "detail": c.detail * detail_gap(pasted, image, mask).mean(),
    }
    if run.second is not None:
        with torch.no_grad():
            other = run.second(image)
        # Over the whole picture: what is in a hole also changes what the deep layers see around it.
        terms["second_perceptual"] = c.second_perceptual * perceptual_distance(run.second(pasted), other).mean()
    return terms | adversarial_terms(run, image, pasted, made, mask), (image, pasted), list(zip(original, made, strict=True))


def adversarial_terms(
    run: FinishRun, image: Tensor, pasted: Tensor, made: list[Tensor], mask: Tensor
) -> dict[str, Tensor]:
    """What the discriminators, which don't learn from this, say about completed pictures and their features."""
    c = run.config
    with run.frozen(*run.discriminators) as (on_pixels, on_features):
        with torch.no_grad():
            _, real = on_pixels(image)
        score, fake = on_pixels(pasted)
        scores = on_features(made)
    return {
        "adversarial": -c.adversarial * mean_score(score.float(), mask),
        "feature_matching": c.feature_matching * feature_matching(fake, real),
        "feature_adversarial": -c.feature_adversarial * mean_of([mean_score(s.float(), mask) for s in scores]),
    }


def discriminator_terms(run: FinishRun, images: Both, features: list[Both], mask: Tensor) -> dict[str, Tensor]:
    """The losses of the discriminators, from originals and completed pictures and from the features of both."""
    score, _ = run.discriminator(torch.cat(images).detach())
    scores = run.feature_discriminator([torch.cat(both).detach() for both in features])
    return {
        "discriminator": hinge_loss(*score.float().chunk(2), mask),
        "feature_discriminator": mean_of([hinge_loss(*s.float().chunk(2), mask) for s in scores]),
    }


def mean_of(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).mean()
