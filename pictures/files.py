"""Finds the picture files of a folder and pairs pictures with masks by name."""

from pathlib import Path

from utils import UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def find_images(path: str | Path) -> dict[str, Path]:
    """List the pictures of a folder (not of its subfolders) by stem, sorted; a file gives itself.

    Raises DataError if the path is missing or has no picture, or if two pictures share a stem (a.jpg and a.png).
    """
    path = Path(path)
    try:
        if path.is_file():
            return {path.stem: path}
        if not path.is_dir():
            raise UserError(f"{path} does not exist; give a picture or a folder of pictures")
        files = sorted(path.iterdir())
    except OSError as error:
        raise UserError(f"cannot list {path}: {error.strerror}") from error
    found: dict[str, Path] = {}
    for file in files:
        if file.suffix.lower() not in IMAGE_SUFFIXES or file.name.startswith(".") or not file.is_file():
            continue
        if file.stem in found:
            raise UserError(f"{found[file.stem].name} and {file.name} in {path} share a name; remove or rename one")
        found[file.stem] = file
    if not found:
        raise UserError(f"no picture in {path}; looked for {', '.join(sorted(IMAGE_SUFFIXES))} (not in subfolders)")
    return dict(sorted(found.items()))


def pair(images: str | Path, masks: str | Path) -> list[tuple[str, Path, Path]]:
    """Pair pictures with masks of the same stem, never by position: [(stem, image file, mask file)], sorted by stem.

    A single mask file serves every picture; a single picture takes its mask from a folder of masks.
    Raises DataError if any picture lacks its mask, or any mask its picture.
    """
    image_files, mask_files = find_images(images), find_images(masks)
    if Path(masks).is_file():
        mask = Path(masks)
        return [(stem, image, mask) for stem, image in image_files.items()]
    if Path(images).is_file():
        mask_files = {stem: mask for stem, mask in mask_files.items() if stem in image_files}
    for have, lack, have_word, lack_word in ((image_files, mask_files, "picture", "mask"),
                                             (mask_files, image_files, "mask", "picture")):
        alone = [stem for stem in have if stem not in lack]
        if alone:
            some = ", ".join(alone[:5]) + (", ..." if len(alone) > 5 else "")
            raise UserError(f"{len(alone)} {have_word}(s) have no {lack_word} of the same name: {some}; "
                            f"looked in {images} and {masks}")
    return [(stem, image, mask_files[stem]) for stem, image in image_files.items()]
