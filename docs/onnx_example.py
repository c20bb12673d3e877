"""Complete a picture with ONNX files, without PyTorch; it needs numpy, onnxruntime and pillow.

    python -m tools.export --onnx out/onnx
    python docs/onnx_example.py out/onnx samples/images/cat_00014.png samples/masks/cat_00014.png out/completed.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image


def complete(folder: str, pixels: np.ndarray, hole: np.ndarray, rounds: int = 8) -> np.ndarray:
    """pixels: (S, S, 3) uint8, hole: (S, S) bool, S as in config.json.  Returns the completed picture, (S, S, 3) uint8."""
    config = json.load(open(f"{folder}/config.json"))["vqgan"]
    stride, grid = config["stride"], config["image_size"] // config["stride"]
    image = (pixels.transpose(2, 0, 1)[None] / 127.5 - 1).astype(np.float32)            # (1, 3, S, S)
    mask = hole[None, None].astype(np.float32)                                          # (1, 1, S, S)
    inputs = {"image": image, "mask": mask, "guess": np.zeros((1, 4, *hole.shape), np.float32)}

    def run(name: str, **more: np.ndarray) -> list[np.ndarray]:
        session = sessions[name]
        return session.run(None, {x.name: (inputs | more)[x.name] for x in session.get_inputs()})

    sessions = {name: onnxruntime.InferenceSession(f"{folder}/{name}.onnx", providers=["CPUExecutionProvider"])
                for name in ("encoder", "transformer", "decoder")}    # fmt: skip
    masked = hole.reshape(grid, stride, grid, stride).any((1, 3)).reshape(1, -1)        # (1, N) tokens that touch the hole
    tokens, total, left = run("encoder")[0].reshape(1, -1), masked.sum(), masked.sum()  # (1, N)
    for t in range(1, rounds + 1):
        logits, features = run("transformer", tokens=np.where(masked, config["codebook_size"], tokens))
        inputs.setdefault("features", features)                 # the decoder gets those of the first round
        tokens = np.where(masked, logits.argmax(-1), tokens)    # the likeliest token
        score = logits.max(-1) - np.log(np.exp(logits).sum(-1))                         # (1, N) its log-probability
        left = min(int(np.cos(t / rounds * np.pi / 2) * total + 1e-9), max(left - 1, 0)) if t < rounds else 0
        order = np.where(masked, score, np.inf).argsort(kind="stable")                  # the least sure first
        masked[:], masked[0, order[0, :left]] = False, True     # what is masked again
    (picture,) = run("decoder", tokens=tokens.reshape(1, grid, grid))                   # (1, 3, S, S)
    made = ((picture[0].transpose(1, 2, 0) + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    return np.where(hole[..., None], made, pixels)              # known pixels stay as they are


if __name__ == "__main__":
    folder, picture, mask, output = sys.argv[1:]
    size = (json.load(open(f"{folder}/config.json"))["vqgan"]["image_size"],) * 2
    pixels = np.asarray(Image.open(picture).convert("RGB").resize(size))
    hole = np.asarray(Image.open(mask).convert("L").resize(size, Image.Resampling.NEAREST)) < 128    # black is the hole
    Image.fromarray(complete(folder, pixels, hole)).save(output)
