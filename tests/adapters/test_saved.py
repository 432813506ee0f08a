"""Models of other libraries through save_model and load_model(..., into=...)."""

import json
import re
from functools import partial

import pytest
import torch
from hosts import FAMILIES, OPTIONS, host, images, outputs, timm_vit, torchvision_vit
from safetensors.torch import load_file
from torch import nn

from effvit import ViT, ViTConfig, available_attention, load_model, save_model, swap_attention
from effvit.errors import UserError
from effvit.model.pretrained import start_from

OTHERS = [family for family in FAMILIES if family != "effvit"]
NORMALISED = {"classes": list("abcde"), "mean": [0.4] * 3, "std": [0.2, 0.3, 0.4]}


def fresh(family):
    torch.manual_seed(7)
    return FAMILIES[family][0]()


def swapped(family, name="linformer", **changes):
    model = host(family)
    torch.manual_seed(3)
    swap_attention(model, name, **(OPTIONS.get(name, {}) | changes))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", available_attention())
@pytest.mark.parametrize("family", OTHERS)
def test_a_swapped_model_comes_back_the_same(family, name, tmp_path):
    model = swapped(family, name)
    save_model(model, tmp_path)
    into = fresh(family).train()
    back = load_model(tmp_path, into=into)
    assert back is into and not back.training
    with torch.no_grad():
        assert torch.equal(outputs(back, images()), outputs(model, images()))
    assert {key: t.shape for key, t in back.state_dict().items()} == {k: t.shape for k, t in model.state_dict().items()}


@pytest.mark.parametrize("family", ["timm vit", "vit", "torchvision"])
def test_a_model_that_is_not_swapped_and_one_swapped_in_part_come_back_too(family, tmp_path):
    for number, layers in enumerate([None, [1]]):
        model = host(family)
        if layers:
            swap_attention(model, "performer", layers=layers)
        save_model(model, tmp_path / str(number))
        back = load_model(tmp_path / str(number), into=fresh(family))
        with torch.no_grad():
            assert torch.equal(outputs(back, images()), outputs(model, images()))


def test_blocks_swapped_one_by_one_share_what_they_shared(tmp_path):
    model = timm_vit(depth=4)
    for layers in ([0, 2], [1, 3]):
        swap_attention(model, "linformer", layers=layers, k=6, share="layers")
    save_model(model, tmp_path)
    back = load_model(tmp_path, into=timm_vit(depth=4))
    first, second, third, fourth = (block.attn.E for block in back.blocks)
    assert first is third and second is fourth and first is not second
    assert sum(name.endswith(".E") for name in load_file(tmp_path / "model.safetensors")) == 2
    with torch.no_grad():
        assert torch.equal(back(images()), model.eval()(images()))


@pytest.mark.parametrize("family", ["timm vit", "vit", "torchvision"])
def test_a_convolution_of_values_comes_back(family, tmp_path):
    model = host(family)
    swap_attention(model, "pooled", layers=[0], value_conv=3, pool_size=2)
    swap_attention(model, "pooled", layers=[1], pool_size=2)
    save_model(model.eval(), tmp_path)
    back = load_model(tmp_path, into=fresh(family))
    with torch.no_grad():
        assert torch.equal(outputs(back, images()), outputs(model, images()))
    config = json.loads((tmp_path / "config.json").read_text())
    assert [swap["value_conv"] for swap in config["towers"][0]["swaps"]] == [3, 0]


def test_classes_and_normalisation_travel(tmp_path):
    save_model(swapped("timm vit"), tmp_path / "one", **NORMALISED)
    back = load_model(tmp_path / "one", into=fresh("timm vit"))
    assert back.trained_on.known() == NORMALISED
    save_model(back, tmp_path / "two")  # which they are not said of again
    assert load_model(tmp_path / "two", into=fresh("timm vit")).trained_on == back.trained_on


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapped_model_is_saved_as_the_model_itself(wrap, tmp_path):
    model = swapped("timm vit")
    save_model(model, tmp_path / "plain")
    save_model(wrap(model), tmp_path / "wrapped")
    files = [[(tmp_path / name / file).read_bytes() for file in ("model.safetensors", "config.json")] for name in
             ("plain", "wrapped")]  # fmt: skip
    assert files[0] == files[1]


def test_compiled_blocks_are_saved_under_plain_names(tmp_path):
    model = swapped("timm vit")
    names = set(model.state_dict())
    model.blocks[0] = torch.compile(model.blocks[0])
    save_model(model, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == names


def test_any_other_module_keeps_its_weights(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    save_model(model, tmp_path, classes=list("abcd"))
    back = load_model(tmp_path, into=nn.Sequential(nn.Flatten(), nn.Linear(12, 4)))
    assert torch.equal(back[1].weight, model[1].weight)


def refused(directory, into):
    before = {name: tensor.clone() for name, tensor in into.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_model(directory, into=into)
    message = str(caught.value)
    assert "\n" not in message and str(directory) in message
    after = into.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    return message


@pytest.mark.parametrize(
    ("into", "says"),
    [
        (lambda: timm_vit(depth=3), "its ViT: depth=3, saved 2"),
        (lambda: timm_vit(num_heads=4), "its ViT: num_heads=4, saved 2"),
        (lambda: timm_vit(reg_tokens=4), "its ViT: prefix_tokens=5, saved 1"),
        (lambda: timm_vit(img_size=32), "its ViT: grid_size=(8, 8), saved (4, 4)"),
        (lambda: timm_vit(act_layer="relu"), "its activations: ReLU, saved GELU"),
        (lambda: timm_vit(act_layer="gelu_tanh"), "its activations: GELUTanh, saved GELU"),
        (lambda: timm_vit(norm_layer=partial(nn.LayerNorm, eps=1e-5)), "its epsilon of norms: 1e-05, saved 1e-06"),
        (lambda: timm_vit(global_pool="avg", fc_norm=False), "its pooling: avg, saved token"),
        (lambda: timm_vit(num_classes=7), "head.weight is of shape (5, 32), here (7, 32)"),
        (lambda: timm_vit(qkv_bias=False), "blocks.*.attn.qkv.bias left over"),
        (lambda: timm_vit(init_values=0.1), "blocks.*.ls1.gamma, blocks.*.ls2.gamma missing"),
        (torchvision_vit, "saved as timm's VisionTransformer, given torchvision's VisionTransformer"),
        (lambda: nn.Linear(2, 2), "no Vision Transformer"),
        (lambda: nn.DataParallel(timm_vit()), "it is inside DataParallel; load first, then wrap it"),
        (lambda: "timm", "into: got str"),
    ],
)
def test_another_model_is_refused_in_one_line_and_stays_as_it_was(into, says, tmp_path):
    save_model(swapped("timm vit"), tmp_path)
    into = into()
    if not isinstance(into, nn.Module):
        with pytest.raises(UserError, match=says):
            load_model(tmp_path, into=into)
        return
    assert says in refused(tmp_path, into)


def test_a_mechanism_where_the_saved_model_has_none_is_refused(tmp_path):
    """Without weights of its own it would go unnoticed: fused in place of timm's attention has the same names."""
    save_model(swapped("timm vit", "linformer", layers=[0]), tmp_path)
    into = fresh("timm vit")
    swap_attention(into, "nystromformer", num_landmarks=5, conv_kernel_size=0)
    assert "it has mechanisms where the saved one has not; build it anew" in refused(tmp_path, into)


def test_a_model_on_the_meta_device_is_refused(tmp_path):
    save_model(swapped("timm vit"), tmp_path)
    with torch.device("meta"):
        into = fresh("timm vit")
    with pytest.raises(UserError, match="on the meta device; call to_empty first"):
        load_model(tmp_path, into=into)


def test_a_directory_without_into_says_what_to_build_in_one_line(effvit, tmp_path, digits_dir):
    timm = pytest.importorskip("timm", reason="a peer: pip install effvit[peers]")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10)
    swap_attention(model, "performer")
    save_model(model, tmp_path / "model")
    says = r"has the weights of timm\.[\w.]+VisionTransformer; build that model .*vit_tiny_patch16_224.*, into=model\)"
    with pytest.raises(UserError, match=says):
        load_model(tmp_path / "model")
    for command in (["evaluate", "--output-dir", "scores"], ["predict", "image.png"]):
        outcome = effvit(*command, "--model-dir", "model", "--dataset-dir", digits_dir)
        assert outcome.code == 1 and re.search(says, outcome.err) and outcome.err.count("\n") == 1


def test_a_vit_of_effvit_starts_from_it_where_heads_agree(tmp_path):
    """Which the weights do not tell, and the configuration does."""
    save_model(swapped("timm vit", "fused"), tmp_path)
    fields = {"image_size": 16, "num_classes": 5, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2}
    ours = ViT(ViTConfig(**fields, num_attention_heads=2)).eval()
    report = start_from(tmp_path, ours)
    assert not report.fresh and "the number of heads" not in report.on_trust
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), host("timm vit")(images()), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="num_attention_heads=2, here 4"):
        start_from(tmp_path, ViT(ViTConfig(**fields, num_attention_heads=4)))


def test_into_is_refused_for_a_vit_of_effvit(tmp_path):
    save_model(host("effvit"), tmp_path)
    assert "load it without into=" in refused(tmp_path, fresh("effvit"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda values: values["towers"][0]["swaps"][0].update(attention="magic"), "magic"),
        (lambda values: values["towers"][0]["swaps"][0]["options"].update(k=99), "attention.linformer.k=99"),
        (lambda values: values["towers"][0]["swaps"][0].update(layers=[5]), "layers=[5]"),
        (lambda values: values["towers"][0]["swaps"][0]["options"].update(layers=[0]), "linformer.layers: unknown"),
        (lambda values: values["function"].update(magic=[1]), "its magic: none, saved 1"),
        (lambda values: values["towers"][0].update(name="encoder"), "no Vision Transformer 'encoder'"),
        (lambda values: values.update(towers=3), "towers=3"),
        (lambda values: values.update(mean=[0.5]), "mean and std"),
        (lambda values: values.update(surprise=1), "surprise: unknown option"),
    ],
)
def test_a_damaged_configuration_is_refused_in_one_line(change, says, tmp_path):
    save_model(swapped("timm vit"), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    change(values)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert says in refused(tmp_path, fresh("timm vit"))


def test_transformers_own_configuration_is_kept_and_builds_the_model(tmp_path):
    transformers = pytest.importorskip("transformers", reason="not installed: pip install transformers")
    model = swapped("vit", "nystromformer")
    save_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["config"]
    into = transformers.ViTForImageClassification(transformers.ViTConfig.from_dict(config))
    back = load_model(tmp_path, into=into)
    with torch.no_grad():
        torch.testing.assert_close(back(images()).logits, model(images()).logits, rtol=1e-5, atol=1e-5)


def test_the_card_tells_the_model_its_mechanism_and_how_to_load_it(tmp_path):
    model = swapped("timm vit", layers=[1])
    save_model(model, tmp_path, dataset="animals", accuracy={"test": 0.9}, **NORMALISED)
    card = (tmp_path / "README.md").read_text()
    count = sum(p.numel() for p in model.parameters())
    for part in (
        "# VisionTransformer with `linformer` attention",
        f"VisionTransformer, {count:,} parameters",
        "`linformer` in 1 of 2 blocks (k=6",
        "5, named in `config.json`",
        "minus the mean (0.4, 0.4, 0.4)",
        "| top-1, test | 90.00% |",
        "| data | animals |",
    ):
        assert part in card, part
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {}
    code = code.replace("path/of/this/directory", str(tmp_path)).replace("model = ...", "model = build()")
    exec(code, names | {"build": lambda: fresh("timm vit")})


def test_nothing_is_written_where_something_is_wrong(tmp_path):
    for arguments in ({"mean": 0.5, "std": 0.5}, {"accuracy": 0.9}):
        with pytest.raises(UserError):
            save_model(swapped("timm vit"), tmp_path / "model", **arguments)
    assert not (tmp_path / "model").exists()
    with pytest.raises(UserError, match="save_model: got str"):
        save_model("timm", tmp_path / "model")


@pytest.mark.parametrize("kind", ["effvit", "torchvision"])
def test_a_directory_of_something_else_is_kept_and_an_earlier_model_replaced(kind, tmp_path):
    for name, text in (("README.md", "# My project"), ("config.json", '{"lr": 1}'), ("meta.json", "{}")):
        directory = tmp_path / name.partition(".")[0]
        directory.mkdir()
        (directory / name).write_text(text)
        with pytest.raises(UserError, match=f"{directory}: holds something else; expected a new or an empty directory"):
            save_model(host(kind), directory)
        assert [(path.name, path.read_text()) for path in directory.iterdir()] == [(name, text)]
    for file in (tmp_path / "README" / "README.md", tmp_path / "README" / "README.md" / "below"):
        with pytest.raises(UserError, match=f"^{file}: is or lies in a file; "):
            save_model(host(kind), file)
    with pytest.raises(UserError, match=r"^directory: got NoneType, expected a path$"):
        save_model(host(kind), None)
    for earlier in ("effvit", "torchvision", kind):
        save_model(host(earlier), tmp_path / "model")
    (tmp_path / "model" / "notes.txt").touch()
    with pytest.raises(UserError, match="holds something else"):
        save_model(host(kind), tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"classes": ["a"]}, "classes: has 1 entries, the model has 5"),
        ({"classes": list("abcda")}, "classes: 'a' is there 2 times"),
        ({"mean": [0.5], "std": [0.5]}, "mean: has 1 entries, the model has 3"),
        ({"mean": [0.5] * 3, "std": [0.5]}, "mean has 3 entries, std 1"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_fit_a_model_of_any_library_is_refused(family, arguments, says, tmp_path):
    model = host(family)
    if "classes: has" in says and outputs(model, images()).shape[1:] != (5,):
        pytest.skip("no classifier of five classes")
    with pytest.raises(UserError, match=says):
        save_model(model, tmp_path / "model", **arguments)
    assert not (tmp_path / "model").exists()


def test_the_head_as_it_is_counts_and_not_what_is_written_of_it(tmp_path):
    model = torchvision_vit()
    model.heads = nn.Linear(model.hidden_dim, 2)
    save_model(model, tmp_path, classes=["a", "b"])
    with pytest.raises(UserError, match="classes: has 1 entries, the model has 2"):
        save_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), tmp_path, classes=["a"])


def test_truncated_weights_are_told_by_the_file_alone(tmp_path):
    save_model(swapped("torchvision"), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert refused(tmp_path, fresh("torchvision")).startswith(f"{weights}: not a whole safetensors file")


@pytest.mark.parametrize("path", [None, 3])
def test_a_path_that_is_none_is_told_in_one_line(path):
    for into in (None, nn.Linear(1, 1)):
        with pytest.raises(UserError, match=f"^path: got {type(path).__name__}, expected a path$"):
            load_model(path, into=into)
