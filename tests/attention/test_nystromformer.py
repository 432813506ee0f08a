import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mechanisms import copy_maps, qkv_of, relative_error
from torch.nn import functional as F

from effvit import build_attention
from effvit.errors import UserError
from effvit.kernels.dispatch import pseudo_inverse
from effvit.kernels.pseudo_inverse import MOST_ITERATIONS, reference
from effvit.kernels.token_means import block_order, landmark_members, segments


def nystromformer(m, grid=(4, 5), conv=0, **options):
    torch.manual_seed(0)
    return build_attention("nystromformer", 12, 3, grid, num_landmarks=m, conv_kernel_size=conv, **options)


@pytest.mark.parametrize("m", [21, 22, 500])
def test_with_as_many_landmarks_as_tokens_it_is_fused(m):
    fused = build_attention("fused", 12, 3, (4, 5))
    x = torch.randn(2, 21, 12)
    torch.testing.assert_close(copy_maps(fused, nystromformer(m))(x), fused(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_it_is_three_softmaxes_and_a_pseudo_inverse_and_the_convolution(prefix):
    n = prefix + 20
    attention = nystromformer(prefix + 5, conv=3, pinv_iterations=20, prefix_tokens=prefix).double()
    x = 4 * torch.randn(2, n, 12, dtype=torch.float64)  # so large that K₂ is far from singular
    q, k, v = qkv_of(attention, x)
    # The landmarks by brute force: each prefix token, then means of five runs of patches in block order.
    runs = [[token] for token in range(prefix)] + (block_order((4, 5), 5).view(5, 4) + prefix).tolist()
    q_m, k_m = (torch.stack([t[..., run, :].mean(dim=-2) for run in runs], dim=-2) for t in (q, k))
    k1, k2, k3 = ((a @ b.mT / 4**0.5).softmax(dim=-1) for a, b in ((q, k_m), (q_m, k_m), (q_m, k)))
    kernel = attention.conv.weight.view(3, 1, 3)
    padded = F.pad(v, (0, 0, 1, 1))
    convolved = sum(kernel[:, :, i : i + 1] * padded[..., i : i + n, :] for i in range(3))
    # Prefix tokens are close to no mean of patches: with five, K₂ is too near to singular for the true inverse.
    z = torch.linalg.pinv(k2) if prefix < 5 else reference(k2, 20)
    mixed = k1 @ z @ k3 @ v + convolved
    torch.testing.assert_close(attention(x), attention.proj(mixed.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("m", [2, 8])
def test_landmarks_of_many_tokens_do_not_overflow_half_precision(m):
    attention = nystromformer(m, (64, 64))
    x = torch.full((1, 3, 4097, 4), 50.0, dtype=torch.float16)
    torch.testing.assert_close(attention.landmarks(x), torch.full((1, 3, m, 4), 50.0, dtype=torch.float16))
    exact = torch.randn(1, 3, 4097, 4)
    rounding = (attention.landmarks(exact.bfloat16()).double() - attention.landmarks(exact.double())).abs()
    assert rounding.max() < 2**-8 * exact.abs().max()  # one rounding of a token and one of a mean


def test_the_error_falls_as_landmarks_are_added():
    x = torch.randn(4, 65, 12)
    fused = build_attention("fused", 12, 3, (8, 8))
    errors = [relative_error(copy_maps(fused, nystromformer(m, (8, 8)))(x), fused(x)) for m in (2, 8, 24, 48, 65)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5


def test_the_iteration_finds_the_pseudo_inverse_of_softmax_matrices():
    torch.manual_seed(0)
    a = (torch.randn(50, 16, 16, dtype=torch.float64) * 3).softmax(dim=-1)
    for iterations, limit in ((6, 0.05), (40, 1e-9)):
        residual = (a @ pseudo_inverse(a, iterations) @ a - a).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1)
        assert residual.max() < limit
    q, k = torch.randn(2, 50, 16, 12, dtype=torch.float64)
    flat = (q @ k.mT / 12**0.5).softmax(dim=-1)  # scores of unit scale: worse conditioned
    residual = (flat @ pseudo_inverse(flat, 6) @ flat - flat).flatten(1).norm(dim=1) / flat.flatten(1).norm(dim=1)
    assert residual.max() < 0.1


def test_the_iteration_starts_from_each_matrix_by_itself():
    torch.manual_seed(0)
    a = torch.randn(8, 3, 7, 7).softmax(dim=-1)
    a[0, 0] = torch.eye(7)[0]  # all mass in one column: the largest 1-norm there is
    together = pseudo_inverse(a, 3)
    alone = torch.stack([torch.stack([pseudo_inverse(head, 3) for head in sample]) for sample in a])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_segments_are_contiguous_runs_that_differ_by_one_at_most_the_longer_ones_last():
    for n in range(1, 20):
        for m in range(1, n + 1):
            short = n // m
            lengths = [short] * ((short + 1) * m - n)
            lengths += [short + 1] * (m - len(lengths))
            assert segments(n, m).tolist() == [run for run, length in enumerate(lengths) for _ in range(length)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), data=st.data())
def test_every_token_belongs_to_one_landmark_and_the_class_token_alone_to_the_first(rows, columns, data):
    m = data.draw(st.integers(2, rows * columns + 1))
    members = landmark_members((rows, columns), m)
    assert members.shape == (m, 1 + rows * columns)
    assert torch.equal(members.sum(dim=0), torch.ones(1 + rows * columns))
    assert members[0].nonzero().flatten().tolist() == [0]
    sizes = members[1:].sum(dim=1)
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("width", [4, 11])
def test_the_convolution_is_that_of_each_head_as_an_image_of_tokens_and_channels(width):
    attention = nystromformer(6, conv=5).double()
    v = torch.randn(2, 3, 21, width, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn_like(v)
    inputs = (v, attention.conv.weight)
    results = [
        (y, *torch.autograd.grad(y, inputs, gradient))
        for y in (attention.plus_convolution(v, v), v + attention.conv(v))
    ]
    torch.testing.assert_close(*results)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), data=st.data())
def test_block_order_is_a_permutation_of_the_patches(rows, columns, data):
    order = block_order((rows, columns), data.draw(st.integers(1, rows * columns)))
    assert sorted(order.tolist()) == list(range(rows * columns))


@pytest.mark.parametrize("segments, height, width", [(16, 2, 2), (4, 4, 4), (32, 2, 1), (64, 1, 1)])
def test_segments_in_block_order_are_blocks_of_the_grid(segments, height, width):
    for run in block_order((8, 8), segments).view(segments, -1):
        rows, columns = (run // 8).unique(), (run % 8).unique()
        assert (len(rows), len(columns)) == (height, width)


def test_the_class_token_is_a_landmark_of_its_own():
    x = torch.randn(1, 3, 21, 4)
    landmarks = nystromformer(6).landmarks(x)
    torch.testing.assert_close(landmarks[..., 0, :], x[..., 0, :])
    x[..., 0, :] = 1e6
    torch.testing.assert_close(nystromformer(6).landmarks(x)[..., 1:, :], landmarks[..., 1:, :])


def test_a_single_landmark_is_the_mean_of_all_tokens():
    x = torch.randn(1, 3, 21, 4)
    torch.testing.assert_close(nystromformer(1).landmarks(x), x.mean(dim=2, keepdim=True))


def test_its_macs_are_linear_in_tokens():
    n, m, c, heads = 21, 6, 12, 3
    expected = 4 * n * c**2 + 6 * n * m * c + 2 * m**2 * c + 4 * 6 * heads * m**3
    assert nystromformer(m).macs() == expected
    assert nystromformer(m, conv=5).macs() == expected + 5 * n * c


def nearly_singular(noise):
    """Row-stochastic matrices of rank one but for noise of a given size, and such with repeated rows."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(40, 1, 16, generator=generator).softmax(dim=-1)
    scores = row.log() + noise * torch.randn(40, 16, 16, generator=generator)
    repeated = torch.randn(40, 4, 16, generator=generator).mul(4).repeat_interleave(4, dim=1)
    return torch.cat([scores, repeated + noise * torch.randn(40, 16, 16, generator=generator)]).softmax(dim=-1)


@pytest.mark.parametrize("noise", [0.0, 1e-8, 1e-6, 1e-4, 1e-2])
def test_with_the_most_iterations_nearly_singular_matrices_and_their_gradients_stay_finite(noise):
    a = nearly_singular(noise).requires_grad_()
    z = pseudo_inverse(a, MOST_ITERATIONS)
    (gradient,) = torch.autograd.grad(z.square().sum(), a)
    assert z.isfinite().all() and gradient.isfinite().all()
    exact = a.detach().double()
    residual = (exact @ z.double() @ exact - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert residual.max() < 0.02


def test_iterations_that_would_blow_up_are_refused():
    with pytest.raises(UserError, match=r"attention.nystromformer.pinv_iterations=21.*20"):
        nystromformer(6, pinv_iterations=21)
