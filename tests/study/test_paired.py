import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from effvit.analysis.paired import between_models, holm, over_seeds
from effvit.errors import UserError
from effvit.study.paired import compare_to_fused


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_the_interval_over_seeds_is_that_of_the_paired_t_test(seeds):
    a, b = np.random.default_rng(seeds).normal(0.9, 0.01, (2, seeds))
    found, expected = over_seeds(a, b), stats.ttest_rel(a, b)
    ends = expected.confidence_interval(0.95)
    assert (found.difference, found.p) == pytest.approx((np.mean(a) - np.mean(b), expected.pvalue))
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))


def test_what_all_seeds_share_cancels():
    """Seeds that differ by far more than mechanisms do hide nothing, as both have the same seeds."""
    seeds = np.array([0.5, 0.7, 0.9, 0.6])
    found = over_seeds(seeds + 0.01 + np.array([1, -1, 1, -1]) * 1e-4, seeds)
    assert found.low > 0.009 and found.high < 0.011


@pytest.mark.parametrize("values", [[0.9], [0.92, 0.93]])
def test_one_seed_or_a_difference_that_never_varies_has_no_interval(values):
    found = over_seeds(values, np.array(values) - 0.02)
    assert found.difference == pytest.approx(0.02) and np.isnan([found.low, found.high, found.p]).all()


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 50), st.integers(0, 50))
def test_two_models_are_compared_by_the_images_that_one_alone_has_right(gained, lost, both, neither):
    a = np.repeat([True, False, True, False], [gained, lost, both, neither])
    b = np.repeat([False, True, True, False], [gained, lost, both, neither])
    found = between_models(a, b)
    assert found.difference == pytest.approx(a.mean() - b.mean())
    assert found.low <= found.difference <= found.high
    assert found.p == pytest.approx(stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0)
    assert (found.low > 0 or found.high < 0) == (found.p < 0.05)


def test_the_interval_between_models_is_clopper_and_pearsons():
    """7 of 8 images go to the first model; quantiles of beta distributions are the ends of that share's interval."""
    found = between_models([True] * 7 + [False] * 93, [False] * 7 + [True] + [False] * 92)
    ends = stats.beta.ppf([0.025, 0.975], [7, 8], [2, 1])
    assert (found.low, found.high) == pytest.approx(tuple((2 * ends - 1) * 8 / 100))


def test_holm_is_the_step_down_of_bonferroni():
    p = [0.01, 0.04, 0.03, 0.005, 0.5]
    assert holm(p) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.5])
    assert holm([0.03]) == pytest.approx([0.03])
    with_unknown = holm([np.nan, 0.01, 0.9])
    assert np.isnan(with_unknown[0]) and with_unknown[1:] == pytest.approx([0.02, 0.9])
    assert not holm([]).size


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_a_step_down_by_hand_rejects(p):
    rejected = set()
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[i] * (len(p) - rank) >= 0.05:
            break
        rejected.add(i)
    assert set(np.flatnonzero(holm(p) < 0.05)) == rejected


def study(accuracies, images=1000):
    """Predictions of a two-class test split, `accuracies` of each mechanism by seed; errors at random images."""
    found = {}
    for attention, by_seed in accuracies.items():
        for seed, accuracy in enumerate(by_seed):
            wrong = np.arange(images) >= round(accuracy * images)
            np.random.default_rng([seed, len(attention)]).shuffle(wrong)
            table = {"index": range(images), "label": 1, "prediction": np.where(wrong, 0, 1)}
            found["digits", attention, seed] = pd.DataFrame(table)
    return found


def compare(accuracies, seeds):
    table = compare_to_fused(study(accuracies), ["digits"], list(accuracies), range(seeds))
    return table.set_index("attention")


def test_a_verdict_needs_seeds_that_support_it_after_correction():
    accuracies = {
        "fused": [0.900, 0.910, 0.905],
        "linformer": [0.950, 0.961, 0.954],
        "performer": [0.850, 0.861, 0.854],
        "hybrid": [0.880, 0.930, 0.910],
    }
    found = compare(accuracies, 3)
    assert found["verdict"].to_dict() == {
        "linformer": "better",
        "performer": "worse",
        "hybrid": "no difference shown",
    }
    assert found.loc["linformer", "difference"] == pytest.approx(0.05)
    assert (found["p_holm"] >= found["p"]).all() and set(found["of"]) == {"mechanisms"}


def test_an_interval_that_excludes_zero_is_no_verdict_where_many_were_compared():
    fused = [0.9, 0.9, 0.9]
    alone = compare({"fused": fused, "m": [0.902, 0.903, 0.903]}, 3).loc["m"]
    assert alone["difference_low"] > 0 and alone["verdict"] == "better"
    many = {"fused": fused} | {f"m{'x' * i}": [0.902, 0.903, 0.903] for i in range(6)}
    assert set(compare(many, 3)["verdict"]) == {"no difference shown"}


def test_one_seed_gives_no_verdict_and_speaks_of_two_models_alone():
    found = compare({"fused": [0.5], "linformer": [0.99]}, 1).loc["linformer"]
    assert found["p"] < 1e-9 and found["difference_low"] > 0.4
    assert found["verdict"] == "one seed" and found["of"] == "these two trained models, not the mechanisms"
    assert (found["n_seeds"], found["n_images"]) == (1, 1000)


def test_without_fused_nothing_is_compared_and_the_table_has_its_columns():
    table = compare({"linformer": [0.9], "hybrid": [0.8]}, 1)
    assert table.empty and "difference_low" in table


def test_predictions_of_other_images_are_refused():
    predictions = study({"fused": [0.9], "linformer": [0.9]})
    predictions["digits", "linformer", 0]["label"] = 0
    with pytest.raises(
        UserError, match=r"digits, seed 0: linformer and fused .* other images; `dvc repro -f evaluate`"
    ):
        compare_to_fused(predictions, ["digits"], ["fused", "linformer"], [0])
