import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from effvit import ViT, available_attention, build_attention, swap_attention, visualize_attention, visualize_images
from effvit.errors import UserError
from effvit.evaluation.predict import rollout_maps
from effvit.evaluation.score import attention_rollout
from effvit.notebook.inputs import as_inputs
from effvit.notebook.rollout import rollout

OPTIONS = {"hybrid": {"window_size": 2}, "linformer": {"k": 4}}


def pictures_of(figure):
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


def titles_of(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


@pytest.mark.parametrize("name", available_attention())
def test_rollout_of_our_vit_is_that_of_its_own_maps(digits, tiny_config, name):
    torch.manual_seed(0)
    model = ViT(tiny_config(attention=name, attention_options=OPTIONS.get(name, {}), initializer_range=0.3)).eval()
    images = digits.split("validation")[0][:3]
    logits, maps = rollout_maps(model, images, digits.mean, digits.std)
    ours, shares = rollout(model.train(), as_inputs(torch.from_numpy(images), model, digits))
    torch.testing.assert_close(ours, logits)
    assert np.allclose(shares, maps, atol=1e-6) and model.training


class Uniform(nn.Module):
    """A timm-like model of mechanisms without class token, in blocks that call them by a keyword."""

    def __init__(self, layers=(0, 1), global_pool="avg"):
        super().__init__()
        self.global_pool = global_pool
        make = {"prefix_tokens": 1, "depth": 2}
        self.blocks = nn.ModuleList(build_attention("fused", 8, 2, (2, 4), layer=i, **make) for i in layers)
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        x = images.mean(1).unfold(1, 4, 4).unfold(2, 4, 4).flatten(1, 2)[..., :2].flatten(2)  # (B, 8, 8)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        for block in self.blocks:
            x = x + block(x=x)
        return self.head(x[:, 0])


@pytest.mark.parametrize("global_pool", ["avg", "token"])
def test_rollout_starts_where_the_output_is_made(global_pool):
    torch.manual_seed(0)
    model, images = Uniform(global_pool=global_pool), torch.randn(2, 3, 8, 16)
    inner = []
    hooks = [
        block.register_forward_hook(lambda module, args, kwargs, y: inner.append(kwargs["x"]), with_kwargs=True)
        for block in model.blocks
    ]
    logits, shares = rollout(model, images)
    for hook in hooks:
        hook.remove()
    maps = [block(x.clone(), return_map=True)[1] for block, x in zip(model.blocks, inner, strict=True)]
    product = torch.eye(9)
    for each in maps:
        product = (0.5 * each.mean(1) + 0.5 * torch.eye(9)) @ product
    row = product[:, 0, 1:] if global_pool == "token" else product[:, 1:, 1:].mean(1)
    expected = row / row.sum(1, keepdim=True)
    assert np.allclose(shares, expected.detach().view(2, 2, 4), atol=1e-6) and logits.shape == (2, 3)


def test_rollout_of_all_patches_is_their_mean():
    maps = [torch.rand(2, 3, 6, 6) for _ in range(2)]
    total = attention_rollout(maps, 2, class_token=False)
    torch.testing.assert_close(total.sum(1), torch.ones(2))
    assert not torch.allclose(total, attention_rollout(maps, 2))


@pytest.mark.parametrize("library", ["timm", "transformers", "torchvision"])
def test_attention_of_a_swapped_model_is_drawn(library):
    module = pytest.importorskip(library)
    if library == "timm":
        size = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 4}
        model = module.models.vision_transformer.VisionTransformer(**size)
    elif library == "transformers":
        size = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2}
        config = module.ViTConfig(**size, num_attention_heads=2, intermediate_size=48, num_labels=4)
        model = module.ViTForImageClassification(config)
    else:
        model = module.models.VisionTransformer(16, 4, 2, 2, 24, 48, num_classes=4)
    swap_attention(model, "linformer", k=4)
    figure = visualize_attention(model, torch.randn(3, 3, 16, 16), labels=[0, 1, 2])
    assert len(pictures_of(figure)) == 6 and "linformer" in figure.get_suptitle()


def test_attention_of_a_data_set_is_that_of_different_classes(digits, tiny_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # which would want a display
    figure = visualize_attention(ViT(tiny_config()), digits, count=5)
    assert isinstance(figure, Figure)
    titles = [title.split("\nas ") for title in titles_of(figure)]
    assert len({label for label, _ in titles}) == 5 and {guess for _, guess in titles} <= set(digits.classes)
    top = [axes.images[0].get_array() for axes in figure.axes if axes.get_title()]
    images, labels = digits.split("validation")
    for picture, (label, _) in zip(top, titles, strict=True):
        assert any(np.array_equal(picture, images[i]) for i in np.flatnonzero(labels == int(label)))


def test_images_are_drawn_as_they_were_before_they_were_normalised(digits):
    images, labels = digits.split("validation")
    normalised = as_inputs(torch.from_numpy(images[:5]), nn.Identity(), digits)
    figure = visualize_images(normalised, labels[:5], data=digits)
    for picture, image in zip(pictures_of(figure), images, strict=False):
        assert np.abs(picture.astype(int) - image).max() <= 1
    assert titles_of(figure) == [digits.classes[label] for label in labels[:5]]


def test_images_of_a_loader_are_stretched_from_black_to_white():
    loader = DataLoader(TensorDataset(torch.randn(20, 1, 8, 8) * 5, torch.arange(20)), batch_size=12)
    figure = visualize_images(loader, count=10)
    shown = pictures_of(figure)
    assert len(shown) == 10 and titles_of(figure) == [str(i) for i in range(10)]
    assert all((picture.min(), picture.max()) == (0, 255) and picture.shape == (8, 8, 3) for picture in shown)


def test_a_data_set_shows_so_many_images_of_each_class(digits):
    assert len(pictures_of(visualize_images(digits, count=3))) == 30


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), "Sequential: no attention map to draw"),
        (Uniform(layers=(1,)), "Uniform: blocks 1 of 2 have a mechanism; rollout goes through all"),
    ],
)
def test_a_model_without_maps_is_told_in_one_line(model, line):
    with pytest.raises(UserError, match=line) as caught:
        visualize_attention(model, torch.zeros(1, 3, 16, 16))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"labels": [1]}, "labels: expected one for each of 2 images"),
        ({"labels": 1}, "labels: expected one for each of 2 images"),
        ({"count": 0}, "count=0: expected at least 1"),
        ({"labels": [0, 12]}, "labels: has 12, expected 0 to 9"),
    ],
)
def test_wrong_labels_are_told_in_one_line(digits, changes, line):
    with pytest.raises(UserError, match=line):
        visualize_images(np.zeros((2, 8, 8, 3), np.uint8), data=digits, **changes)
