"""Train the masked-token transformer (stage 2) on the tokens of a frozen VQGAN.

    python training_transformer.py --config configs/tiny.yml --vqgan runs/vqgan/last.pt \\
        --train-dir PICTURES --val-dir PICTURES --output-dir runs/maskgit

configs/tiny.yml takes a minute on a CPU; configs/cat64.yml makes the model that ships. On several GPUs, start it with
`accelerate launch training_transformer.py ...` and the same flags; the batch is split over the processes. If a run is
interrupted, repeat the command with --resume auto. More in docs/training.md.

Masked visual token modelling (Chang et al. 2022, section 3.1): hide tokens, predict them, cross-entropy. The pictures are
encoded once, with their mirror images if `mirror` is set, into a cache on disk. No encoder runs while the transformer
learns. The finished model, both stages in one file, is OUTPUT/maskgit.safetensors; complete pictures with it by
`inpainting.py --checkpoint OUTPUT/maskgit.safetensors`.

The code of this stage is in training/transformer.py; which tokens are hidden, in training/token_batches.py.
"""

from training.options import training_parser
from utils import run_cli


def main(argv: list[str] | None = None) -> int:
    parser = training_parser(__doc__)
    flag = parser.add_argument
    flag("--vqgan", required=True, help="stage-1 checkpoint (last.pt), or a finished .safetensors model")
    flag("--init", metavar="FILE", help="begin from the transformer of this model, not from random weights")
    flag("--token-cache", metavar="DIR", help="where the training set's tokens lie (default: OUTPUT/tokens)")
    flag("--compile", action="store_true", help="compile the transformer's blocks (torch.compile): for GPUs")
    flag("--capture", action="store_true", help="capture a step's gradients as CUDA graphs: faster on a GPU")
    args = parser.parse_args(argv)

    from training.transformer import train  # here, because it imports PyTorch, which takes seconds

    return train(args)


if __name__ == "__main__":
    run_cli(main)
