"""Models saved and loaded: single files, folders of the hub's layout, the bundled weights, and what is refused."""

import json
import os
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_sets import small_model

from models import MaskGIT
from models.files import ModelFileError
from models.precision import pick_precision


@pytest.fixture(scope="module")
def model() -> MaskGIT:
    return small_model(embed_dim=64, mlp_dim=64)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Any attempt to open a connection fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def assert_same_model(one: MaskGIT, two: MaskGIT) -> None:
    assert not two.training and two.configs() == one.configs()
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_files_and_folders_bring_the_model_back(model, tmp_path, kind):
    model.save_file(tmp_path / "cat.safetensors", torch.float32)
    assert_same_model(model, MaskGIT.from_pretrained(kind(tmp_path / "cat.safetensors")))
    model.save_pretrained(kind(tmp_path / "new/cat"))
    assert {path.name for path in (tmp_path / "new/cat").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert_same_model(model, MaskGIT.from_pretrained(kind(tmp_path / "new/cat")))


@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_folder_is_as_small_as_it_can_be_without_loss(model, tmp_path, eight_bit):
    model.save_file(tmp_path / "file.safetensors", eight_bit=eight_bit)
    small = MaskGIT.from_pretrained(tmp_path / "file.safetensors")
    small.save_pretrained(tmp_path / "folder")
    assert_same_model(small, MaskGIT.from_pretrained(tmp_path / "folder"))
    file, folder = (load_file(path) for path in (tmp_path / "file.safetensors", tmp_path / "folder/model.safetensors"))
    sizes = [sum(x.numel() * x.element_size() for x in state.values()) for state in (file, folder)]
    assert sizes[1] <= sizes[0]


def test_the_model_card_says_research_only_and_stays_with_the_weights(model, tmp_path):
    model.save_pretrained(tmp_path / "one")
    card = (tmp_path / "one/README.md").read_text()
    assert card.startswith("---\n") and "research" in card and "license: mit" not in card
    (tmp_path / "one/README.md").write_text("# My own cats\n")
    MaskGIT.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    card = (tmp_path / "two/README.md").read_text()
    assert card.startswith("---\n") and card.endswith("# My own cats\n")


def test_the_bundled_weights_and_the_machines_precision_are_the_default():
    model = MaskGIT.from_pretrained(precision="bf16", device="cpu")
    assert model.image_size == 64 and not model.training and "Licence" in model.card
    assert model.precision == "bf16" and model.device.type == "cpu"
    picked = MaskGIT.from_pretrained(precision="auto").precision
    assert picked == pick_precision("auto", torch.device("cpu")) and picked in ("fp32", "bf16")
    assert [pick_precision(name, torch.device("cpu")) for name in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_bundled_weights_are_known_by_name_unless_a_saved_model_has_it(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo").mkdir()    # such as a folder of pictures
    photo, cat = MaskGIT.from_pretrained("photo"), MaskGIT.from_pretrained("cat64")
    assert photo.vqgan.config.guess and "Licence" in photo.card
    assert_same_model(cat, MaskGIT.from_pretrained())
    model.save_pretrained("photo")
    assert_same_model(model, MaskGIT.from_pretrained("photo"))


@pytest.mark.parametrize("option, value", [
    ("dtype", torch.bfloat16), ("nonsense", 3), ("precision", "int4"), ("device", "tpu9"), ("device", "cuda:99"),
])
def test_unknown_options_and_values_are_refused(option, value):
    with pytest.raises((TypeError, ValueError), match=value if isinstance(value, str) else option):
        MaskGIT.from_pretrained(**{option: value})


def refused(source) -> str:
    with pytest.raises(ModelFileError) as error:
        MaskGIT.from_pretrained(source)
    assert error.value.user_error and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("source", ["nowhere.safetensors", "nowhere", "a/b/c", "tests/nowhere", "./nowhere/x", "/nowhere/x"])
def test_a_missing_path_is_refused_without_asking_the_hub(source):
    assert f"{source.removeprefix('./')} not found" in refused(source)


def test_a_name_is_asked_for_at_the_hub(monkeypatch, model, tmp_path):
    import huggingface_hub

    model.save_pretrained(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: {"jane/cat-64": tmp_path / "cache"}[name])
    assert_same_model(model, MaskGIT.from_pretrained("jane/cat-64"))

    def offline(name, **_):
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert "jane/dog" in refused("jane/dog")


def test_folders_and_files_that_are_not_its_own_are_refused(model, tmp_path):
    assert "no config.json" in refused(tmp_path)
    model.save_pretrained(tmp_path)
    for text in ("{", "[1]", "{}", '{"vqgan": {}}', '{"vqgan": 3, "transformer": {}}'):
        (tmp_path / "config.json").write_text(text)
        assert "config.json does not hold" in refused(tmp_path)
    configs = model.configs()
    configs["transformer"]["depth"] = 2
    (tmp_path / "config.json").write_text(json.dumps(configs))
    assert "does not fit" in refused(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "model.safetensors not found" in refused(tmp_path)
    path = tmp_path / "cat.safetensors"
    model.save_file(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in refused(path)
    save_file({"x": torch.zeros(2)}, path)
    assert "no config in its metadata" in refused(path)
    save_file({"x": torch.zeros(2)}, path, {"library": "maskgit-inpainting", "config": '{"vqgan": {"stride": 3}}'})
    assert "does not fit its own config" in refused(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(model, tmp_path, monkeypatch):
    path = tmp_path / "cat.safetensors"
    model.save_file(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ModelFileError, match="No space left"):
        model.save_file(path, torch.float32)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
