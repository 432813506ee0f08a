import math

import pytest
import torch
from mechanisms import copy_maps, qkv_of
from torch.utils._python_dispatch import TorchDispatchMode

from effvit import ViT, ViTConfig, build_attention, load_model
from effvit.errors import UserError
from effvit.kernels.token_projection import at_once
from effvit.model.checkpoint import save_model
from effvit.model.resize import resize_projection

SHARES = ("none", "heads", "kv", "layers")


def linformer(share="heads", k=5, grid=(3, 4), width=12):
    torch.manual_seed(0)
    attention = build_attention("linformer", width, 3, grid, k=k, share=share)
    torch.nn.init.normal_(attention.qkv.bias)
    return attention


def model_of(share, image_size=16, layers=3):
    torch.manual_seed(0)
    return ViT(
        ViTConfig(
            image_size=image_size,
            num_hidden_layers=layers,
            attention="linformer",
            attention_options={"k": 6, "share": share},
            initializer_range=0.2,
        )
    )


@pytest.mark.parametrize("share", SHARES)
def test_with_k_equal_to_n_and_identity_projections_it_is_fused(share):
    projected = linformer(share, k=13)
    fused = build_attention("fused", 12, 3, (3, 4))
    with torch.no_grad():
        for projection in (projected.E, projected.F):
            projection.copy_(torch.eye(13))
    fused.load_state_dict({key: tensor for key, tensor in projected.state_dict().items() if key not in "EF"})
    x = torch.randn(2, 13, 12)
    torch.testing.assert_close(projected(x), fused(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(projected(x, True)[1], fused(x, True)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", SHARES)
def test_it_is_attention_to_projected_keys_and_values_head_by_head(share):
    attention = linformer(share).double()
    x = torch.randn(2, 13, 12, dtype=torch.float64)
    bias = attention.qkv.bias.view(3, 3, 1, 4)  # (q k v, head, 1, d)
    q, k, v = qkv_of(attention, x)
    heads = []
    for h in range(3):
        e, f = (p[h] if share == "none" else p for p in (attention.E, attention.F))
        keys = e @ (k[:, h] - bias[1, h]) + bias[1, h]  # the bias once a row, after the projection
        values = f @ (v[:, h] - bias[2, h]) + bias[2, h]
        heads.append((q[:, h] @ keys.mT / math.sqrt(4)).softmax(dim=-1) @ values)
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=-1)))


def test_sharing_is_of_parameters_not_of_values():
    shapes = {
        share: [tuple(p.shape) for name, p in linformer(share).named_parameters() if name in "EF"] for share in SHARES
    }
    assert shapes == {"none": [(3, 5, 13)] * 2, "heads": [(5, 13)] * 2, "kv": [(5, 13)], "layers": [(5, 13)]}


def test_where_e_and_f_differ_they_start_apart():
    assert not torch.equal(linformer("heads").E, linformer("heads").F)


@pytest.mark.parametrize("share", SHARES)
def test_a_projected_row_has_the_scale_of_a_token(share):
    attention = linformer(share, k=64, grid=(16, 16))
    rows = attention.E @ torch.randn(257, 400)
    assert rows.std().item() == pytest.approx(1, abs=0.05)


def test_layers_share_one_real_parameter_of_the_model():
    model = model_of("layers")
    first, *rest = model.attentions()
    assert all(attention.E is first.E and attention.F is first.E for attention in rest)
    projections = [name for name, _ in model.named_parameters() if name.endswith((".E", ".F"))]
    assert projections == ["blocks.0.attn.E"]
    before = rest[-1].E.detach().clone()
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(rest[-1].E, before)
    assert rest[-1].E is first.E


def test_two_models_share_nothing():
    assert model_of("layers").attentions()[0].E is not model_of("layers").attentions()[0].E


@pytest.mark.parametrize("share", SHARES)
def test_a_model_gives_the_same_logits_after_saving_and_loading(share, tmp_path):
    model = model_of(share).eval()
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), model(images))
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    assert {name: p.numel() for name, p in loaded.named_parameters()} == parameters
    if share == "layers":
        assert loaded.attentions()[-1].F is loaded.attentions()[0].E


def test_another_grid_is_refused_by_name_and_shapes_and_told_what_to_call():
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.E.*\(6, 17\).*\(6, 65\).*resize_projection"):
        model_of("heads", image_size=32).load_state_dict(model_of("heads", image_size=16).state_dict())


def test_a_projection_of_other_sharing_is_refused():
    with pytest.raises(UserError, match=r"E: has shape \(3, 5, 13\)"):
        linformer("heads").load_state_dict(linformer("none").state_dict())


def test_a_resized_projection_loads_into_the_other_grid():
    old, new = linformer(grid=(3, 4)), linformer(grid=(6, 8))
    state = old.state_dict()
    for name in "EF":
        state[name] = resize_projection(state[name], (3, 4), (6, 8))
    new.load_state_dict(state)
    assert new(torch.randn(1, 49, 12)).shape == (1, 49, 12)


@pytest.mark.parametrize("shape", [(5, 13), (3, 5, 13)])
def test_resizing_keeps_a_constant_row_constant_and_what_it_makes_of_constant_tokens(shape):
    constants = torch.randn(*shape[:-1], 1)
    resized = resize_projection(constants.expand(shape), (3, 4), (7, 5))
    assert resized.shape == (*shape[:-1], 36)
    torch.testing.assert_close(resized, (constants * 13 / 36).expand_as(resized))
    # Projecting the same token everywhere gives the same row on either grid.
    torch.testing.assert_close(resized.sum(dim=-1), 13 * constants[..., 0])


def test_resizing_keeps_the_class_column_and_a_gradient_along_the_grid():
    row = torch.cat([torch.tensor([9.0]), torch.arange(4.0).repeat_interleave(4)])[None]  # rises from row to row
    resized = resize_projection(row, (4, 4), (8, 8)) * 65 / 17
    assert resized[0, 0] == pytest.approx(9)
    image = resized[0, 1:].view(8, 8)
    torch.testing.assert_close(image[:, :1].expand(8, 8), image)
    torch.testing.assert_close(image[1:7, 0], torch.arange(0.25, 3, 0.5))  # bilinear between pixel centres


def test_resizing_to_the_same_grid_changes_nothing():
    projection = torch.randn(5, 13)
    torch.testing.assert_close(resize_projection(projection, (3, 4), (3, 4)), projection)


def test_resizing_refuses_a_projection_of_another_grid():
    with pytest.raises(UserError, match=r"13 tokens.*5, 5.*26"):
        resize_projection(torch.zeros(5, 13), (5, 5), (3, 4))


@pytest.mark.parametrize("share, projections, rows", [("none", 2, 13), ("heads", 2, 5), ("kv", 1, 5), ("layers", 1, 5)])
def test_its_macs_are_linear_in_tokens(share, projections, rows):
    n, k, c = 13, 5, 12
    assert linformer(share).macs() == 2 * n * c**2 + 2 * rows * c**2 + (2 + projections) * n * k * c


def test_projecting_before_the_maps_saves_2_n_minus_k_c_squared():
    assert linformer("none").macs() - linformer("heads").macs() == 2 * (13 - 5) * 12**2


def test_it_takes_over_the_maps_of_fused():
    fused = build_attention("fused", 12, 3, (3, 4))
    assert torch.equal(copy_maps(fused, linformer()).qkv.weight, fused.qkv.weight)


def test_a_projection_is_rounded_once_and_not_for_every_sample():
    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            y = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default:
                sizes.append(y.numel())
            return y

    sizes, e, x = [], torch.randn(3, 10), torch.randn(4, 10, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu"), Casts():
        (y,) = at_once(x, e)
    assert sizes == [30]
    assert torch.equal(y, torch.bmm(e.bfloat16().expand(4, -1, -1), x))
