"""The steps after stage 2: finish the decoder, put the parts into one file, make pictures from nothing."""
import contextlib
import copy
import json
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

import training_finish
import training_transformer
import training_vqgan
from models.maskgit import MaskGIT
from pictures.images import write_image
from training.checkpoints import load_checkpoint
from training.options import load_sections, with_flags
from training.pictures_by_step import FolderPictures
from training.processes import start_accelerator
from training.stopping import NotFinite
from utils import UserError, build_config

# Of the decoder's loss, without a second network; each is also the name of its weight.
TERMS = ("l1", "laplacian", "perceptual", "sampled_l1", "sampled_perceptual", "adversarial", "feature_adversarial", "seam",
         "detail")    # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both stages and the finish, trained for a few steps on made-up pictures."""
    folder = tmp_path_factory.mktemp("runs")
    generator = torch.Generator().manual_seed(0)
    for i in range(16):
        small = torch.randint(0, 256, (1, 3, 4, 4), generator=generator).float()
        big = torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear")[0]
        write_image(folder / "pictures" / f"{i}.png", big.to(torch.uint8))
    from safetensors.torch import save_file
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    save_file(squeezenet1_1(weights=None).features.state_dict(), folder / "features.safetensors")
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), folder / "second.safetensors")
    common = ["--config", "configs/tiny.yml", "--train-dir", folder / "pictures", "--val-dir", folder / "pictures"]
    common += ["--epochs", "2", "--device", "cpu"]
    weights = ["--perceptual-weights", folder / "features.safetensors"]
    run(training_vqgan, *common, *weights, "--output-dir", folder / "vqgan")
    vqgan = ["--vqgan", folder / "vqgan/last.pt"]
    run(training_transformer, *common, *vqgan, "--output-dir", folder / "maskgit")
    model = ["--model", folder / "maskgit/maskgit.safetensors"]
    run(training_finish, *common, *vqgan, *model, *weights, "--output-dir", folder / "finish")
    return folder


def run(script, *argv) -> None:
    assert script.main([str(a) for a in argv]) == 0


def refused(script, *argv) -> str:
    with pytest.raises(UserError) as error:
        script.main([str(a) for a in argv])
    return str(error.value)


def test_the_finish_changes_the_decoder_alone(runs):
    before = MaskGIT.from_pretrained(runs / "maskgit/maskgit.safetensors").state_dict()
    after = MaskGIT.from_pretrained(runs / "finish/maskgit.safetensors").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("vqgan.decoder.") for name in changed)
    assert after.keys() - before.keys() == {"vqgan.decoder.from_context.weight"}
    assert after["vqgan.decoder.from_context.weight"].abs().max() > 0    # it began at zero


def test_the_finish_without_a_context_adds_nothing(runs, tmp_path):
    finish(runs, tmp_path / "out", "--set", "train_finish.context=false", "--epochs", "1")
    model = MaskGIT.from_pretrained(tmp_path / "out/maskgit.safetensors")
    assert model.vqgan.config.context_dim == 0 and model.vqgan.decoder.from_context is None


def finish(runs, output, *more) -> dict:
    """Four epochs of the finish, a step each; returns the last checkpoint."""
    argv = ["--config", "configs/tiny.yml", "--train-dir", runs / "pictures", "--val-dir", runs / "pictures"]
    argv += ["--vqgan", runs / "vqgan/last.pt", "--model", runs / "maskgit/maskgit.safetensors", "--device", "cpu"]
    argv += ["--perceptual-weights", runs / "features.safetensors", "--epochs", "4", "--output-dir", output]
    run(training_finish, *argv, *more)
    return load_checkpoint(output / "last.pt", training_finish.KIND)


def second(runs) -> list:
    """Flags for a second perceptual network."""
    return ["--set", "train_finish.second_network=tf_efficientnet_lite0", "--second-weights", runs / "second.safetensors"]


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_finish_resumes_where_it_stopped(runs, tmp_path):
    """Between two epochs that see the same samples; the one after them sees others. The decoder was made deeper."""
    reused = ["--set", "train_finish.reuse=3", "--set", "train_finish.decoder_blocks=[2,1,3]"]
    whole = finish(runs, tmp_path / "whole", *reused)
    assert whole["ema"]["stages.2.2.layers.3.weight"].abs().max() > 0    # it began at zero
    assert MaskGIT.from_pretrained(tmp_path / "whole/maskgit.safetensors").vqgan.config.decoder_blocks == [2, 1, 3]
    previous = tmp_path / "whole/previous.pt"    # written every 2 steps: the state after step 2 of 4
    assert load_checkpoint(previous, training_finish.KIND)["step"] == 2
    again = finish(runs, tmp_path / "again", "--resume", previous, *reused)
    for part in ("decoder", "ema", "discriminator"):
        assert all(torch.equal(whole[part][name], again[part][name]) for name in whole[part])
    for part in ("optimizer", "optimizer_d"):
        for key, state in whole[part]["state"].items():
            assert all(torch.equal(value, again[part]["state"][key][name]) for name, value in state.items())
    assert metrics(tmp_path / "again") == [line for line in metrics(tmp_path / "whole") if line["step"] > 2]


def test_samples_serve_for_several_epochs(runs, tmp_path, monkeypatch):
    """Epochs 0 and 1 see the same pictures, holes and tokens, 2 and 3 others; the transformer fills each hole once."""
    seen, filled = [], []
    mixed, complete = training_finish.mixed_tokens, MaskGIT.complete_tokens

    def watched(run, *batch):
        made = mixed(run, *batch)
        seen.append((*batch[:2], made[0]))
        return made

    def counted(self, known, seeds, **options):
        filled.extend(seeds if options["total_iter"] == 3 else [])    # not those of the validation
        return complete(self, known, seeds, **options)

    monkeypatch.setattr(training_finish, "mixed_tokens", watched)
    monkeypatch.setattr(MaskGIT, "complete_tokens", counted)
    finish(runs, tmp_path / "out", "--set", "train_finish.reuse=2", "--set", "train_finish.rounds=3")
    for one, other, alike in ((0, 1, True), (1, 2, False), (2, 3, True)):
        assert [torch.equal(a, b) for a, b in zip(seen[one], seen[other], strict=True)] == [alike] * 3
    assert len(filled) == len(set(filled)) == 2 * 12    # three quarters of a batch of 16, drawn twice


@pytest.fixture
def new_accelerator():
    """accelerate keeps its first precision and device for the whole process, unless it is made to forget it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_micro_batches_of_the_finish_add_up_to_the_batch(runs, tmp_path, new_accelerator):
    """Each holds true and sampled ones at the batch's ratio, so their means are the batch's; float32 rounds differently."""
    exact = ["--set", "train_finish.precision=fp32", "--epochs", "1"]
    one, four = finish(runs, tmp_path / "one", *exact), finish(runs, tmp_path / "four", *exact, "--accum-grad", "4")
    first, second = (metrics(tmp_path / name)[0] for name in ("one", "four"))
    assert first == pytest.approx(second, rel=1e-4, abs=1e-6)
    assert one["step"] == four["step"] == 1


def test_each_term_of_the_finish_has_a_weight_of_its_own(runs, tmp_path, new_accelerator):
    names = (*TERMS, "second_perceptual")
    exact = ["--epochs", "1", "--set", "train_finish.precision=fp32", *second(runs)]
    given = {name: 0.5 + i for i, name in enumerate(names)}
    usual = finish(runs, tmp_path / "usual", *exact)["config"]["train_finish"]
    finish(runs, tmp_path / "given", *exact, *(x for name in names for x in ("--set", f"train_finish.{name}={given[name]}")))
    first, other = metrics(tmp_path / "usual")[0], metrics(tmp_path / "given")[0]    # step 1: still the same decoder
    assert all(abs(first[name]) > 1e-6 for name in names)
    assert {name: other[name] / given[name] for name in names} == pytest.approx(
        {name: first[name] / usual[name] for name in names}, rel=1e-4
    )
    assert other["loss"] == pytest.approx(sum(other[name] for name in names), rel=1e-4)


def test_a_second_network_teaches_the_decoder(runs, tmp_path, new_accelerator):
    """With nothing else to learn from, the decoder learns from it."""
    alone = ["--epochs", "2", *(x for name in TERMS for x in ("--set", f"train_finish.{name}=0"))]
    finish(runs, tmp_path / "without", *alone)
    finish(runs, tmp_path / "with", *alone, *second(runs))
    assert {line["gradient_norm"] for line in metrics(tmp_path / "without") if "loss" in line} == {0}
    lines = [line for line in metrics(tmp_path / "with") if "loss" in line]
    assert lines and all(line["gradient_norm"] > 0 for line in lines)
    assert all(line["loss"] == pytest.approx(line["second_perceptual"], rel=1e-3) for line in lines)


def test_the_first_network_looks_at_the_hole_and_the_second_at_the_whole_picture(runs, monkeypatch):
    """With networks that see the pixels as they are, in a hole of a quarter: one mean is four times the other."""
    monkeypatch.setattr(training_finish, "adversarial_terms", lambda *_: {})
    model = MaskGIT.from_pretrained(runs / "finish/maskgit.safetensors")
    config = training_finish.FinishConfig(batch_size=4, perceptual=1.0, sampled_perceptual=1.0, second_perceptual=1.0)
    given = {field: None for field in training_finish.Run.__dataclass_fields__}
    parts = {"model": model, "decoder": model.vqgan.decoder, "features": lambda x: [x], "second": lambda x: [x]}
    run = training_finish.Run(**given | {"config": config} | parts)
    image = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(4, 1, 32, 32)
    mask[:, :, 8:24, 8:24] = 1
    with torch.no_grad():
        terms, (original, pasted), _ = training_finish.generator_terms(run, image, mask, model.vqgan.encode(image), None)
    whole = (pasted - original).square().sum(1).mean((1, 2))    # (4,)
    assert whole.min() > 0.01
    assert terms["second_perceptual"].item() == pytest.approx(whole.mean().item(), rel=1e-4)
    assert terms["perceptual"].item() == pytest.approx(4 * whole[:1].mean().item(), rel=1e-4)
    assert terms["sampled_perceptual"].item() == pytest.approx(4 * whole[1:].mean().item(), rel=1e-4)


@pytest.mark.parametrize(("share", "true"), [(0.25, 12), (0.5, 8), (0.75, 4)])
def test_the_first_pictures_of_a_batch_keep_their_true_tokens_in_every_part(runs, share, true):
    model = MaskGIT.from_pretrained(runs / "finish/maskgit.safetensors")
    config = training_finish.FinishConfig(batch_size=16, sampled_share=share, rounds=1)
    accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
    given = {field: None for field in training_finish.Run.__dataclass_fields__}
    run = training_finish.Run(**given | {"config": config, "kept": {}, "model": model, "accelerator": accelerator})
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(16, 3, model.image_size, model.image_size, generator=generator) * 2 - 1
    mask = torch.ones(16, 1, model.image_size, model.image_size)
    wanted = model.vqgan.encode(image)
    for parts in (1, 2, 4):
        for k in range(parts):
            part = slice(k, None, parts)
            tokens, _ = training_finish.mixed_tokens(run, image[part], mask[part], list(range(16))[part])
            kept = (tokens == wanted[part]).all(1)
            assert kept.tolist() == [True] * (true // parts) + [False] * ((16 - true) // parts)


def built_run(runs, output, device: str, *more) -> training_finish.Run:
    """A run of the finish, before its first step."""
    argv = ["--config", "configs/tiny.yml", "--train-dir", runs / "pictures", "--val-dir", runs / "pictures"]
    argv += ["--model", runs / "finish/maskgit.safetensors", "--perceptual-weights", runs / "features.safetensors"]
    argv += ["--device", device, "--output-dir", output, *second(runs), *more]
    args = training_finish.parse_args([str(x) for x in argv])
    section = with_flags(load_sections(args)["train_finish"], args)
    config = build_config(training_finish.FinishConfig, section, "train_finish")
    return training_finish.build_run(args, config, start_accelerator(device, config.precision))


class Reading(TorchDispatchMode):
    """Notes every operation that a GPU would have to be waited for, or whose result's shape its values decide."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "index.Tensor", "unique", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        self.found += [name] if name.startswith(self.OPERATIONS) else []
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("parts", [1, 2])
def test_the_gradients_are_found_without_reading_a_number_back(runs, tmp_path, parts):
    """So that a CUDA graph can hold them. Making the batch does read: there the same watch finds something."""
    run = built_run(runs, tmp_path, "cpu", "--set", f"train_finish.accum_grad={parts}")
    with Reading() as reading:
        batch = training_finish.sampled_batch(run, 0, *training_finish.draw_batch(run, 0))
    assert reading.found
    with Reading() as reading:
        terms = training_finish.gradients(run, batch)
    assert reading.found == []
    assert {*TERMS, "second_perceptual", "loss", "discriminator"} <= terms.keys()
    assert all(x.grad is not None for part in (run.decoder, *run.discriminators) for x in part.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_is_the_step(runs, tmp_path, new_accelerator):
    run = built_run(runs, tmp_path, "cuda")
    batches = [training_finish.sampled_batch(run, step, *training_finish.draw_batch(run, step)) for step in range(2)]
    before = copy.deepcopy(run.feature_discriminator.state_dict())
    captured = training_finish.capture(run, batches[0])
    for batch in batches:    # the second one shows that nothing of the first is left
        found = []
        for gradients in (captured, lambda batch: training_finish.gradients(run, batch)):
            run.feature_discriminator.load_state_dict(before)
            found.append({name: x.item() for name, x in gradients(batch).items()})
        assert found[0] == pytest.approx(found[1], rel=0.02)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_only_pictures_with_true_tokens_may_be_wholly_unknown(share):
    config = training_finish.FinishConfig(batch_size=8, sampled_share=0.5, plain_share=share)
    pictures = FolderPictures(torch.zeros(8, 3, 16, 16, dtype=torch.uint8), 8, seed=0, rank=0, processes=1)
    run = SimpleNamespace(
        config=config, pictures=pictures, accelerator=SimpleNamespace(process_index=0, num_processes=1)
    )
    _, holes, seeds = training_finish.draw_batch(run, 0)
    unknown = holes.flatten(1).all(1)
    assert unknown[:4].tolist() == [share == 1] * 4 and not unknown[4:].any()
    assert holes[4:].flatten(1).any(1).all() and len(set(seeds)) == 8


def test_a_step_of_the_finish_that_is_not_finite_changes_nothing(runs, tmp_path, monkeypatch):
    real = training_finish.hole_l1
    calls = []

    def breaks(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) in (5, 6) else 1)    # true and sampled ones of step 2

    monkeypatch.setattr(training_finish, "hole_l1", breaks)
    with pytest.raises(NotFinite, match="l1 of step 2 is nan"):
        finish(runs, tmp_path / "stopped")
    saved = load_checkpoint(tmp_path / "stopped/last.pt", training_finish.KIND)
    calls.clear()
    whole = finish(runs, tmp_path / "skipped", "--on-nan", "skip")
    assert whole["skipped"] == 1
    assert saved["step"] == 2 < whole["step"]


@pytest.mark.parametrize(("flags", "word"), [
    (["--batch-size", "16", "--accum-grad", "8"], r"true tokens \(4 of 16\) must be a multiple of processes x accum_grad"),
    (["--batch-size", "6", "--accum-grad", "4"], "must be divisible by processes x accum_grad"),
    (["--set", "train_finish.sampled_share=1"], "sampled_share must leave pictures of both kinds in a batch of 16, got 1"),
    (["--set", "train_finish.sampled_share=0.01"], "sampled_share must leave pictures of both kinds"),
    (["--set", "train_finish.discriminator_channels=8"], "discriminators of .* have another size"),
    (["--perceptual-weights", "none.safetensors"], "--perceptual-weights"),
    (["--second-weights", "none.safetensors"], "--second-weights is for train_finish.second_network, which is not set"),
    (["--set", "train_finish.second_network=tf_efficientnet_lite0", "--second-weights", "none.safetensors"],
     "none.safetensors not found.*give them with --second-weights FILE, or do without: "
     "--set train_finish.second_network=null"),
    (["--set", "train_finish.second_network=alexnet"], "unknown perceptual network 'alexnet'; expected one of squeeze"),
    (["--set", "train_finish.perceptual_scales=[]"], "perceptual_scales must be whole numbers, 1 or more"),
    (["--set", "train_finish.second_scales=[0]"], r"second_scales must be whole numbers, .* got \[0\]"),
    (["--discriminators", "none.pt"], "none.pt"),
    (["--capture"], "--capture is for one process on a CUDA device, here there are 1 on cpu; leave it out"),
    (["--model", "none.safetensors"], "not found"),
    (["--set", "train_finish.decoder_blocks=[2,1,0]"],
     r"decoder_blocks must be \[1, 1, 1\] or more at each scale, got \[2, 1, 0\]"),
    (["--set", "train_finish.decoder_blocks=[2,1]"], r"decoder_blocks must be \[1, 1, 1\] or more .* got \[2, 1\]"),
    (["--set", "train_finish.decoder_blocks=[]"], r"decoder_blocks must be \[1, 1, 1\] or more .* got \[\]"),
])
def test_the_finish_refuses_in_a_sentence(runs, tmp_path, flags, word):
    with pytest.raises(UserError, match=word):
        finish(runs, tmp_path / "out", *flags)


def test_what_does_not_fit_is_told_before_pictures_are_read(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(training_finish, "open_pictures", lambda *args: pytest.fail("pictures were read"))
    with pytest.raises(UserError, match="another size"):
        finish(runs, tmp_path / "out", "--set", "train_finish.discriminator_channels=8")


def test_the_finish_does_not_write_over_a_run(runs):
    with pytest.raises(UserError, match="holds a run already"):
        finish(runs, runs / "finish")


def go_on(runs, script, output, section, *argv) -> MaskGIT:
    """Two epochs of a training that begins from a finished model, at a rate that leaves half precision as it is."""
    common = ["--config", "configs/tiny.yml", "--train-dir", runs / "pictures", "--val-dir", runs / "pictures"]
    common += ["--epochs", "2", "--device", "cpu", "--output-dir", output, "--set", f"{section}.learning_rate=1e-12"]
    run(script, *common, *argv)
    return MaskGIT.from_pretrained(output / "maskgit.safetensors")


def equal_in_half(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name].half(), other[name].half()) for name in one)


def test_a_finished_model_is_finished_further(runs, tmp_path):
    """Without --vqgan, from the decoder that it has, features of the transformer included."""
    argv = ["--model", runs / "finish/maskgit.safetensors", "--perceptual-weights", runs / "features.safetensors"]
    model = go_on(runs, training_finish, tmp_path / "out", "train_finish", *argv)
    assert equal_in_half(model.state_dict(), MaskGIT.from_pretrained(runs / "finish/maskgit.safetensors").state_dict())
    word = "train_finish.context is false, and the decoder of .* takes the transformer's features"
    with pytest.raises(UserError, match=word):
        go_on(runs, training_finish, tmp_path / "plain", "train_finish", *argv, "--set", "train_finish.context=false")


def test_a_deeper_decoder_begins_as_the_one_it_was(runs):
    path = runs / "finish/maskgit.safetensors"
    config = training_finish.FinishConfig(decoder_blocks=[2, 1, 3])
    before, (model, _), (again, _) = MaskGIT.from_pretrained(path), *(training_finish.load_model(path, None, config) for _ in "ab")
    assert model.vqgan.config.decoder_blocks == [len(stage) for stage in model.vqgan.decoder.stages] == [2, 1, 3]
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    tokens = torch.randint(64, (4, 64), generator=torch.Generator().manual_seed(0))
    image = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mask = (torch.arange(32) < 20).float().expand(4, 1, 32, 32)
    assert torch.equal(model.decode(tokens, image, mask), before.decode(tokens, image, mask))


def test_the_finish_goes_on_with_the_discriminators_of_another(runs, tmp_path, new_accelerator):
    """Those of the first finish, not those that a new run begins with."""
    before = load_checkpoint(runs / "finish/last.pt", training_finish.KIND)
    argv = ["--model", runs / "finish/maskgit.safetensors", "--perceptual-weights", runs / "features.safetensors"]
    argv += ["--discriminators", runs / "finish/last.pt"]
    slow = ["--set", "train_finish.discriminator_rate=1e-12", "--set", "train_finish.feature_discriminator_rate=1e-12"]
    go_on(runs, training_finish, tmp_path / "out", "train_finish", *argv, *slow)
    after = load_checkpoint(tmp_path / "out/last.pt", training_finish.KIND)
    for part in ("discriminator", "feature_discriminator"):
        weights = {n: x for n, x in before[part].items() if not n.endswith(("_u", "_v"))}    # the norms' vectors turn on
        assert all(torch.allclose(after[part][name], value, atol=1e-6) for name, value in weights.items())


def test_given_stage_1_the_finish_of_a_finished_model_begins_anew(runs, tmp_path):
    argv = ["--model", runs / "finish/maskgit.safetensors", "--perceptual-weights", runs / "features.safetensors"]
    model = go_on(runs, training_finish, tmp_path / "out", "train_finish", *argv, "--vqgan", runs / "vqgan/last.pt")
    stage1 = load_checkpoint(runs / "vqgan/last.pt", training_vqgan.KIND)["ema"]
    assert equal_in_half({n: x for n, x in model.vqgan.state_dict().items() if "from_context" not in n}, stage1)
    assert model.vqgan.decoder.from_context.weight.abs().max() < 1e-6    # zero but for the tiny steps


def test_stage_2_goes_on_from_a_finished_model(runs, tmp_path):
    finished = runs / "finish/maskgit.safetensors"
    argv = ["--vqgan", finished, "--init", finished]
    model = go_on(runs, training_transformer, tmp_path / "out", "train_transformer", *argv)
    assert equal_in_half(model.transformer.state_dict(), MaskGIT.from_pretrained(finished).transformer.state_dict())


def test_stage_2_refuses_to_go_on_from_what_does_not_fit(runs, tmp_path):
    other = MaskGIT.from_pretrained(runs / "finish/maskgit.safetensors")
    other.vqgan.codebook.embedding.weight.data[0] += 1
    other.save_file(tmp_path / "other.safetensors")
    finished = ["--vqgan", runs / "finish/maskgit.safetensors", "--init"]

    def told(*argv) -> str:
        with pytest.raises(UserError) as error:
            go_on(runs, training_transformer, tmp_path / "out", "train_transformer", *finished, *argv)
        assert not (tmp_path / "out/last.pt").exists()
        return str(error.value)

    assert "was trained on other tokens than those of the VQGAN here: codebook" in told(tmp_path / "other.safetensors")
    assert "--init: checkpoint none.safetensors not found" in told("none.safetensors")
    depth = ["--set", "transformer.depth=1"]
    assert "has another transformer, {" in told(runs / "finish/maskgit.safetensors", *depth)


def test_dropout_may_change_when_stage_2_goes_on(runs, tmp_path):
    finished = runs / "finish/maskgit.safetensors"
    argv = ["--vqgan", finished, "--init", finished, "--set", "transformer.dropout=0.3"]
    model = go_on(runs, training_transformer, tmp_path / "out", "train_transformer", *argv)
    assert model.transformer.config.dropout == 0.3
    assert equal_in_half(model.transformer.state_dict(), MaskGIT.from_pretrained(finished).transformer.state_dict())


def test_stage_2_starts_from_a_finished_model_without_its_context(runs):
    vqgan = training_transformer.load_vqgan(str(runs / "finish/maskgit.safetensors"))
    assert vqgan.config.context_dim == 0 and vqgan.decoder.from_context is None


