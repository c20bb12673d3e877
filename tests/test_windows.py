"""Pictures larger than the model's: levels, windows and their averages, what a completion may not depend on, tone."""
import pytest
import torch
from small_sets import rng, small_model

from models import MaskGIT, tone
from models.completion import Job, complete_pictures
from models.convert import to_uint8
from models.decoding import halton_order
from models.levels import THICK, count_levels, enlarge, enlarge_windows, make_levels
from models.tone import match_tone
from models.windows import WindowedModel, make_layout, place_windows, ramp

SIZE, STRIDE, GRID = 16, 4, 4    # of the model below: windows of 4x4 tokens
FEW_AT_ONCE = dict(entropy_budget=0.5)    # several rounds by need, although random weights are unsure of little


def make_model(guess: bool = False) -> MaskGIT:
    """Biases and positions that are no zeros, and a decoder that listens to the transformer."""
    pixel_dim = (8 if guess else 4) * STRIDE**2
    model = small_model(SIZE, dict(guess=guess, context_dim=16), depth=2, pixel_dim=pixel_dim)
    torch.nn.init.normal_(model.vqgan.decoder.from_context.weight, generator=rng(1))
    torch.nn.init.normal_(model.transformer.bias, generator=rng(2))
    torch.nn.init.normal_(model.transformer.pos_embed, generator=rng(3))
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["no guess", "guess"])
def model(request) -> MaskGIT:
    return make_model(request.param)


def job(height: int, width: int, box: tuple[int, int, int, int] | None = None, seed: int = 0) -> Job:
    """A picture of noise with a hole: rows box[0] to box[1], columns box[2] to box[3]."""
    hole = torch.zeros(1, height, width, dtype=torch.bool)
    top, bottom, left, right = box or (height // 4, height // 2 + 1, width // 4, width // 2 + 1)
    hole[:, top:bottom, left:right] = True
    return Job(torch.randint(256, (3, height, width), dtype=torch.uint8, generator=rng(seed + 50)), hole, seed)


def complete(model: MaskGIT, *jobs: Job, **options) -> list:
    return list(complete_pictures(model, jobs, **options))


# ---- one window ----


@pytest.mark.parametrize("options", [dict(total_iter=3), FEW_AT_ONCE, dict(total_iter=4, decoder="halton")], ids=str)
def test_a_picture_of_one_window_is_what_the_plain_model_makes(model, options):
    jobs = [job(SIZE, SIZE, seed=s) for s in range(3)]
    image = torch.stack([j.image for j in jobs]).float() / 127.5 - 1
    hole = torch.stack([j.hole for j in jobs])
    plain = to_uint8(model.complete(image, hole, [j.seed for j in jobs], **options).images)
    for j, made, result in zip(jobs, plain, complete(model, *jobs, **options), strict=True):
        assert torch.equal(result.image, torch.where(j.hole, made, j.image))


# ---- windows ----


def test_wanted_tokens_lie_in_the_middle_of_windows_and_weights_and_order_are_a_windows():
    for seed in range(20):
        wanted = torch.rand(23, 17, generator=rng(seed)) < (0.02, 0.3)[seed % 2]
        corners = place_windows(wanted, 8, 4)
        assert len(corners.unique(dim=0)) == len(corners)
        assert (corners >= 0).all() and (corners <= torch.tensor(wanted.shape) - 8).all()
        for token in wanted.nonzero():
            inside = token - corners                                               # (W, 2)
            middle = ((inside >= 2) | (corners == 0)) & ((inside < 6) | (corners == torch.tensor(wanted.shape) - 8))
            assert (middle & (inside >= 0) & (inside < 8)).all(1).any()
    for length in (4, 16, 64):
        w = ramp(length)
        assert w.max() == 1 and torch.equal(w, w.T) and torch.equal(w, w.flip(0))
        assert (w[: length // 2].diff(dim=0) > 0).all() and w[0, 0] > 0
    layout = make_layout([torch.tensor([[0, 0], [3, 5]])], [9], GRID)
    order = halton_order(GRID * GRID).view(GRID, GRID)
    seen = sorted({(y + dy, x + dx) for y, x in ((0, 0), (3, 5)) for dy in range(4) for dx in range(4)})
    assert layout.order[0].tolist() == [order[y % 4, x % 4].item() for y, x in seen]


def two_windows(model: MaskGIT) -> tuple[WindowedModel, torch.Tensor]:
    """Two windows of one picture, beside each other, that share half of their tokens; the hole is in both."""
    corners = torch.tensor([[0, 0], [0, 2]])
    layout = make_layout([corners], [6], GRID)
    whole, hole = torch.rand(1, 3, 16, 24, generator=rng(7)) * 2 - 1, torch.zeros(1, 1, 16, 24)
    hole[..., 4:12, 4:20] = 1
    cut = [x[..., :, left : left + 16] for x in (whole, hole) for left in (0, 8)]
    return WindowedModel(model, layout, torch.cat(cut[:2]), torch.cat(cut[2:]), None, 16), hole


def test_a_token_seen_by_several_windows_gets_the_weighted_mean_of_their_log_probabilities_and_contexts(model):
    windows, hole = two_windows(model)
    known = windows.known()
    logits = windows.logits(known.tokens, known, first=False)
    hidden = hole[0, 0, ::4, ::4] > 0                                              # (4, 6), the holes are whole tokens
    assert torch.equal(known.hidden.view(4, 6), hidden) and len(logits) == hidden.sum()
    log_p = []
    for left in (0, 2):
        tokens = known.tokens.view(4, 6)[:, left : left + 4].reshape(1, 16)
        log_p.append(model.transformer(tokens, known.pixels[left // 2][None]).log_softmax(-1).view(4, 4, -1))
    expected = []
    for y, x in hidden.nonzero().tolist():
        weights = [ramp(GRID)[y, x - left].item() if 0 <= x - left < 4 else 0.0 for left in (0, 2)]
        parts = [w * log_p[i][y, x - 2 * i] for i, w in enumerate(weights) if w]
        expected.append(sum(parts) / sum(weights))
    torch.testing.assert_close(logits.log_softmax(-1), torch.stack(expected).log_softmax(-1))
    both = known.features.view(2, 4, 4, -1)
    w = torch.stack([ramp(GRID)[:, 2:], ramp(GRID)[:, :2]]).unsqueeze(-1)
    mean = (both[0, :, 2:] * w[0] + both[1, :, :2] * w[1]) / w.sum(0)
    context = known.context.view(2, 4, 4, -1)
    torch.testing.assert_close(context[0, :, 2:], mean)
    assert torch.equal(context[0, :, 2:], context[1, :, :2])                       # a token has one context
    assert torch.equal(context[0, :, :2], both[0, :, :2])                          # seen by one window: as it is


# ---- levels ----


def test_thin_holes_have_one_level_and_wide_ones_more():
    def levels(thickness: int, side: int = 512) -> int:
        hole = torch.zeros(1, side, side, dtype=torch.bool)
        hole[:, 100 : 100 + thickness] = True
        return count_levels(hole, 64, 4)

    wide = int(64 * THICK) + 4
    assert [levels(1), levels(8), levels(wide), levels(2 * wide), levels(4 * wide)] == [1, 1, 2, 3, 4]
    assert count_levels(torch.ones(1, 64, 64, dtype=torch.bool), 64, 4) == 1       # one window shows it all
    assert count_levels(torch.ones(1, 512, 512, dtype=torch.bool), 64, 4) == 4


def test_a_coarse_level_is_the_mean_of_what_is_known_and_enlarged_alike_in_windows():
    j = job(64, 64, (0, 33, 0, 64))
    j.image[:, 33:] = 200
    j.hole[:, :, ::5] = True                                                       # thin lines: the mean leaves them out
    coarse, fine = make_levels(j.image, j.hole, 2, 16, 4)
    assert torch.equal(fine.hole, j.hole) and coarse.hole.shape == (1, 32, 32)
    assert coarse.hole[0, :16].all() and not coarse.hole[0, 17:].any() and (coarse.pixels[:, 17:] == 200).all()
    j = job(128, 128, (0, 0, 0, 0))
    j.hole[:, ::6] = True                                                          # lines of one pixel, a sixth of all
    coarse = make_levels(j.image, j.hole, 3, 16, 4)[0]
    assert not coarse.hole.any()
    below = torch.randint(256, (3, 20, 30), dtype=torch.uint8, generator=rng(0))
    corners = torch.tensor([[0, 0], [8, 12], [24, 44]])
    whole = enlarge(below)
    for (top, left), window in zip(corners.tolist(), enlarge_windows(below, corners, 16), strict=True):
        torch.testing.assert_close(window, whole[:, top : top + 16, left : left + 16], rtol=0, atol=1e-6)


# ---- pictures of all sizes ----


@pytest.mark.parametrize("size", [(65, 97), (1, 500), (300, 40), (7, 5), (16, 16), (16, 130), (40, 40), (90, 33)], ids=str)
def test_odd_sizes_keep_their_shape_and_every_known_pixel(model, size):
    j = job(*size)
    [result] = complete(model, j)
    assert result.image.shape == j.image.shape and result.image.dtype == torch.uint8
    known = ~j.hole[0]
    assert torch.equal(result.image[:, known], j.image[:, known]) and result.steps >= 1


@pytest.mark.parametrize("options", [FEW_AT_ONCE, dict(total_iter=2, decoder="halton"), dict(paste=False)], ids=str)
def test_a_result_does_not_depend_on_its_batch(model, options):
    jobs = [job(65, 97, seed=1), job(16, 16, seed=2), job(40, 40, (0, 40, 0, 5), seed=3), job(16, 16, seed=4)]
    alone = [complete(model, j, **options)[0] for j in jobs]
    assert min(result.steps for result in alone) > 1 or "entropy_budget" not in options
    for order, batch_size in (([0, 1, 2, 3], 16), ([3, 2, 1, 0], 16), ([1, 0, 3, 2], 2), ([0, 1, 2, 3], 3)):
        results = complete(model, *(jobs[i] for i in order), batch_size=batch_size, **options)
        for i, result in zip(order, results, strict=True):
            assert torch.equal(result.image, alone[i].image) and result.steps == alone[i].steps


@pytest.mark.parametrize("size", [(65, 97), (40, 150), (5, 9)], ids=str)
def test_nothing_behind_the_hole_matters_at_any_level(model, size):
    j = job(*size)
    other = torch.where(j.hole, 255 - j.image, j.image)
    assert count_levels(j.hole, SIZE, STRIDE) > 1 or max(size) < 16
    assert torch.equal(complete(model, j)[0].image, complete(model, j._replace(image=other))[0].image)


def test_what_is_far_from_the_hole_is_not_looked_at(model):
    j = job(64, 400, (20, 30, 40, 50))
    other = j.image.clone()
    other[:, :, 200:] = 0
    assert torch.equal(complete(model, j)[0].image[..., :200], complete(model, j._replace(image=other))[0].image[..., :200])


def test_large_levels_are_completed_in_blocks(model, monkeypatch):
    monkeypatch.setattr("models.pyramid.BLOCK", 6)
    j = job(70, 90, (10, 60, 20, 80))
    [result] = complete(model, j)
    assert torch.equal(result.image[:, ~j.hole[0]], j.image[:, ~j.hole[0]])
    assert (result.image != j.image)[:, j.hole[0]].float().mean() > 0.9


def test_a_guess_is_used_where_there_is_one_and_elsewhere_deep_holes_take_the_level_below():
    model, j = make_model(guess=True), job(64, 64, (8, 56, 8, 56))
    with torch.no_grad():
        plain = complete(model, j)[0].image
        model.transformer.pixel_embed.weight[:, 4 * 16 :] = 0                      # deaf to the guess
        assert not torch.equal(complete(model, j)[0].image, plain)
    deep_hole = job(96, 96, (16, 80, 16, 80))
    result, = complete(make_model(), deep_hole, keep_rounds=True, total_iter=1)
    last = [shot for shot in result.rounds if shot.level == result.rounds[-1].level]
    taken = deep_hole.hole[0] & (last[0].picture[:, :96, :96] != 128).any(0)           # not gray before the first round
    assert taken[40:56, 40:56].all() and not taken[16:18].any()
    assert torch.equal(result.image[:, taken], last[0].picture[:, :96, :96][:, taken])


def test_rounds_are_shown_level_by_level(model):
    j = job(64, 64, (8, 56, 8, 56))
    [result] = complete(model, j, keep_rounds=True, total_iter=2)
    levels = [s.level for s in result.rounds]
    assert levels == sorted(levels) and levels.count(0) == 3 and max(levels) >= 1
    for level in set(levels):
        mine = [s for s in result.rounds if s.level == level]
        left = [int(s.masked.sum()) for s in mine]
        assert left == sorted(left, reverse=True) and left[-1] == 0 < left[0]
        assert all(s.picture.shape[1] == STRIDE * s.masked.shape[0] for s in mine)
    assert torch.equal(complete(model, j, total_iter=2)[0].image, result.image)


def test_training_mode_is_put_back_and_half_precision_refused(model):
    j = job(40, 40)
    expected = complete(model, j)[0].image
    model.train()
    assert torch.equal(complete(model, j)[0].image, expected) and model.transformer.training
    model.eval()
    with pytest.raises(ValueError, match="precision='bf16'"):
        complete(make_model().half(), job(16, 16))


# ---- halton order on any grid ----


# ---- tone ----


def sky(height: int = 60, width: int = 90) -> torch.Tensor:
    """(3, H, W) uint8, a smooth gradient."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    return (80 + 0.5 * rows + 0.25 * columns + torch.tensor([0, 20, 60])[:, None, None]).to(torch.uint8)


def stroke(height: int = 60, width: int = 90) -> torch.Tensor:
    hole = torch.zeros(1, height, width, dtype=torch.bool)
    hole[:, 25:34, 10:70] = True
    return hole


def test_a_shade_in_a_smooth_place_goes_texture_and_known_pixels_stay_and_tiles_do_not_show(monkeypatch):
    picture, hole = sky(), stroke()
    filled = torch.where(hole, picture + 12, picture)
    matched = match_tone(picture, filled, hole)
    assert torch.equal(torch.where(hole, picture, matched), picture)
    error = (matched.int() - picture.int())[hole.expand(3, -1, -1)].abs()
    assert error.float().mean() < 2 and error.max() <= 4    # 12 before
    assert (match_tone(picture, picture, hole).int() - picture.int()).abs().max() <= 2    # nothing to mend
    other = torch.where(hole, 255 - picture, picture)    # what the picture holds in the hole has no influence
    assert torch.equal(matched, match_tone(other, filled, hole))
    monkeypatch.setattr(tone, "TILE", 32)
    monkeypatch.setattr(tone, "MARGIN", 16)
    assert (match_tone(picture, filled, hole).int() - matched.int()).abs().max() <= 2
    noise = torch.randint(60, 200, (3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    filled = torch.where(stroke(), noise - 20, noise)
    assert (match_tone(noise, filled, stroke()).int() - filled.int()).abs().max() <= 1


@pytest.mark.parametrize("height, width", [(1, 40), (40, 1), (3, 200)])
def test_odd_sizes_and_holes_without_a_rim(height, width):
    picture = sky(height, width)
    hole = torch.zeros(1, height, width, dtype=torch.bool)
    hole[..., width // 4 : width // 2 + 1] = True
    assert match_tone(picture, picture, hole).shape == picture.shape
    assert torch.equal(match_tone(picture, picture, hole | True), picture)
