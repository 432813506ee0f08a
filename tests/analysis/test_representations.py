"""Similarity of layers, distance and entropy of attention: against brute force, closed forms and invariances."""

import math

import numpy as np
import pytest
import torch
from mps import on_mps

from effvit.analysis.representations import (
    LinearCKA,
    attention_distance,
    attention_entropy,
    in_float64,
    of_uniform_attention,
    patch_distances,
    weights_of,
)

N = 61


def features(seed, width, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, width, generator=generator, dtype=torch.float64) + offset


def cka_of(*layers, batches=(N,)):
    cka = LinearCKA([layer.shape[1] for layer in layers])
    for parts in zip(*(layer.split(list(batches)) for layer in layers), strict=True):
        cka.update(parts)
    return cka.matrix()


def brute_force(x, y):
    """HSIC of centred Gram matrices: tr(K H L H) / sqrt(tr(K H K H) tr(L H L H)) with H = I - 11ᵀ/n."""
    h = np.eye(len(x)) - 1 / len(x)

    def hsic(a, b):
        return np.trace(a @ a.T @ h @ b @ b.T @ h)

    return hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


@pytest.mark.parametrize("batches", [(N,), (1,) * N, (30, 30, 1), (2, 59)])
def test_cka_is_that_of_centred_gram_matrices_whatever_the_batches(batches):
    x, y = features(0, 5, offset=1e3), features(1, 90)  # far from centred; wider than there are images
    z = x[:, :3] @ features(2, 7)[:3] + 0.1 * features(3, 7)
    layers = [x, y, z]
    result = cka_of(*layers, batches=batches)
    expected = [[brute_force(a.numpy(), b.numpy()) for b in layers] for a in layers]
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-7)
    assert 0.1 < result[0, 2] < 0.999  # neither of the extremes, of which wrong formulas get some right


def test_cka_does_not_see_rotation_scale_or_offset_but_sees_stretching():
    x, y = features(0, 6), features(0, 6) @ features(1, 6)[:6] + features(2, 6)
    rotation = torch.linalg.qr(features(3, 6)[:6]).Q
    before = cka_of(x, y)[0, 1]
    assert cka_of(x @ rotation, y * 37 - 5)[0, 1].item() == pytest.approx(before.item(), rel=1e-10)
    assert cka_of(x, x @ rotation * 0.01 + 3)[0, 1].item() == pytest.approx(1, abs=1e-12)
    assert abs(cka_of(x * torch.tensor([9, 1, 1, 1, 1, 1]), y)[0, 1] - before) > 0.01


def test_cka_of_unrelated_features_falls_with_the_number_of_images_and_a_constant_has_none():
    few = cka_of(features(0, 8), features(1, 8))[0, 1]
    many = LinearCKA([8, 8])
    for seed in range(2, 80, 2):
        many.update([features(seed, 8), features(seed + 1, 8)])
    assert many.matrix()[0, 1] < few / 10
    assert cka_of(features(0, 2), torch.ones(N, 2))[0, 1].isnan()


def test_cka_refuses_features_of_other_widths():
    with pytest.raises(ValueError, match="expected"):
        LinearCKA([3, 4]).update([torch.ones(2, 3), torch.ones(2, 5)])


GRID, PATCH = (3, 4), 7


def brute_force_distance(a):
    """Mean over patch queries of Σ |a| distance / Σ |a|, patch by patch."""
    total = 0.0
    places = [(PATCH * r, PATCH * c) for r in range(GRID[0]) for c in range(GRID[1])]
    for i, here in enumerate(places):
        weights = [abs(a[1 + i][1 + j]) for j in range(len(places))]
        total += sum(w * math.dist(here, there) for w, there in zip(weights, places, strict=True)) / sum(weights)
    return total / len(places)


def maps_of(kind):
    n = 1 + GRID[0] * GRID[1]
    generator = torch.Generator().manual_seed(0)
    matrix = {
        "uniform": torch.full((n, n), 1 / n),
        "identity": torch.eye(n),
        "softmax": torch.randn(n, n, generator=generator).mul(3).softmax(dim=-1),
        "implied": torch.randn(n, n, generator=generator),  # of both signs, rows of any sum
    }[kind]
    return matrix.expand(2, 3, n, n)


@pytest.mark.parametrize("kind", ["uniform", "identity", "softmax", "implied"])
def test_distance_is_that_of_a_loop_over_patches(kind):
    maps = maps_of(kind)
    distance = attention_distance(maps, patch_distances(GRID, PATCH))
    assert distance.shape == (2, 3)
    np.testing.assert_allclose(distance, brute_force_distance(maps[0, 0].tolist()), rtol=1e-6, atol=1e-12)


def test_distance_ignores_the_class_token():
    maps = maps_of("softmax").clone()
    maps[..., 0] *= 5
    maps[..., 0, :] = torch.rand(maps.shape[-1])
    distances = patch_distances(GRID, PATCH)
    torch.testing.assert_close(attention_distance(maps, distances), attention_distance(maps_of("softmax"), distances))


def test_entropy_has_its_closed_forms():
    n = 1 + GRID[0] * GRID[1]
    assert attention_entropy(maps_of("identity")).abs().max() == 0
    torch.testing.assert_close(attention_entropy(maps_of("uniform")), torch.full((2, 3), math.log(n)).double())
    two = torch.zeros(1, 1, 4, 4)
    two[..., 0], two[..., 3] = -2.0, 6.0  # magnitudes 1/4 and 3/4 of each row
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert attention_entropy(two).item() == pytest.approx(expected)


def test_uniform_attention_is_that_of_a_matrix_of_equal_weights():
    distances = patch_distances((8, 8), 4)
    distance, entropy = of_uniform_attention(distances)
    uniform = torch.full((1, 1, 65, 65), 1 / 65, dtype=torch.float64)
    assert distance == pytest.approx(attention_distance(uniform, distances).item())
    assert entropy == pytest.approx(attention_entropy(uniform).item())
    assert (round(distance, 1), round(entropy, 2)) == (16.5, 4.17)


def test_a_row_without_weights_stays_without():
    assert weights_of(torch.zeros(1, 1, 2, 2)).tolist() == [[[[0, 0], [0, 0]]]]


def test_float64_is_the_same_numbers_where_the_device_has_none():
    x = torch.rand(3, 5)
    with pytest.raises(TypeError, match="float64"):
        on_mps(x).double()
    moved = in_float64(on_mps(x))
    assert moved.device.type == "cpu" and moved.dtype == torch.float64
    assert torch.equal(moved, x.double())


def test_float64_is_made_on_a_device_that_has_it():
    assert in_float64(torch.empty(3, device="meta")).device.type == "meta"
