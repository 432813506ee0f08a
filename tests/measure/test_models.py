"""``effvit.compare``: any models side by side, held against models whose cost is known."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from foreign import timm_vit, transformers_vit
from torch import nn

from effvit import ViT, ViTConfig, compare
from effvit.errors import UserError
from effvit.measure import latency, side_by_side

pytestmark = pytest.mark.slow

IMAGES = torch.zeros(4, 3, 16, 16)
MIB = 2**20
QUICK = {"budget_s": 1e-3}


class Known(nn.Module):
    """One linear map to 7 logits, whose call takes ``seconds`` by the clock below and ``mib`` of scratch memory."""

    running: "Known"

    def __init__(self, seconds=1.0, mib=0, classes=7):
        super().__init__()
        self.head = nn.Linear(768, classes, bias=False)
        self.seconds, self.mib = seconds, mib

    def forward(self, images):
        Known.running = self
        scratch = torch.zeros(self.mib * MIB, dtype=torch.uint8)
        return self.head(images.flatten(1)) + 0 * scratch[:1].sum()


class Drifting:
    """A clock by which a call takes its model's seconds, and more with every measurement."""

    def __init__(self, drift=0.0):
        self.drift, self.measured = drift, 0

    def __call__(self, call, repeats):
        call()
        self.measured += 1
        return Known.running.seconds * repeats * (1 + self.drift) ** self.measured


@pytest.fixture
def clock(monkeypatch):
    clock = Drifting()
    monkeypatch.setattr(latency, "stopwatch_for", lambda device: clock)
    return clock


def test_times_are_medians_of_the_batch_and_ratios_are_to_the_first_model(clock):
    table = compare({"a": Known(0.5), "b": Known(1.5), "c": Known(0.25)}, IMAGES, **QUICK)
    assert list(table.index) == ["a", "b", "c"] and table.index.name == "model"
    assert table["latency_ms"].tolist() == table["latency_q25"].tolist() == [500, 1500, 250]
    assert table["images_per_s"].tolist() == pytest.approx([8, 8 / 3, 16])
    for column in ("latency_ratio", "latency_ratio_low", "latency_ratio_high"):
        assert table[column].tolist() == [1, 3, 0.5]
    assert (table["n_rounds"] == 6).all() and (table["status"] == "ok").all()
    other = compare({"a": Known(0.5), "b": Known(1.5)}, IMAGES, baseline="b", **QUICK)
    assert other["latency_ratio"].tolist() == pytest.approx([1 / 3, 1])


def test_the_ratio_is_paired_so_that_drift_cancels(clock):
    clock.drift = 0.05
    table = compare({"a": Known(1.0), "b": Known(3.0)}, IMAGES, budget_s=200)
    assert table.loc["b", "latency_q75"] / table.loc["b", "latency_q25"] > 1.3
    assert table.loc["b", "latency_ratio_low"] < 3 < table.loc["b", "latency_ratio_high"]
    assert table.loc["b", "latency_ratio"] == pytest.approx(3, rel=0.06)


def test_memory_parameters_and_macs_are_those_of_the_modules():
    table = compare({"small": Known(mib=2), "large": Known(mib=6)}, IMAGES, **QUICK)
    assert table["memory_mib"].tolist() == pytest.approx([2, 6], abs=0.01)
    assert table.loc["large", "memory_ratio"] == pytest.approx(3, abs=0.01)
    assert table["parameters"].tolist() == table["macs"].tolist() == [768 * 7] * 2
    assert table["parameters_ratio"].tolist() == table["macs_ratio"].tolist() == [1, 1]


def test_models_of_every_library_stand_side_by_side():
    vit = ViT(ViTConfig(image_size=16, num_hidden_layers=2, num_attention_heads=3, num_classes=7))
    models = {"ours": vit, "timm": timm_vit(), "transformers": transformers_vit()}
    table = compare(models, IMAGES, train=True, **QUICK)
    assert (table["macs"] == vit.macs()).all()
    assert (table["parameters"] == sum(p.numel() for p in vit.parameters())).all()
    assert (table["status"] == "ok").all() and (table[["train_ms", "latency_ms"]] > 0).all(axis=None)
    assert (table["train_memory_mib"] > table["memory_mib"]).all()
    assert not table.isna().any(axis=None)


class Restless(Known):
    """A model that changes with every call in training mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout()

    def forward(self, images):
        return super().forward(self.drop(self.norm(images)))


def test_models_and_random_numbers_stay_as_they_were():
    model = Restless().train()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    compare({"a": model}, torch.randn(4, 3, 16, 16, generator=torch.Generator()), train=True, **QUICK)
    assert torch.equal(torch.rand(3), expected)
    assert model.training and model.drop.training and not model.norm.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model(IMAGES).sum().backward()


def test_only_what_is_trained_gets_a_gradient():
    class Half(Known):
        def __init__(self, frozen):
            super().__init__()
            self.body = nn.Linear(768, 768).requires_grad_(not frozen)

        def forward(self, images):
            return super().forward(self.body(images.flatten(1)))

    table = compare({"all": Half(False), "head": Half(True)}, IMAGES, train=True, **QUICK)
    weights = 4 * (768 * 768 + 768) / MIB
    assert table.loc["all", "train_memory_mib"] - table.loc["head", "train_memory_mib"] > 0.9 * weights
    with pytest.raises(UserError, match="frozen: has no parameter that requires a gradient"):
        compare({"frozen": Known().requires_grad_(False)}, IMAGES, train=True, **QUICK)


def test_what_cannot_be_counted_has_no_macs():
    class DependsOnValues(Known):
        def forward(self, images):
            return super().forward(images if images.sum() > -1 else -images)

    table = compare({"plain": Known(), "other": DependsOnValues()}, IMAGES, **QUICK)
    assert table["macs"].isna().tolist() == table["macs_ratio"].isna().tolist() == [False, True]
    assert table.loc["plain", "macs"] == 768 * 7 and (table["latency_ms"] > 0).all()


@pytest.mark.parametrize("greedy", ["a", "b"])
def test_a_model_without_enough_memory_has_a_row_that_says_so(greedy):
    class Greedy(Known):
        def forward(self, images):
            if images.is_cpu and self.training is False:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(images)

    models = {name: Greedy() if name == greedy else Known() for name in "ab"}
    table = compare(models, IMAGES, **QUICK)
    other = "b" if greedy == "a" else "a"
    assert table["status"].to_dict() == {greedy: "out of memory", other: "ok"}
    assert np.isnan(table.loc[greedy, "latency_ms"]) and table.loc[other, "latency_ms"] > 0
    assert np.isnan(table.loc[other, "latency_ratio"]) == (greedy == "a")


def fail(images):
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("models", "arguments", "says"),
    [
        ({}, {}, "models: expected a dictionary of at least one"),
        ([Known()], {}, "models: expected a dictionary of at least one"),
        ({"a": 3}, {}, "models: 'a' is int, expected names and modules"),
        ({"a": Known()}, {"images": [1]}, "images: got list, expected a tensor"),
        ({"a": Known()}, {"images": torch.zeros(0, 3, 16, 16)}, "images: got shape (0, 3, 16, 16), expected a tensor"),
        (
            {"a": Known()},
            {"images": torch.zeros(1, 3, 8, 8)},
            "a: does not run on images of shape (1, 3, 8, 8) and tor",
        ),
        (
            {"a": Known()},
            {"images": IMAGES.half()},
            "a: does not run on images of shape (4, 3, 16, 16) and torch.float16",
        ),
        (
            {"a": Known(), "b": Known(classes=9)},
            {},
            "b: gives logits (4, 9), a (4, 7); expected models of the same task",
        ),
        ({"a": Known()}, {"baseline": "b"}, "baseline='b': unknown, expected one of a"),
        ({"a": Known()}, {"budget_s": 0}, "budget_s=0: must be a number above 0"),
        ({"a": Known().to("meta")}, {}, "a: is on meta, the images are on cpu"),
        ({"a": Known()}, {"images": IMAGES.to("meta")}, "images: on meta, where peak memory cannot be told"),
        ({"a": nn.Module()}, {}, "a: does not run on images of shape (4, 3, 16, 16)"),
    ],
)
def test_what_does_not_fit_is_one_line(models, arguments, says):
    arguments = {"images": IMAGES} | QUICK | arguments
    with pytest.raises(UserError) as caught:
        compare(models, **arguments)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_output_without_logits_is_one_line():
    class Nothing(Known):
        def forward(self, images):
            return {"features": images}

    with pytest.raises(UserError, match=r"a: does not run on .*: the model returns dict: expected logits"):
        compare({"a": Nothing()}, IMAGES, **QUICK)


def test_modes_are_as_they_were_after_an_error_too(monkeypatch):
    model = Known().train()
    monkeypatch.setattr(side_by_side, "interleaved", fail)
    with pytest.raises(TypeError):
        compare({"a": model}, IMAGES, **QUICK)
    assert model.training


@pytest.mark.parametrize("package", ["pandas", "scipy", "ptflops"])
def test_without_its_packages_it_says_what_to_install(package):
    code = f"""
import sys
sys.modules[{package!r}] = None
import torch
from effvit import compare
from effvit.errors import UserError
try:
    compare({{"a": torch.nn.Flatten()}}, torch.zeros(2, 3))
except UserError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == f"compare needs the package {package}: pip install 'effvit[study]'\n"
