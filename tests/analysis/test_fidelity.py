"""Errors to exact attention: none where a mechanism is exact, falling as theory says; attention alone is replaced."""

import math

import numpy as np
import pytest
import torch
from mechanisms import FIRST
from scipy import stats

from effvit.analysis.fidelity import (
    DRAWS,
    Variant,
    compare,
    mix,
    pooling,
    random_qkv,
    relative_error,
    replaced_accuracy,
    set_untrained,
    trained_qkv,
    variants,
)
from effvit.attention import build_attention
from effvit.evaluation.probe import accuracy, normalised, validation_images
from effvit.measure.macs import count_macs
from effvit.model.checkpoint import load_model

pytestmark = pytest.mark.slow

GRID = (4, 4)
QKV = random_qkv(3, 2, 17, 8)


def error(attention, qkv=QKV, **options):
    (row,) = compare(Variant(attention, options), [qkv], GRID)
    return row["error"]


def softmax_attention(q, k, v):
    logits = q.double() @ k.double().transpose(-2, -1) / math.sqrt(q.shape[-1])
    return logits.softmax(dim=-1) @ v.double()


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        ("standard", {}),
        ("fused", {}),
        ("linformer", {"k": 17}),
        ("nystromformer", {"num_landmarks": 17, "conv_kernel_size": 0}),
        ("nystromformer", {"num_landmarks": 40, "conv_kernel_size": 0}),
        ("hybrid", {"window_size": 4, "dilations": [1], "branches": ["regional"]}),
        ("pooled", {"pool_size": 4}),
        ("window", {"window_size": 4}),
    ],
)
def test_there_is_no_error_where_a_mechanism_is_exact(attention, options):
    assert error(attention, **options) < 1e-6


def test_error_is_that_of_each_image_and_head_to_softmax_attention():
    module = build_attention("linformer", 16, 2, GRID, k=5).eval()
    set_untrained(module)
    q, k, v = QKV
    e = pooling(5, GRID).double()
    pooled = e @ k.double(), e @ v.double()
    actual, exact = softmax_attention(q, *pooled), softmax_attention(q, k, v)
    torch.testing.assert_close(mix(module, q, k, v).double(), actual, rtol=1e-5, atol=1e-6)
    expected = np.mean(
        [
            np.linalg.norm(a - e) / np.linalg.norm(e)
            for a, e in zip(actual.flatten(0, 1), exact.flatten(0, 1), strict=True)
        ]
    )
    assert relative_error(actual, exact) == pytest.approx(expected)
    assert error("linformer", k=5) == pytest.approx(expected, rel=1e-5)


def test_error_of_pooling_is_that_of_means_of_keys_and_values_of_cells():
    q, k, v = QKV
    means = torch.zeros(5, 17, dtype=torch.double)  # the class token, and 2 x 2 cells of 2 x 2 patches
    means[0, 0] = 1
    for patch in range(16):
        means[1 + patch // 8 * 2 + patch % 4 // 2, 1 + patch] = 1 / 4
    expected = relative_error(softmax_attention(q, means @ k.double(), means @ v.double()), softmax_attention(*QKV))
    assert error("pooled", pool_size=2) == pytest.approx(expected, rel=1e-5)


def test_error_of_the_control_is_that_of_the_mean_of_all_values():
    mean = QKV[2].double().mean(dim=2, keepdim=True).expand(-1, -1, 17, -1)
    assert error("uniform") == pytest.approx(relative_error(mean, softmax_attention(*QKV)), rel=1e-5)


def test_blocks_that_are_exact_have_no_error_and_its_cost():
    rows = compare(Variant("window", {"window_size": 2, "global_every": 2}), [QKV] * 4, GRID)
    assert [row["error"] < 1e-6 for row in rows] == [False, True, False, True]
    assert [row["mixing_macs"] == row["fused_macs"] for row in rows] == [False, True, False, True]


@pytest.mark.parametrize(("rows", "grid"), [(1, (1, 4)), (5, (1, 4)), (4, (4, 4)), (16, (4, 4)), (7, (3, 5))])
def test_pooling_is_means_over_groups_of_equal_size_that_cover_all_tokens(rows, grid):
    e = pooling(rows, grid)
    torch.testing.assert_close(e.sum(dim=1), torch.ones(rows))
    members = e > 0
    assert (members.sum(dim=0) == 1).all()
    assert members.sum(dim=1).max() - members.sum(dim=1).min() <= 1


def test_pooled_patches_are_neighbours_in_both_directions():
    """Eight groups of an 8 x 8 grid are never more than four patches wide or high; runs row by row would be eight."""
    for row in pooling(8, (8, 8))[:, 1:] > 0:
        rows, columns = np.unravel_index(torch.nonzero(row).flatten().numpy(), (8, 8))
        assert np.ptp(rows) < 4 and np.ptp(columns) < 4


def test_performers_error_falls_with_the_root_of_the_number_of_features():
    q, k, v = (x * scale for x, scale in zip(random_qkv(8, 2, 17, 8), (0.4, 0.4, 1), strict=True))  # where theory holds
    features = np.array([32, 128, 512])
    errors = [error("performer", (q, k, v), num_features=int(m)) for m in features]
    slope = stats.linregress(np.log(features), np.log(errors)).slope
    assert -0.6 < slope < -0.4


def test_performers_interval_is_students_t_over_draws_and_others_have_none():
    (row,) = compare(Variant("performer", {"num_features": 16}), [QKV], GRID)
    exact, errors = softmax_attention(*QKV).float(), []
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        errors.append(relative_error(build_attention("performer", 16, 2, GRID, num_features=16).attend(*QKV), exact))
    assert len(set(errors)) == DRAWS
    expected = stats.ttest_1samp(errors, 0).confidence_interval(0.95)
    assert (row["error_low"], row["error_high"]) == pytest.approx((expected.low, expected.high), rel=1e-4)
    (row,) = compare(Variant("fused", {}), [QKV], GRID)
    assert math.isnan(row["error_low"]) and math.isnan(row["error_high"])


@pytest.mark.parametrize(("attention", "options"), FIRST)
def test_costs_are_the_multiply_adds_that_mixing_executes(attention, options):
    (row,) = compare(Variant(attention, options), [random_qkv(1, 3, 16, 4)], (3, 5))
    module = build_attention(attention, 12, 3, (3, 5), **options)
    counted = count_macs(module, torch.empty(1, 16, 12))
    assert row["mixing_macs"] == counted - module.map_macs()
    assert row["fused_macs"] == 2 * 16**2 * 12


def test_sizes_are_powers_of_two_up_to_exactness_with_that_of_the_study_among_them():
    assert [v.value for v in variants("linformer", {"k": 11, "share": "kv"}, GRID)] == [4, 8, 11, 16, 17]
    assert {v.options["share"] for v in variants("linformer", {"k": 11, "share": "kv"}, GRID)} == {"kv"}
    assert [v.value for v in variants("nystromformer", {"num_landmarks": 32}, GRID)] == [4, 8, 16, 17, 32]
    assert [v.value for v in variants("hybrid", {"window_size": 3}, GRID)] == [1, 2, 3, 4]
    assert [v.value for v in variants("window", {"window_size": 3}, (2, 5))] == [1, 2, 3, 4, 5]
    assert [(v.option, v.value) for v in variants("agent", {"agent_size": 7}, GRID)] == [
        ("agent_size", n) for n in (1, 2, 4, 7)
    ]
    assert [(v.option, v.value) for v in variants("pooled", {"pool_size": 2}, GRID)] == [
        ("pool_size", n) for n in (1, 2, 4)
    ]
    assert [v.value for v in variants("performer", {"num_features": 10}, GRID)] == [4, 8, 10, 16, 32, 64]
    assert [(v.option, v.value) for v in variants("fused", {}, GRID)] == [("", None)]


def test_random_q_k_v_have_logits_of_unit_deviation():
    q, k, _ = random_qkv(64, 4, 17, 12)
    logits = q @ k.transpose(-2, -1) / math.sqrt(12)
    assert logits.std().item() == pytest.approx(1, abs=0.02) and logits.mean().item() == pytest.approx(0, abs=0.02)


def test_trained_q_k_v_give_the_models_own_logits(trained, digits):
    """Attention of them, put through the rest of the model, is what the model computes."""
    model = load_model(trained / "run")
    images = normalised(model, validation_images(digits, 8)[0], digits)
    layers = trained_qkv(model, images)
    assert len(layers) == len(model.blocks)
    _, maps = model(images, output_attentions=True)
    for (q, k, _), expected in zip(layers, maps, strict=True):
        torch.testing.assert_close((q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1), expected)


def test_error_of_a_linformer_in_a_model_is_that_of_its_q_k_v(trained, digits):
    """Projecting keys and values, as `mix` does, and projecting tokens before the maps, as the model does, agree."""
    model = load_model(trained / "run")
    attention = model.attentions()[0]
    module = build_attention("linformer", 16, 2, (4, 4), k=6).eval()
    module.load_state_dict(attention.state_dict(), strict=False)
    set_untrained(module)
    x = torch.randn(2, 17, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module(x), module.merge(mix(module, *attention.project(x))), rtol=1e-5, atol=1e-6)


def test_a_model_with_attention_replaced_by_what_is_exact_scores_the_same(trained, digits):
    model = load_model(trained / "run")
    images, labels = validation_images(digits, 1000)
    of_fused = accuracy(model, images, labels, digits)
    assert len(labels) == digits.counts["validation"] and 0.3 < of_fused < 1
    seen = []

    def score(model):
        seen.append(model.config.attention)
        return accuracy(model, images, labels, digits)

    exact = {
        "standard": {},
        "fused": {},
        "linformer": {"k": 17},
        "nystromformer": {"num_landmarks": 17, "conv_kernel_size": 0},
        "hybrid": {"window_size": 4, "dilations": [1], "branches": ["regional"]},
        "pooled": {"pool_size": 4},
        "window": {"window_size": 4},
    }
    for attention, options in exact.items():
        assert replaced_accuracy(Variant(attention, options), trained / "run", model.config, score) == of_fused
    replaced_accuracy(Variant("performer", {"num_features": 4}), trained / "run", model.config, score)
    assert seen == [*exact, *["performer"] * DRAWS]
    of_control = replaced_accuracy(Variant("uniform", {}), trained / "run", model.config, score)
    assert of_control < of_fused - 0.02
