import copy

import numpy as np
import pytest
import torch
from mechanisms import copy_maps, relative_error
from scipy import stats
from torch.nn import functional as F

from effvit import build_attention, policy
from effvit.attention.performer import draw_features
from effvit.kernels import dispatch

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
    attention = performer(m=20).double()
    features, omega = attention.features()._replace(eps=0.0), attention.omega
    x = 0.5 * torch.randn(2, 3, 13, 4, dtype=torch.float64)
    x_hat = x * 4**-0.25
    h = x_hat @ omega.T
    formula = (h - x_hat.square().sum(dim=-1, keepdim=True) / 2).exp()
    ratio = features.of_queries(x) / formula
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    ratio = features.of_keys(x) / formula
    torch.testing.assert_close(ratio, ratio[..., :1, :1].expand_as(ratio))
    assert not torch.allclose(ratio[0, 0, 0], ratio[1, 0, 0])


def test_every_query_and_the_keys_of_a_head_together_reach_the_largest_feature_whatever_their_norms():
    features = performer(m=20).features()._replace(eps=0.0)
    x = torch.randn(2, 3, 13, 4) * torch.logspace(-1, 2, 13)[:, None]
    queries = features.of_queries(x).amax(dim=-1)
    torch.testing.assert_close(queries, torch.ones_like(queries))
    keys = features.of_keys(x).amax(dim=(-2, -1))
    torch.testing.assert_close(keys, torch.ones_like(keys))


def test_epsilon_is_added_to_features_of_scale_one_over_root_m():
    # Far from all keys a query's features are all ε but one, so that ε is what decides where it looks.
    attention = performer(m=16, width=4, heads=1).double()
    q = torch.full((1, 1, 13, 4), 40.0, dtype=torch.float64)
    k, v = torch.randn(2, 1, 1, 13, 4, dtype=torch.float64)
    h_q, h_k = (x * 4**-0.25 @ attention.omega.T for x in (q, k))
    exponent = h_k - k.square().sum(dim=-1, keepdim=True) / 4
    phi_q = (h_q - h_q.amax(dim=-1, keepdim=True)).exp() / 16**0.5 + 1e-6
    phi_k = (exponent - exponent.amax()).exp() / 16**0.5 + 1e-6
    expected = phi_q @ (phi_k.mT @ v) / (phi_q @ phi_k.sum(dim=-2)[..., None])
    torch.testing.assert_close(attention.attend(q, k, v), expected)
    assert ((phi_q - 1e-6).log() < -20).any()


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_blocks_half_precision_is_rounded_at_the_ends_only(kernel, dtype, monkeypatch):
    monkeypatch.setattr("effvit.kernels.feature_attention.BLOCK_NUMBERS", 1)
    attention = performer(m=11, kernel=kernel)
    inputs = [x.to(dtype).requires_grad_() for x in torch.randn(3, 5, 3, 13, 4)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    gradient = torch.randn(5, 3, 13, 4).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        y = attention.attend(*inputs)
        results = (y, *torch.autograd.grad(y, inputs, gradient))
    assert all(result.dtype == dtype for result in results)
    monkeypatch.setattr(policy, "ONLY_REFERENCE", True)
    truth = attention.double().attend(*exact)
    # y is rounded once by itself, and once more where the gradient of the normaliser is taken from it.
    unit = torch.finfo(dtype).eps
    for result, expected in zip(results, (truth, *torch.autograd.grad(truth, exact, gradient.double())), strict=True):
        assert relative_error(result.double(), expected) < unit


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
    q, k, v = torch.randn(3, 1, 3, 13, 4)
    phi_q, phi_k = ((t * 4**-0.25 @ relu.omega.T).clamp(min=0) / 16**0.5 + 1e-3 for t in (q, k))
    expected = phi_q @ (phi_k.mT @ v) / (phi_q @ phi_k.sum(dim=-2)[..., None])
    torch.testing.assert_close(relu.attend(q, k, v), expected)


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


def test_features_stay_as_they_are_in_the_last_fifth_of_a_run():
    attention = performer(redraw_every=2).train()
    generator = torch.Generator().manual_seed(5)
    drawn = []
    for step in range(1, 11):
        before = attention.omega.clone()
        attention.after_step(step, generator, 10)
        drawn += [step] if not torch.equal(before, attention.omega) else []
    assert drawn == [2, 4, 6, 8]


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


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("numbers", [1, 10**6], ids=["in blocks", "whole"])
def test_features_folded_into_the_maps_change_neither_output_nor_gradients(kernel, qkv_bias, numbers, monkeypatch):
    monkeypatch.setattr("effvit.kernels.feature_attention.BLOCK_NUMBERS", numbers)
    attention = performer(m=4, kernel=kernel, qkv_bias=qkv_bias).double()
    x, gradient = torch.randn(2, 5, 13, 12, dtype=torch.float64)
    x.requires_grad_()
    results = []
    for folds in (True, False):
        monkeypatch.setattr("effvit.kernels.layers.turns_maps", lambda *args, folds=folds: folds)
        y, matrix = attention(x, return_map=True)
        results.append((y.detach(), matrix.detach(), *torch.autograd.grad(y, [x, *attention.parameters()], gradient)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("autocast", [True, False])
def test_in_float16_features_are_not_folded_as_they_are_out_of_range_before_the_keys_are(autocast):
    attention = performer(m=4, qkv_bias=False)
    with torch.no_grad():
        attention.qkv.weight[12:24] = 2e4 * torch.eye(12)
        attention.omega.mul_(4)
    x = torch.ones(8, 13, 12)
    assert dispatch.turns_maps(x, attention.omega)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        y = attention(x) if autocast else attention.half()(x.half())
    assert y.isfinite().all()


@pytest.mark.parametrize("autocast", [True, False])
def test_folded_features_in_bfloat16_have_the_errors_of_rounding_maps_and_tokens(autocast):
    attention = performer(m=4).requires_grad_(False)
    attention.load_state_dict({name: value.bfloat16().float() for name, value in attention.state_dict().items()})
    x = torch.randn(8, 13, 12).bfloat16()
    exact = copy.deepcopy(attention).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = attention(x) if autocast else attention.bfloat16()(x)
    assert y.dtype == torch.bfloat16
    # Rounded: ΩW, Ωk̂ and Ωq̂, whose exponentials are wrong by as much of their exponents, v, the sum, y.
    exponents = (attention.double().qkv(x.double()).abs().amax() * attention.omega.double().norm(dim=1).amax()).item()
    assert relative_error(y.double(), exact) < torch.finfo(torch.bfloat16).eps * (2 + exponents)


@pytest.mark.parametrize("samples", [1, 8])
def test_folded_maps_are_rounded_once_under_autocast_whatever_the_batch(samples, monkeypatch):
    attention = performer(m=4, grid=(2, 2))
    given = []
    qkv = dispatch.qkv
    monkeypatch.setattr(dispatch, "qkv", lambda *args: given.append(args) or qkv(*args))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            attention(torch.randn(samples, 5, 12))
    ((_, folded, bias),) = given  # in float16 Ω stays apart
    omega, weight = attention.omega.double() * 4**-0.25, attention.qkv.weight.double()
    exact = torch.cat([omega @ rows for rows in weight[:24].split(4)] + [weight[24:]])
    torch.testing.assert_close(folded.double(), exact, rtol=1e-5, atol=1e-6)
    exact = torch.cat([omega @ rows for rows in attention.qkv.bias.double()[:24].split(4)])
    torch.testing.assert_close(bias.double()[:24], exact, rtol=1e-5, atol=1e-6)
