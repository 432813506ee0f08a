import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effvit.attention import available_attention
from effvit.model.names import standard_to_fused
from effvit.model.vit import ViT
from effvit.training.muon import Joint, Muon, orthogonalize
from effvit.training.optimizer import build_optimizer
from effvit.training.recipe import TrainConfig

RECIPE = {"epochs": 1, "batch_size": 1, "lr": 0.01, "weight_decay": 0.3}


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (3, 7, 4), (1, 6)])
def test_it_is_the_quintic_of_each_singular_value(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert torch.allclose(orthogonalize(matrices), u @ torch.diag_embed(s) @ vh, atol=1e-10)


def test_singular_values_end_near_one_and_nothing_stays_nothing():
    s = torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01])
    u, _, vh = torch.linalg.svd(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(torch.linalg.svdvals(orthogonalize(u @ s.diag() @ vh)), torch.ones(5), atol=0.35)
    assert torch.equal(orthogonalize(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_steps_are_those_of_torch_within_bfloat16():
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(shape, generator=generator) for shape in ((6, 6), (6, 6), (18, 6), (6, 24))]
    theirs = copy.deepcopy(ours)
    mine = Muon(ours, lr=0.1, weight_decay=0.3)
    peer = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        before = [matrix.clone() for matrix in ours]
        for a, b in zip(ours, theirs, strict=True):
            b.copy_(a)
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        peer.step()
        for old, a, b in zip(before, ours, theirs, strict=True):
            assert torch.dist(a, b) < 0.03 * torch.dist(a, old)


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("attention", available_attention())
def test_each_parameter_has_one_optimizer_and_the_decay_that_it_has_with_adamw(tiny_config, attention):
    model = ViT(tiny_config(attention=attention, image_size=32))
    groups, plain = (
        build_optimizer(model, TrainConfig(**RECIPE, optimizer=name)).param_groups for name in ("muon", "adamw")
    )
    decay, expected = ({id(p): group["weight_decay"] for group in g for p in group["params"]} for g in (groups, plain))
    assert decay == expected
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())), "none twice"
    orthogonal = {id(p) for group in groups if "momentum" in group for p in group["params"]}
    assert {id(m.weight) for m in model.blocks.modules() if isinstance(m, nn.Linear)} <= orthogonal
    assert not {id(p) for p in (model.head.weight, model.patch_embed.proj.weight, model.pos_embed)} & orthogonal


def test_maps_that_lie_merged_are_moved_as_those_that_lie_apart(tiny_config):
    recipe = TrainConfig(**RECIPE, optimizer="muon")
    standard, fused = (ViT(tiny_config(attention=attention)) for attention in ("standard", "fused"))
    fused.load_state_dict(standard_to_fused(standard.state_dict()))
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for model in (standard, fused):
        optimizer = build_optimizer(model, recipe)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(images), torch.arange(4)).backward()
            optimizer.step()
    merged, expected = fused.state_dict(), standard_to_fused(standard.state_dict())
    # A key's bias changes no softmax: its gradient is rounding, which AdamW makes a step of.
    names = [name for name in merged if not name.endswith("qkv.bias")]
    assert all(torch.allclose(merged[name], expected[name], atol=1e-4) for name in names)
    assert torch.allclose(standard(images), fused(images), atol=1e-4)


def test_it_goes_on_from_its_state(tiny_config):
    recipe = TrainConfig(**RECIPE, optimizer="muon")
    model = ViT(tiny_config())
    optimizer = build_optimizer(model, recipe)
    for seed in range(4):
        if seed == 2:
            other = copy.deepcopy(model)
            fresh = build_optimizer(other, recipe)
            fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        gradients(model, seed)
        optimizer.step()
    for seed in (2, 3):
        gradients(other, seed)
        for group in fresh.param_groups:
            group["lr"] = recipe.lr
        fresh.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_joint_step_is_that_of_its_parts_at_the_rates_of_its_groups():
    start = [torch.randn(3, 3), torch.randn(4)]
    gradient = [torch.randn(3, 3), torch.randn(4)]

    def parts(lr):
        matrix, vector = (nn.Parameter(tensor.clone()) for tensor in start)
        matrix.grad, vector.grad = gradient
        return matrix, vector, Muon([matrix], lr=lr, weight_decay=0.0), torch.optim.AdamW([vector], lr=lr)

    *apart, muon, adamw = parts(0.1)
    muon.step()
    adamw.step()
    *together, muon, adamw = parts(1.0)
    joint = Joint(muon, adamw)
    for group in joint.param_groups:
        group["lr"] = 0.1
    joint.step()
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
