"""A change that is not meant to change what is computed leaves the losses of a training run where they are."""

import json

import golden
import pytest
import torch

from effvit import available_attention
from effvit.attention import attention_class

STORED = json.loads(golden.FILE.read_text())
TOLERANCE = 1e-6  # relative; float64 and twenty steps leave a hundred times less to the order of summation


@pytest.mark.parametrize("name", available_attention())
def test_losses_of_a_seeded_run_are_the_stored_ones(name):
    torch.testing.assert_close(golden.losses(name), STORED[name], rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("name", available_attention())
def test_the_tolerance_is_broken_by_scores_that_are_a_thousandth_too_large(name, monkeypatch):
    mechanism = attention_class(name)
    attend = mechanism.attend
    on_values = name in ("linear", "focused", "uniform")  # whose weights hardly change with the size of queries
    by_queries, by_values = (1, 1.001) if on_values else (1.001, 1)
    monkeypatch.setattr(
        mechanism, "attend", lambda self, q, k, v, *others: attend(self, by_queries * q, k, by_values * v, *others)
    )
    with pytest.raises(AssertionError):
        torch.testing.assert_close(golden.losses(name), STORED[name], rtol=10 * TOLERANCE, atol=0)


@pytest.mark.parametrize("name", available_attention())
def test_the_run_learns(name):
    assert sum(STORED[name][-3:]) < sum(STORED[name][:3])
