"""A model as ONNX files, for programs without PyTorch; docs/onnx_example.py shows how to use them.

    encoder.onnx       image (B, 3, H, W)                                     -> tokens (B, h, w)
    transformer.onnx   tokens (B, N), image, mask[, guess]                    -> logits (B, N, K), features (B, N, D)
    decoder.onnx       tokens (B, h, w), image, mask[, features][, guess]     -> picture (B, 3, H, W)
    codebook.npy       (K, codebook_dim)
    config.json        the configs of vqgan and transformer

B is dynamic, in encoder and decoder H and W too. Images are float32 in [-1, 1], masks float32 with 1 = hole; what an image
holds inside the hole is ignored. Tokens are int64, K is the mask token.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models import MaskGIT
from models.maskgit import patch_pixels
from models.quantize import dequantize, quantize
from utils import UserError, atomic_write, writable_folder, write_text

OPSET = 17    # of the oldest onnxruntime in requirements-dev.txt
SMALL = 4096    # values; smaller weights stay in float32


class Part(nn.Module):
    """A function of a model as a module, which the exporter asks for."""

    def __init__(self, model: MaskGIT, function: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self.model, *inputs)


def encode(model: MaskGIT, image: Tensor) -> Tensor:
    return model.vqgan.codebook(model.vqgan.encoder(image)).indices                                 # (B, h, w)


def predict(model: MaskGIT, tokens: Tensor, image: Tensor, mask: Tensor, guess: Tensor | None = None) -> tuple[Tensor, ...]:
    c, pixels = model.vqgan.config, None
    if model.transformer.config.pixel_dim:
        pixels = patch_pixels(image, mask, c.stride, c.guess, guess)                                # (B, N, pixel_dim)
    features = model.transformer.features(tokens, pixels)                                           # (B, N, D)
    return model.transformer.exact_logits(features), features


def decode(model: MaskGIT, tokens: Tensor, image: Tensor, mask: Tensor, *more: Tensor) -> Tensor:
    c, more = model.vqgan.config, list(more)
    features = more.pop(0) if c.context_dim else None
    z_q = model.vqgan.codebook.lookup(tokens)                                                       # (B, codebook_dim, h, w)
    return model.vqgan.decode_latents(z_q, image, mask, features, *more).clamp(-1, 1)               # (B, 3, H, W)


def write_onnx(model: MaskGIT, folder: Path) -> list[Path]:
    """Write all files of a model; returns their paths."""
    try:
        import onnx
    except ImportError as error:
        raise UserError("--onnx needs the package onnx; pip install -r requirements-dev.txt") from error
    writable_folder(folder)
    c, model = model.vqgan.config, model.float().cpu().eval()
    # Two pictures, as the exporter takes a size of 1 for a constant.
    image, mask = torch.zeros(2, 3, c.image_size, c.image_size), torch.ones(2, 1, c.image_size, c.image_size)
    tokens, guess = torch.zeros(2, c.grid, c.grid, dtype=torch.long), torch.zeros(2, 4, c.image_size, c.image_size)
    inputs = {"tokens": tokens, "image": image, "mask": mask}
    if c.context_dim:
        inputs["features"] = torch.zeros(2, c.grid**2, c.context_dim)
    if c.guess:
        inputs["guess"] = guess
    flat = {name: x.flatten(1) if name == "tokens" else x for name, x in inputs.items() if name != "features"}
    parts = {
        "encoder": (encode, {"image": image}, ["tokens"]),
        "transformer": (predict, flat, ["logits", "features"]),
        "decoder": (decode, inputs, ["picture"]),
    }
    paths = []
    for name, (function, given, outputs) in parts.items():
        paths.append(folder / f"{name}.onnx")
        with atomic_write(paths[-1]) as temporary:
            export(Part(model, function), given, outputs, temporary, any_size=name != "transformer")
            onnx.save(shrink(onnx.load(temporary)), temporary)
    paths += [folder / "codebook.npy", folder / "config.json"]
    with atomic_write(paths[-2]) as temporary, open(temporary, "wb") as file:    # numpy would append .npy to a path
        np.save(file, model.vqgan.codebook.codes().detach().numpy())
    write_text(paths[-1], json.dumps(model.configs(), indent=2) + "\n")
    return paths


def export(part: Part, inputs: dict[str, Tensor], outputs: list[str], path: Path, any_size: bool) -> None:
    """torch.onnx.export, with a dynamic batch and, with `any_size`, a dynamic size."""
    axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in [*inputs, *outputs]}
    if any_size:
        for name in axes:
            axes[name] |= {1: "h", 2: "w"} if name == "tokens" else {1: "n"} if name == "features" else {2: "H", 3: "W"}
    with torch.no_grad(), warnings.catch_warnings():
        # The exporter that replaces this one takes a minute for what this one does in seconds.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            part, tuple(inputs.values()), str(path), dynamo=False, opset_version=OPSET, input_names=list(inputs),
            output_names=outputs, dynamic_axes=axes,
        )    # fmt: skip


def shrink(model):
    """Store the weights that were read from 8 bits in 8 bits again: int8 values times scales in place of float32.

    Nothing is lost. A product of constants is computed when the file is loaded; with DequantizeLinear, the operation for it,
    onnxruntime multiplies in 8 bits: logits 0.13 off, and 1.5 times the time.
    """
    from onnx import TensorProto, helper, numpy_helper

    kept, nodes = [], []
    for weight in model.graph.initializer:
        value = numpy_helper.to_array(weight)
        found = as_eight_bit(value) if value.dtype == np.float32 and value.ndim >= 2 and value.size >= SMALL else None
        if found is None:
            kept.append(weight)
            continue
        names = [f"{weight.name}_{part}" for part in ("int8", "scale", "float")]
        kept += [numpy_helper.from_array(x, name) for x, name in zip(found, names[:2], strict=True)]
        nodes.append(helper.make_node("Cast", names[:1], names[2:], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", names[1:], [weight.name]))
    nodes += model.graph.node
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(kept)
    model.graph.node.extend(nodes)
    return model


def as_eight_bit(value: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """int8 values and float32 scales whose product is exactly the weight, if there are. The exporter transposes matrices."""
    for axis in (0, value.ndim - 1):
        rows = torch.from_numpy(np.moveaxis(value, axis, 0).copy())
        try:
            values, scale = quantize(rows)
        except ValueError:    # too large for 8 bits
            continue
        if torch.equal(dequantize(values, scale), rows):
            shape = [-1 if i == axis else 1 for i in range(value.ndim)]
            return np.ascontiguousarray(np.moveaxis(values.numpy(), 0, axis)), scale.float().numpy().reshape(shape)
    return None
