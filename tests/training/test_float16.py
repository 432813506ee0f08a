"""float16 with a loss scale, which belongs to CUDA, on the CPU: PyTorch's scaler and autocast are there as well."""

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision

from effvit import policy
from effvit.training.loop import Step, Training
from effvit.training.recipe import TrainConfig


@pytest.fixture
def float16(monkeypatch):
    """Training in float16 on the CPU; a fabric of it."""

    def make_fabric(*args):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        return Fabric(accelerator="cpu", plugins=[MixedPrecision("16-mixed", device="cpu", scaler=scaler)])

    monkeypatch.setattr("effvit.training.loop.make_fabric", make_fabric)
    return make_fabric()


def losses(config, dataset, **changes):
    fields = {"epochs": 1, "batch_size": 256, "lr": 3e-3, "device": "cpu"} | changes
    with policy.kept():
        training = Training(config, dataset, TrainConfig(**fields), seed=0, horizontal_flip=False)
        return [event.loss for event in training.run() if isinstance(event, Step)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_it_trains_with_every_optimiser_clipped_or_not(digits, tiny_config, optimizer, clip_norm, request):
    changes = {"optimizer": optimizer, "clip_norm": clip_norm}
    exact = losses(tiny_config(num_hidden_layers=1), digits, **changes)
    request.getfixturevalue("float16")
    scaled = losses(tiny_config(num_hidden_layers=1), digits, precision="16-mixed", **changes)
    assert scaled == pytest.approx(exact, rel=0.02) and scaled != exact


def test_what_is_clipped_is_the_gradient_without_the_scale(float16):
    from effvit.training.optimizer import clip_gradients

    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    _, update = float16.setup(torch.nn.Linear(1, 1), optimizer)
    float16.backward((weight * torch.tensor([3.0, 4.0, 0.0, 0.0])).sum())
    assert weight.grad.norm() > 1000
    clip_gradients(float16, optimizer, 2.0)
    torch.testing.assert_close(weight.grad, torch.tensor([1.2, 1.6, 0.0, 0.0]))
    update.step()
    assert weight.abs().max() > 0.05, "it is not unscaled twice"
