import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effvit import build_attention, policy
from effvit.kernels import linear as module
from effvit.kernels import qkv as qkv_module
from effvit.kernels.dispatch import linear
from effvit.kernels.layers import apply_linear
from effvit.kernels.linear import suits_onednn

needs_onednn = pytest.mark.skipif(policy._ONEDNN is None, reason="this build of PyTorch has no oneDNN")


@pytest.fixture
def on_amds(monkeypatch):
    """Linear maps as on a processor where oneDNN is the faster one."""
    monkeypatch.setattr(policy, "ONEDNN_PRODUCTS", policy._ONEDNN is not None)


def inputs(shape, out, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=dtype), torch.randn(out, shape[-1], dtype=dtype)]
    tensors += [torch.randn(out, dtype=dtype)] if bias else []
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.usefixtures("on_amds")
@pytest.mark.parametrize(("shape", "out"), [((5,), 3), ((0, 4), 2)])
def test_a_single_row_and_no_rows_are_mapped_too(shape, out):
    x, weight, bias = inputs(shape, out)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_amds")
def test_rows_that_are_a_view_give_the_same():
    x, weight, bias = inputs((17, 12, 2), 20)
    x, weight = x.mT, torch.randn(20, 12)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.usefixtures("on_amds")
def test_float32_on_a_cpu_is_onednns_and_nothing_else():
    x, weight, bias = inputs((3, 4), 2)

    def operators(call):
        with torch.profiler.profile() as profile:
            call()
        return [event.key for event in profile.key_averages()]

    assert "mkldnn::_linear_pointwise" in operators(lambda: linear(x, weight, bias))
    assert "mkldnn::_linear_pointwise" not in operators(lambda: linear(x.double(), weight.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "mkldnn::_linear_pointwise" not in operators(lambda: linear(x, weight))
    assert not suits_onednn(torch.empty(3, 4, device="meta"))


def test_on_other_processors_it_is_torchs_own_map(monkeypatch):
    monkeypatch.setattr(policy, "ONEDNN_PRODUCTS", False)
    x, weight, bias = inputs((3, 4), 2)
    assert not suits_onednn(x)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.usefixtures("on_amds")
def test_only_the_gradients_asked_for_are_computed(monkeypatch):
    x, weight, bias = inputs((3, 4), 2)
    linear(x.detach(), weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(2, -1))
    frozen = build_attention("fused", 12, 3, (2, 2)).requires_grad_(False)
    tokens = torch.randn(2, 5, 12, requires_grad=True)
    for of in (module, qkv_module):
        monkeypatch.setattr(of, "weight_gradient", lambda *args: pytest.fail("a gradient nobody asked for"))
    linear(x, weight.detach(), bias.detach()).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(3, -1))
    frozen(tokens).sum().backward()
    assert tokens.grad is not None


@pytest.mark.usefixtures("on_amds")
def test_it_maps_over_samples():
    x, weight, _ = (tensor.detach() for tensor in inputs((6, 3, 4), 5))
    per_sample = torch.func.vmap(torch.func.grad(lambda w, x: linear(x, w).sin().sum()), in_dims=(None, 0))(weight, x)
    expected = torch.stack([torch.func.grad(lambda w, s=s: F.linear(s, w).sin().sum())(weight) for s in x])
    torch.testing.assert_close(per_sample, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_amds")
def test_a_layer_is_the_same_eagerly_compiled_and_exported():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x):
            return apply_linear(self.layer, x)

    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 4)
    expected = model.layer(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
