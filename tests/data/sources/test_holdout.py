import numpy as np
import pytest

from effvit.data.sources.holdout import hold_out

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [2, 11, 100, 257]))


def test_kept_and_held_out_partition_the_set_in_ascending_order():
    kept, held = hold_out(LABELS, every=10)
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(len(LABELS)))
    assert np.all(np.diff(kept) > 0) and np.all(np.diff(held) > 0)
    assert kept.dtype == held.dtype == np.int64


def test_each_class_loses_a_tenth_but_at_least_one_and_never_all():
    kept, held = hold_out(LABELS, every=10)
    assert np.bincount(LABELS[held]).tolist() == [1, 1, 10, 26]
    assert np.bincount(LABELS[kept]).min() >= 1


@pytest.mark.parametrize("n", range(2, 60))
@pytest.mark.parametrize("every", [2, 5, 10])
def test_positions_within_a_class_follow_the_documented_formula(n, every):
    m = max(1, int(n / every + 0.5))
    assert hold_out(np.zeros(n, int), every)[1].tolist() == [(2 * i + 1) * n // (2 * m) for i in range(m)]


def test_rule_ignores_every_random_state():
    np.random.seed(1)
    first = hold_out(LABELS, every=10)
    np.random.seed(2)
    second = hold_out(LABELS, every=10)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_class_of_one_image_is_refused():
    with pytest.raises(ValueError, match="class 1 has a single image"):
        hold_out(np.array([0, 0, 1]), every=10)
