"""Finds the pictures of a folder, pairs pictures with masks by name, and protects what is read from being written over."""

import os
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import product
from pathlib import Path, PurePosixPath

from PIL import Image

from utils import UserError, listing, notice

# Of a file with one of these suffixes we expect a picture: if it can't be read, it is broken. Files with other suffixes, or
# none, are looked into.
SUFFIXES = frozenset(".avif .bmp .gif .jfif .jpe .jpeg .jpg .png .ppm .tga .tif .tiff .webp".split())
# Formats of Pillow that are not pixels, or that another program would have to draw.
NOT_PIXELS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"})
REPORTS = frozenset(".csv .html .json .md .npz .onnx .pt .safetensors .txt".split())    # files that are never pictures
UNMARKED = frozenset({"SPIDER", "TGA"})    # nothing in such a file says what it is


@lru_cache
def picture_formats() -> tuple[str, ...]:
    """The formats of Pillow that are read here."""
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_PIXELS)


def is_picture(file: Path) -> bool:
    """Whether a file is a picture, by its suffix or else by its content."""
    if file.suffix.lower() in SUFFIXES:
        return True
    try:
        with Image.open(file, formats=[name for name in picture_formats() if name not in UNMARKED]):
            return True
    except Exception:    # what is no picture makes decoders raise anything
        return False


def find_images(path: str | Path, leave_out: Iterable[str | Path] = ()) -> dict[str, Path]:
    """The pictures of a folder and its subfolders, sorted by name; a file gives itself.

    Args:
        leave_out: subfolders and files that are not read, such as the folder of the masks.
    Returns:
        Files by name: the path inside the folder without suffix, such as "cat" or "kittens/cat". Hidden files and folders
        (.name) are not read.
    Raises:
        UserError: there is no picture, or two have one name (cat.jpg and cat.png).
    """
    path = Path(path)
    if path.is_file():
        return {_name(path.name): path}
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a picture or a folder of pictures")
    found: dict[str, Path] = {}
    others = []
    for file in _walk(path, leave_out):
        if not is_picture(file):
            others.append(file.name)
            continue
        name = _name(file.relative_to(path).as_posix())
        if name in found:
            raise UserError(f"{found[name].name} and {file.name} in {file.parent} share a name; remove or rename one")
        found[name] = file
    if not found:
        raise UserError(f"no picture in {path}" + (f"; it holds {listing(others)}" if others else ""))
    if others:
        notice(f"{len(others):,} file(s) in {path} are no pictures and are left out: {listing(sorted(others))}")
    return dict(sorted(found.items()))


def _name(path: str) -> str:
    """Without suffix; an accent is the same whether it is one character with its letter or one of its own."""
    return unicodedata.normalize("NFC", PurePosixPath(path).with_suffix("").as_posix())


def _walk(folder: Path, leave_out: Iterable[str | Path]) -> Iterator[Path]:
    """Every file that is not hidden, folder by folder. A link to a folder is followed once."""
    seen = {os.path.realpath(path) for path in leave_out} - {os.path.realpath(folder)}
    left_out_files = {path for path in seen if os.path.isfile(path)}

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot list {error.filename}: {error.strerror}") from error

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in sorted(folders)
                      if not name.startswith(".") and os.path.realpath(os.path.join(parent, name)) not in seen]
        for name in sorted(files):
            path = os.path.join(parent, name)
            if not name.startswith(".") and os.path.isfile(path):
                if not left_out_files or os.path.realpath(path) not in left_out_files:
                    yield Path(path)


# ---- pairs ----


def pair(images: str | Path, masks: str | Path, leave_out: Iterable[str | Path] = ()) -> list[tuple[str, Path, Path]]:
    """Pair pictures with masks by name, never by position: [(name, image file, mask file)], sorted by name.

    A single mask file serves every picture; a single picture takes its mask from a folder of masks. See `match_names`.
    """
    images, masks, words = Path(images), Path(masks), ("picture", "mask")
    image_files = find_images(images, [masks, *leave_out])
    if masks.is_file():
        return [(name, image, masks) for name, image in image_files.items()]
    mask_files = find_images(masks, [images, *leave_out])
    if images.is_file():
        name = next(iter(image_files))
        if name not in mask_files:    # its neighbours tell what the names have in common
            matched = match_names(find_images(images.parent, [masks, *leave_out]), mask_files, words)
            return [(name, images, mask_files[matched[name]])]
        mask_files = {name: mask_files[name]}
    matched = match_names(image_files, mask_files, words)
    return [(name, image, mask_files[matched[name]]) for name, image in image_files.items()]


def match_names(first: dict[str, Path], second: dict[str, Path], words: tuple[str, str]) -> dict[str, str]:
    """For each name of `first` its partner among the names of `second`; all must have one.

    Partners have the same name. Where no two names are the same, the beginning and the end that all names of one side share
    are taken away (image_000 and mask_000, cat and cat_mask), and a notice says so.

    Args:
        words: what the two sides hold, for messages, such as ("picture", "mask").
    """
    if not first.keys() & second.keys():
        matched = _match_stripped(list(first), list(second), words)
        if matched:
            a, b = next(iter(matched.items()))
            notice(f"{words[0]}s and {words[1]}s have different names; paired by what differs in them, such as "
                   f"{first[a].name} with {second[b].name}")
            return matched
    for side, other, word, lacking in ((first, second, *words), (second, first, *words[::-1])):
        alone = [name for name in side if name not in other]
        if alone:
            there = f"; the {lacking}s are called {listing(sorted(other))}" if len(alone) == len(side) else ""
            raise UserError(f"{len(alone):,} {word}(s) have no {lacking} of the same name: {listing(alone, 5)}{there}")
    return {name: name for name in first}


def _match_stripped(first: list[str], second: list[str], words: tuple[str, str]) -> dict[str, str] | None:
    if len(first) == len(second) == 1:
        return {first[0]: second[0]}
    matches: list[dict[str, str]] = []
    for left, right in product(_stripped(first), _stripped(second)):
        if left.keys() == right.keys():
            match = {name: right[rest] for rest, name in left.items()}
            if match not in matches:
                matches.append(match)
    if not matches:
        return None
    name, others = _contradiction(matches[0])
    if len(matches) > 1:
        name = next(name for name in first if matches[0][name] != matches[1][name])
        others = [match[name] for match in matches]
    if name:
        raise UserError(f"{' and '.join(words)} don't pair by their names: {name} may belong to {' or to '.join(others)}; "
                        f"give each {words[1]} the name of its {words[0]}")    # fmt: skip
    return matches[0]


def _contradiction(match: dict[str, str]) -> tuple[str, list[str]]:
    """A name that begins or ends with the whole name of another than its partner (cat_1 beside cat), and the two."""
    for way in (match, {b: a for a, b in match.items()}):
        bases = {PurePosixPath(name).name: name for name in way}
        for partner, name in ((PurePosixPath(a).name, b) for a, b in way.items()):
            base = PurePosixPath(name).name
            parts = {part for i in range(1, len(base)) for part in (base[:i], base[i:])} & bases.keys()
            if parts and partner not in parts:
                return name, [bases[min(parts)], bases[partner]]
    return "", []


def _stripped(names: list[str]) -> list[dict[str, str]]:
    """The names without what they have in common at both ends, cut where a number begins, or where a word does.

    {rest: name} for each way of cutting in which no two rests are the same.
    """
    bases = [PurePosixPath(name).name for name in names]
    start = os.path.commonprefix(bases)
    end = os.path.commonprefix([base[::-1] for base in bases])
    ways = []
    for keep in (str.isdigit, str.isalnum):
        cut = [len(start), len(end)]
        for i, part in enumerate((start, end)):
            while cut[i] and keep(part[cut[i] - 1]):
                cut[i] -= 1
        rests = {}
        for name, base in zip(names, bases, strict=True):
            rest = base[cut[0] : max(cut[0], len(base) - cut[1])]
            rests[str(PurePosixPath(name).parent / rest)] = name
        if len(rests) == len(names) and rests not in ways:
            ways.append(rests)
    return ways


# ---- protection ----


def refuse_overwriting(inputs: Iterable[str | Path], outputs: Iterable[str | Path]) -> None:
    """Refuse outputs that are inputs, before anything is read or written.

    Args:
        inputs: files that are read, and folders whose every file is.
        outputs: files that will be written, and folders into which files will be.
    Raises:
        UserError: an output is an input (under whatever name: links count), or lies inside a folder that is read, where it
            would be a picture the next time.
    """
    files, folders = set(), []
    for path in map(Path, inputs):
        if path.is_dir():
            folders.append(path)
        elif path.exists():
            files.add(_identity(path))
    for path in map(Path, outputs):
        if path.exists() and not path.is_dir() and _identity(path) in files:
            raise UserError(f"{path} is read by this command and would be written over; give another output")
        if path.suffix.lower() in REPORTS and not (path.is_file() and is_picture(path)):
            continue
        real = Path(os.path.realpath(path))
        for folder in folders:
            if real.is_relative_to(os.path.realpath(folder)):
                raise UserError(f"{path} would be written into {folder}, which this command reads; give an output elsewhere")


def _identity(path: Path) -> tuple[int, int]:
    """The same for all names of a file."""
    status = path.stat()
    return status.st_dev, status.st_ino
