"""tools/benchmark: what its cases compute and count. No test depends on how fast the machine is."""

import json
from types import SimpleNamespace

import pytest
import torch

from models import MaskGIT
from tools import benchmark
from tools.benchmark import completion, timing, training
from utils import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models() -> tuple[MaskGIT, MaskGIT]:
    args = SimpleNamespace(quick=True, checkpoint=None, reference_checkpoint=None)
    return timing.load_models(args, CPU)


def test_the_reference_loop_decodes_every_round_of_every_picture(models, monkeypatch):
    decoded, decode = [], MaskGIT.decode
    monkeypatch.setattr(MaskGIT, "decode", lambda self, t, *a: decoded.append(len(t)) or decode(self, t, *a))
    image, mask = timing.draw_pictures(3, 16, CPU)
    completion.reference_loop(models[1], image, mask, total_iter=4)
    assert decoded == [1] * 12
    decoded.clear()
    assert completion.complete(models[0], completion.sample_jobs(3, 16), total_iter=2) > 0


def test_cases_take_turns(monkeypatch):
    order, clock = [], iter([1.0, 1.0, 8.0, 2.0, 6.0, 3.0, 9.0, 1.0])
    monkeypatch.setattr(timing, "seconds", lambda call, device: call() or next(clock))
    cases = [timing.Case("slow", 2, lambda: order.append("slow")), timing.Case("fast", 1, lambda: order.append("fast"))]
    rows = timing.take_turns(cases, 3, CPU)
    assert order == ["slow", "fast"] * 4    # a round to warm up, and three
    assert [row["seconds a picture"] for row in rows] == [4.0, 2.0]
    assert [row["times as fast"] for row in rows] == [1.0, 2.0]    # median of 4/2, 3/3 and 4.5/1


def test_operations_are_counted_by_their_closed_form(models):
    model, B = models[1], 2
    c = model.transformer.config
    tokens = torch.zeros(B, c.seq_len, dtype=torch.long)
    with torch.no_grad():
        counted = training.count_flops(lambda: model.transformer(tokens), model)
    N, D = c.seq_len, c.embed_dim
    block = 4 * N * D * D + 2 * N * N * D + 2 * N * D * c.mlp_dim
    assert counted == 2 * B * (c.depth * block + N * D * D + N * D * c.codebook_size)
    assert all(layer.attention.fused for layer in model.transformer.blocks)    # as it was


def test_a_training_step_trains_a_copy_of_the_transformer(models):
    given = {name: value.clone() for name, value in models[0].state_dict().items()}
    model, step = training.training_step(training.Plan("", models[0], 2, cached=False, half=True), CPU)
    step()
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, given[name])}
    assert changed == {"transformer"}
    assert all(torch.equal(value, given[name]) for name, value in models[0].state_dict().items())


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
    [["--rounds", "0"], ["--total-iter", "0"], ["--batch-size", "-1"], ["--quick", "--checkpoint", "x.safetensors"],
     ["--device", "tpu"]],
)    # fmt: skip
def test_senseless_flags_are_refused(options):
    with pytest.raises(UserError, match=options[0] if options[0] != "--device" else "tpu"):
        benchmark.main(["inpaint", "--device", "cpu", *options])
