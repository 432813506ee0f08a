import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, RandomResizedCrop, Resize

from effvit.data.loading.views import evaluation_view, random_box, random_view

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (128, 128), (100, 64), (1000, 129), (128, 301), (1300, 65)])
def test_evaluation_view_is_torchvision_resize_and_centre_crop(shape):
    image = NOISE.resize(shape)
    peer = CenterCrop(112)(Resize(128, InterpolationMode.BICUBIC)(image))
    assert np.array_equal(np.asarray(evaluation_view(image, 112)), np.asarray(peer))


@pytest.mark.parametrize("shape", [(4001, 1), (1, 4001), (65000, 2), (3000, 140)])
def test_strip_is_seen_in_its_middle_and_never_enlarged_as_a_whole(monkeypatch, shape):
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *rest: sizes.append(size) or resize(self, size, *rest)
    )
    bars = np.zeros((*shape[::-1], 3), np.uint8)
    middle = tuple(slice(length // 2 - 3 * min(shape), length // 2 + 3 * min(shape)) for length in bars.shape[:2])
    bars[tuple(part if part.start > 0 else slice(None) for part in middle)] = 200
    view = np.asarray(evaluation_view(Image.fromarray(bars), 112))
    assert view.shape == (112, 112, 3) and np.all(view == 200)
    assert all(width * height <= 20 * 128 * 128 for width, height in sizes)


def test_random_boxes_are_distributed_as_torchvision_draws_them():
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    ours = np.array([random_box((90, 60), 0.2, rng) for _ in range(4000)], dtype=float)
    ours[:, 2:] -= ours[:, :2]
    drawn = [RandomResizedCrop.get_params(NOISE, [0.2, 1], [3 / 4, 4 / 3]) for _ in range(4000)]
    theirs = np.array([(left, top, w, h) for top, left, h, w in drawn], dtype=float)
    for column in range(4):
        quantiles = [np.quantile(boxes[:, column], np.linspace(0.05, 0.95, 10)) for boxes in (ours, theirs)]
        assert np.abs(quantiles[0] - quantiles[1]).max() <= 3


@pytest.mark.parametrize("shape", [(90, 60), (1000, 8), (8, 1000), (1, 1), (3, 2)])
def test_random_boxes_lie_in_the_image_and_keep_their_share_of_it(shape):
    rng = np.random.default_rng(1)
    for _ in range(500):
        left, top, right, bottom = random_box(shape, 0.5, rng)
        assert 0 <= left < right <= shape[0] and 0 <= top < bottom <= shape[1]
        if shape == (90, 60):
            assert (right - left) * (bottom - top) >= 0.5 * 90 * 60 - 90


def test_random_view_is_the_box_enlarged():
    view = random_view(NOISE, 32, 0.3, np.random.default_rng(5))
    box = random_box(NOISE.size, 0.3, np.random.default_rng(5))
    assert np.array_equal(np.asarray(view), np.asarray(NOISE.resize((32, 32), Image.Resampling.BILINEAR, box=box)))
