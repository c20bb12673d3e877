"""models/norms.py: gradients of norms under autocast are those of float32; in float32 nothing changes."""

import pytest
import torch
from torch import nn

from models import MaskGIT
from models.discriminator import PatchDiscriminator
from models.norms import ChannelNorm, GroupNorm, HeadNorm, LayerNorm
from models.vqgan import VQGAN, VQGANConfig

REFERENCE = dict(encoder="reference", encoder_channels=[16, 16, 24], encoder_down=[0, 1], decoder="reference",
                 decoder_channels=[24, 16, 16], decoder_up=[0, 1], attention_size=16)    # fmt: skip
TRANSFORMER = dict(seq_len=256, embed_dim=16, depth=1, num_heads=2, mlp_dim=16)


def errors(model: nn.Module, loss, parameters) -> list[float]:
    """Relative errors of gradients under autocast."""
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss(model).backward()
        gradients.append([p.grad.clone() for p in parameters])
    return [float((a - b).norm() / a.norm()) for a, b in zip(*gradients, strict=True)]


@pytest.mark.parametrize("norm", [ChannelNorm, GroupNorm])
def test_gradients_of_scale_and_shift_over_many_rows(norm):
    torch.manual_seed(0)
    x, weight = torch.randn(8, 3, 64, 64), torch.randn(1, 16, 1, 1)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), norm(16), nn.Conv2d(16, 16, 1))
    assert max(errors(model, lambda m: (m(x) * (1 + x[:, :1]) * weight).mean(), list(model[1].parameters()))) < 0.02


def test_gradients_of_the_decoders_norms():
    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(codebook_size=64, decoder_channels=[32, 16, 8], decoder_blocks=[1, 1, 1]))
    for parameter in model.decoder.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    tokens, image = torch.randint(64, (4, 256)), 2 * torch.rand(4, 3, 64, 64) - 1
    parameters = [p for m in model.decoder.modules() if isinstance(m, ChannelNorm) for p in m.parameters()]
    assert len(parameters) == 8
    assert max(errors(model, lambda m: (m.decode(tokens) - image).abs().mean(), parameters)) < 0.05


@pytest.mark.parametrize("vqgan, transformer", [({}, dict(pre_norm=True, qk_norm=True)), (REFERENCE, {})])
def test_every_norm_of_the_networks_is_one_of_these(vqgan, transformer):
    networks = [MaskGIT(vqgan, TRANSFORMER | transformer), PatchDiscriminator()]
    norms = [m for network in networks for m in network.modules() if "Norm" in type(m).__name__]
    assert norms and all(isinstance(m, LayerNorm | GroupNorm | HeadNorm) for m in norms)


def test_in_float32_they_are_pytorchs_layers():
    x = torch.randn(2, 48, 5, 7, generator=torch.Generator().manual_seed(2))
    rows = x.permute(0, 2, 3, 1)
    assert torch.equal(LayerNorm(48)(rows), nn.LayerNorm(48)(rows))
    assert torch.equal(ChannelNorm(48)(x), nn.LayerNorm(48)(rows).permute(0, 3, 1, 2))
    assert torch.equal(GroupNorm(48)(x), nn.GroupNorm(16, 48)(x))
    assert torch.equal(HeadNorm(48)(rows), nn.RMSNorm(48)(rows))
