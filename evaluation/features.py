"""Networks that turn a picture into a feature vector.

InceptionV3 is pytorch-fid's (https://github.com/mseitzer/pytorch-fid, Apache-2.0): its scores are called FID and KID.
Any ONNX network `images (B, 3, H, W) in [0, 1] -> features (B, D)` serves too; its scores carry its name.
"""
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import UserError

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d"   # the official file's sha256 starts so
# Names that exporters give to every graph, so they name none.
NO_NAMES = {"", "main", "main_graph", "graph", "torch_jit", "torch-jit-export", "tf2onnx"}


@dataclass(frozen=True)
class Features:
    """A feature network and what tells it from any other."""

    name: str                             # "InceptionV3", or the ONNX network's
    sha256: str                           # of the file that holds the weights
    dims: int                             # D
    network: Callable[[Tensor], Tensor]   # float32 (B, 3, H, W) in [0, 1] -> (B, D), on the network's device
    batch_size: int = 50
    inception: bool = False               # pytorch-fid's InceptionV3: its scores alone are FID and KID
    note: str | None = None               # a sentence that belongs beside every score

    @property
    def frechet_name(self) -> str:
        return "FID" if self.inception else f"FD-{self.name}"

    @property
    def kernel_name(self) -> str:
        return "KID" if self.inception else f"KD-{self.name}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """images: uint8 (N, 3, H, W).  Returns float64 (N, D) on the CPU, one row for each picture."""
        return torch.cat([self.network(batch.float() / 255).cpu().double() for batch in images.split(self.batch_size)])


def load_features(
    network: str | Path = "inception",
    *,
    inception_weights: str | Path | None = None,
    name: str | None = None,
    device: torch.device | str = "cpu",
) -> Features:
    """The network of `--features`.

    Args:
        network: "inception", or an ONNX file.
        inception_weights: file of Inception's weights; None takes torch's cache, or downloads them.
        name: what the scores of an ONNX network are called; None takes the network's own name.
    """
    if str(network) == "inception":
        if name is not None:
            raise UserError(f"--features-name {name!r} is for an ONNX network; Inception's score is always called FID")
        return inception_features(inception_weights, device)
    if inception_weights is not None:
        raise UserError(f"--inception-weights goes with --features inception, not with --features {network}")
    return onnx_features(Path(network), name, device)


# Inception


def inception_features(weights: str | Path | None = None, device: torch.device | str = "cpu") -> Features:
    """pytorch-fid's InceptionV3, its 2048 pooled features; weights from a file, torch's cache or the network."""
    try:
        from pytorch_fid.inception import InceptionV3
    except ImportError as error:
        raise UserError("--features inception needs pytorch-fid: pip install pytorch-fid") from error
    path = download_inception() if weights is None else Path(weights)
    sha256, note = check_inception(path)
    block = InceptionV3.DEFAULT_BLOCK_INDEX
    model = build_inception(path, block).to(device).eval()

    def network(images: Tensor) -> Tensor:
        return model(images.to(device))[0].flatten(1)    # (B, 2048); the model resizes to 299x299 itself

    return Features("InceptionV3", sha256, 2048, network, inception=True, note=note)


def download_inception() -> Path:
    """The official weights' place in torch's cache, where they are downloaded to if absent."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(INCEPTION_URL).name
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256)
    except (OSError, RuntimeError) as error:    # no network; a file that is not the official one
        raise UserError(
            f"cannot download FID's Inception weights ({error}): fetch {INCEPTION_URL} elsewhere and put it at {path}, "
            "or name it with --inception-weights FILE. Without them, --features FILE.onnx takes any other network, and "
            "--features none gives the scores that need no network: PSNR, SSIM and L1"
        ) from error
    return path


def check_inception(path: Path) -> tuple[str, str | None]:
    """sha256 of a weights file, and a note if it is not the official one.

    A hash in the file's name ("...-6726825d.pth", torch.hub's convention) must be its own.
    """
    if not path.is_file():
        raise UserError(f"--inception-weights {path}: there is no such file")
    sha256 = file_sha256(path)
    named = re.search(r"-([0-9a-f]{8,64})\.pth$", path.name)
    if named and not sha256.startswith(named[1]):
        raise UserError(
            f"{path}: its name promises sha256 {named[1]}..., its content has {sha256[:8]}...: "
            "the file is damaged or is another one; fetch it again"
        )
    if sha256.startswith(INCEPTION_SHA256):
        return sha256, None
    return sha256, (
        f"{path.name} is not the official Inception file (sha256 {sha256[:8]}..., not {INCEPTION_SHA256}...): "
        "its scores compare with no published FID"
    )


def build_inception(path: Path, block: int) -> torch.nn.Module:
    """pytorch-fid's network with the weights of a file. pytorch-fid itself can only download them, so its download is
    replaced by the file's content.
    """
    from pytorch_fid import inception

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:    # whatever a file that is no state dict makes torch raise
        raise UserError(f"{path} is not a PyTorch file of weights: {first_line(error)}") from error
    try:
        with mock.patch.object(inception, "load_state_dict_from_url", return_value=state):
            return inception.InceptionV3([block])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not hold the weights of FID's InceptionV3: {first_line(error)}") from error


# ONNX


def onnx_features(path: Path, name: str | None = None, device: torch.device | str = "cpu") -> Features:
    """An ONNX network; pictures are resized (bilinear, antialiased) when its input has a size of its own."""
    session = open_onnx(path, device)
    if len(session.get_inputs()) != 1:
        raise UserError(f"{path} has {len(session.get_inputs())} inputs, expected one: images (B, 3, H, W)")
    entry, output = session.get_inputs()[0], session.get_outputs()[0].name
    shape = entry.shape    # a number where the size is fixed, a name or None where it is free
    if entry.type != "tensor(float)" or len(shape) != 4 or isinstance(shape[1], int) and shape[1] != 3:
        raise UserError(f"{path}: input {entry.name} is {entry.type} {shape}, expected float32 images (B, 3, H, W)")
    if isinstance(shape[0], int) and shape[0] != 1:
        raise UserError(f"{path} takes exactly {shape[0]} pictures at a time; export it with a free batch size")
    size = tuple(shape[2:]) if all(isinstance(side, int) for side in shape[2:]) else None

    def network(images: Tensor) -> Tensor:
        if size is not None and images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        try:
            features = session.run([output], {entry.name: images.numpy()})[0]
        except Exception as error:    # onnxruntime has a class of its own for each way to fail
            size_text = "x".join(map(str, reversed(images.shape[2:])))
            raise UserError(f"{path} fails on pictures of {size_text}: {first_line(error)}") from error
        return torch.from_numpy(features).flatten(1)    # (B, D)

    dims = network(torch.zeros(1, 3, *(size or (64, 64)))).shape[1]
    batch_size = 1 if shape[0] == 1 else 50
    return Features(name or onnx_name(session, path), file_sha256(path), dims, network, batch_size)


def open_onnx(path: Path, device: torch.device | str):
    """An onnxruntime session of the file; on the GPU if that was asked for and this onnxruntime has one."""
    if not path.is_file():
        raise UserError(f"--features {path}: expected 'inception', 'none' or an ONNX file, and there is no such file")
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"--features {path} needs onnxruntime: pip install onnxruntime") from error
    providers = ["CPUExecutionProvider"]
    if torch.device(device).type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()    # one setting (OMP_NUM_THREADS) rules both
    options.log_severity_level = 3                            # errors only
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:    # again a class for each way
        raise UserError(f"{path} cannot be read as an ONNX network: {first_line(error)}") from error


def onnx_name(session, path: Path) -> str:
    """The metadata's "name", else the graph's name unless an exporter made it up, else the file's."""
    meta = session.get_modelmeta()
    own = meta.custom_metadata_map.get("name", "")
    return own or (path.stem if meta.graph_name in NO_NAMES else meta.graph_name)


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
