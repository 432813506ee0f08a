import json

import pytest
import torch
from foreign import shaken, timm_vit
from safetensors.torch import save_file

from effvit import ViT, ViTConfig, available_attention
from effvit.errors import UserError
from effvit.model.checkpoint import save_model
from effvit.model.names import standard_to_fused
from effvit.model.pretrained import start_from
from effvit.model.resize import resize_positions, resize_projection

OPTIONS = {"linformer": {"k": 6}, "nystromformer": {"num_landmarks": 5}, "hybrid": {"window_size": 2}}
OPTIONS |= {"agent": {"agent_size": 2}, "pooled": {"pool_size": 3}, "window": {"window_size": 2}}


def vit(name="fused", seed=1, **changes):
    torch.manual_seed(seed)
    fields = {"image_size": 16, "num_hidden_layers": 2, "num_classes": 7, "num_attention_heads": 3}
    options = {"attention": name, "attention_options": OPTIONS.get(name, {})}
    return ViT(ViTConfig(**(fields | options | changes))).eval()


def saved(model, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_file(model.state_dict(), path)
    return path


def saved_model(model, tmp_path):
    save_model(model, tmp_path)
    return tmp_path


def refused(path, model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        start_from(path, model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("name", ["fused", "standard"])
def test_logits_are_timms(tmp_path, name):
    theirs, ours = timm_vit(), vit(name)
    start_from(saved(theirs, tmp_path), ours)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "deit_tiny_patch16_224"])
@pytest.mark.parametrize(("image_size", "classes"), [(224, 1000), (96, 10)])
def test_logits_are_those_of_timms_own_models(tmp_path, architecture, image_size, classes):
    timm = pytest.importorskip("timm", reason="a peer: pip install effvit[peers]")
    torch.manual_seed(0)
    theirs = shaken(timm.create_model(architecture, img_size=image_size, num_classes=classes))
    torch.save({"model": theirs.state_dict()}, tmp_path / "deit.pth")  # as DeiT's releases are
    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    ours = vit(**sizes, image_size=image_size, patch_size=16, num_classes=classes)
    report = start_from(tmp_path / "deit.pth", ours)
    images = torch.randn(1, 3, image_size, image_size)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert len(report.loaded) == len(theirs.state_dict())
    assert not (report.adapted or report.fresh or report.ignored)


@pytest.mark.parametrize("name", available_attention())
def test_any_mechanism_takes_over_what_all_share_and_starts_the_rest_fresh(tmp_path, name):
    theirs, ours, untouched = timm_vit(), vit(name), vit(name)
    report = start_from(saved(theirs, tmp_path), ours)
    state, fresh = standard_to_fused(ours.state_dict()), untouched.state_dict()
    expected = theirs.state_dict() if name != "uniform" else values_of(theirs.state_dict())
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    own = state.keys() - expected.keys()
    assert set(report.fresh) == own and all(torch.equal(state[key], fresh[key]) for key in own)
    assert {key.split(".", 3)[-1] for key in own} == {
        "linformer": {"E", "F"},
        "performer": {"omega"},
        "nystromformer": {"conv.weight"},
        "focused": {"scale"},
    }.get(name, set())
    assert bool(report.adapted) == (name in ("standard", "uniform"))  # whose maps are cut
    assert not report.ignored
    assert sorted([*report.loaded, *report.adapted, *report.fresh]) == sorted(ours.state_dict())


def values_of(state):
    """What the control has of the maps: the last third of the merged one."""
    return {
        key.replace(".qkv.", ".value."): weight.chunk(3)[2] if ".attn.qkv." in key else weight
        for key, weight in state.items()
    }


PAIRS = [(a, b) for a in available_attention() for b in available_attention() if a != "uniform" or a == b]


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.slow
def test_a_trained_mechanism_becomes_another(tmp_path, source, target):
    theirs, ours = shaken(vit(source, seed=0)), vit(target)
    report = start_from(saved_model(theirs, tmp_path), ours)
    a, b = (standard_to_fused(model.state_dict()) for model in (theirs, ours))
    if target == "uniform":
        a = values_of(a)
    assert all(torch.equal(a[key], b[key]) for key in a.keys() & b.keys())
    assert set(report.ignored) == a.keys() - b.keys()
    if source == target:
        assert len(report.loaded) == len(ours.state_dict())
        images = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("target", ["fused", "standard"])
def test_the_control_has_no_queries_and_keys_to_start_from(tmp_path, target):
    assert "of uniform attention, which has no queries and keys" in refused(
        saved_model(vit("uniform"), tmp_path), vit(target)
    )


def test_a_convolution_of_values_is_taken_over_where_both_have_one(tmp_path):
    both = [shaken(vit("fused", seed=0, value_conv=3)), vit("window", value_conv=3)]
    report = start_from(saved_model(both[0], tmp_path), both[1])
    assert torch.equal(*(model.blocks[1].attn.value_conv.weight for model in both)) and not report.fresh
    other = vit("fused", value_conv=5)
    report = start_from(tmp_path, other)
    own = {f"blocks.{block}.attn.value_conv.weight" for block in range(2)}
    assert set(report.fresh) == set(report.ignored) == own
    plain = start_from(tmp_path, vit("fused"))
    assert set(plain.ignored) == own and not plain.fresh
    assert set(start_from(saved(timm_vit(), tmp_path), other).fresh) == own


@pytest.mark.parametrize("size", [8, 12, 24, 32])
def test_positions_are_carried_over_to_another_grid_as_timm_does(tmp_path, size):
    theirs, ours = timm_vit(), vit(image_size=size)
    report = start_from(saved(theirs, tmp_path), ours)
    from timm.layers import resample_abs_pos_embed

    side = size // 4
    expected = resample_abs_pos_embed(theirs.pos_embed.detach(), [side, side], num_prefix_tokens=1)
    torch.testing.assert_close(ours.pos_embed.detach(), expected)
    assert report.adapted == {"pos_embed": f"4x4 to {side}x{side} patches"}


def test_positions_of_the_same_grid_stay_and_a_linear_ramp_stays_one():
    positions = torch.randn(1, 17, 5)
    torch.testing.assert_close(resize_positions(positions, (4, 4), (4, 4)), positions)
    ramp = torch.cat([torch.full((1, 1, 1), 9.0), torch.arange(8.0).repeat_interleave(8).view(1, 64, 1)], dim=1)
    larger = resize_positions(ramp, (8, 8), (16, 16))
    assert larger[0, 0, 0] == 9
    inside = larger[0, 1:, 0].view(16, 16)[5:11]  # away from the border, where a cubic runs out of pixels
    torch.testing.assert_close(inside, (torch.arange(5.0, 11.0) / 2 - 0.25)[:, None].expand(6, 16))


@pytest.mark.parametrize("share", ["none", "heads", "kv", "layers"])
def test_linformers_projections_are_carried_over_to_another_grid(tmp_path, share):
    options = {"attention_options": {"k": 6, "share": share}}
    theirs, ours = shaken(vit("linformer", seed=0, **options)), vit("linformer", image_size=24, **options)
    report = start_from(saved_model(theirs, tmp_path), ours)
    for old, new in zip(theirs.attentions(), ours.attentions(), strict=True):
        torch.testing.assert_close(new.E, resize_projection(old.E, (4, 4), (6, 6)))
        torch.testing.assert_close(new.F, resize_projection(old.F, (4, 4), (6, 6)))
    assert set(report.adapted.values()) == {"4x4 to 6x6 patches"}
    assert not (report.fresh or report.ignored)
    assert len({id(a.E) for a in ours.attentions()}) == (1 if share == "layers" else 2)


@pytest.mark.parametrize(
    ("name", "old", "new", "weight"),
    [("linformer", {"k": 6}, {"k": 4}, "E"), ("performer", {"num_features": 8}, {"num_features": 9}, "omega")],
)
def test_own_weights_of_another_size_start_fresh_and_are_told(tmp_path, name, old, new, weight):
    theirs, ours = vit(name, seed=0, attention_options=old), vit(name, attention_options=new)
    report = start_from(saved_model(theirs, tmp_path), ours)
    key = f"blocks.1.attn.{weight}"
    assert key in report.fresh and report.ignored[key].startswith("of shape (")
    assert torch.equal(ours.state_dict()[key], vit(name, attention_options=new).state_dict()[key])


@pytest.mark.parametrize("classes", [0, 1000])
def test_a_head_of_other_classes_is_left_out(tmp_path, classes):
    theirs, ours = timm_vit(num_classes=classes), vit()
    report = start_from(saved(theirs, tmp_path), ours)
    assert report.fresh == ["head.weight", "head.bias"]
    assert list(report.ignored) == (["head.bias", "head.weight"] if classes else [])
    assert torch.equal(ours.head.weight, vit().head.weight)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        theirs.reset_classifier(7)
        theirs.head.load_state_dict(ours.head.state_dict())
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"embed_dim": 24}, "hidden_size=24, here 48"),
        ({"depth": 3}, "num_hidden_layers=3, here 2"),
        ({"mlp_ratio": 2}, "intermediate_size=96, here 192"),
        ({"patch_size": 8}, "patch_size=8, here 4"),
        ({"in_chans": 1}, "num_channels=1, here 3"),
        ({"qkv_bias": False}, "qkv.bias: missing"),
        ({"init_values": 0.1}, "layer scale"),
        ({"qk_norm": True}, "normed queries"),
        ({"reg_tokens": 2}, "prefix_tokens=3, here 1"),
        ({"reg_tokens": 2, "no_embed_class": True}, "prefix_tokens=3, here 1"),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "prefix_tokens=0, here 1"),
        ({"class_token": False, "reg_tokens": 2, "global_pool": "avg", "fc_norm": False}, "without a class token"),
        ({"class_token": False, "global_pool": "map"}, "attention pooling"),
        ({"pre_norm": True}, "a norm before the blocks"),
        ({"global_pool": "avg", "fc_norm": True}, "average pooling"),
        ({"class_token": False, "global_pool": "avg"}, "average pooling"),
        ({"img_size": (16, 20)}, "pos_embed has 21 positions"),
    ],
)
def test_another_model_is_refused_in_one_line_that_names_the_numbers(tmp_path, changes, says):
    assert says in refused(saved(timm_vit(**changes), tmp_path), vit())


def test_a_distilled_model_is_refused_by_name(tmp_path):
    deit = pytest.importorskip("timm.models.deit", reason="a peer: pip install effvit[peers]")
    theirs = deit.VisionTransformerDistilled(
        img_size=16, patch_size=4, num_classes=7, embed_dim=48, depth=2, num_heads=3
    )
    assert "a distillation head, a distillation token" in refused(saved(theirs, tmp_path), vit())


def prefix(state, first, keep=""):
    for name in list(state):
        if name != keep:
            state[first + name] = state.pop(name)


def test_another_number_of_heads_is_refused_where_it_is_known(tmp_path):
    assert "num_attention_heads=3, here 4" in refused(saved_model(vit(), tmp_path), vit(num_attention_heads=4))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("norm.weight"), "norm.weight: missing"),
        (lambda s: s.pop("pos_embed"), "not the weights of a ViT"),
        (lambda s: s.update({"pos_embed": torch.ones(1, 0, 48)}), "pos_embed has 0 positions"),
        (lambda s: s.update({"blocks.0.mlp.fc1.weight": torch.tensor(1.0)}), "not the weights of a ViT"),
        (lambda s: s.update({"student.patch_embed.proj.weight": torch.ones(2)}), "has student.patch_embed.proj.weight"),
        (lambda s: prefix(s, "student.", keep="head.weight"), "some names begin with student., others do not (head.w"),
        (lambda s: [s.pop(name) for name in list(s) if "patch_embed" in name], "in the names of timm, transformers or"),
        (lambda s: s.update({f"_orig_mod.{name}": s[name].clone() for name in list(s)}), "with and without _orig_mod."),
        (lambda s: s.update({"patch_embed.proj.weight": torch.ones(48, 3, 4, 2)}), "patches of 4 x 2 pixels"),
        (lambda s: s.update({"blocks.0.attn.extra": torch.ones(3)}), "blocks.*.attn.extra, which this ViT lacks"),
        (lambda s: s.update({"cls_token": torch.ones(1, 1, 5)}), "cls_token: of shape (1, 1, 5), here (1, 1, 48)"),
        (lambda s: s.update({"blocks.0.attn.qkv.weight": torch.ones(2, 2)}), ""),
    ],
)
@pytest.mark.parametrize("name", ["fused", "standard"])
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, name, change, says):
    state = vit().state_dict()
    change(state)
    save_file(state, tmp_path / "checkpoint.safetensors")
    assert says in refused(tmp_path / "checkpoint.safetensors", vit(name))


def test_half_precision_weights_become_the_models_own(tmp_path):
    theirs, ours = timm_vit().half(), vit()
    start_from(saved(theirs, tmp_path), ours)
    assert ours.head.weight.dtype == torch.float32
    assert torch.equal(ours.head.weight, theirs.head.weight.float())


def test_the_report_is_a_few_lines_with_all_blocks_as_one(tmp_path):
    report = start_from(saved(timm_vit(num_classes=1000), tmp_path), vit("performer", image_size=24))
    assert report.lines() == [
        f"start from {tmp_path / 'checkpoint.safetensors'} (sha256 {report.sha256[:12]}): 29 weights unchanged",
        "  adapted: pos_embed (4x4 to 6x6 patches)",
        "  ignored: head.bias (of shape (1000,), here (7,))",
        "  ignored: head.weight (of shape (1000, 48), here (7, 48))",
        "  fresh: head.weight, head.bias, blocks.*.attn.omega",
        "  taken on trust: the number of heads, pooling by the class token, GELU, norms with epsilon 1e-6",
    ]
    assert json.dumps(vars(report))
