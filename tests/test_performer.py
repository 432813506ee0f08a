import numpy as np
import pytest
import torch
from mechanisms import copy_maps, relative_error
from scipy import stats
from torch.nn import functional as F

from effvit import build_attention
from effvit.attention.performer import draw_features

D = 4


def performer(m=16, width=12, heads=3, grid=(3, 4), **options):
    torch.manual_seed(0)
    return build_attention("performer", width, heads, grid, num_features=m, **options)


@pytest.fixture(scope="module")
def draws():
    """Many Ω, of six features each: one whole block of four and half a second one."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([draw_features(6, D, generator) for _ in range(6000)])


def within_standard_error(samples, expected, sigmas=4.5):
    standard_error = samples.std(dim=0) / len(samples) ** 0.5
    return ((samples.mean(dim=0) - expected).abs() < sigmas * standard_error + 1e-6).all()


E1, E2 = torch.eye(D)[:2]


@pytest.mark.parametrize(
    "q, k",
    [
        (1.5 * E1, 1.5 * E1),
        (1.5 * E1, -1.5 * E1),
        (1.5 * E1, E2),
        (-E2, -2 * E2),
        (torch.tensor([0.5, -1.0, 0.8, 0.3]), torch.tensor([-0.2, 0.4, 1.0, -0.7])),
    ],
)
def test_the_kernel_is_estimated_without_bias(draws, q, k):
    q_hat, k_hat = (x * D**-0.25 for x in (q, k))
    exponent = draws @ (q_hat + k_hat) - (q_hat.square().sum() + k_hat.square().sum()) / 2
    # Every feature by itself: the first vector of a block is the one that plain QR biases.
    assert within_standard_error(exponent.exp(), (q @ k / D**0.5).exp())


def test_features_are_isotropic(draws):
    assert within_standard_error(draws, 0.0)
    second_moments = torch.einsum("nmi,nmj->nmij", draws, draws)
    assert within_standard_error(second_moments, torch.eye(D))


def test_rows_of_a_block_are_orthogonal_and_of_two_blocks_are_not(draws):
    directions = F.normalize(draws, dim=-1)
    cosines = directions @ directions.mT
    assert (cosines[:, :4, :4] - torch.eye(4)).abs().max() < 1e-5
    assert cosines[:, 4, 5].abs().max() < 1e-5
    assert cosines[:, 0, 4].abs().max() > 0.5


def test_norms_are_those_of_gaussian_vectors(draws):
    for row in range(6):
        assert stats.kstest(draws[:, row].norm(dim=-1).numpy(), stats.chi(D).cdf).pvalue > 1e-3


def test_one_feature_and_heads_of_width_one_work():
    assert draw_features(1, 5).shape == (1, 5)
    assert draw_features(7, 1).shape == (7, 1)


def test_query_features_are_the_formula_up_to_one_factor_a_token_and_keys_up_to_one_a_head():
    attention = performer(m=20)
    x = 0.5 * torch.randn(2, 3, 13, 4, dtype=torch.float64)
    x_hat = x * 4**-0.25
    formula = (x_hat @ attention.omega.double().T - x_hat.square().sum(dim=-1, keepdim=True) / 2).exp() / 20**0.5
    ratio = (attention.features(x, over_tokens=False) - 1e-6) / formula
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    ratio = (attention.features(x, over_tokens=True) - 1e-6) / formula
    torch.testing.assert_close(ratio, ratio[..., :1, :1].expand_as(ratio))
    assert not torch.allclose(ratio[0, 0, 0], ratio[1, 0, 0])


def test_every_query_and_the_keys_of_a_head_together_reach_the_largest_feature_whatever_their_norms():
    attention = performer(m=20)
    x = torch.randn(2, 3, 13, 4) * torch.logspace(-1, 2, 13)[:, None]
    largest = 20**-0.5 + 1e-6
    queries = attention.features(x, over_tokens=False).amax(dim=-1)
    torch.testing.assert_close(queries, torch.full_like(queries, largest))
    keys = attention.features(x, over_tokens=True).amax(dim=(-2, -1))
    torch.testing.assert_close(keys, torch.full_like(keys, largest))


def test_attention_is_the_quotient_of_kernel_sums_token_by_token():
    attention = performer(m=20).double()
    q, k, v = (0.5 * torch.randn(1, 1, 6, 4, dtype=torch.float64) for _ in range(3))
    omega = attention.omega * 4**-0.25
    kernel = torch.stack([((omega @ (a + b)) - (a @ a + b @ b) / 4).exp().sum() for a in q[0, 0] for b in k[0, 0]])
    kernel = kernel.view(6, 6)
    expected = kernel @ v[0, 0] / kernel.sum(dim=1, keepdim=True)
    torch.testing.assert_close(attention.attend(q, k, v)[0, 0], expected, rtol=1e-3, atol=1e-4)


def test_the_error_falls_like_one_over_the_root_of_the_number_of_features():
    generator = torch.Generator().manual_seed(0)
    # Scores small enough for 16 features to be in the range where the law holds (docs/mechanisms.md).
    q, k, v = (scale * torch.randn(1, 1, 33, 8, generator=generator) for scale in (0.3, 0.3, 1))
    exact = F.scaled_dot_product_attention(q, k, v)
    features, errors = [16, 64, 256, 1024], []
    for m in features:
        attention = performer(m=m, width=8, heads=1, grid=(4, 8))
        squares = []
        for _ in range(30):
            attention.omega.copy_(draw_features(m, 8, generator))
            squares.append(relative_error(attention.attend(q, k, v), exact) ** 2)
        errors.append(np.mean(squares) ** 0.5)
    slope = np.polyfit(np.log(features), np.log(errors), 1)[0]
    assert -0.55 < slope < -0.45


def test_the_relu_kernel_is_another_one():
    x = torch.randn(2, 13, 12)
    softmax = performer()
    relu = copy_maps(softmax, performer(kernel="relu"))
    assert torch.equal(softmax.omega, relu.omega)
    assert relative_error(relu(x), softmax(x)) > 0.01
    tokens = torch.randn(1, 3, 13, 4)
    expected = (tokens * 4**-0.25 @ relu.omega.T).clamp(min=0) / 16**0.5 + 1e-3
    for over_tokens in (False, True):
        torch.testing.assert_close(relu.features(tokens, over_tokens), expected)


def test_features_are_redrawn_in_training_at_multiples_only_and_from_the_given_generator():
    attention = performer(redraw_every=3).train()
    generator = torch.Generator().manual_seed(5)
    changed = []
    for step in range(1, 10):
        before = attention.omega.clone()
        attention.after_step(step, generator)
        changed.append(not torch.equal(before, attention.omega))
    assert changed == [False, False, True] * 3
    expected = torch.Generator().manual_seed(5)
    for _ in range(3):
        omega = draw_features(16, 4, expected)
    assert torch.equal(attention.omega, omega)


@pytest.mark.parametrize("redraw_every, training", [(0, True), (1, False)])
def test_features_are_never_redrawn_in_eval_mode_or_if_not_asked_for(redraw_every, training):
    attention = performer(redraw_every=redraw_every).train(training)
    before = attention.omega.clone()
    generator = torch.Generator().manual_seed(5)
    for step in range(1, 5):
        attention.after_step(step, generator)
    assert torch.equal(attention.omega, before)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())


def test_features_are_state_but_not_trained():
    attention = performer()
    assert "omega" in attention.state_dict()
    assert "omega" not in dict(attention.named_parameters())


def test_its_macs_are_linear_in_tokens():
    n, m, c, heads = 13, 16, 12, 3
    assert performer().macs() == 4 * n * c**2 + 4 * n * m * c + n * m * heads
