import numpy as np
import pandas as pd
import pytest

from effvit.analysis.efficiency import efficiency, lengths

TOKENS = np.array([64, 256, 1024, 4096, 16384])


def rows(attention, ratio, spread=1.0, median=None, **columns):
    """One case of a mechanism: ratio to fused at each token count, its interval a factor ``spread`` either way."""
    ratio = np.asarray(ratio, dtype=float)
    table = {
        "attention": attention,
        "scope": "block",
        "batch": "one",
        "mode": "forward",
        "quantity": "time",
        "tokens": TOKENS,
        "median": ratio * TOKENS**2.0 if median is None else median,
        "ratio_to_fused": ratio,
        "ratio_low": ratio / spread,
        "ratio_high": ratio * spread,
        "status": np.where(np.isnan(ratio), "out of memory", "ok"),
        "macs": 1000 * TOKENS,
        "fused_macs": TOKENS**2,
        "contended": False,
    }
    return pd.DataFrame(table | columns)


FUSED = rows("fused", np.ones(5), macs=TOKENS**2)


@pytest.mark.parametrize("spread", [1.0, 1.2, 2.0])
def test_the_interval_of_a_length_is_where_the_ends_of_the_ratios_interval_cross_one(spread):
    """A ratio of (500 / N)^½, times or over the spread, is one at 500 x spread^±2."""
    found = lengths(rows("linformer", (500 / TOKENS) ** 0.5, spread), FUSED)
    expected = {"length": 500, "length_low": 500 / spread**2, "length_high": 500 * spread**2}
    nowhere = {"cheaper_from": None, "cheaper_to": None}
    assert found == pytest.approx(expected | nowhere | {"measured_from": 64, "measured_to": 16384})


def test_a_length_beyond_the_last_point_is_open():
    found = lengths(rows("linformer", (12000 / TOKENS) ** 0.5, 1.3), FUSED)
    assert found["length"] == pytest.approx(12000) and found["length_high"] is None
    found = lengths(rows("linformer", (20000 / TOKENS) ** 0.5, 1.3), FUSED)
    assert found["length"] is None and found["length_low"] == pytest.approx(20000 / 1.69)
    never = lengths(rows("linformer", np.full(5, 2.0), 1.3), FUSED)
    assert [never[name] for name in ("length", "length_low", "length_high")] == [None] * 3


@pytest.mark.parametrize(
    ("ratio", "spread", "expected"),
    [
        ([1.0, 0.87, 0.63, 0.92, 1.1], 1.0, (256, 4096)),
        ([1.0, 0.87, 0.63, 0.92, 1.1], 1.1, (256, 1024)),  # 0.92 x 1.1 > 1
        ([0.5, 2.0, 0.5, 2.0, 2.0], 1.0, (1024, 1024)),  # of two stretches the last
        ([0.5, 0.5, 0.5, 0.5, np.nan], 1.0, (64, 4096)),  # stopped alone at the longest
        ([2.0, 0.99, 0.99, 2.0, 2.0], 1.2, (None, None)),
        ([2.0, 0.5, 0.5, 0.5, 0.5], 1.0, (None, None)),  # has a length
    ],
)
def test_cheaper_in_between_and_not_at_the_longest_point_is_told_by_its_measured_ends(ratio, spread, expected):
    found = lengths(rows("nystromformer", ratio, spread), FUSED)
    assert (found["cheaper_from"], found["cheaper_to"]) == expected
    assert (found["length"] is None) == (ratio[-1] != 0.5)


def test_a_ratio_without_an_interval_is_its_own():
    table = rows("linformer", (500 / TOKENS) ** 0.5, 1.2).assign(ratio_low=np.nan, ratio_high=np.nan)
    found = lengths(table, FUSED)
    assert [found[name] for name in ("length", "length_low", "length_high")] == pytest.approx([500] * 3)


def test_whichever_was_stopped_alone_is_the_dearer():
    stopped = rows("linformer", [2, 0.5, 0.5, 0.5, np.nan])
    assert lengths(stopped, FUSED)["length"] is None
    alone = rows("linformer", [2, 2, 2, 2, np.nan], status="ok")
    fused = FUSED.assign(status=["ok"] * 4 + ["over budget"])
    assert lengths(alone, fused)["length"] == TOKENS[-1]
    both = rows("linformer", [2, 0.5, 0.5, 0.5, np.nan])
    assert lengths(both, fused)["length"] == pytest.approx(128)


@pytest.mark.parametrize(
    ("reason", "length", "measured_to"), [("over budget", None, 4096), ("out of memory", 16384, 16384)]
)
def test_whichever_ran_out_of_time_may_have_needed_less_memory(reason, length, measured_to):
    alone = rows("linformer", [2, 2, 2, 2, np.nan], status="ok", quantity="memory")
    fused = FUSED.assign(status=["ok"] * 4 + [reason])
    found = lengths(alone, fused)
    assert (found["length"], found["measured_to"]) == (length, measured_to)
    mine = rows("linformer", [2, 0.5, 0.5, 0.5, np.nan], quantity="memory").replace("out of memory", reason)
    assert (lengths(mine, FUSED)["length"] is None) == (reason == "out of memory")


def test_slope_and_prediction_of_power_laws_are_the_closed_forms():
    table = pd.concat([rows("linformer", 500 / TOKENS), FUSED])
    found = efficiency(table).set_index("attention")
    linformer, fused = found.loc["linformer"], found.loc["fused"]
    assert (linformer["slope"], linformer["macs_slope"], linformer["predicted_length"]) == pytest.approx((1, 1, 1000))
    assert (fused["slope"], fused["macs_slope"]) == pytest.approx((2, 2))
    assert (fused["slope_from"], fused["slope_to"]) == (1024, 16384)
    assert fused[["length", "length_low", "length_high", "predicted_length"]].isna().all()
    assert (linformer["measured_from"], linformer["measured_to"]) == (64, 16384)


def test_the_slope_is_that_of_the_longest_sixteenfold():
    """Constant below, quadratic from 1,024 tokens on: only the latter is how cost grows."""
    table = rows("hybrid", np.ones(5), median=np.maximum(TOKENS, 1024.0) ** 2)
    assert efficiency(table)["slope"].tolist() == pytest.approx([2])


def test_macs_predict_no_memory():
    found = efficiency(pd.concat([rows("linformer", 500 / TOKENS, quantity="memory")]))
    assert found[["macs_slope", "predicted_length"]].isna().all(axis=None) and found["length"].notna().all()


def test_cases_are_apart_and_one_contended_point_marks_its_own():
    busy = rows("linformer", 500 / TOKENS, contended=[False, True, False, False, False])
    table = pd.concat([busy, rows("linformer", 100 / TOKENS, mode="train"), rows("hybrid", 900 / TOKENS)])
    found = efficiency(table).set_index(["attention", "mode"])
    assert found["length"].to_dict() == pytest.approx(
        {("linformer", "forward"): 500, ("linformer", "train"): 100, ("hybrid", "forward"): 900}
    )
    assert found["contended"].to_dict() == {
        ("linformer", "forward"): True,
        ("linformer", "train"): False,
        ("hybrid", "forward"): False,
    }


def test_a_mechanism_stopped_everywhere_has_no_numbers():
    found = efficiency(rows("standard", np.full(5, np.nan)).assign(median=np.nan)).iloc[0]
    assert found[["length", "slope", "macs_slope", "measured_to"]].isna().all()
