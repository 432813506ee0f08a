import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effvit import build_attention
from effvit.attention import base
from effvit.kernels import linear as module
from effvit.kernels.linear import Linear, LinearMap, linear, suits_onednn

needs_onednn = pytest.mark.skipif(module._ONEDNN is None, reason="this build of PyTorch has no oneDNN")


@pytest.fixture
def on_amds(monkeypatch):
    """Linear maps as on a processor where oneDNN is the faster one."""
    monkeypatch.setattr(module, "_FASTER_THAN_MKL", True)


SHAPES = [((2, 17, 12), 20), ((2, 17, 20), 12), ((7, 5), 5), ((5,), 3), ((0, 4), 2), ((2, 3, 1), 1)]


def inputs(shape, out, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=dtype), torch.randn(out, shape[-1], dtype=dtype)]
    tensors += [torch.randn(out, dtype=dtype)] if bias else []
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("rewriting_pays", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "out"), SHAPES)
@pytest.mark.parametrize("faster", [True, False])
def test_result_and_gradients_are_those_of_torchs_own_map(shape, out, bias, faster, rewriting_pays, monkeypatch):
    monkeypatch.setattr(module, "_FASTER_THAN_MKL", faster)
    monkeypatch.setattr(module, "_REWRITING_PAYS", rewriting_pays)
    tensors = inputs(shape, out, bias)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    gradient = torch.randn(*shape[:-1], out)
    y, expected = linear(*tensors), F.linear(*exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    actual = torch.autograd.grad(y, tensors, gradient)
    for a, e in zip(actual, torch.autograd.grad(expected, exact, gradient.double()), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_amds")
def test_rows_that_are_a_view_give_the_same():
    x, weight, bias = inputs((17, 12, 2), 20)
    x, weight = x.mT, torch.randn(20, 12)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.usefixtures("on_amds")
def test_float32_on_a_cpu_is_onednns_and_nothing_else(monkeypatch):
    calls = []
    onednn = module._ONEDNN
    monkeypatch.setattr(module, "_ONEDNN", lambda *a: calls.append(a) or onednn(*a))
    x, weight, bias = inputs((3, 4), 2)
    linear(x, weight, bias).sum().backward()
    assert len(calls) == 2 + module._REWRITING_PAYS  # y, the gradient of x, and of W where that pays
    calls.clear()
    linear(x.double(), weight.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    torch.compile(linear, fullgraph=True, backend="eager")(x, weight)
    assert not calls


def test_on_other_processors_it_is_torchs_own_map(monkeypatch):
    monkeypatch.setattr(module, "_FASTER_THAN_MKL", False)
    x, weight, bias = inputs((3, 4), 2)
    assert not suits_onednn(x)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_without_onednn_it_is_torchs_own_map(monkeypatch):
    monkeypatch.setattr(module, "_ONEDNN", None)
    x, weight, bias = inputs((3, 4), 2)
    assert not suits_onednn(x)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.usefixtures("on_amds")
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_gradients_exist(bias):
    tensors = inputs((2, 3, 4), 5, bias, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: LinearMap.apply(*t, *[None] * (not bias)), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: LinearMap.apply(*t, *[None] * (not bias)), tensors)
    x, weight, *rest = inputs((2, 3, 4), 5, bias)
    (first,) = torch.autograd.grad(linear(x, weight, *rest).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 2 * (weight.T @ weight).sum(0).expand_as(x))


@pytest.mark.usefixtures("on_amds")
def test_only_the_gradients_asked_for_are_computed(monkeypatch):
    x, weight, bias = inputs((3, 4), 2)
    linear(x.detach(), weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(2, -1))
    frozen = build_attention("fused", 12, 3, (2, 2)).requires_grad_(False)
    tokens = torch.randn(2, 5, 12, requires_grad=True)
    for of in (module, base):
        monkeypatch.setattr(of, "weight_gradient", lambda *args: pytest.fail("a gradient nobody asked for"))
    linear(x, weight.detach(), bias.detach()).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(3, -1))
    frozen(tokens).sum().backward()
    assert tokens.grad is not None


@pytest.mark.usefixtures("on_amds")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_it_maps_over_samples():
    x, weight, _ = (tensor.detach() for tensor in inputs((6, 3, 4), 5))
    per_sample = torch.func.vmap(torch.func.grad(lambda w, x: linear(x, w).sin().sum()), in_dims=(None, 0))(weight, x)
    expected = torch.stack([torch.func.grad(lambda w, s=s: F.linear(s, w).sin().sum())(weight) for s in x])
    torch.testing.assert_close(per_sample, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_amds")
def test_the_module_has_torchs_parameters_and_compiles_and_exports():
    torch.manual_seed(0)
    ours, theirs = Linear(4, 6), nn.Linear(4, 6)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 4)
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(ours, (x,)).module()(x), expected)
