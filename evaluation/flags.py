"""Flags that the commands which score pictures share. Nothing here is slow to import."""
import argparse
from pathlib import Path


def add_score_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("scores")
    flag = group.add_argument
    flag("--features", default="inception", metavar="inception|none|FILE.onnx",
         help="network of FID and KID (default: inception). ONNX: images (B, 3, H, W) in [0, 1] -> features (B, D); the "
              "scores take its name. none: only metrics of pairs, no network")
    flag("--features-name", metavar="NAME", help="name of an ONNX network that carries none")
    flag("--inception-weights", type=Path, metavar="FILE", help="a file of Inception's weights, instead of the download")
    flag("--perceptual-weights", type=Path, metavar="FILE.safetensors", help="SqueezeNet 1.1 features")
    flag("--reference", type=Path, metavar="DIR|FILE.npz",
         help="other pictures, any number, or their saved statistics: adds unpaired distances")
    return group
