"""Layers are called: what acts by a call acts here, such as hooks, adapters, pruning, tracers and counters."""

import copy
import io

import pytest
import torch
from mechanisms import FIRST, WITH_VALUE_CONV
from mps import NoFloat64
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from effvit import ViT, ViTConfig, build_attention, policy
from effvit.attention.performer import draw_features

pytestmark = pytest.mark.slow

GRID, TOKENS, WIDTH, HEADS = (3, 5), 16, 12, 3
GATE = ("hybrid", {"window_size": 2, "fusion": "gate"})
BY_NAME = pytest.mark.parametrize("name, options", [*FIRST, GATE, *WITH_VALUE_CONV])


def attention_of(name, options, **more):
    torch.manual_seed(0)
    return build_attention(name, WIDTH, HEADS, GRID, **options, **more).eval()


def place_of_merged_layer(attention):
    """Owner and name of the layer that makes queries, or values where there are no queries, among other things."""
    if hasattr(attention, "heads"):
        return attention.heads[0], "query"
    return attention, "qkv" if hasattr(attention, "qkv") else "value"


def merged_layer(attention):
    return getattr(*place_of_merged_layer(attention))


def model_of(name, options, **changes):
    torch.manual_seed(0)
    options = dict(options)
    changes["value_conv"] = options.pop("value_conv", 0)
    size = {"image_size": 16, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    size |= {"intermediate_size": 24, "num_classes": 5, "initializer_range": 0.3}
    return ViT(ViTConfig(**(size | changes), attention=name, attention_options=options)).eval()


@BY_NAME
def test_a_hook_on_the_merged_map_is_called_and_what_it_returns_counts(name, options):
    attention, x = attention_of(name, options), torch.randn(2, TOKENS, WIDTH)
    before = attention(x)
    seen = []
    layer = merged_layer(attention)
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(attention(x), before, rtol=1e-5, atol=1e-6)
    assert seen
    handle.remove()

    assert all(output.shape[-1] == layer.out_features for output in seen)
    layer.register_forward_hook(lambda module, inputs, output: output * 0)
    with torch.no_grad():
        layer.weight.zero_()
        if layer.bias is not None:
            layer.bias.zero_()
        of_zero_weights = attention_of(name, options)
        of_zero_weights.load_state_dict(attention.state_dict())
        layer.weight.normal_()
        torch.testing.assert_close(attention(x), of_zero_weights(x))


@BY_NAME
def test_a_hook_that_replaces_the_merged_map_replaces_its_bias_too(name, options):
    attention, x = attention_of(name, options), torch.randn(2, TOKENS, WIDTH)
    layer = merged_layer(attention)
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    layer.register_forward_hook(lambda module, inputs, output: output * 0)
    of_zeros = attention_of(name, options)
    with torch.no_grad():
        of_zeros.load_state_dict(attention.state_dict())
        for parameter in merged_layer(of_zeros).parameters():
            parameter.zero_()
        torch.testing.assert_close(attention(x), of_zeros(x))


@BY_NAME
def test_a_hook_on_the_merged_map_sees_tokens_of_samples(name, options):
    attention, x = attention_of(name, options), torch.randn(2, TOKENS, WIDTH)
    expected = attention(x)
    merged_layer(attention).register_forward_hook(lambda module, inputs, output: output[:, :, :] * 1)
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-6)


class Doubled(nn.Parameter):
    """Weights that take part in products as twice themselves, as quantised ones do as something else."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function is nn.functional.linear:
                args = tuple(2 * each.as_subclass(torch.Tensor) if isinstance(each, Doubled) else each for each in args)
            return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("onednn", [True, False])
@BY_NAME
def test_weights_that_act_in_products_act_on_every_processor(name, options, onednn, monkeypatch):
    monkeypatch.setattr(policy, "ONEDNN_PRODUCTS", onednn and policy._ONEDNN is not None)
    attention, doubled = attention_of(name, options), attention_of(name, options)
    x = torch.randn(2, TOKENS, WIDTH)
    layer = merged_layer(attention)
    layer.weight = Doubled(layer.weight.detach(), requires_grad=False)
    with torch.no_grad():
        merged_layer(doubled).weight.mul_(2)
        torch.testing.assert_close(attention(x), doubled(x), rtol=1e-4, atol=1e-5)


@BY_NAME
def test_a_hook_on_the_output_map_is_called_and_what_it_returns_counts(name, options):
    attention, x = attention_of(name, options), torch.randn(2, TOKENS, WIDTH)
    attention.proj.register_forward_hook(lambda module, inputs, output: output + 1)
    torch.testing.assert_close(attention(x), attention_of(name, options)(x) + 1)


@BY_NAME
def test_a_hook_before_the_merged_map_changes_what_is_mapped(name, options):
    attention, x = attention_of(name, options, qkv_bias=False), torch.randn(2, TOKENS, WIDTH)
    doubled = copy.deepcopy(attention)
    with torch.no_grad():
        merged_layer(doubled).weight.mul_(2)
    merged_layer(attention).register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    torch.testing.assert_close(attention(x), doubled(x), rtol=1e-4, atol=1e-5)


def test_random_features_are_drawn_where_the_default_device_has_neither_float64_nor_generators():
    with torch.device("meta"), NoFloat64():
        assert build_attention("performer", WIDTH, HEADS, GRID, num_features=11).omega.is_meta
    attention = build_attention("performer", WIDTH, HEADS, GRID, num_features=11, redraw_every=1).train()
    before = attention.omega.clone()
    with torch.device("meta"):
        attention.after_step(1, torch.Generator("cpu").manual_seed(3))
    expected = draw_features(11, WIDTH // HEADS, torch.Generator().manual_seed(3))
    assert torch.equal(attention.omega, expected) and not torch.equal(before, expected)


@BY_NAME
def test_hooks_on_all_modules_are_called(name, options):
    attention, seen = attention_of(name, options), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        attention(torch.randn(2, TOKENS, WIDTH))
    finally:
        handle.remove()
    assert merged_layer(attention) in seen and attention.proj in seen


class LoRA(nn.Module):
    """W x + B A x in place of a linear layer, as adapters are written."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


@BY_NAME
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_an_adapter_in_place_of_the_merged_map_is_the_map_with_its_sum(name, options, qkv_bias):
    attention, x = attention_of(name, options, qkv_bias=qkv_bias), torch.randn(2, TOKENS, WIDTH)
    summed = copy.deepcopy(attention)
    owner, key = place_of_merged_layer(attention)
    adapter = LoRA(getattr(owner, key))
    setattr(owner, key, adapter)
    with torch.no_grad():
        merged_layer(summed).weight.add_(adapter.b.weight @ adapter.a.weight)
    torch.testing.assert_close(attention(x), summed(x), rtol=1e-4, atol=1e-5)
    attention(x).sum().backward()
    assert adapter.a.weight.grad.abs().sum() > 0 and adapter.b.weight.grad.abs().sum() > 0


@BY_NAME
@pytest.mark.parametrize("targets", [["qkv", "proj"], ["qkv"]])
def test_peft_trains_its_adapters_and_merges_them(name, options, targets):
    peft = pytest.importorskip("peft", reason="needs peft, of the extra peers", exc_type=ImportError)
    model, images = model_of(name, options), torch.randn(2, 3, 16, 16)
    maps = {"standard": ["query", "key", "value"], "uniform": ["value"]}.get(name, ["qkv"])
    targets = [*maps, *targets[1:]]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    logits = adapted(images)
    logits.sum().backward()
    gradients = [p.grad for key, p in adapted.named_parameters() if "lora_" in key]
    assert gradients and all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(images), logits, rtol=1e-4, atol=1e-4)


@BY_NAME
def test_pruning_and_parametrisations_act(name, options):
    x = torch.randn(2, TOKENS, WIDTH)
    pruned, by_hand = attention_of(name, options), attention_of(name, options)
    layer = merged_layer(pruned)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    with torch.no_grad():
        merged_layer(by_hand).weight.mul_(layer.weight_mask)
    torch.testing.assert_close(pruned(x), by_hand(x), rtol=1e-5, atol=1e-6)

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    doubled, by_hand = attention_of(name, options), attention_of(name, options)
    parametrize.register_parametrization(merged_layer(doubled), "weight", Double())
    with torch.no_grad():
        merged_layer(by_hand).weight.mul_(2)
    torch.testing.assert_close(doubled(x), by_hand(x), rtol=1e-5, atol=1e-6)


CONVOLUTIONS = pytest.mark.parametrize(
    "name, options, key",
    [*((*case, "value_conv") for case in WITH_VALUE_CONV), ("nystromformer", {"num_landmarks": 5}, "conv")],
)


def with_convolution_scaled(name, options, key, factor):
    attention = attention_of(name, options)
    with torch.no_grad():
        getattr(attention, key).weight.mul_(factor)
    return attention


@CONVOLUTIONS
def test_hooks_on_a_convolution_are_called_and_what_they_return_counts(name, options, key):
    x, seen = torch.randn(2, TOKENS, WIDTH), []
    hooked = attention_of(name, options)
    convolution = getattr(hooked, key)
    handle = convolution.register_forward_hook(lambda module, inputs, output: seen.append(output))
    before = attention_of(name, options)(x, return_map=True)
    torch.testing.assert_close(hooked(x, return_map=True), before, rtol=1e-5, atol=1e-6)
    assert seen
    handle.remove()
    handle = convolution.register_forward_hook(lambda module, inputs, output: output * 0)
    for found, expected in zip(
        hooked(x, return_map=True),
        with_convolution_scaled(name, options, key, 0)(x, return_map=True),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    handle.remove()
    convolution.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    doubled = with_convolution_scaled(name, options, key, 2)
    torch.testing.assert_close(hooked(x), doubled(x), rtol=1e-5, atol=1e-6)
    gradients = []
    convolution.register_full_backward_hook(lambda module, inputs, outputs: gradients.append(outputs))
    hooked(x).sum().backward()
    assert gradients


@CONVOLUTIONS
def test_what_replaces_the_weight_of_a_convolution_acts(name, options, key):
    x = torch.randn(2, TOKENS, WIDTH)
    normed = attention_of(name, options)
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(getattr(normed, key))
    with torch.no_grad():
        getattr(normed, key).weight_g.mul_(2)
    doubled = with_convolution_scaled(name, options, key, 2)
    torch.testing.assert_close(normed(x), doubled(x), rtol=1e-5, atol=1e-6)

    pruned = attention_of(name, options)
    prune.l1_unstructured(getattr(pruned, key), "weight", amount=0.5)
    for _ in range(2):  # a graph of its own for each step
        pruned(x).sum().backward()
    by_hand = attention_of(name, options)
    with torch.no_grad():
        getattr(by_hand, key).weight.mul_(getattr(pruned, key).weight_mask)
    torch.testing.assert_close(pruned(x), by_hand(x), rtol=1e-5, atol=1e-6)


@CONVOLUTIONS
def test_a_convolution_of_another_kind_in_its_place_is_called(name, options, key):
    """With a bias, of all channels, or on other tokens: none of which its weight alone says."""
    x, attention = torch.randn(2, TOKENS, WIDTH), attention_of(name, options)
    plain = getattr(attention, key)
    sizes = {"kernel_size": plain.kernel_size, "padding": plain.padding, "groups": plain.groups, "bias": False}
    before, channels = attention(x), plain.in_channels
    for change in (
        {"bias": True},
        {"groups": 1},
        {"dilation": 2, "padding": tuple(2 * side for side in plain.padding)},
    ):
        called = []
        other = nn.Conv2d(channels, channels, **(sizes | change))
        other.register_forward_hook(lambda module, inputs, output, called=called: called.append(output))
        setattr(attention, key, other)
        assert attention(x).shape == before.shape and len(called) == 1
        other._forward_hooks.clear()
        with torch.no_grad():
            other.weight.zero_()
            if other.bias is not None:
                other.bias.fill_(5.0)
        assert torch.equal(attention(x), with_convolution_scaled(name, options, key, 0)(x)) == (other.bias is None)


@CONVOLUTIONS
def test_peft_trains_its_adapter_of_a_convolution(name, options, key):
    peft = pytest.importorskip("peft", reason="needs peft, of the extra peers", exc_type=ImportError)
    if key == "conv":  # PyTorch itself crashes in the backward pass of a kernel twice as long as the image
        options = options | {"conv_kernel_size": 5}
    model, images = model_of(name, options), torch.randn(2, 3, 16, 16)
    groups = getattr(model.blocks[0].attn, key).groups  # which divide the rank
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=groups, target_modules=[key], init_lora_weights=False))
    adapted(images).sum().backward()
    # Of the first block: what the last one makes of patches is not seen by the class token.
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_" in name and "blocks.0." in name]
    assert gradients and all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@BY_NAME
def test_a_forward_put_in_place_of_linear_layers_own_is_called(name, options, monkeypatch):
    attention, calls, forward = attention_of(name, options), [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda layer, x: calls.append(layer) or forward(layer, x))
    attention(torch.randn(2, TOKENS, WIDTH))
    assert attention.proj in calls
    assert merged_layer(attention) in calls


@pytest.mark.parametrize("onednn", [True, False])
@BY_NAME
def test_a_mode_that_watches_functions_sees_products_on_every_processor(name, options, onednn, monkeypatch):
    class Counting(TorchFunctionMode):
        count = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.count += function is nn.functional.linear
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(policy, "ONEDNN_PRODUCTS", onednn and policy._ONEDNN is not None)
    attention, x = attention_of(name, options), torch.randn(2, TOKENS, WIDTH)
    with Counting() as mode:
        attention(x)
    assert mode.count >= 2


@BY_NAME
def test_dynamic_quantisation_replaces_the_maps_and_is_near(name, options):
    model, images = model_of(name, options), torch.randn(32, 3, 16, 16)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    maps = [
        module
        for key, module in quantized.named_modules()
        if ".attn." in key and key.endswith((".qkv", ".proj", ".query", ".value"))
    ]
    assert maps and all("quantized" in type(module).__module__ for module in maps)
    expected = model(images)
    assert (quantized(images) - expected).norm() / expected.norm() < 0.1


@BY_NAME
def test_a_batch_of_gradients_is_taken_as_one_after_the_other(name, options):
    attention = attention_of(name, options).double()
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    inputs, gradients = (x, *attention.parameters()), torch.randn(3, 2, TOKENS, WIDTH, dtype=torch.float64)
    y = attention(x)
    together = torch.autograd.grad(y, inputs, gradients, retain_graph=True, is_grads_batched=True)
    for number, gradient in enumerate(gradients):
        expected = torch.autograd.grad(y, inputs, gradient, retain_graph=True)
        torch.testing.assert_close([of[number] for of in together], list(expected))


@BY_NAME
def test_gradients_and_forward_derivatives_by_torch_func_are_autograds(name, options):
    attention = attention_of(name, options).double()
    x, tangent = torch.randn(2, 2, TOKENS, WIDTH, dtype=torch.float64)

    def loss(x):
        return attention(x).sin().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(grad(loss)(x), expected)
    torch.testing.assert_close(jvp(loss, (x,), (tangent,))[1], (expected * tangent).sum())
    per_sample = vmap(grad(lambda sample: loss(sample[None])))(x)
    torch.testing.assert_close(per_sample, expected)
    state = dict(attention.named_parameters())
    by_weights = grad(lambda state: functional_call(attention, state, (x,)).sin().sum())(state)
    for parameter, theirs in zip(torch.autograd.grad(loss(x), state.values()), by_weights.values(), strict=True):
        torch.testing.assert_close(theirs, parameter)


@pytest.mark.parametrize("name", ["performer", "nystromformer", "hybrid"])
def test_batches_above_the_size_of_blocks_have_gradients_by_torch_func(name):
    attention = build_attention(name, 192, 3, (14, 14))
    x = torch.randn(8, 197, 192)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(attention(leaf).sum(), leaf)
    torch.testing.assert_close(grad(lambda x: attention(x).sum())(x), expected, rtol=1e-3, atol=1e-4)


@BY_NAME
def test_gradients_of_gradients_are_those_of_finite_differences(name, options, monkeypatch):
    monkeypatch.setattr("effvit.kernels.feature_attention.BLOCK_NUMBERS", 1)
    attention = attention_of(name, options).double()
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda x: attention(x).sin().sum(), (x,), fast_mode=True, atol=1e-3)


@pytest.mark.parametrize("onednn", [True, False])
@BY_NAME
def test_public_counters_count_the_same_on_every_processor(name, options, onednn, monkeypatch):
    monkeypatch.setattr(policy, "ONEDNN_PRODUCTS", onednn and policy._ONEDNN is not None)
    model = model_of(name, options)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 16, 16))
    assert counter.get_total_flops() == 2 * model.macs()


@BY_NAME
def test_ptflops_counts_all_maps_whichever_way_it_counts(name, options):
    from ptflops import get_model_complexity_info

    model = model_of(name, options)
    by_layers, by_operators = (
        get_model_complexity_info(
            model, (3, 16, 16), as_strings=False, print_per_layer_stat=False, verbose=False, backend=backend
        )[0]
        for backend in ("pytorch", "aten")
    )
    maps = sum(block.attn.map_macs() for block in model.blocks)
    assert min(by_layers, by_operators) >= maps


@pytest.mark.parametrize("onednn", [True, False])
def test_ptflops_counts_the_maps_as_of_a_model_of_torchs_own_layers(onednn, monkeypatch):
    from ptflops import get_model_complexity_info

    monkeypatch.setattr(policy, "ONEDNN_PRODUCTS", onednn and policy._ONEDNN is not None)
    macs, _ = get_model_complexity_info(
        model_of("fused", {}), (3, 16, 16), print_per_layer_stat=False, as_strings=False
    )
    n, c, patch, blocks = 17, 12, 48, 2
    maps = 16 * patch * c + blocks * (4 * n * c * c + 2 * n * c * 24) + c * 5
    assert macs >= maps  # ptflops adds biases, norms and activations


@BY_NAME
def test_it_is_built_without_memory_and_filled_later(name, options):
    with torch.device("meta"):
        attention = build_attention(name, WIDTH, HEADS, GRID, **options)
        assert attention(torch.empty(2, TOKENS, WIDTH)).is_meta
    assert all(parameter.is_meta for parameter in attention.parameters())
    real = attention_of(name, options)
    x = torch.randn(2, TOKENS, WIDTH)
    for one_by_one in (copy.deepcopy(attention), copy.deepcopy(attention).to("meta")):
        for key, tensor in real.state_dict(keep_vars=True).items():  # as loaders of large models do
            place, _, leaf = key.rpartition(".")
            setattr(one_by_one.get_submodule(place), leaf, tensor)
        torch.testing.assert_close(one_by_one.eval()(x), real(x))
    attention.load_state_dict(real.state_dict(), assign=True)
    torch.testing.assert_close(attention.eval()(x), real(x))


@pytest.mark.parametrize("name, options", FIRST)  # PyTorch cannot initialise a convolution's weights so
def test_it_is_built_and_called_with_tensors_that_only_pretend(name, options):
    with FakeTensorMode():
        attention = build_attention(name, WIDTH, HEADS, GRID, **options)
        assert attention(torch.randn(2, TOKENS, WIDTH)).shape == (2, TOKENS, WIDTH)
    with FakeTensorMode(), torch.device("cuda"):
        attention = build_attention(name, WIDTH, HEADS, GRID, **options)
        assert attention(torch.randn(2, TOKENS, WIDTH)).is_cuda


@pytest.mark.parametrize("of", [attention_of, model_of], ids=["module", "model"])
@BY_NAME
def test_it_is_emptied_and_filled_later(name, options, of, monkeypatch):
    """As `torchrun` with meta weights, accelerate and FSDP do it; tables are no weights, and keep their numbers."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    real = of(name, options)
    with torch.device("meta"):
        filled = of(name, options)
    for there in (filled, copy.deepcopy(real).to("meta"), copy.deepcopy(real).double()):
        there.to_empty(device="cpu").to(torch.float32).load_state_dict(real.state_dict())
        buffers = dict(there.named_buffers())
        assert buffers.keys() == dict(real.named_buffers()).keys()
        for key, buffer in real.named_buffers():
            torch.testing.assert_close(buffers[key], buffer)
        x = torch.randn(2, 3, 16, 16) if of is model_of else torch.randn(2, TOKENS, WIDTH)
        torch.testing.assert_close(there.eval()(x), real.eval()(x))


@BY_NAME
def test_a_traced_model_is_saved_and_loaded_again(name, options):
    model, images = model_of(name, options), torch.randn(2, 3, 16, 16)
    file = io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, images), file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(images), model(images), rtol=1e-4, atol=1e-5)


@BY_NAME
def test_torch_fx_takes_features_out_of_the_middle(name, options):
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, images = model_of(name, options), torch.randn(2, 3, 16, 16)
    seen = []
    model.blocks[0].attn.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = model(images)
    extractor = feature_extraction.create_feature_extractor(
        model, {"blocks.0.attn.proj_drop": "mixed", "head": "logits"}
    )
    features = extractor(images)
    torch.testing.assert_close(features["mixed"], seen[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features["logits"], logits, rtol=1e-4, atol=1e-5)
