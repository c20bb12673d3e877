"""Feature networks: pytorch-fid's Inception and ONNX files, their names and refusals."""
import hashlib
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from small_sets import random_images
from torch import nn

from evaluation.features import Features, load_features
from pictures.images import write_image
from utils import UserError

# ---- Inception: a file of the official layout with random weights ----


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
    assert (inception.frechet_name, inception.kernel_name) == ("FID", "KID") and "not the official" in inception.note


def test_weights_whose_hash_or_content_is_not_what_the_name_says_are_refused(inception_file, tmp_path):
    own = hashlib.sha256(inception_file.read_bytes()).hexdigest()[:8]
    right, wrong = tmp_path / f"inception-{own}.pth", tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    for path in (right, wrong):
        path.symlink_to(inception_file)
    assert load_features("inception", inception_weights=right).sha256.startswith(own)
    with pytest.raises(UserError, match=f"promises sha256 6726825d.*its content has {own}"):
        load_features("inception", inception_weights=wrong)
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    for name, words in (("other.pth", "does not hold the weights"), ("text.pth", "is not a PyTorch file"),
                        ("none.pth", "there is no such file")):
        with pytest.raises(UserError, match=words):
            load_features("inception", inception_weights=tmp_path / name)


def test_offline_without_weights_says_where_to_put_the_file_and_what_works_without(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise urllib.error.URLError("Name or service not known")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError) as error:
        load_features("inception")
    place = str(tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth")
    assert all(word in str(error.value) for word in (place, "--inception-weights", "--features none"))


# ---- ONNX networks, made here ----


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


def test_onnx_features_are_the_networks_of_pictures_resized_to_a_fixed_input(colour, tmp_path):
    images = random_images(3)
    network = load_features(colour)
    assert network.dims == 3 and network.note is None
    torch.testing.assert_close(network(images), images.double().mean((2, 3)) / 255, rtol=1e-5, atol=0)
    network = load_features(
        make_onnx(tmp_path / "n.onnx", (1, 3, 8, 8), pool="AveragePool", kernel_shape=[2, 2], strides=[2, 2])
    )
    images = random_images(3)
    small = F.interpolate(images.float() / 255, (8, 8), mode="bilinear", antialias=True)
    assert network.dims == 48 and network.batch_size == 1
    torch.testing.assert_close(network(images), F.avg_pool2d(small, 2).flatten(1).double(), rtol=1e-4, atol=1e-5)


def test_onnx_scores_carry_the_networks_name_and_files_that_do_not_fit_are_refused(tmp_path, colour, monkeypatch):
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
