import numpy as np
import pytest
import torch

from effvit.data.loading.transforms import crop, cutmix, erase, flip, mixup, to_float

IMAGES = torch.randint(0, 256, (64, 12, 10, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_each_crop_is_its_image_padded_and_cut_by_a_loop(padding):
    tops, lefts = torch.randint(2 * padding + 1, (2, 64))
    cropped = crop(IMAGES, padding, tops, lefts).numpy()
    for image, cut, top, left in zip(IMAGES.numpy(), cropped, tops.tolist(), lefts.tolist(), strict=True):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        assert np.array_equal(cut, padded[top : top + 12, left : left + 10])


def test_chosen_images_are_mirrored_and_others_left_alone():
    flipped = torch.arange(64) % 3 == 0
    for image, result, chosen in zip(IMAGES.numpy(), flip(IMAGES, flipped).numpy(), flipped.tolist(), strict=True):
        assert np.array_equal(result, image[:, ::-1] if chosen else image)


def test_erased_box_is_zero_and_the_rest_as_it_was():
    images = torch.rand(3, 2, 8, 6) + 1
    boxes = torch.tensor([[2, 1, 3, 4], [0, 0, 8, 6], [5, 5, 0, 1]]).T
    expected = images.clone()
    for image, (top, left, height, width) in zip(expected, boxes.T.tolist(), strict=True):
        image[:, top : top + height, left : left + width] = 0
    assert torch.equal(erase(images, boxes), expected)


def test_mixup_blends_neighbours_and_their_targets_alike():
    images, targets = torch.rand(5, 3, 4, 4), torch.eye(5)
    mixed, soft = mixup(images, targets, 0.7)
    for index, other in enumerate([1, 0, 3, 2, 4]):
        torch.testing.assert_close(mixed[index], 0.7 * images[index] + 0.3 * images[other])
        torch.testing.assert_close(soft[index], 0.7 * targets[index] + 0.3 * targets[other])


def test_cutmix_pastes_the_neighbours_box_and_counts_its_area():
    images, targets = torch.rand(5, 3, 8, 8), torch.eye(5)
    mixed, soft = cutmix(images, targets, (1, 2, 4, 6))
    for index, other in enumerate([1, 0, 3, 2, 4]):
        expected = images[index].clone()
        expected[:, 1:5, 2:8] = images[other][:, 1:5, 2:8]
        assert torch.equal(mixed[index], expected)
        torch.testing.assert_close(soft[index], (1 - 24 / 64) * targets[index] + 24 / 64 * targets[other])


@pytest.mark.parametrize("mix", [lambda x, t: mixup(x, t, 0.3), lambda x, t: cutmix(x, t, (0, 1, 3, 3))])
def test_a_batch_cut_between_pairs_is_mixed_as_it_would_be_whole(mix):
    images, targets = torch.rand(7, 3, 4, 4), torch.eye(7)
    whole = mix(images, targets)
    parts = [mix(images[part], targets[part]) for part in (slice(0, 4), slice(4, 7))]
    for index in (0, 1):
        assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])


def test_normalisation_agrees_with_torchvision():
    from torchvision.transforms import functional as peer

    mean, std = (0.49, 0.48, 0.45), (0.2, 0.3, 0.4)
    result = to_float(IMAGES, mean, std)
    for image, normalised in zip(IMAGES.numpy(), result, strict=True):
        expected = peer.normalize(peer.to_tensor(image), list(mean), list(std))
        torch.testing.assert_close(normalised, expected, atol=1e-5, rtol=1e-5)
    assert result.dtype == torch.float32 and result.is_contiguous()
