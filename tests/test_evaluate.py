"""evaluate.py with metrics.py and features.py: closed forms, parity with pytorch-fid, folders, refusals."""
import hashlib
import json
import math
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import evaluate
from evaluation.features import Features, Statistics, load_features
from evaluation.metrics import (
    HOLE_BINS,
    Moments,
    frechet_distance,
    inside_gradient,
    kernel_distance,
    load_perceptual,
    paired_metrics,
    rim_gradient,
    summarise,
)
from pictures.files import find_images
from pictures.images import read_image, write_image
from pictures.masks import read_mask
from utils import UserError, run_cli

N, SIDE = 6, 24    # pictures of the small folders, and their height and width


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, seed: int = 0, side: int = SIDE) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=rng(seed))


def refused(argv: list) -> str:
    """The sentence with which evaluate.py refuses these arguments."""
    with pytest.raises(ValueError) as error:
        evaluate.main([str(arg) for arg in argv])
    assert getattr(error.value, "user_error", False)
    return str(error.value)


# Fréchet distance


@pytest.mark.parametrize("count", [5, 50])    # fewer and more pictures than features
def test_equal_covariances_give_the_squared_distance_of_the_means(count):
    a, shift = torch.randn(count, 8, generator=rng()), torch.arange(8.0)
    assert frechet_distance(a, a + shift) == pytest.approx(shift.square().sum().item(), rel=1e-6)


def test_diagonal_covariances_give_the_squared_distance_of_the_standard_deviations():
    def cross(radii):    # points at +-radius on each axis: mean 0, covariance 2 radius^2 / (2D - 1) on the diagonal
        return torch.cat([torch.diag(radii), -torch.diag(radii)])
    r, s = torch.tensor([1.0, 2.0, 3.0, 0.0]).double(), torch.tensor([2.0, 0.5, 3.0, 1.0]).double()
    expected = (2 / (2 * 4 - 1) * (r - s).square()).sum().item()    # sum (sqrt(a) - sqrt(b))^2
    assert frechet_distance(cross(r), cross(s)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [10, 100])
def test_identical_sets_are_at_distance_zero(count):
    a = torch.randn(count, 32, generator=rng())
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a[torch.randperm(count, generator=rng())]) == pytest.approx(0, abs=1e-9)


def by_definition(a: Tensor, b: Tensor) -> float:
    """|m - n|^2 + tr(C) + tr(D) - 2 tr((C D)^(1/2)), the root's trace from the eigenvalues of C D."""
    a, b = a.double(), b.double()
    c, d = torch.cov(a.T), torch.cov(b.T)
    root_trace = torch.linalg.eigvals(c @ d).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + c.trace() + d.trace() - 2 * root_trace).item()


@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
@pytest.mark.parametrize("counts", [(300, 200), (40, 30), (20, 200)])
def test_frechet_distance_equals_its_definition_and_pytorch_fids(counts):
    D = 48
    mix = torch.randn(D, D, generator=rng(1)) / D**0.5
    a = torch.randn(counts[0], D, generator=rng(2)) @ mix + 0.3
    b = torch.randn(counts[1], D, generator=rng(3)).relu() @ mix
    ours = frechet_distance(a, b)
    assert ours == pytest.approx(by_definition(a, b), rel=1e-3)
    assert frechet_distance(b, a) == pytest.approx(ours, rel=1e-9)
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    statistics = [s for x in (a, b) for s in (np.mean(x.numpy(), 0), np.cov(x.double().numpy(), rowvar=False))]
    try:
        theirs = fid_score.calculate_frechet_distance(*statistics)
    except (TypeError, ValueError):    # scipy's sqrtm changed its signature and what it returns
        return
    assert ours == pytest.approx(float(theirs), rel=1e-3)


@pytest.mark.parametrize("counts", [(300, 200), (40, 30)])
def test_moments_of_a_covariance_serve_as_well_as_the_features(counts):
    a, b = torch.randn(counts[0], 48, generator=rng(2)), 2 * torch.randn(counts[1], 48, generator=rng(3)) + 1
    m = Moments.of_features(a)
    torch.testing.assert_close(m.covariance, torch.cov(a.double().T))
    from_covariance = Moments.of_covariance(m.count, m.mean, m.covariance)
    assert frechet_distance(from_covariance, b) == pytest.approx(frechet_distance(a, b), rel=1e-5)


def test_frechet_distance_refuses_what_has_no_covariance():
    a = torch.randn(10, 4)
    for wrong, words in ((a[:1], "at least 2 pictures"), (a / 0, "not finite"), (torch.randn(10, 5), "networks")):
        with pytest.raises(UserError, match=words):
            frechet_distance(a, wrong)


# Kernel distance


def test_kernel_distance_of_whole_sets_is_the_unbiased_estimate():
    a, b = torch.randn(20, 4, generator=rng(1)).double(), torch.randn(20, 4, generator=rng(2)).double() + 1
    def kernel(x, y):
        return (x @ y.T / 4 + 1) ** 3
    def off_diagonal_mean(k):
        return (k.sum() - k.trace()) / (20 * 19)
    expected = off_diagonal_mean(kernel(a, a)) + off_diagonal_mean(kernel(b, b)) - 2 * kernel(a, b).mean()
    result = kernel_distance(a, b, subsets=3, subset_size=20)
    assert result["mean"] == pytest.approx(expected.item(), rel=1e-9)
    assert result["std"] == pytest.approx(0, abs=1e-9)    # every subset is the whole set


def test_kernel_distance_is_a_function_of_its_seed_alone():
    a, b = torch.randn(20, 4, generator=rng(1)), torch.randn(30, 4, generator=rng(2))
    before = torch.get_rng_state()
    first = kernel_distance(a, b, subsets=5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert kernel_distance(a, b, subsets=5, seed=1) == first and first["subset_size"] == 10 and first["std"] > 0
    assert kernel_distance(a, b, subsets=5, seed=2)["mean"] != first["mean"]
    with pytest.raises(UserError, match="a subset size of 21 must be at least 2 and at most 20"):
        kernel_distance(a, b, subset_size=21)


# Metrics of picture pairs


def offset_pairs(offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three pictures whose holes, of 1, 2 and 3 eighths, are off by the same amount, and nothing else is."""
    truth = random_images(3) // 2
    masks = torch.zeros(3, 1, SIDE, SIDE, dtype=torch.bool)
    for i in range(3):
        masks[i, :, : (i + 1) * SIDE // 8] = True
    return torch.where(masks, truth + offset, truth), truth, masks


def test_paired_metrics_of_a_constant_error_in_the_hole():
    columns = paired_metrics(*offset_pairs(10))
    area = torch.tensor([1, 2, 3]).double() / 8
    psnr = 20 * math.log10(255 / 10)
    torch.testing.assert_close(columns["hole_area"], area)
    torch.testing.assert_close(columns["hole_l1"], torch.full((3,), 10 / 255).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(columns["l1"], area * 10 / 255, rtol=1e-5, atol=0)
    torch.testing.assert_close(columns["hole_psnr"], torch.full((3,), psnr).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(columns["psnr"], psnr - 10 * area.log10(), rtol=1e-5, atol=0)
    assert (columns["hole_ssim"] < columns["ssim"]).all() and (columns["ssim"] < 1).all()
    assert columns["known_changed"].sum() == 0


def test_equal_pictures_are_perfect():
    _, truth, masks = offset_pairs(0)
    columns = paired_metrics(truth, truth, masks)
    for prefix in ("", "hole_"):
        assert (columns[prefix + "psnr"] == math.inf).all() and (columns[prefix + "l1"] == 0).all()
        torch.testing.assert_close(columns[prefix + "ssim"], torch.ones(3).double())


def test_a_batch_gives_what_single_pictures_give():
    pred, truth, masks = offset_pairs(10)
    whole, single = paired_metrics(pred, truth, masks), paired_metrics(pred, truth, masks, batch_size=1)
    for key in whole:
        torch.testing.assert_close(whole[key], single[key], rtol=1e-5, atol=1e-6)


def test_every_changed_known_pixel_counts_once():
    pred, truth, masks = offset_pairs(10)
    pred[0, 1, -1, 0] ^= 1       # one channel by one level
    pred[2, :, -1, :4] ^= 128    # all channels of four pixels
    columns = paired_metrics(pred, truth, masks)
    assert columns["known_changed"].tolist() == [1, 0, 4]
    summary = summarise(columns)
    assert summary["known_pixels_changed"] == pytest.approx(5 / (SIDE * SIDE * (7 + 6 + 5) / 8))
    assert summary["pictures_with_known_pixels_changed"] == 2


def test_pictures_without_a_hole_have_no_part_in_the_hole():
    pred, truth, masks = offset_pairs(10)
    masks[0] = False
    columns = paired_metrics(pred, truth, masks, perceptual=lambda a, b, w: (a - b).abs().mean((1, 2, 3)))
    assert all(columns[f"hole_{key}"].isnan().tolist() == [True, False, False] for key in ("psnr", "l1", "perceptual"))
    summary = summarise(columns)
    assert summary["hole"]["l1"] == pytest.approx(10 / 255, rel=1e-5)
    assert summary["n"] == 3 and sum(bin["n"] for bin in summary["by_hole_area"]) == 2


def test_bins_hold_each_picture_once_and_average_to_the_whole():
    columns = paired_metrics(*offset_pairs(10))
    bins = summarise(columns)["by_hole_area"]
    assert [(bin["from"], bin["to"]) for bin in bins] == [(0.10, 0.15), (0.20, 0.25), (0.30, 0.40)]
    assert [bin["whole"]["psnr"] for bin in bins] == pytest.approx(columns["psnr"].tolist())
    assert HOLE_BINS[0] == 0 and HOLE_BINS[-1] == 1 and list(HOLE_BINS) == sorted(HOLE_BINS)


def test_rim_gradient_is_the_step_across_the_rim_and_nothing_else():
    """A stripe hole: 2 SIDE pairs of pixels across its rim, each with a step of 10 on one side and of 30 on the other."""
    masks = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.bool)
    masks[..., 8:12] = True
    image = torch.full((1, 3, SIDE, SIDE), 100, dtype=torch.uint8)
    image[..., 8:10], image[..., 10:12] = 110, 130    # the step of 20 inside the hole must not count
    for turned, hole in ((image, masks), (image.mT, masks.mT)):
        expected = torch.tensor([(10 + 30) / 2 / 255])
        torch.testing.assert_close(rim_gradient(turned.float() / 255, hole), expected)
        torch.testing.assert_close(rim_gradient(turned.float() / 255, ~hole), expected)


def test_rim_gradient_equals_its_definition_pixel_by_pixel():
    image, mask = random_images(1, side=12)[0].float() / 255, torch.rand(12, 12, generator=rng(2)) < 0.4
    steps = [
        (image[:, y, x] - image[:, v, u]).abs().mean().item()
        for y in range(12) for x in range(12) for v, u in ((y + 1, x), (y, x + 1))
        if v < 12 and u < 12 and mask[y, x] != mask[v, u]
    ]
    assert rim_gradient(image[None], mask[None, None]).item() == pytest.approx(sum(steps) / len(steps), rel=1e-5)


def test_inside_gradient_counts_pairs_inside_the_hole_alone():
    image, mask = torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 2:6, 2:6] = True
    image[..., 2:6, 2:6] = 0.5                  # steep on the rim, flat inside
    assert inside_gradient(image, mask).item() == 0
    image[..., 2:6, 4:6] = 0.8                  # 4 of 24 steps of 0.3
    assert inside_gradient(image, mask).item() == pytest.approx(4 * 0.3 / 24, rel=1e-5)
    mask = torch.zeros_like(mask)
    mask[..., ::2, ::2] = True
    assert inside_gradient(image, mask).isnan().all()


def test_detail_is_the_ratio_of_the_mean_gradients_inside():
    ramp = (torch.arange(SIDE) * 8).to(torch.uint8).expand(2, 3, SIDE, SIDE)
    masks = torch.zeros(2, 1, SIDE, SIDE, dtype=torch.bool)
    masks[..., 4:8] = True
    lifted, half = torch.where(masks, ramp + 64, ramp), torch.where(masks, ramp // 2, ramp)
    assert summarise(paired_metrics(lifted, ramp, masks))["detail"] == pytest.approx(1)    # the rim is the seam's
    assert summarise(paired_metrics(half, ramp, masks))["detail"] == pytest.approx(0.5)
    assert math.isnan(summarise(paired_metrics(ramp, ramp, masks & False))["detail"])


def test_seam_is_the_ratio_of_the_mean_gradients():
    """Columns that rise by 8, and a stripe lifted by d: across its rim the steps are 8 + d and |8 - d|."""
    ramp = (torch.arange(SIDE) * 8).to(torch.uint8).expand(2, 3, SIDE, SIDE)
    masks = torch.zeros(2, 1, SIDE, SIDE, dtype=torch.bool)
    masks[..., 4:8] = True
    summary = summarise(paired_metrics(torch.where(masks, ramp + 4, ramp), ramp, masks))
    assert summary["rim_gradient_truth"] == pytest.approx(8 / 255) and summary["seam"] == pytest.approx(1)
    summary = summarise(paired_metrics(torch.where(masks, ramp + 64, ramp), ramp, masks))
    assert summary["rim_gradient"] == pytest.approx((72 + 56) / 2 / 255) and summary["seam"] == pytest.approx(8)
    columns = paired_metrics(ramp, ramp, masks & torch.tensor([True, False])[:, None, None, None])
    assert columns["rim_gradient"].isnan().tolist() == [False, True] and summarise(columns)["seam"] == 1


def test_a_seam_over_flat_originals_has_no_number():
    flat = torch.full((1, 3, SIDE, SIDE), 7, dtype=torch.uint8)
    masks = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.bool)
    masks[..., 4:8] = True
    assert summarise(paired_metrics(flat.masked_fill(masks, 9), flat, masks))["seam"] == math.inf
    assert math.isnan(summarise(paired_metrics(flat, flat, masks))["seam"])


def test_paired_metrics_refuse_what_does_not_match():
    pred, truth, masks = offset_pairs(10)
    for wrong in ((pred[:2], truth, masks), (pred, truth, masks[..., :-1]), (pred[..., :-1], truth, masks)):
        with pytest.raises(UserError, match="do not match"):
            paired_metrics(*wrong)
    with pytest.raises(UserError, match="expected uint8 pictures and bool masks"):
        paired_metrics(pred.float(), truth, masks)
    with pytest.raises(UserError, match="smaller than the window of SSIM"):
        paired_metrics(pred[..., :8, :8], truth[..., :8, :8], masks[..., :8, :8])


def test_perceptual_distance_sees_the_hole_alone(tmp_path):
    from safetensors.torch import save_file
    torch.manual_seed(0)
    network = torchvision.models.squeezenet1_1(weights=None).features
    save_file({f"features.{key}": value for key, value in network.state_dict().items()}, tmp_path / "s.safetensors")
    pred, truth = random_images(2, side=64), random_images(2, seed=1, side=64)
    pred[:, :, :, 16:] = truth[:, :, :, 16:]    # different at the left edge only
    masks = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    masks[0, ..., :16], masks[1, ..., -1:] = True, True
    columns = paired_metrics(pred, truth, masks, load_perceptual(tmp_path / "s.safetensors"))
    assert columns["hole_perceptual"][0] > columns["perceptual"][0] > 0
    assert columns["hole_perceptual"][1] < columns["perceptual"][1]
    same = paired_metrics(truth, truth, masks, load_perceptual(tmp_path / "s.safetensors"))
    assert (same["perceptual"] == 0).all() and (same["hole_perceptual"] == 0).all()
    with pytest.raises(UserError, match="--perceptual-weights: .*not found"):
        load_perceptual(tmp_path / "none.safetensors")


# Inception: a file of the official layout with random weights


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """FID's Inception has torchvision's layout with 1008 classes; He-scaled, or the signal dies in 94 layers."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(inception_file) -> Features:
    return load_features("inception", inception_weights=inception_file)


def test_inception_features_are_pytorch_fids(inception, inception_file, tmp_path, monkeypatch):
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    monkeypatch.setattr("pytorch_fid.inception.load_state_dict_from_url", lambda *_, **__: torch.load(inception_file))
    images = random_images(2)
    for i, image in enumerate(images):
        write_image(tmp_path / f"{i}.png", image)
    files = sorted(tmp_path.iterdir())
    theirs = fid_score.get_activations(files, fid_score.InceptionV3([3]), batch_size=2, num_workers=0)
    ours = inception(images)
    assert ours.shape == (2, 2048) and ours.dtype == torch.float64 and inception.dims == 2048
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours[0], ours[1])


def test_inception_scores_are_fid_and_kid_with_a_word_about_unknown_weights(inception):
    assert (inception.frechet_name, inception.kernel_name) == ("FID", "KID")
    assert "inception.pth is not the official Inception file" in inception.note


def test_a_hash_in_the_weights_name_must_be_the_files(inception_file, tmp_path):
    own = hashlib.sha256(inception_file.read_bytes()).hexdigest()[:8]
    right, wrong = tmp_path / f"inception-{own}.pth", tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    for path in (right, wrong):
        path.symlink_to(inception_file)
    assert load_features("inception", inception_weights=right).sha256.startswith(own)
    with pytest.raises(UserError, match=f"promises sha256 6726825d.*its content has {own}"):
        load_features("inception", inception_weights=wrong)


def test_files_that_are_not_inceptions_weights_are_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    for name, words in (("other.pth", "does not hold the weights"), ("text.pth", "is not a PyTorch file"),
                        ("none.pth", "there is no such file")):
        with pytest.raises(UserError, match=words):
            load_features("inception", inception_weights=tmp_path / name)


def test_offline_without_weights_says_where_to_put_the_file(folders, tmp_path, monkeypatch, capsys):
    def no_network(*_, **__):
        raise urllib.error.URLError("Name or service not known")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--predicted", str(folders / "pred"), "--ground-truth",
                                      str(folders / "truth")])
    with pytest.raises(SystemExit) as stop:
        run_cli(evaluate.main)
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: cannot download") and "--inception-weights FILE" in message
    assert str(tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth") in message


# ONNX networks, made here


def make_onnx(path: Path, shape: tuple, graph="main_graph", name=None, pool="GlobalAveragePool", **pool_args) -> Path:
    """A network of one pooling and a flattening; with the global pooling its features are the mean colour."""
    onnx = pytest.importorskip("onnx")
    h = onnx.helper
    nodes = [h.make_node(pool, ["images"], ["pooled"], **pool_args), h.make_node("Flatten", ["pooled"], ["features"])]
    inputs = [h.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)]
    outputs = [h.make_tensor_value_info("features", onnx.TensorProto.FLOAT, (shape[0], "D"))]
    model = h.make_model(h.make_graph(nodes, graph, inputs, outputs), opset_imports=[h.make_opsetid("", 17)])
    model.ir_version = 8
    if name:
        h.set_model_props(model, {"name": name})
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def colour(tmp_path_factory) -> Path:
    return make_onnx(tmp_path_factory.mktemp("onnx") / "colour.onnx", ("B", 3, "H", "W"), name="MeanColour")


def test_onnx_features_are_the_networks(colour):
    images = random_images(3)
    network = load_features(colour)
    assert network.dims == 3 and network.note is None
    torch.testing.assert_close(network(images), images.double().mean((2, 3)) / 255, rtol=1e-5, atol=0)
    with pytest.raises(UserError, match="uint8 pictures"):
        network(images.float())


def test_pictures_are_resized_with_antialiasing_to_a_fixed_input(tmp_path):
    network = load_features(
        make_onnx(tmp_path / "n.onnx", (1, 3, 8, 8), pool="AveragePool", kernel_shape=[2, 2], strides=[2, 2])
    )
    images = random_images(3)
    small = F.interpolate(images.float() / 255, (8, 8), mode="bilinear", antialias=True)
    assert network.dims == 48 and network.batch_size == 1
    torch.testing.assert_close(network(images), F.avg_pool2d(small, 2).flatten(1).double(), rtol=1e-4, atol=1e-5)


def test_onnx_scores_carry_the_networks_name_and_never_inceptions(tmp_path, colour):
    shape = ("B", 3, "H", "W")
    exported = make_onnx(tmp_path / "my_net.onnx", shape)                   # a name that the exporter invented
    graph = make_onnx(tmp_path / "b.onnx", shape, graph="TinyNet")
    assert [load_features(path).frechet_name for path in (exported, graph, colour)] == [
        "FD-my_net", "FD-TinyNet", "FD-MeanColour"]
    chosen = load_features(exported, name="MobileNetV1")
    assert (chosen.frechet_name, chosen.kernel_name) == ("FD-MobileNetV1", "KD-MobileNetV1")
    assert load_features(exported, name="InceptionV3").frechet_name == "FD-InceptionV3"
    with pytest.raises(UserError, match="always called FID"):
        load_features("inception", name="Mine")


def test_onnx_files_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    (tmp_path / "text.onnx").write_text("not a network")
    make_onnx(tmp_path / "four.onnx", (4, 3, "H", "W"))
    make_onnx(tmp_path / "gray.onnx", ("B", 1, "H", "W"))
    make_onnx(tmp_path / "large.onnx", ("B", 3, "H", "W"), pool="AveragePool", kernel_shape=[99, 99])
    for name, words in (("text.onnx", "cannot be read"), ("four.onnx", "exactly 4 pictures"),
                        ("gray.onnx", "expected float32 images"), ("none.onnx", "no such file"),
                        ("large.onnx", "fails on pictures of 64x64")):
        with pytest.raises(UserError, match=words):
            load_features(tmp_path / name)
    with pytest.raises(UserError, match="--inception-weights goes with --features inception"):
        load_features(tmp_path / "four.onnx", inception_weights="x.pth")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnxruntime"):
        load_features(tmp_path / "four.onnx")


def test_real_mobilenet_tells_noise_from_cats(shared):
    network = load_features(shared / "weights" / "mobilenet_v1_075_pool.onnx", name="MobileNetV1")
    assert network.dims == 768 and network.frechet_name == "FD-MobileNetV1"
    files = list(find_images(shared / "data" / "catface64" / "test" / "image").values())[:40]
    cats = torch.stack([read_image(path) for path in files])
    some, others, noise = network(cats[::2]), network(cats[1::2]), network(random_images(20, side=64))
    assert frechet_distance(some, others) < frechet_distance(some, noise)


# The program on folders


@pytest.fixture
def folders(tmp_path) -> Path:
    """pred, truth and masks of N pictures; pred is wrong in the hole only, and its files have another suffix."""
    truth = random_images(N)
    masks = torch.zeros(N, 1, SIDE, SIDE, dtype=torch.bool)
    masks[..., 6:18, 6:18] = True
    pred = torch.where(masks, random_images(N, seed=1), truth)
    for i in range(N):
        for folder, image in (("pred", pred[i]), ("truth", truth[i]), ("masks", (~masks[i] * 255).expand(3, -1, -1))):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_image(tmp_path / folder / f"cat_{i}.png", image.to(torch.uint8))
    return tmp_path


def flags(folders: Path, *more, truth="truth") -> list[str]:
    return [str(arg) for arg in ("--predicted", folders / "pred", "--ground-truth", folders / truth, *more)]


def scores(argv: list[str], folders: Path) -> dict:
    """The JSON of a run, which must be JSON by the letter: no NaN, no Infinity."""
    assert evaluate.main([*argv, "--json", str(folders / "scores.json")]) == 0

    def strict(constant):
        raise AssertionError(f"{constant} is no JSON")
    return json.loads((folders / "scores.json").read_text(), parse_constant=strict)


def stacked(folder: Path) -> Tensor:
    return torch.stack([read_image(path) for path in find_images(folder).values()])


def read_holes(folders: Path) -> Tensor:
    return torch.stack([read_mask(path) for path in find_images(folders / "masks").values()])


def test_the_program_reports_what_the_functions_give(folders, colour, capsys):
    report = scores(flags(folders, "--masks", folders / "masks", "--features", colour), folders)
    pred, truth = stacked(folders / "pred"), stacked(folders / "truth")
    network = load_features(colour)
    assert report["n"] == N and report["size"] == [SIDE, SIDE]
    assert report["features"] == {"name": "MeanColour", "dims": 3, "sha256": network.sha256}
    distance = frechet_distance(network(truth), network(pred))
    assert report["frechet"] == {"name": "FD-MeanColour", "value": distance}
    assert report["kernel"] == {"name": "KD-MeanColour"} | kernel_distance(network(truth), network(pred))
    assert report["paired"]["known_pixels_changed"] == 0
    assert report["paired"]["hole_area"] == pytest.approx(0.25)
    rim = rim_gradient(pred.float() / 255, read_holes(folders)).mean().item()
    assert report["paired"]["rim_gradient"] == pytest.approx(rim)
    assert report["paired"]["seam"] == pytest.approx(rim / report["paired"]["rim_gradient_truth"])
    assert {"rim_gradient", "rim_gradient_truth", "inside_gradient"} <= set(report["per_picture"]["cat_0"])
    psnr = 10 * (255**2 / (pred.double() - truth.double()).square().mean((1, 2, 3))).log10()
    assert report["paired"]["whole"]["psnr"] == pytest.approx(psnr.mean().item(), rel=1e-5)
    assert list(report["per_picture"]) == [f"cat_{i}" for i in range(N)]
    assert torch.__version__.startswith(report["versions"]["torch"]) and "--features" in report["command"]
    printed = capsys.readouterr().out
    assert f"{distance:.3f}" in printed and "FD-MeanColour" in printed and "FID" not in printed
    assert f"seam: {report['paired']['seam']:.3f}" in printed and f"detail: {report['paired']['detail']:.3f}" in printed
    assert "hole only" in printed and "known pixels changed: 0.0000%, in 0 of 6 pictures" in printed


def test_the_program_with_inception_and_no_masks(folders, inception_file, capsys):
    for i in range(2, N):    # two pictures are enough for this network's cost
        (folders / "pred" / f"cat_{i}.png").unlink(), (folders / "truth" / f"cat_{i}.png").unlink()
    report = scores(flags(folders, "--inception-weights", inception_file), folders)
    assert report["frechet"]["name"] == "FID" and report["features"]["dims"] == 2048
    assert "paired" not in report and "kernel" not in report
    printed = capsys.readouterr().out
    assert "2 pictures are fewer than the 2048 features" in printed
    assert "too few for different subsets" in printed and "not the official Inception file" in printed


def test_equal_folders_and_no_network(folders):
    argv = ["--predicted", str(folders / "truth"), *flags(folders)[2:], "--masks", str(folders / "masks")]
    report = scores([*argv, "--features", "none"], folders)
    assert report["paired"]["whole"]["psnr"] == "inf" and report["paired"]["whole"]["l1"] == 0
    assert "frechet" not in report and any("--perceptual-weights" in note for note in report["notes"])


def test_saved_statistics_give_the_same_numbers(folders, colour):
    first = scores(flags(folders, "--features", colour, "--save-statistics", folders / "truth.npz"), folders)
    again = scores(flags(folders, "--features", colour, truth="truth.npz"), folders)
    for key in ("frechet", "kernel", "features", "n", "n_ground_truth"):
        assert again[key] == first[key]
    arrays = dict(np.load(folders / "truth.npz"))
    features = load_features(colour)(stacked(folders / "truth")).numpy()
    np.testing.assert_allclose(arrays["covariance"], np.cov(features, rowvar=False), rtol=1e-9)
    np.testing.assert_allclose(arrays["mean"], features.mean(0))
    del arrays["features"]    # as for sets too large to keep
    np.savez(folders / "moments.npz", **arrays)
    moments = scores(flags(folders, "--features", colour, truth="moments.npz"), folders)
    assert moments["frechet"]["value"] == pytest.approx(first["frechet"]["value"], rel=1e-6)
    assert "kernel" not in moments and any("holds no features" in note for note in moments["notes"])


def test_statistics_of_another_network_or_other_pictures_are_refused(folders, colour, tmp_path):
    evaluate.main(flags(folders, "--features", colour, "--save-statistics", folders / "truth.npz"))
    other = make_onnx(tmp_path / "other.onnx", ("B", 3, "H", "W"), pool="GlobalMaxPool", name="MeanColour")
    argv = flags(folders, "--features", colour, truth="truth.npz")
    assert "mean nothing" in refused([*argv[:-1], other])    # the same name, not the same file
    assert "holds features of MeanColour" in refused([*argv, "--features-name", "Mine"])
    (folders / "pred" / "cat_0.png").rename(folders / "pred" / "dog_0.png")
    assert "such as cat_0" in refused(argv)
    np.savez(folders / "foreign.npz", mu=np.zeros(3), sigma=np.eye(3))    # pytorch-fid's own
    (folders / "broken.npz").write_text("not an archive")
    for name, words in (("foreign", "lacks count, covariance"), ("broken", "cannot be read"), ("none", "no such file")):
        assert words in refused(flags(folders, "--features", colour, truth=f"{name}.npz"))


def test_statistics_too_large_to_keep_are_saved_as_moments(tmp_path, colour, monkeypatch):
    monkeypatch.setattr("evaluation.features.MAX_SAVED_NUMBERS", 5)
    network, images = load_features(colour), random_images(4)
    saved = Statistics.of(network, images, ["a", "b", "c", "d"])
    saved.save(tmp_path / "s.npz")
    loaded = Statistics.load(tmp_path / "s.npz", network)
    assert loaded.features is None and loaded.stems == saved.stems and loaded.moments.count == 4
    assert frechet_distance(loaded.moments, saved.moments) == pytest.approx(0, abs=1e-9)


def test_sets_of_different_pictures_are_refused_unless_asked_for(folders, colour):
    write_image(folders / "pred" / "stale.png", random_images(1)[0])
    argv = flags(folders, "--features", colour)
    assert "1 picture(s)" in refused(argv) and "such as stale" in refused(argv)
    report = scores([*argv, "--unpaired"], folders)
    assert report["n"] == N + 1 and report["n_ground_truth"] == N
    assert any("7 predicted and 6 original" in note for note in report["notes"])
    (folders / "pred" / "stale.png").unlink(), (folders / "pred" / "cat_3.png").unlink()
    assert "such as cat_3" in refused(argv)


def test_pictures_and_masks_of_other_sizes_are_refused_by_name(folders, colour):
    argv = flags(folders, "--features", colour, "--masks", folders / "masks")
    write_image(folders / "masks" / "cat_2.png", torch.zeros(3, SIDE, SIDE + 1, dtype=torch.uint8))
    assert "cat_2.png is 25x24" in refused(argv)
    (folders / "masks" / "cat_2.png").unlink()
    assert "cat_2" in refused(argv)
    write_image(folders / "truth" / "cat_1.png", torch.zeros(3, SIDE - 1, SIDE, dtype=torch.uint8))
    assert "truth/cat_1.png is 24x23, the pictures before it are 24x24" in refused(argv)


def test_one_mask_serves_all_pictures(folders, colour):
    mask = folders / "masks" / "cat_0.png"
    argv = flags(folders, "--features", "none", "--masks")
    assert scores([*argv, str(mask)], folders)["paired"] == scores([*argv, str(folders / "masks")], folders)["paired"]
    inverse = scores([*argv, str(mask), "--mask-hole", "white"], folders)["paired"]
    assert inverse["hole_area"] == pytest.approx(0.75) and inverse["known_pixels_changed"] > 0.9


def test_too_few_pictures_are_refused(folders, colour):
    for i in range(1, N):
        (folders / "pred" / f"cat_{i}.png").unlink(), (folders / "truth" / f"cat_{i}.png").unlink()
    assert "at least 2 pictures, got 1" in refused(flags(folders, "--features", colour))


@pytest.mark.parametrize(("more", "words"), [
    (["--masks", "m", "--unpaired"], "--unpaired cannot"),
    (["--perceptual-weights", "w.safetensors"], "give --masks too"),
    (["--features", "none"], "give --masks and two folders"),
    (["--kid-subsets", "0"], "at least 1, got 0"),
    (["--json", f"{__file__}/scores.json"], "is not writable"),
    (["--save-statistics", f"{__file__}/s.npz"], "is not writable"),
    (["--device", "gpu"], "unknown device 'gpu'"),
    (["--inception-weights", "nowhere.pth"], "no such file"),
    (["--features", "nowhere.onnx"], "no such file"),
])
def test_flags_that_cannot_be_honoured_are_refused(folders, more, words):
    assert words in refused(flags(folders, *more))


def test_flags_that_saved_statistics_cannot_honour_are_refused(folders):
    (folders / "s.npz").touch()
    assert "saved statistics cannot" in refused(flags(folders, "--masks", "m", truth="s.npz"))
    assert "already saved statistics" in refused(flags(folders, "--save-statistics", folders / "t.npz", truth="s.npz"))
    assert not (folders / "t.npz").exists()
