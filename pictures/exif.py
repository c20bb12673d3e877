"""EXIF data of a picture that was turned upright."""

import struct

ORIENTATION = 0x0112
THUMBNAIL = {0x0201: 0x0202, 0x0111: 0x0117}    # tag of its place -> tag of its length, in bytes


def upright(exif: bytes) -> bytes | None:
    """The same data with the orientation 1 and without the thumbnail, which would show what is in the hole.

    None if the data can't be read. Nothing is written anew, so that what Pillow doesn't understand stays as it is.
    """
    data = bytearray(exif.removeprefix(b"Exif\0\0"))
    try:
        order = {b"II": "<", b"MM": ">"}[bytes(data[:2])]
        first = struct.unpack_from(order + "I", data, 4)[0]
        entries, end = _entries(data, order, first)
        if ORIENTATION in entries:
            struct.pack_into(order + "HIHH", data, entries[ORIENTATION] - 6, 3, 1, 1, 0)
        second = struct.unpack_from(order + "I", data, end)[0]
        struct.pack_into(order + "I", data, end, 0)
        if second:
            entries, _ = _entries(data, order, second)
            for place, length in THUMBNAIL.items():
                if place in entries and length in entries:
                    start, count = (struct.unpack_from(order + "I", data, entries[tag])[0] for tag in (place, length))
                    data[start : start + count] = bytes(len(data[start : start + count]))
    except (KeyError, struct.error):
        return None
    return bytes(data)


def _entries(data: bytes, order: str, start: int) -> tuple[dict[int, int], int]:
    """Of a directory of tags: where each tag's value is, and where the directory ends."""
    count = struct.unpack_from(order + "H", data, start)[0]
    places = [start + 2 + 12 * i for i in range(count)]
    return {struct.unpack_from(order + "H", data, place)[0]: place + 8 for place in places}, start + 2 + 12 * count
