"""The finish: the decoder alone learns, from sampled tokens; and what runs may begin from."""


import pytest
import torch
from small_sets import assert_equal_in_half
from tiny_runs import metrics, train_all

import training.finish
import training_finish
import training_transformer
from models.maskgit import MaskGIT
from training import finish_losses, sampled_batches
from training.checkpoints import load_checkpoint
from training.finish import FinishConfig, FinishRun
from training.finish_models import load_model
from training.options import load_sections
from training.processes import start_accelerator
from training.stopping import NotFinite
from training.weights import load_vqgan
from utils import UserError, build_config

# Of the decoder's loss, without a second network; each is also the name of its weight.
TERMS = ("l1", "laplacian", "perceptual", "sampled_l1", "sampled_perceptual", "adversarial", "feature_adversarial", "seam",
         "detail")    # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return train_all(tmp_path_factory.mktemp("runs"))


def flags(runs, output, *more) -> list[str]:
    argv = ["--config", "configs/tiny.yml", "--train-dir", runs / "pictures", "--val-dir", runs / "pictures"]
    return [str(x) for x in (*argv, "--device", "cpu", "--output-dir", output, *more)]


def finish(runs, output, *more) -> dict:
    """Four epochs of the finish, a step each; returns the last checkpoint."""
    argv = ["--vqgan", runs / "vqgan/last.pt", "--model", runs / "maskgit/maskgit.safetensors", "--epochs", "4"]
    argv += ["--perceptual-weights", runs / "features.safetensors"]
    assert training_finish.main(flags(runs, output, *argv, *more)) == 0
    return load_checkpoint(output / "last.pt", FinishRun.KIND)


def second(runs) -> list:
    """Flags for a second perceptual network."""
    return ["--set", "train_finish.second_network=tf_efficientnet_lite0", "--second-weights", runs / "second.safetensors"]


def built_run(runs, output, device: str, *more) -> FinishRun:
    """A run of the finish, before its first step."""
    argv = ["--model", runs / "finish/maskgit.safetensors", "--perceptual-weights", runs / "features.safetensors"]
    captured = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.finish.train", lambda args: captured.append(args) or 0)
        training_finish.main(flags(runs, output, *argv, *second(runs), *more))
    (args,) = captured
    args.device = device
    config = build_config(FinishConfig, load_sections(args, "train_finish")["train_finish"], "train_finish")
    return training.finish.build_run(args, config, start_accelerator(device, config.precision))


def partial_run(**parts) -> FinishRun:
    run = FinishRun.__new__(FinishRun)
    run.__dict__.update({name: None for name in FinishRun.__dataclass_fields__} | parts)
    return run


# ---- what it does ----


def test_the_decoder_alone_changes_and_a_deeper_one_begins_as_the_one_it_was(runs):
    before = MaskGIT.from_pretrained(runs / "maskgit/maskgit.safetensors").state_dict()
    after = MaskGIT.from_pretrained(runs / "finish/maskgit.safetensors").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("vqgan.decoder.") for name in changed)
    assert after.keys() - before.keys() == {"vqgan.decoder.from_context.weight"}
    assert after["vqgan.decoder.from_context.weight"].abs().max() > 0    # it began at zero
    path = runs / "finish/maskgit.safetensors"
    config = FinishConfig(decoder_blocks=[2, 1, 3])
    before, (model, _), (again, _) = MaskGIT.from_pretrained(path), *(load_model(str(path), None, config) for _ in "ab")
    assert model.vqgan.config.decoder_blocks == [len(stage) for stage in model.vqgan.decoder.stages] == [2, 1, 3]
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    tokens = torch.randint(64, (4, 64), generator=torch.Generator().manual_seed(0))
    image = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mask = (torch.arange(32) < 20).float().expand(4, 1, 32, 32)
    assert torch.equal(model.decode(tokens, image, mask), before.decode(tokens, image, mask))


def test_it_resumes_where_it_stopped(runs, tmp_path):
    """Between two epochs that see the same samples; the one after them sees others. The decoder was made deeper."""
    reused = ["--set", "train_finish.reuse=3", "train_finish.decoder_blocks=[2,1,3]"]
    whole = finish(runs, tmp_path / "whole", *reused)
    assert whole["ema"]["stages.2.2.layers.3.weight"].abs().max() > 0    # it began at zero
    config = MaskGIT.from_pretrained(tmp_path / "whole/maskgit.safetensors").vqgan.config
    assert config.decoder_blocks == [2, 1, 3]
    previous = tmp_path / "whole/previous.pt"    # written every 2 steps: the state after step 2 of 4
    assert load_checkpoint(previous, FinishRun.KIND)["step"] == 2
    again = finish(runs, tmp_path / "again", "--resume", previous, *reused)
    for part in ("decoder", "ema", "discriminator"):
        assert all(torch.equal(whole[part][name], again[part][name]) for name in whole[part])
    for part in ("optimizer", "optimizer_d"):
        for key, state in whole[part]["state"].items():
            assert all(torch.equal(value, again[part]["state"][key][name]) for name, value in state.items())
    assert metrics(tmp_path / "again") == [line for line in metrics(tmp_path / "whole") if line["step"] > 2]


def test_on_windows_it_learns_to_take_a_guess_and_resumes(runs, tmp_path):
    """A model that took none gets inputs for it, which begin at zero."""
    flags = ["--set", "train_finish.windows=16", "train_finish.guess_gain=3"]
    whole = finish(runs, tmp_path / "whole", *flags)
    inputs = whole["ema"]["condition.0.weight"]
    assert inputs[:, inputs.shape[1] // 2 :].abs().max() > 0
    assert MaskGIT.from_pretrained(tmp_path / "whole/maskgit.safetensors").vqgan.config.guess
    again = finish(runs, tmp_path / "again", "--resume", tmp_path / "whole/previous.pt", *flags)
    for part in ("decoder", "ema", "discriminator"):
        assert all(torch.equal(whole[part][name], again[part][name]) for name in whole[part])


def test_samples_serve_for_several_epochs(runs, tmp_path, monkeypatch):
    """Epochs 0 and 1 see the same pictures, holes and tokens, 2 and 3 others."""
    seen, prepare = [], training.finish.prepare

    def watched(*given):
        batch = prepare(*given)
        seen.append(batch[:3])
        return batch

    monkeypatch.setattr(training.finish, "prepare", watched)
    finish(runs, tmp_path / "out", "--set", "train_finish.reuse=2", "train_finish.context=false",
           "train_finish.plain_share=1")
    for one, other, alike in ((0, 1, True), (1, 2, False), (2, 3, True)):
        assert [torch.equal(a, b) for a, b in zip(seen[one], seen[other], strict=True)] == [alike] * 3
    true, unknown = FinishConfig(batch_size=16).true_pictures, seen[0][1].flatten(1).all(1)
    assert unknown[:true].all() and not unknown[true:].any()    # with their true tokens, the others never
    assert MaskGIT.from_pretrained(tmp_path / "out/maskgit.safetensors").vqgan.decoder.from_context is None


# ---- losses ----


def test_micro_batches_add_up_to_the_batch(runs, tmp_path):
    """Each holds true and sampled ones at the batch's ratio, so their means are the batch's; float32 rounds differently."""
    exact = ["--set", "train_finish.precision=fp32", "--epochs", "1"]
    finish(runs, tmp_path / "one", *exact), finish(runs, tmp_path / "four", *exact, "--accum-grad", "4")
    first, second = (metrics(tmp_path / name)[0] for name in ("one", "four"))
    assert first == pytest.approx(second, rel=1e-4, abs=1e-6)


def test_each_term_has_a_weight_of_its_own(runs, tmp_path):
    names = (*TERMS, "second_perceptual")
    exact = ["--epochs", "1", *second(runs), "--set", "train_finish.precision=fp32"]
    given = {name: 0.5 + i for i, name in enumerate(names)}
    usual = finish(runs, tmp_path / "usual", *exact)["config"]["train_finish"]
    finish(runs, tmp_path / "given", *exact, *(f"train_finish.{name}={given[name]}" for name in names))
    first, other = metrics(tmp_path / "usual")[0], metrics(tmp_path / "given")[0]    # step 1: still the same decoder
    assert all(abs(first[name]) > 1e-6 for name in names)
    assert {name: other[name] / given[name] for name in names} == pytest.approx(
        {name: first[name] / usual[name] for name in names}, rel=1e-4
    )
    assert other["loss"] == pytest.approx(sum(other[name] for name in names), rel=1e-4)
    # There is nothing else to learn from.
    finish(runs, tmp_path / "out", "--epochs", "2", *second(runs), "--set", *(f"train_finish.{name}=0" for name in TERMS))
    lines = [line for line in metrics(tmp_path / "out") if "loss" in line]
    assert len(lines) == 2 and all(line["gradient_norm"] > 0 for line in lines)


def test_the_first_network_looks_at_the_hole_and_the_second_at_the_whole_picture(runs, monkeypatch):
    """With networks that see the pixels as they are, in a hole of a quarter: one mean is four times the other."""
    monkeypatch.setattr(finish_losses, "adversarial_terms", lambda *_: {})
    model = MaskGIT.from_pretrained(runs / "finish/maskgit.safetensors")
    config = FinishConfig(batch_size=4, perceptual=1.0, sampled_perceptual=1.0, second_perceptual=1.0)
    networks = {"features": lambda x: [x], "second": lambda x: [x]}
    run = partial_run(config=config, model=model, decoder=model.vqgan.decoder, **networks)
    image = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(4, 1, 32, 32)
    mask[:, :, 8:24, 8:24] = 1
    batch = sampled_batches.Batch(image, mask, model.vqgan.encode(image), None, None)
    with torch.no_grad():
        terms, (original, pasted), _ = finish_losses.decoder_terms(run, batch)
    whole = (pasted - original).square().sum(1).mean((1, 2))    # (4,)
    assert whole.min() > 0.01
    assert terms["second_perceptual"].item() == pytest.approx(whole.mean().item(), rel=1e-4)
    assert terms["perceptual"].item() == pytest.approx(4 * whole[:1].mean().item(), rel=1e-4)
    assert terms["sampled_perceptual"].item() == pytest.approx(4 * whole[1:].mean().item(), rel=1e-4)


def test_a_step_that_is_not_finite_changes_nothing(runs, tmp_path, monkeypatch):
    real, calls = finish_losses.hole_l1, []

    def breaks(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) in (5, 6) else 1)    # true and sampled ones of step 2

    monkeypatch.setattr(finish_losses, "hole_l1", breaks)
    with pytest.raises(NotFinite, match="l1 of step 2"):
        finish(runs, tmp_path / "stopped")
    assert load_checkpoint(tmp_path / "stopped/last.pt", FinishRun.KIND)["step"] == 2
    calls.clear()
    assert finish(runs, tmp_path / "skipped", "--on-nan", "skip")["skipped"] == 1


# ---- CUDA graphs ----


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_is_the_step(runs, tmp_path):
    run = built_run(runs, tmp_path, "cuda", "--capture")
    before = {name: x.clone() for name, x in run.feature_discriminator.state_dict().items()}
    for batch in (run.batch(0), run.batch(1)):    # the second one shows that nothing of the first is left
        found = []
        for gradients in (run.captured, lambda *batch: training.finish.gradients(run, *batch)):
            run.feature_discriminator.load_state_dict(before)
            found.append({name: x.item() for name, x in gradients(*batch).items()})
        assert found[0] == pytest.approx(found[1], rel=0.02)


# ---- what it begins from ----


@pytest.mark.parametrize(("more", "word"), [
    (["--batch-size", "16", "--accum-grad", "8"], "4 of 16"), (["--batch-size", "6", "--accum-grad", "4"], "batch_size"),
    (["--set", "train_finish.sampled_share=1"], "sampled_share"),
    (["--set", "train_finish.sampled_share=0.01"], "both kinds"),
    (["--set", "train_finish.discriminator_channels=8"], "another size"),
    (["--perceptual-weights", "none.safetensors"], "--perceptual-weights"),
    (["--second-weights", "none.safetensors"], "second_network"),
    (["--set", "train_finish.second_network=alexnet"], "alexnet"), (["--discriminators", "none.pt"], "none.pt"),
    (["--set", "train_finish.second_scales=[0]"], "second_scales"), (["--model", "none.safetensors"], "not found"),
    (["--set", "train_finish.decoder_blocks=[2,1,0]"], "decoder_blocks"),
])    # fmt: skip
def test_it_refuses_in_a_sentence(runs, tmp_path, monkeypatch, more, word):
    """Before pictures are read, which may take minutes."""
    monkeypatch.setattr(training.finish, "open_pictures", lambda *args: pytest.fail("pictures were read"))
    with pytest.raises(ValueError, match=word) as caught:
        finish(runs, tmp_path / "out", *more)
    assert caught.value.user_error


def go_on(runs, script, output, section, *argv) -> MaskGIT:
    """Two epochs of a training that begins from a finished model, at a rate that leaves half precision as it is."""
    slow = ["--epochs", "2", "--set", f"{section}.learning_rate=1e-12"]
    assert script.main(flags(runs, output, *slow, *argv)) == 0
    return MaskGIT.from_pretrained(output / "maskgit.safetensors")


def test_a_finished_model_is_finished_further_or_given_stage_1_anew(runs, tmp_path):
    """Without --vqgan, from the decoder that it has, features of the transformer included."""
    argv = ["--model", runs / "finish/maskgit.safetensors", "--perceptual-weights", runs / "features.safetensors"]
    argv += ["--discriminators", runs / "finish/last.pt"]
    slow = ["--set", "train_finish.discriminator_rate=1e-12", "train_finish.feature_discriminator_rate=1e-12"]
    model = go_on(runs, training_finish, tmp_path / "out", "train_finish", *argv, *slow)
    finished = MaskGIT.from_pretrained(runs / "finish/maskgit.safetensors")
    assert_equal_in_half(model.state_dict(), finished.state_dict())
    before, after = (load_checkpoint(x / "last.pt", FinishRun.KIND) for x in (runs / "finish", tmp_path / "out"))
    for part in ("discriminator", "feature_discriminator"):
        weights = {n: x for n, x in before[part].items() if not n.endswith(("_u", "_v"))}    # the norms' vectors turn on
        assert all(torch.allclose(after[part][name], value, atol=1e-6) for name, value in weights.items())
    with pytest.raises(UserError, match="context"):
        go_on(runs, training_finish, tmp_path / "b", "train_finish", *argv, "--set", "train_finish.context=false")
    anew = go_on(runs, training_finish, tmp_path / "c", "train_finish", *argv[:4], "--vqgan", runs / "vqgan/last.pt")
    stage1 = load_checkpoint(runs / "vqgan/last.pt", "vqgan-training")["ema"]
    assert_equal_in_half({n: x for n, x in anew.vqgan.state_dict().items() if "from_context" not in n}, stage1)
    assert anew.vqgan.decoder.from_context.weight.abs().max() < 1e-6    # zero but for the tiny steps


def test_stage_2_goes_on_from_a_finished_model_that_fits(runs, tmp_path):
    """Another dropout is no other architecture. The decoder's input for the transformer's features is left out."""
    finished = runs / "finish/maskgit.safetensors"
    argv = ["--vqgan", finished, "--init", finished, "--set", "transformer.dropout=0.3"]
    model = go_on(runs, training_transformer, tmp_path / "out", "train_transformer", *argv)
    before = MaskGIT.from_pretrained(finished)
    assert model.transformer.config.dropout == 0.3 and before.vqgan.config.context_dim > 0
    assert_equal_in_half(model.transformer.state_dict(), before.transformer.state_dict())
    assert load_vqgan(str(finished)).config.context_dim == model.vqgan.config.context_dim == 0
    before.vqgan.codebook.embedding.weight.data[0] += 1
    before.save_file(tmp_path / "other.safetensors")
    for init, more, word in (
        (tmp_path / "other.safetensors", [], "other tokens"), ("none.safetensors", [], "not found"),
        (finished, ["--set", "transformer.depth=1"], "another transformer"),
    ):    # fmt: skip
        with pytest.raises(UserError, match=word):
            go_on(runs, training_transformer, tmp_path / "no", "train_transformer", *argv[:3], init, *more)
        assert not (tmp_path / "no/last.pt").exists()
