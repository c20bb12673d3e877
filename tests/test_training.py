"""What the two training scripts compute, and what they share: pictures by step, the loop, sizes, processes."""
import io
import math
import tarfile
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import (
    STEPS,
    checkpoint,
    differences,
    kill_at,
    make_setting,
    metrics,
    run,
    succeed,
    write_pictures,
)

import models.transformer
import training_transformer
import training_vqgan
from models.maskgit import MaskGIT
from models.transformer import TransformerConfig
from pictures.folders import load_folder
from pictures.images import read_image, to_float
from pictures.shards import _read_shards, count_pictures, open_shards
from pictures.views import take_views
from tools import dataset as dataset_tools
from training.checkpoints import Progress, load_checkpoint
from training.loop import MAX_SKIPPED, step_or_skip, training_loop
from training.options import check_size
from training.pictures_by_step import FolderPictures, ShardPictures, open_pictures
from training.processes import local_batches, local_gradients, on_main
from training.speed import Ahead, CapturedGradients, padded_positions
from training.stopping import NotFinite, check_all_finite
from utils import UserError, load_config


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return make_setting(tmp_path_factory.mktemp("setting"))


@pytest.fixture(scope="module")
def stage2(setting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage2") / "a"
    child = succeed("transformer", setting.argv("transformer", folder))
    return folder, child


# ---- the stages ----


@pytest.mark.parametrize("stage, term, share", [("vqgan", "l1", 0.4), ("transformer", "loss", 0.5)])
def test_a_batch_can_be_learnt_by_heart(setting, tmp_path, stage, term, share):
    pictures = write_pictures(tmp_path / "p", 8)
    flags = ["--epochs", "150", "--accum-grad", "1", "--learning-rate", "1e-2", "--set", f"train_{stage}.log_every=5",
             "--set", f"train_{stage}.sample_every=150", "--set", f"train_{stage}.save_every=150"]    # fmt: skip
    flags += {
        "vqgan": ["--set", "train_vqgan.adversarial_from=1.0", "--set", "train_vqgan.freeze_tokens_from=1.0"],
        "transformer": ["--set", "transformer.dropout=0.0", "--set", "transformer.attention_dropout=0.0",
                        "--set", "train_transformer.seed=0", "--set", "train_transformer.validate_every=150",
                        "--set", "train_transformer.rate_schedule=cosine", "--set", "train_transformer.warmup_steps=5"],
    }[stage]    # fmt: skip
    succeed(stage, setting.argv(stage, tmp_path / "a", *flags, train=pictures))
    curve = [line[term] for line in metrics(tmp_path / "a") if term in line]
    assert sum(curve[-5:]) / 5 < share * curve[0], curve


def test_stage_2_trains_the_transformer_alone(setting, stage2):
    folder, _ = stage2
    state = checkpoint(folder, "transformer")
    vqgan = load_checkpoint(setting.vqgan, "vqgan-training")["ema"]
    assert differences(dict(state["vqgan"]), dict(vqgan)) == []
    assert len(state["optimizer"]["state"]) == len(state["model"])
    states = state["optimizer"]["state"].values()
    shapes = sorted(tuple((entry["momentum"] if "momentum" in entry else entry["exp_avg"]).shape) for entry in states)
    assert sum("momentum" in entry for entry in states) == 5    # qkv, proj, two of the MLP, one of the head
    assert shapes == sorted(tuple(value.shape) for value in state["model"].values())


def test_stage_2_exports_both_stages_in_one_file(setting, stage2):
    folder, _ = stage2
    best = checkpoint(folder, "transformer", "best.pt")
    model = MaskGIT.from_pretrained(folder / "maskgit.safetensors")
    for name, value in model.transformer.state_dict().items():
        torch.testing.assert_close(value, best["ema"][name], atol=1e-3, rtol=1e-3)    # half precision
    for name, value in model.vqgan.state_dict().items():
        torch.testing.assert_close(value, best["vqgan"][name], atol=1e-3, rtol=1e-3)


def test_stage_1_ends_in_what_stage_2_takes(setting, tmp_path):
    succeed("vqgan", setting.argv("vqgan", tmp_path / "a"))
    argv = setting.argv("transformer", tmp_path / "b", "--epochs", "1")
    argv[argv.index("--vqgan") + 1] = str(tmp_path / "a" / "last.pt")
    succeed("transformer", argv)
    vqgan, ema = training_transformer.load_vqgan(str(tmp_path / "a" / "last.pt")), checkpoint(tmp_path / "a", "vqgan")["ema"]
    assert all(torch.equal(value, ema[name]) for name, value in vqgan.state_dict().items())
    argv[argv.index("--vqgan") + 1] = str(tmp_path / "b" / "maskgit.safetensors")    # a finished model serves as well
    argv[argv.index("--output-dir") + 1] = str(tmp_path / "c")
    succeed("transformer", argv)


def test_the_discriminator_learns_from_its_step_on(setting, tmp_path):
    """adversarial_from = 0.4 of 12 steps: it changes first in the sixth."""
    argv = setting.argv("vqgan", tmp_path / "a", "--resume", "auto", "--set", "train_vqgan.save_every=1")
    discriminators = []
    for micro in (2, 2 * 4, 2 * 1):    # checkpoints of steps 1, 5 and 6
        run("vqgan", argv, kill_at(micro))
        discriminators.append(checkpoint(tmp_path / "a", "vqgan")["discriminator"])
    assert differences(discriminators[0], discriminators[1]) == []
    assert differences(discriminators[1], discriminators[2]) != []


def test_stage_2_validates_when_it_is_due_and_may_hold_its_rate(setting, tmp_path):
    values = ("validate_every=3", "rate_schedule=constant", "augment=0.5", "warmup_steps=2", "learning_rate=0.01")
    flags = [x for value in values for x in ("--set", f"train_transformer.{value}")]
    succeed("transformer", setting.argv("transformer", tmp_path / "a", *flags))
    lines = metrics(tmp_path / "a")
    assert [line["step"] for line in lines if "val_loss" in line] == [9, STEPS]    # of four epochs of three steps
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates == pytest.approx([0.005] + [0.01] * (STEPS - 1))


def test_compile_compiles_every_block(setting, tmp_path):
    def patch():
        torch.nn.Module.compile = lambda block, **_: print("compiled", type(block).__name__)
        models.transformer.compile_once = lambda function: print("compiled", function.__name__) or function

    flags = ("--compile", "--epochs", "1", "--set", "transformer.depth=3")
    child = succeed("transformer", setting.argv("transformer", tmp_path / "a", *flags), patch)
    assert child.text.count("compiled Block\n") == 3
    assert child.text.count("compiled embed\n") == child.text.count("compiled losses\n") > 0


def test_augmented_pictures_are_encoded_as_they_are_seen(setting):
    vqgan = training_transformer.load_vqgan(str(setting.vqgan))
    model = MaskGIT(vqgan.config, TransformerConfig(**load_config(setting.config)["transformer"]))
    model.vqgan.load_state_dict(vqgan.state_dict())
    images = load_folder(setting.train, 16)
    sides = [training_transformer.encode(vqgan, x, torch.device("cpu")) for x in (images, images.flip(3))]
    tokens = torch.stack(sides, 1)                                                           # (M, 2, N)

    def rows(chosen, mirrored):
        return tokens[chosen, mirrored.long()], images[chosen]

    def draw(augment, rank=0, processes=1, captured=None):
        c = training_transformer.TrainTransformerConfig(batch_size=8, augment=augment)
        place = SimpleNamespace(process_index=rank, num_processes=processes, device=torch.device("cpu"))
        run = SimpleNamespace(config=c, accelerator=place, ema=model, pictures=Pictures(rows, len(images)), per_epoch=3)
        run.captured = captured
        batch = training_transformer.draw_batch(run, 4)
        return batch, training_transformer.prepare(run, batch)

    (plain, before), (batch, after) = draw(0.0), draw(0.6)
    changed = batch.views.changed
    assert 0 < changed.sum() < 8 and torch.equal(plain.image, batch.image)
    same = (before.tokens == after.tokens).all(1)
    assert same[~changed].all() and not same[changed].any()
    seen = take_views(to_float(batch.image), batch.views)
    assert torch.equal(after.tokens, vqgan.encode(seen)) and torch.equal(after.pixels, model.pixels_of(seen, batch.holes))
    assert torch.equal(torch.cat(after.wanted), after.masked.flatten().nonzero().squeeze(1))
    parts = [draw(0.6, rank, 2)[1] for rank in range(2)]
    for whole, mine in zip(after[:3], zip(*(part[:3] for part in parts), strict=True), strict=True):
        assert torch.equal(torch.stack(mine, 1).flatten(0, 1), whole)
    assert after.total == parts[0].total == parts[1].total == after.masked.sum()
    assert sum(len(part.wanted[0]) for part in parts) == after.total
    (rounded,) = draw(0.6, captured=object())[1].wanted
    assert torch.equal(rounded[: after.total], after.wanted[0]) and len(rounded) == 8 * math.ceil(after.total / 8)


def test_gradients_are_captured_once_for_each_shape(monkeypatch):
    """With a plain call in place of a CUDA graph, which writes into the gradients that it was captured with."""
    captured = []

    class Graph:
        def __init__(self, function, inputs, beside):
            captured.append((len(inputs[0]), None if beside is None else captured[0][0]))
            self.function, self.outputs = function, function(*inputs)

        def __call__(self, *inputs):
            returned, found = self.function(*inputs)
            for mine, now in zip(self.outputs[1], found, strict=True):
                mine.copy_(now)
            return returned, self.outputs[1]

    monkeypatch.setattr("training.speed.Captured", Graph)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    weight = torch.nn.Parameter(torch.tensor([2.0, 3.0]))

    def function(x, nothing):
        weight.grad = None
        loss = (x @ weight.repeat(len(x) // 2)).square()
        loss.backward()
        return loss.detach()

    gradients = CapturedGradients(function, [weight])
    for x in ([1.0, 0.0], [1.0, 1.0, 0.0, 1.0], [0.0, 1.0], [1.0, 1.0, 1.0, 1.0]):
        x = torch.tensor(x)
        loss, found = gradients(x, None), weight.grad.clone()
        assert loss == function(x, None) and torch.equal(found, weight.grad)
    assert captured == [(2, None), (4, 2)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_captured_gradients_are_the_gradients(setting, compile):
    torch.manual_seed(0)
    sections = load_config(setting.config)
    options = sections["transformer"] | {"dropout": 0.0, "attention_dropout": 0.0}
    model = MaskGIT(sections["vqgan"], options).train().to("cuda")
    parameters = list(model.transformer.parameters())
    if compile:
        model.transformer.compile_blocks()

    def gradients(tokens, masked, pixels, wanted):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens, masked, pixels, positions=wanted).sum()
        loss.backward()
        return loss.detach()

    graphs = CapturedGradients(gradients, parameters)
    N, K = options["seq_len"], options["codebook_size"]
    before = torch.cuda.get_rng_state()
    for share in (0.3, 0.8, 0.3):    # two sizes, the first one again
        masked = (torch.randperm(8 * N) < share * 8 * N).view(8, N)
        tokens, pixels = torch.randint(K, (8, N)).cuda(), torch.rand(8, N, options["pixel_dim"]).cuda()
        loss = graphs(tokens, masked.cuda(), pixels, padded_positions(masked).cuda()).item()
        found = [p.grad.clone() for p in parameters]
        assert loss == pytest.approx(gradients(tokens, masked.cuda(), pixels, None).item(), rel=0.01)
        for mine, p in zip(found, parameters, strict=True):
            assert (mine - p.grad).norm() <= 0.03 * p.grad.norm() + 1e-6
    assert len(graphs.graphs) == 2 and torch.equal(torch.cuda.get_rng_state(), before)


def test_stage_2_refuses_to_capture_on_a_cpu(setting, tmp_path):
    child = run("transformer", setting.argv("transformer", tmp_path / "a", "--capture"))
    assert child.code == 2 and "--capture is for one process on a CUDA device, here there are 1 on cpu" in child.text
    assert not (tmp_path / "a").exists()


@dataclass
class Pictures:
    """In place of a token cache."""

    rows: Callable
    count: int

    def __len__(self) -> int:
        return self.count


def test_pictures_written_on_the_way(stage2):
    folder, child = stage2
    assert sorted(path.name for path in folder.glob("samples_*.png")) == ["samples_0000006.png", "samples_0000012.png"]
    assert read_image(folder / "samples_0000012.png").shape[0] == 3
    assert child.text.count('"images/s"') == STEPS // 3


def test_batches_are_a_function_of_seed_and_step(setting):
    images = load_folder(setting.train, 16)
    c = training_vqgan.TrainVQGANConfig(batch_size=8, known_share=0.5)

    def draw(step, rank=0, processes=1, **changes):
        config = training_vqgan.TrainVQGANConfig(**(vars(c) | changes))
        pictures = FolderPictures(images, 8, config.seed, rank, processes)
        place = SimpleNamespace(process_index=rank, num_processes=processes)
        return training_vqgan.draw_batch(SimpleNamespace(config=config, accelerator=place, pictures=pictures), step)

    image, mask = draw(4)
    again = draw(4)
    assert torch.equal(image, again[0]) and torch.equal(mask, again[1])
    assert not torch.equal(image, draw(5)[0]) and not torch.equal(mask, draw(4, seed=1)[1])
    parts = [draw(4, rank, 4) for rank in range(4)]
    assert torch.equal(torch.stack([part[0] for part in parts], 1).flatten(0, 1), image)
    assert torch.equal(torch.stack([part[1] for part in parts], 1).flatten(0, 1), mask)
    assert draw(0, known_share=0.0)[1].all()
    holes = torch.cat([draw(step, known_share=1.0)[1] for step in range(4)])
    assert (holes.mean((1, 2, 3)) < 1).all() and (holes.mean((1, 2, 3)) > 0).all()


def test_missing_perceptual_weights(monkeypatch, capsys):
    def no_network(*args):
        raise OSError("no route to host")

    monkeypatch.setattr(training_vqgan, "PerceptualFeatures", no_network)
    c = training_vqgan.TrainVQGANConfig()
    assert training_vqgan.load_features(c, None) is None
    assert "training without the perceptual term" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(UserError, match="not found"):
        training_vqgan.load_features(c, "nowhere.pth")
    c.perceptual_network = "alexnet"
    with pytest.raises(UserError, match="unknown perceptual network 'alexnet'"):
        training_vqgan.load_features(c, None)


# ---- pictures by step ----


@pytest.fixture(scope="module")
def shards(setting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    argv = ["shards", str(setting.train), "--output", f"{folder}/s-%02d.tar", "--size", "16", "--shard-size", "7"]
    dataset_tools.main(argv)
    return f"{folder}/s-{{00..03}}.tar"


def source(kind, setting, shards, rank=0, processes=1, batch_size=8):
    place = {"batch_size": batch_size, "seed": 3, "rank": rank, "processes": processes}
    if kind == "folder":
        return FolderPictures(load_folder(setting.train, 16), **place)
    return ShardPictures(shards, 24, 16, **place, workers=0, bad_images="error")


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_an_epoch_visits_every_picture_once_and_epochs_differ(setting, shards, kind):
    pictures = source(kind, setting, shards)
    assert len(pictures) == 24
    every = {image.numpy().tobytes() for image in load_folder(setting.train, 16)}
    batches = [[image.numpy().tobytes() for image in pictures.batch(step)] for step in range(6)]
    epochs = [sum(batches[:3], []), sum(batches[3:], [])]
    assert set(epochs[0]) == set(epochs[1]) == every and len(epochs[0]) == 24
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize("processes", [2, 4])
def test_the_processes_shares_make_the_batch(setting, shards, kind, processes):
    whole = source(kind, setting, shards)
    parts = [source(kind, setting, shards, rank, processes) for rank in range(processes)]
    for step in range(4):
        together = torch.stack([part.batch(step) for part in parts], 1).flatten(0, 1)
        assert torch.equal(together, whole.batch(step))


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_batch_does_not_depend_on_where_one_began(setting, shards, kind):
    one, two = source(kind, setting, shards), source(kind, setting, shards)
    batches = [one.batch(step) for step in range(6)]
    for step in (4, 1, 2, 5):
        assert torch.equal(two.batch(step), batches[step])


def test_shards_that_hold_less_than_was_said(setting, shards):
    pictures = ShardPictures(shards, 40, 16, 8, 0, 0, 1, workers=0, bad_images="error")
    for step in range(3):
        pictures.batch(step)
    with pytest.raises(UserError, match="fewer pictures than the 40 of --train-pictures"):
        pictures.batch(3)


def test_samples_are_counted_as_webdataset_groups_them(tmp_path, shards):
    assert [count_pictures(url) for url in open_shards(shards, 16).urls] == [7, 7, 7, 3]
    path = tmp_path / "s.tar"
    names = ["a/0.png", "a/0.json", "a/1.v2.png", "a/1.cls", "b/1.png", "README", "c.d/2.png"]
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            tar.addfile(info, io.BytesIO())
        tar.addfile(_folder("c.d"))
    assert count_pictures(str(path)) == len(list(_read_shards([str(path)])))
    path.write_bytes(b"no tar")
    with pytest.raises(UserError, match="can't be read"):
        count_pictures(str(path))
    with pytest.raises(UserError, match="--train-pictures"):
        count_pictures("https://example.org/s.tar")


def _folder(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


@pytest.mark.parametrize(
    "train, more, sentence",
    [
        (["a", "s-{0..1}.tar"], {}, "folders, or one quoted pattern"),
        (["s-{0..1}.tar"], {}, "do not exist"),
        (["SHARDS"], {"train_pictures": 5}, "5 training pictures are fewer than one batch"),
        (["SHARDS"], {"workers": -1}, "--workers must be 0 or more"),
        (["SHARDS"], {"train_pictures": 0}, "--train-pictures at least 1"),
    ],
)
def test_train_dirs_that_make_no_sense(shards, train, more, sentence):
    args = SimpleNamespace(**{"train_dir": [shards if path == "SHARDS" else path for path in train], "workers": 0,
                              "train_pictures": None, "bad_images": "error"} | more)    # fmt: skip
    c = SimpleNamespace(batch_size=8, seed=0)
    with pytest.raises((UserError, UserError), match=sentence):
        open_pictures(args, 16, c, SimpleNamespace(process_index=0, num_processes=1))


# ---- helpers ----


def test_ahead_computes_the_same_one_step_early():
    calls, threads = [], set()

    def square(step):
        calls.append(step)
        threads.add(threading.current_thread())
        if step == 9:
            raise DataLost(step)
        return step * step

    now, ahead = Ahead(lambda step: step * step, threads=0), Ahead(square, threads=1)
    for step in (0, 1, 2, 5, 6, 3):    # a gap, as after a resume
        assert ahead(step) == now(step) == step * step
    ahead.pool.shutdown(wait=True)
    assert calls == [0, 1, 2, 3, 5, 6, 7, 3, 4] and threading.main_thread() not in threads
    ahead = Ahead(square, threads=1)
    assert ahead(8) == 64    # what comes after it fails, and is told when it is asked for
    with pytest.raises(DataLost):
        ahead(9)


class DataLost(Exception):
    pass


def test_several_threads_work_ahead_at_once():
    """Step 0 is not done before step 3 has begun: four steps are under way together."""
    begun = {step: threading.Event() for step in range(8)}

    def function(step):
        begun[step].set()
        assert step or begun[3].wait(30)
        return step

    ahead = Ahead(function, threads=4)
    assert [ahead(step) for step in range(4)] == [0, 1, 2, 3]
    ahead.pool.shutdown(wait=True)
    assert sorted(ahead.waiting) == [4, 5, 6, 7]


@pytest.mark.parametrize("processes", [1, 3, 8])
def test_share_deals_every_row_to_one_process(processes):
    x = torch.arange(7)
    rows = []
    for rank in range(processes):
        place = SimpleNamespace(process_index=rank, num_processes=processes, device="cpu")
        for a, b in local_batches(place, x, x * 2, batch_size=2):
            assert torch.equal(b, a * 2) and len(a) <= 2
            rows += a.tolist()
    assert sorted(rows) == x.tolist()


def test_gradients_stay_local_only_while_asked():
    kept = []

    class Kept:
        def __init__(self, model):
            self.model = model

        def __enter__(self):
            kept.append(self.model)

        def __exit__(self, *exc):
            kept.remove(self.model)

    accelerator = SimpleNamespace(no_sync=Kept)
    with local_gradients(accelerator, True, "a", "b"):
        assert kept == ["a", "b"]
    with local_gradients(accelerator, False, "a", "b"):
        assert kept == []


def test_sizes_that_no_machine_holds():
    class Config:
        depth = 3
        decoder_blocks = [1, 2]

    small = lambda: torch.nn.Linear(10, 10)    # noqa: E731
    check_size("vqgan", Config(), small)
    for build, sentence in (
        (lambda: torch.nn.Linear(10**6, 10**6), r"config vqgan describes 1.0e\+12 parameters, more than 1e\+11"),
        (lambda: torch.nn.Linear(2**40, 2**40), "config vqgan describes no model that can be made"),
    ):
        with pytest.raises(UserError, match=sentence):
            check_size("vqgan", Config(), build)
    Config.decoder_blocks = [1, 2**70]
    with pytest.raises(UserError, match="config vqgan.decoder_blocks must be at most 1000"):
        check_size("vqgan", Config(), small)


# ---- the loop ----


def fake_loop(folder, losses, save_every=2, export=None, on_nan="stop", progress=None):
    """The loop over steps that do nothing; `losses` are the validation losses of its epochs of 3 steps."""
    accelerator = SimpleNamespace(is_main_process=True, num_processes=1, process_index=0, end_training=lambda: None)
    c = SimpleNamespace(epochs=len(losses), batch_size=4, seed=0, log_every=2, save_every=save_every)
    progress = progress or Progress(pictures=12)
    steps = []

    def train_step(step):
        steps.append(step)
        return {"loss": float(step), "learning_rate": 0.1}

    code = training_loop(
        c, accelerator, folder, progress, per_epoch=3, on_nan=on_nan, train_step=train_step,
        validate=lambda epoch: losses[epoch - 1], state=lambda: {"kind": "fake"}, export=export,
    )    # fmt: skip
    return code, steps, progress


def test_the_loop_logs_saves_and_keeps_the_best(tmp_path):
    exported = []
    losses = [{"val_loss": 3.0}, None, {"val_loss": 2.0}, {"val_loss": 2.5}, {"val_loss": float("nan")}]
    code, steps, progress = fake_loop(tmp_path, losses, export=lambda: exported.append(1))
    assert code == 0 and steps == list(range(15)) and progress.step == 15 and progress.best == 2.0
    assert [line["step"] for line in metrics(tmp_path) if "loss" in line] == [2, 4, 6, 8, 10, 12, 14]
    assert [line["step"] for line in metrics(tmp_path) if "val_loss" in line] == [3, 9, 12, 15]
    assert len(exported) == 2
    kept = {name: load_checkpoint(tmp_path / name, "fake") for name in ("last.pt", "previous.pt", "best.pt")}
    assert {name: state["step"] for name, state in kept.items()} == {"last.pt": 15, "previous.pt": 14, "best.pt": 9}
    assert kept["last.pt"]["best"] == 2.0 and kept["last.pt"]["pictures"] == 12


def test_the_loop_saves_before_the_first_step(tmp_path):
    """A disk that is too small shows at once, and a run that is killed in its first step can be resumed."""
    with pytest.raises(ZeroDivisionError):
        fake_loop(tmp_path, [{"val_loss": 1.0}], save_every=0)
    assert load_checkpoint(tmp_path / "last.pt", "fake")["step"] == 0


def test_step_or_skip_counts_over_the_whole_run():
    def broken(step):
        raise NotFinite(f"the loss of step {step} is nan")

    progress = Progress(step=4, skipped=MAX_SKIPPED - 1)
    assert step_or_skip(broken, progress, "skip") == {"skipped": MAX_SKIPPED}
    with pytest.raises(NotFinite, match=f"step 4 is nan .{MAX_SKIPPED} steps were left out before"):
        step_or_skip(broken, progress, "skip")
    with pytest.raises(NotFinite, match="step 4 is nan$"):
        step_or_skip(broken, Progress(step=4), "stop")


def test_the_first_number_that_is_not_finite_is_named():
    check_all_finite({"l1": 0.5, "loss": -1e30}, 7)
    with pytest.raises(NotFinite, match="the feature matching of step 7 is inf"):
        check_all_finite({"l1": 0.5, "feature_matching": math.inf, "loss": math.inf}, 7)


def test_on_main_alone_is_a_plain_call():
    accelerator = SimpleNamespace(num_processes=1)
    assert on_main(accelerator, lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        on_main(accelerator, lambda: 1 / 0)
