"""tools/benchmark: what its cases compute and count. No test depends on how fast the machine is."""

import json
from types import SimpleNamespace

import pytest
import torch

from tools import benchmark
from tools.benchmark import timing, training
from utils import UserError


def test_operations_are_counted_by_their_closed_form():
    args = SimpleNamespace(quick=True, checkpoint=None, reference_checkpoint=None)
    _, model = timing.load_models(args, torch.device("cpu"))
    c, B = model.transformer.config, 2
    tokens = torch.zeros(B, c.seq_len, dtype=torch.long)
    with torch.no_grad():
        counted = training.count_flops(lambda: model.transformer(tokens), model)
    N, D = c.seq_len, c.embed_dim
    block = 4 * N * D * D + 2 * N * N * D + 2 * N * D * c.mlp_dim
    assert counted == 2 * B * (c.depth * block + N * D * D + N * D * c.codebook_size)
    assert all(layer.attention.fused for layer in model.transformer.blocks)    # as it was


@pytest.mark.parametrize("what, flags", [("inpaint", ["--compile"]), ("train", []), ("photos", [])])
def test_it_reports_every_case(what, flags, tmp_path, capsys, traced):
    path = tmp_path / "report.json"
    assert benchmark.main([what, "--quick", "--rounds", "1", "--device", "cpu", "--json", str(path), *flags]) == 0
    report, printed = json.loads(path.read_text()), capsys.readouterr()
    if what == "photos":
        assert len(report["photographs"]) == 5 and all(row["seconds"] > 0 < row["rounds"] for row in report["photographs"])
        return
    rows = report["completion" if what == "inpaint" else "training"]
    assert rows[0]["times as fast"] == 1 and "reference" in rows[0]["case"]
    assert all(row["pictures/s"] > 0 and row["case"] in printed.out and row["case"] in printed.err for row in rows)
    assert any("compiled" in row["case"] for row in rows) == bool(flags)
    if what == "train":
        assert rows[0]["GF a picture"] > rows[1]["GF a picture"] == pytest.approx(rows[2]["GF a picture"])    # the encoder's


@pytest.mark.parametrize(
    "options",
    [["--rounds", "0"], ["--batch-size", "-1"], ["--quick", "--checkpoint", "x.safetensors"]],
)    # fmt: skip
def test_senseless_flags_are_refused(options):
    with pytest.raises(UserError, match=options[0]):
        benchmark.main(["inpaint", "--device", "cpu", *options])
