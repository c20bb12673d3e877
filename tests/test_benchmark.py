"""benchmark.py: what its cases compute and count. No test depends on how fast the machine is."""
import ctypes
import json
import mmap

import pytest
import torch

from models import MaskGIT
from models.transformer import BidirectionalTransformer
from tools import benchmark
from tools.benchmark import Bench, Case
from utils import UserError

CPU = torch.device("cpu")
QUICK = Bench(CPU, quick=True, rounds=1, batch_size=3, total_iter=2)


@pytest.fixture(scope="module")
def models() -> dict[str, MaskGIT]:
    return {name: benchmark.build(benchmark.HERE / f"configs/{name}.yml", QUICK) for name in ("cat64", "maskgit_reference")}


@pytest.fixture
def calls(monkeypatch) -> dict[str, list[int]]:
    """Batch sizes that the transformer and the decoding to pixels were called with."""
    seen: dict[str, list[int]] = {"transformer": [], "decode": []}
    features, decode = BidirectionalTransformer.features, MaskGIT.decode
    monkeypatch.setattr(
        BidirectionalTransformer, "features", lambda self, t, *a: seen["transformer"].append(len(t)) or features(self, t, *a)
    )
    monkeypatch.setattr(MaskGIT, "decode", lambda self, t, *a: seen["decode"].append(len(t)) or decode(self, t, *a))
    return seen


def test_the_reference_loop_decodes_every_round_of_every_picture(models, calls):
    image, mask = benchmark.draw_pictures(3, 16, CPU)
    benchmark.reference_loop(models["maskgit_reference"], image, mask, total_iter=4)
    assert calls == {"transformer": [1] * 12, "decode": [1] * 12}


def test_our_path_decodes_a_batch_once(models, calls):
    image, mask = benchmark.draw_pictures(5, 16, CPU)
    benchmark.complete(models["cat64"], image, mask, 2, total_iter=3)
    assert calls == {"transformer": [2] * 6 + [1] * 3, "decode": [2, 2, 1]}


def test_cases_take_turns(monkeypatch):
    order, clock = [], iter([8.0, 2.0, 6.0, 3.0, 9.0, 1.0])
    monkeypatch.setattr(benchmark, "seconds", lambda call, device: call() or next(clock))
    cases = [Case("slow", 2, lambda: order.append("slow")), Case("fast", 1, lambda: order.append("fast"))]
    rows = benchmark.take_turns(cases, Bench(CPU, True, 3, 1, 1))
    assert order == ["slow", "fast"] * 4    # a round to warm up, and three
    assert [row["seconds a picture"] for row in rows] == [4.0, 2.0]
    assert [row["pictures/s"] for row in rows] == [0.25, 0.5]
    assert [row["times as fast"] for row in rows] == [1.0, 2.0]    # median of 4/2, 3/3 and 4.5/1


def test_operations_are_counted_by_their_closed_form(models):
    model = models["maskgit_reference"]
    c, B = model.transformer.config, 2
    tokens = torch.zeros(B, c.seq_len, dtype=torch.long)
    with torch.no_grad():
        counted = benchmark.count_flops(lambda: model.transformer(tokens), model)
    N, D = c.seq_len, c.embed_dim
    block = 4 * N * D * D + 2 * N * N * D + 2 * N * D * c.mlp_dim
    assert counted == 2 * B * (c.depth * block + N * D * D + N * D * c.codebook_size)
    assert all(layer.attention.fused for layer in model.transformer.blocks)    # as it was


def test_agreement_is_a_share_of_the_masked_tokens(models):
    model = models["maskgit_reference"]
    image, mask = benchmark.draw_pictures(3, 16, CPU)

    def wrong(tokens, pixels):
        return -model.masked_logits(tokens, pixels)

    def once_in_two(tokens, pixels):
        logits = model.masked_logits(tokens, pixels)
        logits[::2] *= -1
        return logits

    shares = benchmark.agreement(
        model, {"same": model.masked_logits, "wrong": wrong, "every second": once_in_two}, image, mask, 2
    )
    assert shares["same"] == 1 and shares["wrong"] == 0
    assert 0.4 < shares["every second"] <= 0.5


def test_an_int8_transformer_stays_close(models):
    model = models["maskgit_reference"]
    small = benchmark.quantise(model)
    tokens = torch.full((2, 16), model.mask_token_id)
    with torch.no_grad():
        a, b = model.masked_logits(tokens), small.masked_logits(tokens)
    assert not torch.equal(a, b)
    assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.99
    benchmark.complete_int8(model, small, *benchmark.draw_pictures(2, 16, CPU), total_iter=2)


def test_memory_of_a_call_is_seen():
    if benchmark.peak_memory(lambda: None, CPU) is None:
        pytest.skip("only Linux tells a process's peak memory")
    before = []

    def call() -> None:    # pages of its own, which no allocator holds already, and gives back before the call ends
        before.append(benchmark.memory_now(CPU))
        torch.frombuffer(mmap.mmap(-1, 64 * 2**20), dtype=torch.uint8).fill_(1)

    peak = benchmark.peak_memory(call, CPU)
    assert peak - before[0] > 40             # MiB, of 64
    assert benchmark.peak_memory(lambda: None, CPU) < peak - 20    # the mark starts anew


def test_freed_memory_does_not_count():
    if benchmark.memory_now(CPU) is None or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("only glibc gives memory back when asked")
    before = benchmark.memory_now(CPU)
    small = [b"x" * 2**16 for _ in range(1024)]    # 64 MiB, in pieces small enough for the heap
    assert benchmark.memory_now(CPU) - before > 40
    last = b"x" * 2**16                            # above them, so that they aren't given back of themselves
    del small
    assert benchmark.memory_now(CPU) - before < 20 and last


def test_only_the_copy_is_compiled(models, traced):
    model = models["cat64"]
    blocks = list(benchmark.compiled(model).transformer.blocks)
    assert traced == blocks and len(traced) > 0 and not set(traced) & set(model.modules())
    assert not model.transformer.compiled


def test_a_training_step_trains_the_transformer_alone(models):
    plan = benchmark.Plan("", models["cat64"], 2, cached=False, half=True)
    model, step = benchmark.training_step(plan, 2, CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step()
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"transformer"}
    assert all(torch.equal(a, b) for a, b in zip(models["cat64"].parameters(), plan.model.parameters(), strict=True))


@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_inpaint_reports_everything(flags, tmp_path, capsys, traced):
    path = tmp_path / "report.json"
    assert benchmark.main(["inpaint", "--quick", "--rounds", "1", "--device", "cpu", "--json", str(path), *flags]) == 0
    report, out = json.loads(path.read_text()), capsys.readouterr().out
    assert report["machine"]["quick"] is True
    cases = [row["case"] for row in report["completion"]]
    assert cases[0] == "reference loop" and "default, bfloat16" in cases and all(name in out for name in cases)
    assert ("default, compiled" in cases) == bool(flags)
    assert report["completion"][0]["times as fast"] == 1
    assert all(row["pictures/s"] > 0 for row in report["completion"])
    assert set(report["equal arg-max tokens"]) == {"bfloat16", "int8"}
    assert [row["pictures"] for row in report["growth with pictures"]] == [1, 2, 4]
    assert [row["T"] for row in report["growth with rounds"]] == [1, 2]
    decoder = next(row for row in report["parts of the default"] if row["part"] == "decoder")
    assert decoder["GF"] > 0 and decoder["floor ms"] > 0


def test_train_reports_everything(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert benchmark.main(["train", "--quick", "--rounds", "1", "--device", "cpu", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["training"]
    assert len(rows) == 4 and rows[0]["times as fast"] == 1
    assert rows[0]["GF a picture"] > rows[1]["GF a picture"] == pytest.approx(rows[2]["GF a picture"])    # the encoder's
    assert all(row["share of peak"] > 0 for row in rows)
    assert "| default, tokens cached, bfloat16 |" in capsys.readouterr().out


def test_unknown_memory_is_a_dash(monkeypatch):
    assert benchmark.text(None) == "-" and benchmark.text(0.12345) == "0.1235" and benchmark.text(7) == "7"
    monkeypatch.setattr(benchmark, "Path", lambda *a: (_ for _ in ()).throw(OSError()))
    assert benchmark.memory_now(CPU) is None and benchmark.peak_memory(lambda: None, CPU) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--total-iter", "0"], "--total-iter must be at least 1"),
        (["--batch-size", "-1"], "--batch-size must be at least 1, got -1"),
        (["--quick", "--checkpoint", "x.safetensors"], "--quick makes tiny models of its own"),
        (["--checkpoint", "missing.safetensors"], "missing.safetensors not found"),
        (["--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_senseless_flags_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        benchmark.main(["inpaint", "--device", "cpu", *options])
