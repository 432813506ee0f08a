"""Attention swapped in models of every family: what must not change, what must, and what is said of it."""

import copy
import pickle
import re

import pytest
import torch
from hosts import (
    FAMILIES,
    HUGGING_FACE,
    OPTIONS,
    TIMM,
    attention_name,
    host,
    hugging_face,
    images,
    outputs,
    own,
    pattern,
    timm_vit,
    torchvision_vit,
)
from mechanisms import relative_error
from safetensors.torch import load_file, save_file
from torch import nn

from effvit import available_attention, load_model, swap_attention
from effvit.attention.base import Attention
from effvit.errors import UserError
from effvit.kernels import choice
from effvit.model.checkpoint import save_model
from effvit.model.resize import resize_projection

pytestmark = pytest.mark.slow

OWN_WEIGHTS = {"linformer": {"E", "F"}, "performer": {"omega"}, "nystromformer": {"conv.weight"}}
OWN_WEIGHTS |= {"focused": {"scale"}}


def swapped(family, name, **more):
    model = host(family)
    return model, swap_attention(model, name, **OPTIONS.get(name, {}), **more)


def attentions(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Attention)}


@pytest.mark.parametrize("family", TIMM)
def test_weights_that_only_an_option_has_are_reported_as_new(family):
    model = host(family)
    report = swap_attention(model, "hybrid", window_size=2, fusion="gate", feature_map="focused")
    assert {key.split(".attn.")[-1] for key in report.new} == {"gate.weight", "gate.bias", "scale"}
    assert outputs(model, images()).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["fused", "standard"])
def test_exact_attention_gives_the_logits_of_the_original(family, name):
    original, (model, _) = host(family), swapped(family, name)
    with torch.no_grad():
        expected = outputs(original, images())
        largest = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(outputs(model, images()), expected, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("family", TIMM)
def test_where_the_kernels_are_the_same_so_is_every_bit(family, monkeypatch):
    monkeypatch.setattr(choice, "on_cpu", lambda *tensors: False)  # no products of this package's own
    original, (model, _) = host(family), swapped(family, "fused")
    with torch.no_grad():
        assert torch.equal(outputs(model, images()), outputs(original, images()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["fused", "standard"])
def test_exact_attention_gives_the_gradients_of_the_original(family, name):
    gradients = []
    for model in (host(family), swapped(family, name)[0]):
        x = images().requires_grad_()
        outputs(model, x).square().sum().backward()
        gradients.append(x.grad)
    assert relative_error(*gradients) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", available_attention())
def test_every_mechanism_runs_and_every_weight_of_it_learns(family, name):
    model, _ = swapped(family, name)
    outputs(model.train(), images()).square().sum().backward()
    first, last = attentions(model).values()
    used = [
        [parameter for key, parameter in attention.named_parameters() if name != "uniform" or key[1:6] != "_norm"]
        for attention in (first, last)
    ]
    assert all(parameter.grad.isfinite().all() for parameters in used for parameter in parameters)
    # In the last block what becomes of patches may not matter, and with it what only they have.
    assert all(parameter.grad.any() for parameter in used[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", available_attention())
def test_the_report_names_every_weight_and_nothing_else_moved(family, name):
    before = host(family).state_dict()
    model, report = swapped(family, name)
    after = model.state_dict()
    inside = {f"{where}.{key}" for where, module in attentions(model).items() for key in module.state_dict()}
    assert set(report.kept) | set(report.new) == inside and not set(report.kept) & set(report.new)
    assert {key.split(".attn.")[-1] for key in report.new if family.startswith("timm")} <= OWN_WEIGHTS.get(name, set())
    assert report.unused == []
    outside = after.keys() - inside
    assert outside and all(torch.equal(after[key], before[key]) for key in outside)
    for layer in report.layers:
        for key, origin in layer.kept.items():
            if not key.startswith("heads."):
                expected = torch.cat([before[f"{layer.name}.{each}"] for each in origin.split(", ")])
                if key.startswith("value."):  # the control has no queries and keys
                    expected = expected.chunk(3)[2]
                assert torch.equal(after[f"{layer.name}.{key}"], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_tokens_and_grid_are_read_from_the_model(family):
    prefix_tokens = FAMILIES[family][1]
    model, report = swapped(family, "nystromformer")
    assert list(attentions(model)) == [attention_name(family, block) for block in range(2)]
    for block, attention in enumerate(attentions(model).values()):
        assert (attention.prefix_tokens, attention.grid_size) == (prefix_tokens, (4, 4))
        assert (attention.layer, attention.depth) == (block, 2)
    assert f"({pattern(family)}): {prefix_tokens} prefix token" in str(report) and "4 x 4 patches" in str(report)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", available_attention())
def test_the_report_says_which_of_what_is_new_can_be_trained(family, name):
    model, report = swapped(family, name)
    assert set(report.new_parameters) == set(report.new) & dict(model.named_parameters()).keys()


def test_what_is_drawn_and_not_trained_is_told():
    _, report = swapped("timm vit", "performer")
    assert report.new and not report.new_parameters and "omega (not trained)" in str(report)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_convolution_of_values_is_new_and_is_what_is_added(family):
    plain, (model, report) = swapped(family, "pooled")[0], swapped(family, "pooled", value_conv=3)
    assert {key.rpartition(".value_conv")[2] for key in report.new} == {".weight"}
    assert report.unused == []
    with torch.no_grad():
        assert not torch.allclose(outputs(model, images()), outputs(plain, images()), atol=1e-4)
        for attention in attentions(model).values():
            attention.value_conv.weight.zero_()
        torch.testing.assert_close(outputs(model, images()), outputs(plain, images()), rtol=0, atol=1e-5)
        swap_attention(model, "pooled", value_conv=3, **OPTIONS["pooled"])
        assert not any(attention.value_conv.weight.any() for attention in attentions(model).values())
        assert swap_attention(model, "fused", value_conv=3).new == [], "it belongs to the model, not to a mechanism"
        assert not any(attention.value_conv.weight.any() for attention in attentions(model).values())
        assert {key.rpartition(".value_conv")[2] for key in swap_attention(model, "fused").unused} == {".weight"}


def test_the_control_has_no_queries_and_keys_for_another():
    model, _ = swapped("timm vit", "uniform")
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    with pytest.raises(UserError, match=r"^blocks\.0\.attn \(Uniform.*\): it has values alone, and no queries"):
        swap_attention(model, "fused")
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())


def test_the_report_reads_well():
    _, report = swapped("torchvision", "linformer")
    assert str(report).splitlines() == [
        "linformer in 2 of 2 blocks of torchvision's VisionTransformer "
        "(encoder.layers.encoder_layer_*.self_attention): 1 prefix token, 4 x 4 patches",
        "  kept: qkv.weight (from in_proj_weight), qkv.bias (from in_proj_bias), "
        "proj.weight (from out_proj.weight), proj.bias (from out_proj.bias)",
        "  new: E, F",
        "  unused: nothing",
    ]


@pytest.mark.parametrize("family", ["timm vit", "vit", "torchvision", "effvit"])
@pytest.mark.parametrize(("layers", "expected"), [([0], [0]), ([-1], [1]), (range(2), [0, 1])])
def test_some_blocks_are_swapped_and_the_others_stay(family, layers, expected):
    original, (model, report) = host(family), swapped(family, "linformer", layers=layers)
    assert [layer.name for layer in report.layers] == [attention_name(family, block) for block in expected]
    for block in range(2):
        name = attention_name(family, block)
        assert (type(model.get_submodule(name)) is type(original.get_submodule(name))) == (block not in expected)
    with torch.no_grad():
        assert outputs(model, images()).isfinite().all()


def test_several_vision_transformers_in_one_model_are_all_swapped():
    model = nn.ModuleDict({"a": host("timm vit"), "b": host("torchvision")})
    report = swap_attention(model, "fused")
    assert [layer.name.split(".")[0] for layer in report.layers] == ["b", "b", "a", "a"][::-1]
    assert len(report.places) == 2


def test_the_text_tower_stays_as_it_is():
    transformers = pytest.importorskip("transformers", reason="not installed: pip install transformers")
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.CLIPConfig(
        text_config=tower | {"vocab_size": 30, "eos_token_id": 2, "bos_token_id": 1},
        vision_config=tower | {"image_size": 16, "patch_size": 4},
        projection_dim=16,
    )
    model = transformers.CLIPModel(config).eval()
    inputs = {"input_ids": torch.tensor([[1, 5, 2], [1, 6, 2]]), "pixel_values": images()}
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
        report = swap_attention(model, "fused")
        torch.testing.assert_close(model(**inputs).logits_per_image, expected, rtol=0, atol=1e-5)
    assert len(report.layers) == 2 and all(layer.name.startswith("vision_model.") for layer in report.layers)


@pytest.mark.parametrize("family", ["timm vit", "vit", "dinov2", "torchvision", "effvit"])
def test_precision_mode_and_what_is_frozen_stay(family):
    model = host(family).to(torch.bfloat16).requires_grad_(False)
    assert not model.training
    report = swap_attention(model, "linformer", k=6)
    parameters = dict(model.named_parameters())
    assert {parameter.dtype for parameter in parameters.values()} == {torch.bfloat16}
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == set(report.new)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        assert outputs(model, images().to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["timm vit", "vit", "torchvision"])
@pytest.mark.parametrize("name", available_attention())
def test_weights_without_numbers_are_swapped_as_well(family, name):
    with torch.device("meta"):
        model = FAMILIES[family][0]()
    swap_attention(model, name, **OPTIONS.get(name, {}))
    assert all(parameter.is_meta for parameter in model.parameters())
    filled = swapped(family, name)[0]
    model.load_state_dict(filled.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(outputs(model.eval(), images()), outputs(filled, images()))


@pytest.mark.parametrize("family", ["timm vit", "torchvision", "effvit"])
def test_merged_weights_are_the_same_parameters_that_an_optimizer_knows(family):
    model = host(family)
    known = {id(parameter) for parameter in model.parameters()}
    swap_attention(model, "linformer", k=6)
    new = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    assert {name.rpartition(".")[2] for name in new} == {"E", "F"}


def test_dropout_is_what_it_was():
    timm = timm_vit(attn_drop_rate=0.25, proj_drop_rate=0.125)
    swap_attention(timm, "fused")
    assert timm.blocks[0].attn.proj_drop.p == 0.125 and timm.blocks[0].attn.dropout_p == 0.25
    assert timm.eval().blocks[0].attn.dropout_p == 0
    timm.train().blocks[0].attn.attn_drop.p = 0.5  # as some schedules do
    assert timm.blocks[0].attn.dropout_p == 0.5


@pytest.mark.parametrize(
    "build",
    [
        lambda: hugging_face("ViTModel", "ViTConfig", attention_probs_dropout_prob=0.25),
        lambda: hugging_face("CLIPVisionModel", "CLIPVisionConfig", attention_dropout=0.25),
        lambda: torchvision_vit(attention_dropout=0.25),
        lambda: own(attention_probs_dropout_prob=0.25),
    ],
)
def test_dropout_of_attention_is_read_where_the_others_keep_it(build):
    model = build().train()
    swap_attention(model, "fused")
    assert {attention.dropout_p for attention in attentions(model).values()} == {0.25}


@pytest.mark.parametrize("name", [name for name in available_attention() if name != "uniform"])
def test_norms_of_queries_and_keys_are_honoured(name, monkeypatch):
    options = {"num_features": 16} if name == "performer" else OPTIONS.get(name, {})  # one that folds, without norms
    results = []
    for on_cpu in (choice.on_cpu, lambda *tensors: False):
        torch.manual_seed(0)
        model = host("timm qk_norm")
        swap_attention(model, name, **options)
        monkeypatch.setattr(choice, "on_cpu", on_cpu)
        with torch.no_grad():
            results.append(model(images()))
            model.blocks[0].attn.q_norm.weight.mul_(3)
            assert not torch.allclose(model(images()), results[-1])
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_a_norm_of_the_heads_outputs_is_honoured():
    original = timm_vit(scale_attn_norm=True).eval()
    if isinstance(getattr(original.blocks[0].attn, "norm", nn.Identity()), nn.Identity):
        pytest.skip("this timm has no scale_attn_norm")
    with torch.no_grad():
        original.blocks[0].attn.norm.weight.uniform_(0, 2)
        model = copy.deepcopy(original)
        swap_attention(model, "standard")
        torch.testing.assert_close(model(images()), original(images()), rtol=0, atol=1e-5)


def test_a_layer_that_is_more_than_its_weights_is_kept_and_called():
    class LowRank(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.in_features, self.out_features = layer, layer.in_features, layer.out_features
            self.a, self.b = nn.Linear(32, 2, bias=False), nn.Linear(2, 96, bias=False)

        def forward(self, x):
            return self.layer(x) + self.b(self.a(x))

    original = host("timm vit")
    original.blocks[0].attn.qkv = LowRank(original.blocks[0].attn.qkv)
    model = copy.deepcopy(original)
    swap_attention(model, "fused")
    with torch.no_grad():
        torch.testing.assert_close(model(images()), original(images()), rtol=0, atol=1e-5)
        swap_attention(model, "linformer", k=6)
        assert isinstance(model.blocks[0].attn.qkv, LowRank) and model(images()).isfinite().all()
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv \(LowRank\): not a plain nn\.Linear"):
        swap_attention(model, "standard")


def test_hooks_on_the_module_stay():
    model = host("timm vit")
    seen = []
    handle = model.blocks[0].attn.register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    swap_attention(model, "fused")
    model(images())
    handle.remove()
    model(images())
    assert seen == [type(model.blocks[0].attn)]


@pytest.mark.parametrize("family", ["timm vit", "vit", "siglip", "torchvision"])
def test_gradient_checkpointing_changes_no_gradient(family):
    plain, (model, _) = swapped(family, "nystromformer")[0], swapped(family, "nystromformer")
    model.load_state_dict(plain.state_dict())
    if family == "torchvision":
        for name, block in model.encoder.layers.named_children():
            model.encoder.layers.add_module(name, Checkpointed(block))
    else:
        names = ("set_grad_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
        next(getattr(model, name) for name in names if hasattr(model, name))()
    gradients = []
    for each in (plain, model):
        outputs(each.train(), images()).square().sum().backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    torch.testing.assert_close(*gradients)


class Checkpointed(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("family", "name"),
    [("timm qk_norm", "hybrid"), ("vit", "linformer"), ("clip", "performer"), ("torchvision", "nystromformer")],
)
def test_it_compiles_without_a_graph_break(family, name):
    model, _ = swapped(family, name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(outputs(compiled, images()), outputs(model, images()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["timm dinov2 reg4", "vit", "torchvision"])
@pytest.mark.parametrize("name", available_attention())
def test_weights_go_through_a_safetensors_file(family, name, tmp_path):
    model, _ = swapped(family, name)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(5)
    again = FAMILIES[family][0]().eval()
    swap_attention(again, name, **OPTIONS.get(name, {}))
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(outputs(again, images()), outputs(model, images()))


def test_the_state_dict_of_timm_with_fused_is_timms():
    model = host("timm qk_norm")
    names = list(model.state_dict())
    swap_attention(model, "fused")
    assert sorted(model.state_dict()) == sorted(names)
    model.load_state_dict(host("timm qk_norm").state_dict())


@pytest.mark.parametrize("family", ["timm vit", "vit", "torchvision"])
def test_it_is_copied_and_pickled_like_any_module(family):
    model, _ = swapped(family, "linformer")
    with torch.no_grad():
        expected = outputs(model, images())
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(outputs(again, images()), expected)


def test_it_trains_under_distributed_data_parallel(tmp_path):
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model, plain = swapped("vit", "hybrid")[0], swapped("vit", "hybrid")[0]
        wrapped = nn.parallel.DistributedDataParallel(model)
        for each in (wrapped, plain):
            outputs(each, images()).square().sum().backward()
        for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, expected.grad)
        with pytest.raises(UserError, match="inside DistributedDataParallel; swap attention first, then wrap it"):
            swap_attention(wrapped, "fused")
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_back_it_is_what_it_was(family):
    original, model = host(family), host(family)
    for name in ("linformer", "standard", "hybrid", "fused"):
        report = swap_attention(model, name, **OPTIONS.get(name, {}))
        if name == "standard":
            assert {key.rpartition(".")[2] for key in report.unused} == {"E", "F"}
    with torch.no_grad():
        torch.testing.assert_close(outputs(model, images()), outputs(original, images()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", available_attention())
@pytest.mark.parametrize("family", ["timm vit", "vit", "effvit"])
def test_the_same_mechanism_again_keeps_what_it_has_learned(family, name):
    model, _ = swapped(family, name)
    with torch.no_grad():
        for attention in attentions(model).values():
            for parameter in attention.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = outputs(model, images())
        report = swap_attention(model, name, **OPTIONS.get(name, {}))
        assert torch.equal(outputs(model, images()), expected)
    assert report.new == report.unused == []


def test_what_belongs_to_a_number_of_tokens_is_interpolated_when_the_grid_has_changed():
    model, _ = swapped("timm vit", "linformer")
    old = model.blocks[1].attn.E.detach().clone()
    model.set_input_size(img_size=(24, 16))
    with pytest.raises(UserError, match=r"got tokens of shape \(2, 25, 32\), expected \(batch, 17, 32\)"):
        model(torch.randn(2, 3, 24, 16))
    report = swap_attention(model, "linformer", k=6)
    assert report.new == [] and "6 x 4 patches" in str(report)
    torch.testing.assert_close(model.blocks[1].attn.E.detach(), resize_projection(old, (4, 4), (6, 4)))
    assert isinstance(model.blocks[1].attn.E, nn.Parameter) and model(torch.randn(2, 3, 24, 16)).isfinite().all()


def test_weights_shared_between_layers_are_shared():
    model = host("timm vit")
    swap_attention(model, "linformer", k=6, share="layers")
    first, second = (block.attn for block in model.blocks)
    assert first.E is first.F is second.E is second.F


def test_other_options_of_the_same_mechanism_start_fresh():
    model, _ = swapped("timm vit", "linformer")
    report = swap_attention(model, "linformer", k=5)
    assert [layer.new for layer in report.layers] == [layer.unused for layer in report.layers] == [["E", "F"]] * 2


def test_a_module_used_twice_stays_one():
    model = host("timm vit")
    model.blocks[1].attn = model.blocks[0].attn
    swap_attention(model, "fused")
    assert model.blocks[1].attn is model.blocks[0].attn and isinstance(model.blocks[0].attn, Attention)


def test_a_mechanism_for_one_grid_says_so_in_a_model_for_many():
    _, report = swapped("timm dinov2 reg4", "linformer")
    assert report.notes == ["the model takes images of any size, linformer those of 4 x 4 patches alone"]
    assert swapped("timm dinov2 reg4", "fused")[1].notes == [] == swapped("timm vit", "linformer")[1].notes
    model, _ = swapped("timm dinov2 reg4", "performer")
    assert model(torch.randn(2, 3, 24, 20)).isfinite().all()


def test_a_mechanism_that_changes_while_training_says_who_must_ask_it_to():
    _, report = swapped("timm vit", "performer")
    assert re.search("note: .*after_step", str(report))
    assert "after_step" not in str(swapped("effvit", "performer")[1])  # whose training asks


@pytest.mark.parametrize("name", available_attention())
def test_our_own_model_is_saved_and_loaded_after_a_swap(name, tmp_path):
    model, _ = swapped("effvit", name)
    save_model(model, tmp_path)
    assert model.config.attention == name
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(images()), model(images()))


def test_a_directory_cannot_say_that_blocks_differ(tmp_path):
    model = own()
    report = swap_attention(model, "linformer", k=6, layers=[0])
    assert model.config.attention == "fused" and "save_model" in report.notes[0]
    with pytest.raises(UserError, match=r"^save_model: .*save its state dict instead$"):
        save_model(model, tmp_path)
    assert not list(tmp_path.iterdir())
    swap_attention(model, "nystromformer", num_landmarks=5)
    swap_attention(model, "nystromformer", num_landmarks=6, layers=[0])  # with weights of the same shapes
    with pytest.raises(UserError, match=r"^save_model: not all blocks have nystromformer attention with these options"):
        save_model(model, tmp_path)
    swap_attention(model, "linformer", k=6, layers=[0])
    swap_attention(model, "linformer", k=6, layers=[1])
    save_model(model, tmp_path)
    assert load_model(tmp_path).config.attention_options == {"k": 6}


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_a_hugging_face_model_saves_its_weights(family, tmp_path):
    model, _ = swapped(family, "linformer")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert any(key.endswith(".E") for key in stored)
