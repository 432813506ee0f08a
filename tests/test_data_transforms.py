import numpy as np
import pytest
import torch

from effvit.data.transforms import random_crop, random_horizontal_flip, to_float

IMAGES = torch.randint(0, 256, (64, 12, 10, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_each_crop_is_one_of_its_own_image_cut_by_a_loop(padding):
    cropped = random_crop(IMAGES, padding, generator())
    tops, lefts = torch.randint(2 * padding + 1, (2, 64), generator=generator()).tolist()
    for image, crop, top, left in zip(IMAGES.numpy(), cropped.numpy(), tops, lefts, strict=True):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        assert np.array_equal(crop, padded[top : top + 12, left : left + 10])


def test_every_offset_occurs_about_equally_often():
    marks = torch.zeros(9000, 3, 3, 1, dtype=torch.uint8)
    marks[:, 1, 1] = 1
    where = random_crop(marks, 1, generator()).flatten(1).argmax(1)
    counts = torch.bincount(where, minlength=9).double()
    assert (counts - 1000).abs().max() < 5 * (9000 * 1 / 9 * 8 / 9) ** 0.5


def test_each_image_is_flipped_whole_or_left_alone_about_half_of_the_time():
    images = IMAGES.repeat(20, 1, 1, 1)
    flipped = random_horizontal_flip(images, generator())
    same = torch.tensor([torch.equal(a, b) for a, b in zip(images, flipped, strict=True)])
    mirrored = torch.tensor([torch.equal(a.flip(1), b) for a, b in zip(images, flipped, strict=True)])
    assert torch.all(same ^ mirrored)
    assert abs(same.double().mean() - 0.5) < 5 * 0.5 / len(images) ** 0.5


@pytest.mark.parametrize("augment", [lambda x, g: random_crop(x, 4, g), random_horizontal_flip])
def test_the_generator_alone_decides(augment):
    before = IMAGES.clone()
    torch.manual_seed(1)
    first = augment(IMAGES, generator(3))
    torch.manual_seed(2)
    assert torch.equal(first, augment(IMAGES, generator(3)))
    assert not torch.equal(first, augment(IMAGES, generator(4)))
    assert torch.equal(IMAGES, before)


def test_normalisation_agrees_with_torchvision():
    from torchvision.transforms import functional as peer

    mean, std = (0.49, 0.48, 0.45), (0.2, 0.3, 0.4)
    result = to_float(IMAGES, mean, std)
    for image, normalised in zip(IMAGES.numpy(), result, strict=True):
        expected = peer.normalize(peer.to_tensor(image), list(mean), list(std))
        torch.testing.assert_close(normalised, expected, atol=1e-5, rtol=1e-5)
    assert result.dtype == torch.float32 and result.is_contiguous()
