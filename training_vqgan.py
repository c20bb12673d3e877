"""Train the VQGAN (stage 1): pictures to tokens and back.

    python training_vqgan.py --config configs/tiny.yml --train-dir PICTURES --val-dir PICTURES --output-dir runs/vqgan

configs/tiny.yml takes a minute on a CPU; configs/cat64.yml makes the model that ships. On several GPUs, start it with
`accelerate launch training_vqgan.py ...` and the same flags; the batch is split over the processes. If a run is interrupted,
repeat the command with --resume auto. More in docs/training.md.

Losses: L1 + Laplacian pyramid + perceptual + codebook, and from `adversarial_from` on a hinge GAN with feature matching
(Esser et al. 2021, section 3.1, with a fixed weight). Half of the pictures are decoded with nothing known, the others with
everything known but a random hole. Before the perceptual and adversarial terms the decoded hole is pasted into the picture,
so these terms judge what a person will see: the hole and its seam.

The code of this stage is in training/vqgan.py.
"""

from training.options import add_pixel_flags, training_parser
from utils import run_cli


def main(argv: list[str] | None = None) -> int:
    parser = training_parser(__doc__)
    parser.add_argument("--init", metavar="FILE", help="begin from the VQGAN of this last.pt or model (default: at random)")
    add_pixel_flags(parser)
    args = parser.parse_args(argv)

    from training.vqgan import train  # here, because it imports PyTorch, which takes seconds

    return train(args)


if __name__ == "__main__":
    run_cli(main)
