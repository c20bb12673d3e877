"""Score completions over decoders, schedules, rounds, sweet spots, temperatures and seeds.

As the reference:     python -m tools.sweep --images test/masked --masks test/masks
                          --ground-truth test/originals --output out/sweep
                          --mask-func cosine linear square --total-iter 10 20 30 --sweet-spot all --seeds 0 1 2
To choose a setting:  python -m tools.sweep --images val --masks valmasks --reference train --output out/tune
                          --features network.onnx --decoder maskgit halton --temperature 0.7 1 --total-iter 1 4 8

Clean pictures may be given as --images; then they are the ground truth too. (What pictures hold inside their holes is never
shown to the model.) One decode of T rounds gives the scores of all its sweet spots. If a sweep is interrupted, repeat the
command: it goes on where it stopped.

Writes to OUTPUT: results.csv (a row for each setting, sweet spot and seed), results.md (tables: mean and standard deviation
over the seeds), and as PNG score_over_total_iter, score_over_sweet_spot (where there are several), schedules, and for each T
rounds_T: picture and token mask of every round.
"""
import argparse
import shlex
import sys
from pathlib import Path

from evaluation.flags import add_score_flags
from evaluation.tables import NEED
from utils import (
    Parser,
    UserError,
    amount,
    check_names,
    count,
    pick_device,
    progress,
    run_cli,
    writable_folder,
    write_text,
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--checkpoint", metavar="FILE", help="model: a file, a folder, cat64 or photo (default: cat64)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--figures", action=switch, default=True, help="draw the results (matplotlib)")
    parser.add_argument("--show", metavar="NAME", help="the picture of the rounds' figures (default: the first)")
    parser.add_argument("--batch-size", type=count, default=16, help="pictures completed together (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the model (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group = parser.add_argument_group("pictures")
    group.add_argument("--images", type=Path, required=True, metavar="DIR", help="to be completed")
    group.add_argument("--masks", type=Path, required=True, metavar="DIR", help="hole masks of the same names, or one")
    group.add_argument("--mask-hole", choices=("black", "white"), default="black", help="colour of the hole in mask files")
    group.add_argument("--ground-truth", type=Path, metavar="DIR", help="originals (default: --images, if they are clean)")
    group.add_argument("--limit", type=count, metavar="N", help="the first N pictures only")
    group = parser.add_argument_group("what is varied")
    group.add_argument("--decoder", nargs="+", default=["maskgit"], metavar="NAME", help="maskgit, halton, reference")
    group.add_argument("--mask-func", nargs="+", default=["cosine", "linear", "square"], metavar="NAME",
                       help="schedules: cosine, linear, square, cubic, sqrt, arccos (default: the first three)")
    group.add_argument("--total-iter", nargs="+", type=rounds, default=[10, 20, 30], metavar="T",
                       help="rounds; need: as many as each picture needs")
    group.add_argument("--sweet-spot", nargs="+", metavar="t", help="rounds to stop after, or all (default: T)")
    group.add_argument("--temperature", nargs="+", type=amount, default=[1.0], metavar="X")
    group.add_argument("--choice-temperature", nargs="+", type=amount, default=[4.5], metavar="X")
    group.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    group = add_score_flags(parser)
    group.add_argument("--paste", action=switch, default=True, help="put the known pixels back before scoring")
    return parser.parse_args(argv)


def rounds(text: str) -> int | None:
    """The type of --total-iter; None: as many as needed."""
    return None if text == NEED else count(text)


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can't work before anything is read or written."""
    from models.decoding import DECODERS
    from models.schedule import SCHEDULES

    check_names("--mask-func", args.mask_func, SCHEDULES)
    check_names("--decoder", args.decoder, DECODERS)
    if None in args.total_iter and "reference" in args.decoder:
        raise UserError(f"--total-iter {NEED} is not for --decoder reference, which has a schedule; give numbers")
    args.spots = sweet_spots(args.sweet_spot, max(T or 0 for T in args.total_iter))


def sweet_spots(given: list[str] | None, last: int) -> list[int] | None:
    """Rounds after which scores are taken, where a decode has so many; None: after the last."""
    if given is None:
        return None
    if given == ["all"]:
        return list(range(1, last + 1))
    if not all(spot.isdecimal() and 1 <= int(spot) <= last for spot in given):
        raise UserError(f"--sweet-spot must be all or rounds in 1..{last} (the largest --total-iter), got {' '.join(given)}")
    return sorted({int(spot) for spot in given})


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_args(args)
    from evaluation import figures, sets, sweep_report, sweeps, tables
    from evaluation.judge import load_judge
    from models import MaskGIT
    from pictures.files import refuse_overwriting

    if args.figures:
        figures.new_figure(1, 1)    # a missing matplotlib is told before the work
    refuse_overwriting(filter(None, (args.images, args.masks, args.ground_truth, args.reference)), [args.output])
    writable_folder(args.output)
    judge = load_judge(args)
    model = MaskGIT.from_pretrained(args.checkpoint, device=pick_device(args.device))
    pictures = sets.load_pictures(args.images, args.masks, args.mask_hole, args.ground_truth, args.limit)
    [shown] = sets.choose(pictures, args.show and [args.show], 1)
    judge = judge.with_originals(sets.measure_originals(judge, pictures))

    header = [*sweeps.KEY, "n", "rounds", *judge.names(svm=False)]
    rows = sweeps.load_results(args.output, sweeps.facts(model, pictures, judge, args), header)
    done = set(map(sweeps.key, rows))
    every = sweeps.all_settings(args)
    left = [x for x in every if any(sweeps.key(x.columns(spot)) not in done for spot in sweeps.spots_of(x, args))]
    if rows:
        print(f"{len(rows)} rows are there already; {len(left)} of {len(every)} decodes are left", file=sys.stderr)
    total = sum(len(sweeps.spots_of(x, args)) for x in left) * len(pictures)
    with progress(total=total, desc="completing", unit="picture") as bar:
        for setting in left:
            fresh = sweeps.score(model, pictures, setting, judge, args, bar.update)
            rows = list({sweeps.key(row): row for row in rows + fresh}.values())
            tables.write_csv(args.output / "results.csv", header, rows)
    command = shlex.join(["python", "-m", "tools.sweep", *(sys.argv[1:] if argv is None else argv)])
    text = sweep_report.report(rows, args, judge, command)
    write_text(args.output / "results.md", text)
    if args.figures:
        sweep_report.draw(model, shown, rows, judge, args)
    print(text)
    return 0


if __name__ == "__main__":
    run_cli(main)
