"""What the stages compute, and what they share: pictures by step, configs, rates, Muon."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import (
    STEPS,
    checkpoint,
    differences,
    metrics,
    refused,
    run,
    succeed,
    write_pictures,
    write_shards,
)
from torch import nn

import training.vqgan
from models.maskgit import MaskGIT
from models.transformer import BidirectionalTransformer, TransformerConfig
from models.vqgan import VQGANConfig
from pictures import holes
from pictures.folders import load_folder
from pictures.images import read_image, to_float
from pictures.views import take_views
from training.checkpoints import load_checkpoint
from training.config import fit_decoder, fit_transformer
from training.masks import MaskSource
from training.muon import Muon, orthogonalize
from training.optimization import cosine_rate, ema_decay_at, set_rate, update_ema
from training.options import load_sections, training_parser
from training.pictures_by_step import FolderPictures, ShardPictures, epoch_order
from training.speed import Ahead, Captured, padded_positions
from training.token_batches import draw_batch, prepare
from training.token_cache import encode
from training.transformer import TrainTransformerConfig
from training.weights import load_vqgan
from utils import UserError, build_config, load_config

# ---- the stages ----


@pytest.mark.parametrize("stage, term, share", [("vqgan", "l1", 0.4), ("transformer", "loss", 0.5)])
def test_a_batch_can_be_learnt_by_heart(setting, tmp_path, stage, term, share):
    pictures = write_pictures(tmp_path / "p", 8)
    flags = ["--epochs", "150", "--accum-grad", "1", "--learning-rate", "1e-2", "--set", f"train_{stage}.log_every=5",
             f"train_{stage}.validate_every=150", f"train_{stage}.save_every=150"]    # fmt: skip
    flags += {
        "vqgan": ["train_vqgan.adversarial_from=1.0", "train_vqgan.freeze_tokens_from=1.0"],
        "transformer": ["transformer.dropout=0.0", "transformer.attention_dropout=0.0", "train_transformer.seed=0",
                        "train_transformer.rate_schedule=cosine", "train_transformer.warmup_steps=5"],
    }[stage]    # fmt: skip
    succeed(stage, setting.argv(stage, tmp_path / "a", *flags, train=pictures))
    curve = [line[term] for line in metrics(tmp_path / "a") if term in line]
    assert sum(curve[-5:]) / 5 < share * curve[0], curve


def test_stage_2_trains_the_transformer_alone_and_exports_both_stages(setting, tmp_path):
    folder = tmp_path / "a"
    child = succeed("transformer", setting.argv("transformer", folder))
    state, best = checkpoint(folder, "transformer"), checkpoint(folder, "transformer", "best.pt")
    vqgan = load_checkpoint(setting.vqgan, "vqgan-training")["ema"]
    assert differences(dict(state["vqgan"]), dict(vqgan)) == []
    assert sum("momentum" in x for x in state["optimizer"]["state"].values()) == 5    # qkv, proj, MLP twice, head
    model = MaskGIT.from_pretrained(folder / "maskgit.safetensors")
    for part, weights in (("transformer", best["ema"]), ("vqgan", best["vqgan"])):
        for name, value in getattr(model, part).state_dict().items():
            torch.testing.assert_close(value, weights[name], atol=1e-3, rtol=1e-3)    # half precision
    assert sorted(path.name for path in folder.glob("samples_*.png")) == ["samples_0000006.png", "samples_0000012.png"]
    assert read_image(folder / "samples_0000012.png").shape[0] == 3
    assert child.text.count('"images/s"') == STEPS // 3


def test_stage_2_validates_when_it_is_due_may_hold_its_rate_and_compiles(setting, tmp_path):
    def patch():
        BidirectionalTransformer.compile_blocks = lambda self: print("blocks compiled")

    values = ("validate_every=3", "rate_schedule=constant", "augment=0.5", "warmup_steps=2", "learning_rate=0.01")
    flags = ["--compile", "--set", *(f"train_transformer.{value}" for value in values)]
    child = succeed("transformer", setting.argv("transformer", tmp_path / "a", *flags), patch)
    lines = metrics(tmp_path / "a")
    assert [line["step"] for line in lines if "val_loss" in line] == [9, STEPS]    # of four epochs of three steps
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates == pytest.approx([0.005] + [0.01] * (STEPS - 1))
    assert child.text.count("blocks compiled") == 1


def test_augmented_pictures_are_encoded_as_they_are_seen(setting):
    vqgan = load_vqgan(str(setting.vqgan))
    model = MaskGIT(vqgan.config, TransformerConfig(**load_config(setting.config)["transformer"]))
    model.vqgan.load_state_dict(vqgan.state_dict())
    images = load_folder(setting.train, 16)
    tokens = torch.stack([encode(vqgan, x, torch.device("cpu")) for x in (images, images.flip(3))], 1)    # (M, 2, N)

    class Pictures(list):
        def rows(self, chosen, mirrored):
            return tokens[chosen, mirrored.long()], images[chosen]

    def draw(augment, rank=0, processes=1, captured=None):
        c = TrainTransformerConfig(batch_size=8, augment=augment)
        parts = {"config": c, "ema": model, "pictures": Pictures(images), "per_epoch": 3, "captured": captured}
        parts["masks"] = MaskSource(holes, holes)
        place = SimpleNamespace(device=torch.device("cpu"))
        run = SimpleNamespace(accelerator=place, mine=slice(rank, None, processes), **parts)
        drawn = draw_batch(run, 4)
        return drawn, prepare(run, drawn)

    (plain, before), (drawn, after) = draw(0.0), draw(0.6)
    changed = drawn.views.changed
    assert 0 < changed.sum() < 8 and torch.equal(plain.image, drawn.image)
    same = (before.tokens == after.tokens).all(1)
    assert same[~changed].all() and not same[changed].any()
    seen = take_views(to_float(drawn.image), drawn.views)
    assert torch.equal(after.tokens, vqgan.encode(seen)) and torch.equal(after.pixels, model.pixels_of(seen, drawn.holes))
    assert torch.equal(torch.cat(after.positions), after.masked.flatten().nonzero().squeeze(1))
    parts = [draw(0.6, rank, 2)[1] for rank in range(2)]
    for whole, mine in zip(after[:3], zip(*(part[:3] for part in parts), strict=True), strict=True):
        assert torch.equal(torch.stack(mine, 1).flatten(0, 1), whole)
    assert after.total == parts[0].total == parts[1].total == after.masked.sum()
    (padded,) = draw(0.6, captured=object())[1].positions
    assert torch.equal(padded[: after.total], after.positions[0]) and len(padded) == 8 * math.ceil(after.total / 8)


@pytest.mark.parametrize("known", [0.0, 1.0])
def test_stage_1_sees_known_pixels_in_the_share_that_is_asked_for(setting, known):
    config = training.vqgan.TrainVQGANConfig(batch_size=8, known_share=known)
    pictures = FolderPictures(load_folder(setting.train, 16), 8, config.seed, 0, 1)
    run = SimpleNamespace(config=config, mine=slice(None), pictures=pictures, masks=MaskSource(holes, holes))
    hidden = torch.cat([training.vqgan.draw_batch(run, step)[1] for step in range(4)]).mean((1, 2, 3))
    assert ((hidden < 1) == bool(known)).all() and (hidden > 0).all()


def test_stage_1_begins_from_another_run(setting, tmp_path):
    still = ["--epochs", "1", "--learning-rate", "1e-12", "--set", "train_vqgan.restart_every=99"]
    succeed("vqgan", setting.argv("vqgan", tmp_path / "a", "--init", str(setting.vqgan), *still))
    before, after = load_vqgan(str(setting.vqgan)).state_dict(), checkpoint(tmp_path / "a", "vqgan")["ema"]
    assert all(torch.allclose(after[name], value, atol=1e-6) for name, value in before.items())
    other = ["--init", str(setting.vqgan), "--set", "vqgan.encoder_depth=2"]
    refused(run("vqgan", setting.argv("vqgan", tmp_path / "b", *other)), "--init")


def test_without_a_network_there_is_no_perceptual_term(monkeypatch, capsys):
    def no_network(*args):
        raise OSError("no route to host")

    monkeypatch.setattr("training.losses.PerceptualFeatures", no_network)
    assert training.vqgan.perceptual_network(training.vqgan.TrainVQGANConfig(), None) is None
    assert "without the perceptual term" in capsys.readouterr().err


# ---- CUDA graphs ----


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

    def gradients(tokens, masked, pixels, positions):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens, masked, pixels, positions=positions).sum()
        loss.backward()
        return loss.detach()

    captured = Captured(gradients, parameters)
    N, K = options["seq_len"], options["codebook_size"]
    before = torch.cuda.get_rng_state()
    for share in (0.3, 0.8, 0.3):    # two sizes, the first one again
        masked = (torch.randperm(8 * N) < share * 8 * N).view(8, N)
        tokens, pixels = torch.randint(K, (8, N)).cuda(), torch.rand(8, N, options["pixel_dim"]).cuda()
        loss = captured(tokens, masked.cuda(), pixels, padded_positions(masked).cuda()).item()
        found = [p.grad.clone() for p in parameters]
        assert loss == pytest.approx(gradients(tokens, masked.cuda(), pixels, None).item(), rel=0.01)
        for mine, p in zip(found, parameters, strict=True):
            assert (mine - p.grad).norm() <= 0.03 * p.grad.norm() + 1e-6
    assert len(captured.replays) == 2 and torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_capture_is_refused_on_a_cpu(setting, tmp_path):
    refused(run("transformer", setting.argv("transformer", tmp_path / "a", "--capture")), "--capture")
    assert not (tmp_path / "a").exists()


# ---- pictures by step ----


@pytest.fixture(scope="module")
def shards(setting, tmp_path_factory):
    return write_shards(setting.train, tmp_path_factory.mktemp("shards"), 7)


def source(kind, setting, shards, rank=0, processes=1):
    where = {"batch_size": 8, "seed": 3, "rank": rank, "processes": processes}
    if kind == "folder":
        return FolderPictures(load_folder(setting.train, 16), **where)
    return ShardPictures(shards, 24, 16, **where, workers=0, bad_images="error")


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_epochs_visit_every_picture_once_in_orders_of_their_own_on_every_machine(setting, shards, kind):
    pictures = source(kind, setting, shards)
    every = {image.numpy().tobytes() for image in load_folder(setting.train, 16)}
    batches = [pictures.batch(step) for step in range(6)]
    epochs = [[image.numpy().tobytes() for image in torch.cat(part)] for part in (batches[:3], batches[3:])]
    assert set(epochs[0]) == set(epochs[1]) == every and len(epochs[0]) == len(pictures) == 24
    assert epochs[0] != epochs[1]
    other = source(kind, setting, shards)
    for step in (4, 1, 2, 5):    # a batch does not depend on where one began
        assert torch.equal(other.batch(step), batches[step])
    parts = [source(kind, setting, shards, rank, 4) for rank in range(4)]    # nor on the number of processes
    for step in range(4):
        assert torch.equal(torch.stack([part.batch(step) for part in parts], 1).flatten(0, 1), batches[step])
    assert epoch_order(5, 0, 0).tolist() == [0, 2, 4, 3, 1]    # depends on no hash seed, platform or earlier call


def test_shards_that_hold_less_than_was_said(shards):
    pictures = ShardPictures(shards, 40, 16, 8, 0, 0, 1, workers=0, bad_images="error")
    with pytest.raises(UserError, match="40"):
        for step in range(4):
            pictures.batch(step)


@pytest.mark.parametrize("flags, word", [
    ("a s-{0..1}.tar", "quoted"), ("s-{0..1}.tar", "do not exist"),
    ("SHARDS --train-pictures 5", "one batch"), ("SHARDS --workers -1", "--workers"),
])    # fmt: skip
def test_train_dirs_that_make_no_sense(setting, shards, tmp_path, flags, word):
    train = flags.replace("SHARDS", shards).split()
    refused(run("vqgan", setting.argv("vqgan", tmp_path / "a", "--train-dir", *train)), word)


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_work_ahead_gives_what_was_asked_for(threads):
    def square(step):
        if step == 9:
            raise ZeroDivisionError
        return step * step

    ahead = Ahead(square, threads)
    for step in (0, 1, 2, 5, 6, 3, 8):    # gaps, as after a resume
        assert ahead(step) == step * step
    with pytest.raises(ZeroDivisionError):    # told when it is asked for
        ahead(9)


# ---- configs and flags ----


@pytest.mark.parametrize("values", [
    {"epochs": 0}, {"ema_decay": 1.5}, {"seed": 2**63}, {"precision": "fp16"}, {"optimizer": "sgd"},
    {"mask_schedule": "linea"}, {"hole_share": 0.9, "full_share": 0.2}, {"no_such_key": 1},
])    # fmt: skip
def test_values_out_of_range_are_refused_by_their_key(values):
    with pytest.raises(UserError, match=f"config train_transformer.{next(iter(values))}"):
        build_config(TrainTransformerConfig, values, "train_transformer")


def test_flags_win_over_the_config_file(tmp_path):
    (tmp_path / "c.yml").write_text("train_vqgan: {epochs: 5, seed: 2}\nvqgan: {image_size: 8}")
    argv = ["--train-dir", "a", "b", "--val-dir", "c", "--output-dir", "d", "--config", str(tmp_path / "c.yml")]
    argv += ["--epochs", "0", "--learning-rate", "1e-4", "--set", "vqgan.stride=8", "train_vqgan.l1=2", "--set", "vqgan.a=1"]
    sections = load_sections(training_parser("").parse_args(argv), "train_vqgan")
    assert sections["train_vqgan"] == {"epochs": 0, "seed": 2, "learning_rate": 1e-4, "l1": 2}
    assert sections["vqgan"] == {"image_size": 8, "stride": 8, "a": 1} and sections["transformer"] == {}
    (tmp_path / "c.yml").write_text("train_vgan: {epochs: 5}")
    with pytest.raises(UserError, match="train_vgan"):
        load_sections(training_parser("").parse_args(argv[:-7]), "train_vqgan")


def test_what_follows_from_the_pictures_size_is_derived_or_refused(setting, tmp_path, capsys):
    values = fit_decoder({"image_size": 128, "stride": 8, "decoder_channels": [4, 2, 1], "decoder_blocks": [3, 2, 1]}, [])
    assert values["decoder_channels"] == [4, 4, 2, 1] and values["decoder_blocks"] == [3, 3, 2, 1]
    assert fit_decoder({"stride": 2, "decoder_channels": [4, 2, 1]}, ["decoder_channels"])["decoder_channels"] == [4, 2, 1]
    vqgan = VQGANConfig(**values, codebook_size=32)
    stale = {"codebook_size": 1024, "seq_len": 256, "pixel_dim": 64, "depth": 2}
    fitted = fit_transformer(stale, vqgan, [])
    assert fitted == {"codebook_size": 32, "seq_len": 256, "pixel_dim": 256, "depth": 2}
    assert "transformer.pixel_dim=256" in capsys.readouterr().err
    MaskGIT(vqgan, TransformerConfig(**fitted))
    assert fit_transformer({"pixel_dim": 0}, vqgan, [])["pixel_dim"] == 0    # it sees tokens only
    with pytest.raises(UserError, match="pixel_dim must be 256"):
        fit_transformer(stale, vqgan, ["pixel_dim"])
    for stage, value, word in (("vqgan", "100", "multiple of 8"), ("transformer", "32", "trained with 16")):
        refused(run(stage, setting.argv(stage, tmp_path / "a", "--set", f"vqgan.image_size={value}")), word)


# ---- optimisation ----


def test_rates_and_averages_have_closed_forms_and_reach_every_parameter():
    rates = [cosine_rate(step, total=110, peak=2.0, warmup=10) for step in range(112)]
    assert [rates[0], rates[4], rates[9], rates[10]] == [0.2, 1.0, 2.0, 2.0]
    assert rates[35] == pytest.approx(1 + math.sqrt(0.5)) and rates[60] == pytest.approx(1.0)
    assert rates[110:] == pytest.approx([0, 0], abs=1e-12) and rates[10:111] == sorted(rates[10:111], reverse=True)
    assert cosine_rate(0, 100, 2.0, 0) == 2.0 and cosine_rate(500, math.inf, 2.0, 5) == 2.0
    ema, model = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.SGD([{"params": [model.weight], "lr": 1.0}, {"params": [model.bias], "lr": 2.0}])
    set_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    before = {name: x.detach().clone() for name, x in ema.named_parameters()}
    for _ in range(3):
        update_ema(ema, model, 0.75)
    for name, x in ema.named_parameters():
        torch.testing.assert_close(x, model.get_parameter(name) + 0.75**3 * (before[name] - model.get_parameter(name)))
    assert ema_decay_at(0, 0.999) == 0.1 and ema_decay_at(8, 0.999) == 0.5 and ema_decay_at(10**6, 0.999) == 0.999


# ---- Muon ----


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_singular_values_become_about_one_whatever_the_scale_and_singular_vectors_stay():
    for shape in ((16, 64), (64, 16), (24, 24)):
        u, _, vt = torch.linalg.svd(normal(*shape), full_matrices=False)
        values = torch.linspace(0.3, 1, min(shape))
        inner = u.mT @ orthogonalize(((u * values) @ vt)[None])[0] @ vt.mT    # diagonal
        assert inner.diag().min() > 0.6 and inner.diag().max() < 1.3
        assert (inner - inner.diag().diag()).abs().max() < 0.05
    x = normal(3, 8, 20)
    together = orthogonalize(x)
    torch.testing.assert_close(orthogonalize(x * 2.0**10), together, atol=1e-5, rtol=0)
    torch.testing.assert_close(orthogonalize(x[1:2])[0], together[1], atol=1e-4, rtol=0)
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs the Muon of torch 2.9")
def test_the_step_is_that_of_torch_up_to_rounding():
    """Nesterov momentum, weight decay and size of the step; torch's orthogonalising rounds to bfloat16."""
    for shape in ((32, 32), (16, 64), (64, 16)):
        p = nn.Parameter(normal(*shape))
        twin, before = nn.Parameter(p.detach().clone()), p.detach().clone()
        mine = Muon([p], [], lr=0.1, weight_decay=0.03)
        theirs = torch.optim.Muon([twin], lr=0.1, weight_decay=0.03, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        for step in range(3):
            p.grad = normal(*shape, seed=step)
            twin.grad = p.grad.clone()
            mine.step()
            theirs.step()
        assert (p - twin).norm() < 0.02 * (p - before).norm()


def test_others_learn_as_with_adamw_and_gradients_are_left_alone():
    p, q, idle = nn.Parameter(normal(4, 4)), nn.Parameter(normal(6, seed=1)), nn.Parameter(torch.ones(2, 2))
    twin = nn.Parameter(q.detach().clone())
    muon = Muon([p, idle], [q], lr=0.05, betas=(0.8, 0.9), weight_decay=0.1)
    adamw = torch.optim.AdamW([twin], lr=0.05, betas=(0.8, 0.9), weight_decay=0.1)
    for step in range(4):
        p.grad, q.grad = normal(4, 4, seed=10 + step), normal(6, seed=20 + step)
        twin.grad, given = q.grad.clone(), p.grad.clone()
        muon.step()
        adamw.step()
        assert torch.equal(p.grad, given)
    assert torch.equal(q, twin) and torch.equal(idle, torch.ones(2, 2))
