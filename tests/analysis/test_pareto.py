import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effvit.analysis.pareto import pareto_front

# few distinct numbers, so that ties and duplicates are the rule
POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12)


def dominates(a, b):
    return a[0] <= b[0] and a[1] >= b[1] and a != b


@given(POINTS)
def test_front_is_what_brute_force_finds(points):
    expected = [not any(dominates(other, point) for other in points) for point in points]
    cost, value = [p[0] for p in points], [p[1] for p in points]
    assert pareto_front(cost, value).tolist() == expected


@given(POINTS, st.randoms())
def test_front_does_not_depend_on_the_order_of_points(points, random):
    shuffled = random.sample(points, len(points))
    fronts = []
    for some in (points, shuffled):
        mask = pareto_front([p[0] for p in some], [p[1] for p in some])
        fronts.append(sorted(p for p, on in zip(some, mask, strict=True) if on))
    assert fronts[0] == fronts[1]


def test_duplicates_are_on_the_front_together():
    assert pareto_front([1, 1, 2], [0.9, 0.9, 0.9]).tolist() == [True, True, False]


@pytest.mark.parametrize(("cost", "value"), [([1, 2], [1]), ([[1]], [[1]]), ([float("nan")], [1]), ([1], [np.nan])])
def test_front_refuses_unequal_lengths_and_nan(cost, value):
    with pytest.raises(ValueError, match="cost and value"):
        pareto_front(cost, value)
