"""models/schedule.py: closed forms of every gamma, and the integer plan that is made from it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.schedule import SCHEDULES, gamma, mask_plan

CLOSED_FORMS = {
    "cosine": {1 / 3: math.sqrt(3) / 2, 0.5: math.sqrt(0.5), 2 / 3: 0.5},
    "linear": {0.25: 0.75, 0.5: 0.5, 0.9: 0.1},
    "square": {0.25: 15 / 16, 0.5: 0.75, 0.9: 0.19},
    "sqrt": {0.04: 0.8, 0.25: 0.5, 0.81: 0.1},
    "cubic": {0.25: 63 / 64, 0.5: 0.875, 0.9: 0.271},
    "arccos": {0.5: 2 / 3, math.sqrt(0.5): 0.5, math.sqrt(3) / 2: 1 / 3},
}
POWER = {"linear": 1, "square": 2, "cubic": 3}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_closed_forms(schedule):
    points = CLOSED_FORMS[schedule]
    r = torch.tensor(list(points), dtype=torch.float64)
    torch.testing.assert_close(gamma(schedule, r), torch.tensor(list(points.values()), dtype=torch.float64))
    assert gamma(schedule, 0.25).item() == gamma(schedule, torch.tensor([[0.25]])).item()
    assert gamma(schedule, torch.zeros(2, 3)).shape == (2, 3) and gamma(schedule, 0).dtype == torch.float64


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ends_are_exact_and_it_falls_between(schedule):
    ratio = gamma(schedule, torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert ratio[0] == 1 and ratio[-1] == 0
    assert (ratio.diff() < 0).all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SCHEDULES), st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(1, 40))
def test_plan_falls_to_zero(schedule, holes, total_iter):
    plan = mask_plan(schedule, torch.tensor(holes), total_iter)
    assert plan.dtype == torch.int64 and plan.shape == (len(holes), total_iter)
    before = torch.cat([torch.tensor(holes).unsqueeze(1), plan[:, :-1]], dim=1)
    assert ((plan < before) | ((before == 0) & (plan == 0))).all()
    assert (plan >= 0).all() and not plan[:, -1].any()
    for row, hole in zip(plan, holes, strict=True):    # each row as if it were alone
        assert torch.equal(row, mask_plan(schedule, torch.tensor([hole]), total_iter)[0])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(POWER)), st.integers(0, 300), st.integers(1, 40))
def test_plan_is_the_floor_of_the_schedule(schedule, hole, total_iter):
    """Against whole-number arithmetic, which has no rounding: floor((1 - (t/T)^p) n) = (T^p - t^p) n // T^p."""
    left, power = hole, POWER[schedule]
    plan = mask_plan(schedule, torch.tensor([hole]), total_iter)[0]
    for t in range(1, total_iter + 1):
        share = (total_iter**power - t**power) * hole // total_iter**power
        left = max(0, min(share, left - 1))
        assert plan[t - 1] == left
