"""Draw the sample photograph: a lake in the mountains, with a wire, a pole, scratches and a date across it.

    python samples/landscape.py

Writes samples/photo/lake.png and its mask samples/photo_masks/lake.png (black = hole). Everything is computed from noise
with a fixed seed, so nobody has rights to the picture.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT, HORIZON = 480, 320, 170
HERE = Path(__file__).resolve().parent


def noise(rng: np.random.Generator, shape: tuple, cell: tuple, octaves: int = 6, falloff: float = 0.55) -> np.ndarray:
    """Fractal noise, about -1 to 1: octaves of random grids, each of half the cell size (rows, columns in pixels)."""
    total, weight = np.zeros(shape), 1.0
    for octave in range(octaves):
        grid = [max(2, round(side / (size / 2**octave)) + 1) for side, size in zip(shape, cell, strict=True)]
        values = Image.fromarray(rng.standard_normal(grid).astype(np.float32)).resize(shape[::-1], Image.Resampling.BICUBIC)
        total += weight * np.asarray(values)
        weight *= falloff
    return total / np.abs(total).max()


def colour(*rgb: int) -> np.ndarray:
    return np.array(rgb, dtype=float)


def blend(below: np.ndarray, above: np.ndarray, share: np.ndarray) -> np.ndarray:
    return below + (above - below) * np.clip(share, 0, 1)[..., None]


def sky(rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
    picture = blend(np.broadcast_to(colour(92, 138, 196), (HEIGHT, WIDTH, 3)), colour(226, 222, 212), rows / HORIZON)
    clouds = noise(rng, (HEIGHT, WIDTH), (60, 170))
    shaded = colour(246, 243, 238) - 40 * np.clip(noise(rng, (HEIGHT, WIDTH), (40, 90)), 0, 1)[..., None]
    return blend(picture, shaded, 2.2 * clouds + 0.1)


def mountains(rng: np.random.Generator, picture: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Four ridges, the farthest first. Each has its mean height, how far it varies, and a colour; the first one has snow."""
    ridges = [(70, 62, (146, 154, 170)), (110, 40, (96, 112, 118)), (136, 26, (62, 84, 66)), (152, 12, (44, 62, 38))]
    for distance, (top, rough, tone) in enumerate(ridges):
        ridge = top + rough * noise(rng, (1, WIDTH), (1, 150 - 25 * distance), 7, 0.5)
        relief = noise(rng, (HEIGHT, WIDTH), (46 - 9 * distance, 26), 7, 0.7)
        light = np.clip(np.gradient(relief, axis=1) * 9 + 0.25 * relief, -1, 1)[..., None]
        surface = colour(*tone) * (1 + 0.55 * light)
        if distance == 0:
            snow = colour(240, 243, 248) * (1 + 0.25 * np.minimum(light, 0))
            surface = blend(surface, snow, (ridge + 34 - rows) / 18 + 1.6 * relief)
        picture = blend(picture, surface, rows - ridge)
    return picture


def lake_and_shore(rng: np.random.Generator, picture: np.ndarray, rows: np.ndarray) -> np.ndarray:
    ripples = noise(rng, (HEIGHT, WIDTH), (5, 60), 4) * (rows - HORIZON) / 18
    source = np.clip(2 * HORIZON - rows + ripples, 0, HORIZON).astype(int)
    glitter = 26 * np.clip(noise(rng, (HEIGHT, WIDTH), (4, 40), 4), 0, 1)[..., None]
    picture = blend(picture, picture[source, np.arange(WIDTH)] * 0.72 + colour(10, 26, 34) + glitter, rows - HORIZON)
    shore = 268 + 22 * noise(rng, (1, WIDTH), (1, 200), 6) - np.linspace(26, -18, WIDTH)
    stones = noise(rng, (HEIGHT, WIDTH), (16, 24), 6, 0.7)
    blades = noise(rng, (HEIGHT, WIDTH), (14, 3), 5, 0.8)
    grass = colour(92, 104, 46) * (1 + 0.5 * blades)[..., None]
    ground = blend(colour(116, 108, 92) * (1 + 0.6 * stones)[..., None], grass, (rows - shore - 12) / 10 + stones)
    return blend(picture, ground, rows - shore)


def damage(colours: dict[str, tuple], wider: int, background: tuple) -> Image.Image:
    """What is to be removed: a pole, two wires, two scratches and a date, `wider` pixels wider than they are."""
    zoom = 4    # drawn larger, then shrunk, so that edges are smooth
    image = Image.new("RGBA", (WIDTH * zoom, HEIGHT * zoom), background)
    draw = ImageDraw.Draw(image)

    def line(points: list[tuple[float, float]], what: str, width: float) -> None:
        draw.line([(x * zoom, y * zoom) for x, y in points], colours[what], round((width + wider) * zoom), joint="curve")

    wire = [(x, 85 - 0.18 * x if x < 118 else 98 - 0.00075 * (x - 330) ** 2) for x in range(-8, 492, 4)]
    line(wire, "wire", 1.2)
    line([(x, y + 11) for x, y in wire], "wire", 1.2)
    line([(118, 44), (122, 300)], "pole", 6)
    line([(98, 65), (140, 64)], "pole", 4)
    line([(330, -5), (322, 90), (334, 190), (326, 330)], "scratch", 1)
    line([(215, -5), (260, 120), (252, 215), (281, 330)], "scratch", 1.6)
    if wider:
        draw.rectangle([388 * zoom, 293 * zoom, 470 * zoom, 316 * zoom], colours["date"])
    else:
        draw.text((392 * zoom, 294 * zoom), "12.08.94", colours["date"], font_size=18 * zoom)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def main() -> None:
    rng, rows = np.random.default_rng(7), np.arange(HEIGHT)[:, None] + np.zeros((1, WIDTH))
    picture = lake_and_shore(rng, mountains(rng, sky(rng, rows), rows), rows)
    picture += 3 * rng.standard_normal((HEIGHT, WIDTH, 1))    # grain of a film
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
    colours = {"wire": (38, 36, 40), "pole": (70, 52, 40), "scratch": (247, 243, 232), "date": (255, 150, 40)}
    layer = damage(colours, 0, (0, 0, 0, 0))
    hole = damage(dict.fromkeys(colours, "black"), 5, (255, 255, 255, 255)).convert("L")
    hole = hole.point(lambda value: 255 * (value >= 200))
    image.paste(layer, mask=layer.getchannel("A"))
    for folder, result in (("photo", image), ("photo_masks", hole)):
        (HERE / folder).mkdir(exist_ok=True)
        result.save(HERE / folder / "lake.png", optimize=True)


if __name__ == "__main__":
    main()
