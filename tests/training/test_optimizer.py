import numpy as np
import pytest
import torch
from torch import nn

from effvit.errors import UserError
from effvit.model.vit import ViT
from effvit.training.optimizer import build_optimizer, parameter_groups, schedule
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


def of_timm(**changes):
    timm = pytest.importorskip("timm")
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.models.vision_transformer.VisionTransformer(**size, **changes)


def of_transformers(name, **changes):
    transformers = pytest.importorskip("transformers")
    size = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    size |= {"intermediate_size": 48}
    config = getattr(transformers, f"{name}Config")
    config = config(**size) if name != "Siglip" else config(vision_config=size)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def of_torchvision():
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 4, 2, 3, 24, 48, num_classes=5)


FOREIGN = {
    "timm": (of_timm, {"cls_token", "pos_embed"}, 8),
    "timm_registers": (lambda: of_timm(reg_tokens=2, qk_norm=True), {"cls_token", "reg_token", "pos_embed"}, 8),
    "vit": (lambda: of_transformers("ViT"), {"cls_token", "position_embeddings"}, 12),
    "deit": (lambda: of_transformers("DeiT"), {"cls_token", "position_embeddings", "distillation_token"}, 12),
    "dinov2": (
        lambda: of_transformers("Dinov2WithRegisters"),
        {"cls_token", "position_embeddings", "register_tokens", "mask_token"},
        None,
    ),
    "siglip": (lambda: of_transformers("Siglip"), {"position_embedding.weight"}, 12),
    "torchvision": (of_torchvision, {"class_token", "pos_embedding"}, 8),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_weight_decay_spares_the_same_in_models_of_other_libraries(name):
    build, vectors, _ = FOREIGN[name]
    model = build()
    spared = {id(parameter) for parameter in parameter_groups(model, 0.3)[1]["params"]}
    named = {each for each, parameter in model.named_parameters() if parameter.ndim > 1 and id(parameter) in spared}
    assert {next(vector for vector in vectors if each.endswith(vector)) for each in named} == vectors
    assert len(named) == len(vectors)
    assert all(id(parameter) in spared for parameter in model.parameters() if parameter.ndim < 2)


@pytest.mark.parametrize("name", [name for name, (_, _, matrices) in FOREIGN.items() if matrices])
def test_muon_takes_the_matrices_of_blocks_of_other_libraries(name):
    """Query, key and value maps by head: 3 heads, merged or not; 4 or 6 matrices a block, none from elsewhere."""
    build, _, count = FOREIGN[name]
    model = build()
    optimizer = build_optimizer(model, TrainConfig(epochs=1, batch_size=1, lr=1e-2, optimizer="muon"))
    names = {parameter: each for each, parameter in model.named_parameters()}
    maps = {names[p]: group["maps"] for group in optimizer.param_groups if "maps" in group for p in group["params"]}
    assert len(maps) == count and {each.split(".0.")[0].split(".1.")[0] for each in maps if "_layer_" not in each} <= {
        "blocks",
        "vit.layers",
        "vit.encoder.layer",
        "deit.layers",
        "deit.encoder.layer",
        "vision_model.encoder.layers",
    }
    for each, number in maps.items():
        split = any(part in each for part in ("q_proj", "k_proj", "v_proj", "query", "key", "value"))
        assert number == (9 if "qkv" in each or "in_proj" in each else 3 if split else 1), each
    before = {each: parameter.clone() for each, parameter in model.named_parameters()}
    logits = model(torch.randn(2, 3, 16, 16))
    getattr(logits, "logits", logits).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(before[each], parameter) for each, parameter in model.named_parameters() if each in maps)


def test_muon_refuses_a_model_whose_blocks_it_does_not_know():
    recipe = TrainConfig(epochs=1, batch_size=1, lr=1e-2, optimizer="muon")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(UserError, match="optimizer=muon: no blocks with attention are known in Sequential"):
        build_optimizer(model, recipe)
