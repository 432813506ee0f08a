import gc
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import binom, ttest_rel

from effvit.measure import latency
from effvit.measure.latency import interleaved, median_interval, paired_interval, paired_ratio, summarise

CPU = torch.device("cpu")


class Clock:
    """A stopwatch by which call ``name`` takes ``seconds[name]``, times a drift that grows with every measurement."""

    def __init__(self, drift=0.0, **seconds):
        self.seconds, self.drift, self.log = seconds, drift, []
        self.calls = {name: partial(str, name) for name in seconds}

    def __call__(self, call, repeats):
        self.log.append((call(), repeats))
        return self.seconds[call()] * repeats * (1 + self.drift) ** len(self.log)


def measure(clock, **settings):
    settings = {"budget_s": 10.0, "relative_interval": 0.0, "max_rounds": 6} | settings
    return interleaved(clock.calls, device=CPU, stopwatch=clock, **settings)


def test_every_call_is_measured_once_a_round():
    clock = Clock(a=1.0, b=1.0, c=1.0)
    samples = measure(clock, budget_s=1e9, max_rounds=6)
    rounds = [name for name, _ in clock.log][-18:]
    assert all(sorted(rounds[i : i + 3]) == ["a", "b", "c"] for i in range(0, 18, 3))
    assert list(samples) == ["a", "b", "c"] and all(len(s) == 6 for s in samples.values())


def test_what_a_call_leaves_behind_falls_on_all_others_alike():
    class AfterTheSpoilerAllIsSlow(Clock):
        def __call__(self, call, repeats):
            spoilt = bool(self.log) and self.log[-1][0] == "spoiler"
            return super().__call__(call, repeats) * (1.5 if spoilt else 1.0)

    clock = AfterTheSpoilerAllIsSlow(a=1.0, b=1.0, c=1.0, spoiler=1.0)
    samples = measure(clock, budget_s=1e9, max_rounds=100, relative_interval=-1)
    assert all(0.2 < np.mean(samples[name] > 1) < 0.4 for name in "abc")  # after it every third time
    assert paired_ratio(samples["a"], samples["b"]) == 1.0


def test_it_stops_when_the_budget_is_spent_but_not_before_the_fewest_rounds():
    assert len(measure(Clock(a=1.0, b=1.0), budget_s=8.0, max_rounds=100, relative_interval=-1)["a"]) == 4
    assert len(measure(Clock(a=1.0, b=1.0), budget_s=1.0, max_rounds=100, relative_interval=-1, min_rounds=5)["a"]) == 5


def test_it_stops_when_all_medians_are_known_well():
    steady = measure(Clock(a=0.1, b=0.1), budget_s=1e9, max_rounds=100, relative_interval=0.01)
    assert len(steady["a"]) == 6  # the fewest samples that give a 95 % interval
    drifting = measure(Clock(drift=0.01, a=0.1, b=0.1), budget_s=1e9, max_rounds=100, relative_interval=0.01)
    assert len(drifting["a"]) == 100


def test_a_short_call_is_repeated_within_a_sample_and_its_sample_is_the_time_of_one():
    clock = Clock(short=1e-5, long=0.5)
    samples = measure(clock)
    assert dict(clock.log[-2:]) == {"short": 100, "long": 1}
    assert samples["short"] == pytest.approx(np.full(6, 1e-5)) and samples["long"] == pytest.approx(np.full(6, 0.5))


def test_warming_up_is_no_sample():
    class FirstIsSlow(Clock):
        def __call__(self, call, repeats):
            first = call() not in [name for name, _ in self.log]
            return super().__call__(call, repeats) + (5.0 if first else 0.0)

    assert measure(FirstIsSlow(a=1.0, b=2.0))["a"].max() == 1.0


def test_a_gpu_that_was_idle_is_kept_busy_first(monkeypatch):
    monkeypatch.setattr(latency, "_last_busy", [-float("inf")])
    monkeypatch.setattr(latency.time, "monotonic", lambda: 5.0)
    counts = []
    for _ in range(2):
        clock = Clock(a=0.02, b=0.01)
        interleaved(clock.calls, device=torch.device("cuda"), stopwatch=clock, budget_s=0.0, min_rounds=1)
        counts.append(len(clock.log))
    assert counts == [2 + 20 + 2 + 2, 2 + 2], "one each, 0.3 s; then what warms each call up, and a round"


def test_garbage_is_not_collected_while_measuring_and_is_afterwards():
    seen = []
    clock = Clock(a=1.0)
    clock.calls["a"] = lambda: seen.append(gc.isenabled()) or "a"
    measure(clock)
    assert not any(seen[-6:]) and gc.isenabled()


@pytest.mark.parametrize("n", [6, 9, 20, 101, 1000])
def test_the_interval_of_the_median_covers_95_percent_and_no_wider_one_is_taken(n):
    ordered = np.arange(n, dtype=float)
    median = np.median(ordered)
    width = median_interval(list(np.random.default_rng(0).permutation(ordered))) * median
    left_out = round((n - 1 - width) / 2)  # samples outside, on either side
    assert 1 - 2 * binom.cdf(left_out, n, 0.5) >= 0.95 > 1 - 2 * binom.cdf(left_out + 1, n, 0.5)


def test_five_samples_give_no_interval():
    assert median_interval([1.0] * 5) == float("inf")


def test_the_summary_is_of_quantiles():
    summary = summarise(np.arange(101.0))
    assert summary == {"median": 50, "q25": 25, "q75": 75, "p90": 90, "n": 101}


def test_the_ratio_is_paired_so_that_drift_cancels():
    samples = measure(Clock(drift=0.05, a=3.0, b=1.0), max_rounds=60, relative_interval=-1, budget_s=1e9)
    assert samples["a"].max() / samples["a"].min() > 10
    assert paired_ratio(samples["a"], samples["b"]) == pytest.approx(3.0, rel=0.06)


def test_the_device_clock_counts_every_repeat():
    calls = []
    assert latency.stopwatch_for(CPU)(lambda: calls.append(1), 7) > 0
    assert len(calls) == 7


@pytest.mark.parametrize("rounds", [2, 5])
def test_few_rounds_have_students_interval_of_the_logarithm_of_the_ratio(rounds):
    a, b = np.random.default_rng(rounds).lognormal(0, 0.1, (2, rounds))
    expected = ttest_rel(np.log(a), np.log(b)).confidence_interval(0.95)
    assert paired_interval(a, b) == pytest.approx((np.exp(expected.low), np.exp(expected.high)))


def test_six_rounds_have_the_interval_of_their_order_and_one_round_has_none():
    assert paired_interval(np.array([3.0, 1, 2, 6, 5, 4]), np.ones(6)) == (1, 6)
    assert paired_interval(np.ones(1), np.ones(1)) is None
