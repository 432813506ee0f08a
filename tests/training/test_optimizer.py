import numpy as np
import pytest
from torch import nn

from effvit.model.vit import ViT
from effvit.training.optimizer import parameter_groups, schedule
from effvit.training.recipe import TrainConfig


@pytest.mark.parametrize("warmup_epochs", [0.0, 0.5, 2.0, 3.0])
def test_learning_rate_rises_linearly_then_falls_as_half_a_cosine(warmup_epochs):
    recipe, steps = TrainConfig(epochs=10, batch_size=1, lr=1.0, warmup_epochs=warmup_epochs), 20
    warmup, total = int(warmup_epochs * steps), 200
    factors = np.array([schedule(step, steps, recipe) for step in range(total)])
    assert np.allclose(factors[:warmup], np.arange(1, warmup + 1) / max(warmup, 1))
    x = np.arange(total - warmup) / (total - warmup)
    assert np.allclose(factors[warmup:], np.cos(np.pi * x / 2) ** 2)  # half-angle form of (1 + cos πx) / 2
    assert factors.max() == 1 and 0 < factors[-1] < 1e-3


@pytest.mark.parametrize(
    ("attention", "options"),
    [("fused", {}), ("linformer", {"k": 4, "share": "kv"}), ("nystromformer", {}), ("hybrid", {"window_size": 2})],
)
def test_weight_decay_spares_biases_norms_positions_and_class_token(tiny_config, attention, options):
    model = ViT(tiny_config(attention=attention, attention_options=options))
    exempt = {id(model.cls_token), id(model.pos_embed)}
    for module in model.modules():
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            exempt.add(id(module.bias))
        if isinstance(module, nn.LayerNorm):
            exempt.add(id(module.weight))
    groups = {group["weight_decay"]: group["params"] for group in parameter_groups(model, 0.3)}
    assert {id(p) for p in groups[0.0]} == exempt
    assert {id(p) for p in groups[0.3]} == {id(p) for p in model.parameters()} - exempt
    assert sum(map(len, groups.values())) == len(list(model.parameters())), "none twice"
