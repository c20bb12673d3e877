"""Finish the decoder on sampled tokens (after stage 2): a completed hole is made of predictions, not of true tokens.

    python training_finish.py --model runs/maskgit/maskgit.safetensors --vqgan runs/vqgan/last.pt \\
        --train-dir PICTURES --val-dir PICTURES --output-dir runs/finish

--config and the other flags are those of the two stages. More in docs/training.md.

Encoder, codebook and transformer stand still. The decoder and its discriminator continue from stage 1 (`--vqgan`). A quarter
of every batch keeps its true tokens and the losses of stage 1, so that the decoder forgets nothing. The others get their
holes' tokens from the transformer in a few rounds, and the decoder learns to make them look like the originals: to an
ImageNet network, as sharp on the hole's rim and inside it, real to the discriminator. From here on it also sees the
transformer's features of the known part. The finished model, all parts in one file, is OUTPUT/maskgit.safetensors. Without
`--vqgan` a finished model is finished further, with new discriminators or those of an earlier finish (`--discriminators`).

The code of this stage is in training/finish.py; its losses are in training/finish_losses.py.
"""

from training.options import add_pixel_flags, training_parser
from utils import run_cli


def main(argv: list[str] | None = None) -> int:
    parser = training_parser(__doc__)
    flag = parser.add_argument
    flag("--model", required=True, help="the model of stage 2 (maskgit.safetensors)")
    flag("--vqgan", help="stage-1 checkpoint (last.pt) with decoder and discriminator (default: the model's own decoder, to "
                         "finish it further, and a new discriminator)")    # fmt: skip
    flag("--discriminators", metavar="FILE", help="a last.pt of the finish, to continue its discriminators (default: those "
                                                  "of --vqgan, or new ones)")    # fmt: skip
    add_pixel_flags(parser)
    flag("--second-weights", help="file with the weights of train_finish.second_network (default: downloaded)")
    flag("--capture", action="store_true", help="capture a step's gradients as one CUDA graph: faster on a GPU")
    args = parser.parse_args(argv)

    from training.finish import train  # here, because it imports PyTorch, which takes seconds

    return train(args)


if __name__ == "__main__":
    run_cli(main)
