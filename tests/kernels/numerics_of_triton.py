"""Kernels of effvit.kernels.cuda give the outputs and gradients of their references in float64.

Run by `test_triton.py` in a process of its own, with TRITON_INTERPRET=1 set before Triton is imported. On a machine
with a GPU, `pytest tests/kernels/numerics_of_triton.py` runs the same on it.
"""

import importlib
import os
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from effvit import build_attention, policy
from effvit.kernels import (
    choice,
    dispatch,
    feature_attention,
    pseudo_inverse,
    softmax_attention,
    token_convolution,
    window_attention,
)
from effvit.kernels.cuda import features as of_cuda
from effvit.kernels.feature_attention import Features
from effvit.kernels.window_attention import Windows

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"
ON_A_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="takes seconds in the interpreter, and others are like it")


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    """Triton's forms run on this device in place of a CPU's, products are exact, and 35 tokens have two parts."""
    monkeypatch.setattr(policy, "TRITON_ON", DEVICE)
    monkeypatch.setattr(choice, "on_cpu", lambda *tensors: False)
    monkeypatch.setattr(of_cuda, "SUMMED", 32)
    monkeypatch.setattr(of_cuda, "APART", 32)
    with policy.kept():
        torch.backends.cuda.matmul.allow_tf32 = False
        yield


@pytest.fixture(autouse=True)
def tensor_cores(monkeypatch):
    """Products in the interpreter cut factors to TF32, 10 bits of float32's 23, as a GPU's do."""
    if DEVICE == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    product = InterpreterBuilder.create_dot

    def cut(factor):
        return TensorHandle((factor.data.view(np.int32) & -(2**13)).view(np.float32), factor.dtype)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: product(self, cut(a), cut(b), *rest)
    )


@pytest.fixture
def launched(monkeypatch):
    """How often each operator of Triton's was called."""
    count = Counter()
    for module, names in (
        ("feature_attention", ("attend",)),
        ("feature_gradients", ("attend_backward",)),
        ("pseudo_inverse", ("invert", "invert_backward")),
        ("token_convolution", ("convolution", "convolution_backward")),
        ("window_attention", ("attend",)),
        ("window_gradients", ("attend_backward",)),
    ):
        for name in names:
            place = f"effvit.kernels.cuda.{module}.{name}"
            operator = getattr(importlib.import_module(f"effvit.kernels.cuda.{module}"), name)

            def call(*args, operator=operator, name=f"{module}.{name}"):
                count[name] += 1
                return operator(*args)

            monkeypatch.setattr(place, call)
    return count


def drawn(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


def output_and_gradients(form, tensors):
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    y = form(*inputs)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, inputs, gradient.to(y.device, y.dtype))]


def assert_equal(form, reference, tensors, amplified=1.0):
    """Within 20 roundings, as all forms, or as many times more as rounding is amplified."""
    actual = output_and_gradients(form, tensors)
    expected = output_and_gradients(reference, [tensor.double() for tensor in tensors])
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == tensors[0].dtype
        error = (a.double() - e).norm().item() / max(e.norm().item(), e.numel() ** 0.5)
        assert error < 20 * amplified * torch.finfo(a.dtype).eps


def features(kernel, d, m):
    omega = None if m is None else torch.randn(m, d, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return Features(kernel, 0.0 if kernel in ("softmax", "identity") else 1e-2, omega, d**-0.25 if m else 1.0)


def heads(d, e, dtype=torch.float32, b=1):
    """Queries, keys and values of two heads, which lie next to one another as a map of tokens leaves them."""
    return [x.transpose(1, 2) for x in drawn((b, 19, 2, d), (b, 35, 2, d), (b, 35, 2, e), dtype=dtype)]


FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("kernel", "d", "m", "dtype"),
    [
        *[("exp", 12, 20, FLOAT32), ("exp", 16, 128, FLOAT32), ("exp", 64, 33, FLOAT32), ("exp", 12, 40, BFLOAT16)],
        *[("relu", 32, 11, FLOAT32), ("relu", 64, 64, BFLOAT16), ("elu", 12, None, FLOAT32), ("elu", 16, 5, FLOAT32)],
        *[("elu", 64, None, BFLOAT16), ("softmax", 32, None, FLOAT32), ("softmax", 64, None, FLOAT32)],
        *[("softmax", 12, 40, BFLOAT16), ("identity", 12, None, FLOAT32), ("identity", 64, None, BFLOAT16)],
    ],
)
def test_attention_by_features(kernel, d, m, dtype):
    q, k, v = heads(d, 10 if d == 12 else d, dtype)
    if kernel == "identity":
        q, k = q.abs() + 0.1, k.abs() + 0.1
    phi = features(kernel, d, m)
    exact = phi._replace(omega=None if phi.omega is None else phi.omega.double())
    assert_equal(
        lambda *x: feature_attention.in_triton(*x, phi),
        lambda *x: feature_attention.reference(*x, exact),
        [q, k, v],
    )


@pytest.mark.parametrize(
    ("d", "power", "dtype"),
    [(12, 3.0, FLOAT32), (16, 0.5, FLOAT32), (64, 3.0, FLOAT32), (32, 8.0, FLOAT32), (64, 3.0, BFLOAT16)],
)
def test_attention_by_focused_features(d, power, dtype):
    q, k, v = heads(d, 10 if d == 12 else d, dtype, b=2)
    q[0, 0, 3], k[0, 0, 4] = 0, -1  # no number above zero
    (scale,) = drawn((2, 1, d))
    assert_equal(
        lambda q, k, v, s: feature_attention.in_triton(q, k, v, Features("focused", 0.0, None, s.exp(), power)),
        lambda q, k, v, s: feature_attention.reference(q, k, v, Features("focused", 0.0, None, s.exp(), power)),
        [q, k, v, scale.to(dtype)],
        amplified=max(1.0, power / 3),
    )


def test_products_of_float32_are_rounded_to_tf32_where_pytorch_may():
    tensors, phi = heads(16, 16), features("elu", 16, None)
    exact = feature_attention.in_triton(*tensors, phi)
    torch.backends.cuda.matmul.allow_tf32 = True
    rounded = feature_attention.in_triton(*tensors, phi)
    assert 2**-16 < (rounded - exact).norm() / exact.norm() < 2**-9


@pytest.mark.parametrize("kernel", ["exp", "softmax"])
def test_exponents_far_apart_neither_overflow_nor_vanish(kernel):
    q, k, v = heads(12, 12)
    k[:, :, 33:] *= 30  # the largest of all are in the last block
    phi = features(kernel, 12, 20)
    y = feature_attention.in_triton(q, k, v, phi)
    expected = feature_attention.reference(q.double(), k.double(), v.double(), phi._replace(omega=phi.omega.double()))
    assert (y - expected).norm() < 2e-5 * expected.norm()


def test_a_sample_does_not_depend_on_its_batch_and_two_runs_are_equal():
    tensors, phi = heads(12, 12, b=2), features("exp", 12, 20)
    together = feature_attention.in_triton(*tensors, phi)
    assert torch.equal(together, feature_attention.in_triton(*tensors, phi))
    assert torch.equal(together[1:], feature_attention.in_triton(*(x[1:] for x in tensors), phi))


def test_sums_and_values_of_another_precision_than_queries():
    q, k, v = heads(16, 16)
    y = feature_attention.in_triton(q.abs(), k.abs(), v.bfloat16(), features("identity", 16, None))
    expected = feature_attention.reference(
        q.double().abs(), k.double().abs(), v.bfloat16().double(), features("identity", 16, None)
    )
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() < 2**-7 * expected.norm()


@pytest.mark.parametrize(("m", "number", "iterations"), [(1, 1, 3), (7, 2, 4), (33, 1, 2), (64, 1, 1)])
def test_pseudo_inverse(m, number, iterations):
    (a,) = drawn((number, 1, m, m))
    assert_equal(
        lambda a: pseudo_inverse.in_triton(a, iterations),
        lambda a: pseudo_inverse.reference(a, iterations),
        [a.softmax(dim=-1)],
    )


def test_columns_of_equal_sums_share_the_gradient_of_the_largest():
    a = torch.full((1, 4, 4), 0.25, device=DEVICE) + torch.eye(4, device=DEVICE)
    assert_equal(lambda a: pseudo_inverse.in_triton(a, 2), lambda a: pseudo_inverse.reference(a, 2), [a])


@pytest.mark.parametrize(
    ("b", "n", "c", "w", "dtype"),
    [
        (2, 21, 4, 5, FLOAT32),
        (3, 3, 2, 7, FLOAT32),
        (1, 40, 40, 33, FLOAT32),
        (1, 5, 3, 1, FLOAT32),
        (2, 21, 4, 5, BFLOAT16),
    ],
)
def test_convolution_over_tokens(b, n, c, w, dtype):
    x, kernels, residual = drawn((b, n, c), (c, w), (b, n, c), dtype=dtype)
    assert_equal(token_convolution.in_triton, plus_convolution, [x, kernels, residual])


def test_convolution_alone():
    assert_equal(
        lambda x, kernels: dispatch.token_convolution(x, kernels),
        token_convolution.reference,
        drawn((2, 21, 4), (4, 5)),
    )


def plus_convolution(x, kernels, residual):
    return residual + token_convolution.reference(x, kernels)


def test_sums_of_a_long_sequence_are_joined(monkeypatch):
    monkeypatch.setattr("effvit.kernels.cuda.token_convolution._SUMMED", 16)
    assert_equal(token_convolution.in_triton, plus_convolution, drawn((2, 45, 3), (3, 65), (2, 45, 3)))


def windowed(windows, prefix, d, e, dtype=torch.float32, heads=None, b=1):
    """Queries, keys and values of all tokens, a head for each of the windows or more, side by side in memory."""
    number, heads = prefix + windows[0].rows * windows[0].columns, heads or len(windows)
    return [x.transpose(1, 2) for x in drawn(*((b, number, heads, width) for width in (d, d, e)), dtype=dtype)]


def of_all_tokens(windows, prefix):
    """Prefix tokens attend to all tokens, patches to their windows; what the other heads are given is passed on."""

    def reference(q, k, v):
        h = len(windows)
        of_prefix = softmax_attention.reference(q[:, :, :prefix], k, v)
        patches = window_attention.reference(q[:, :h, prefix:], k[:, :h], v[:, :h], windows)
        others = q[:, h:, prefix:], k[:, h:], v[:, h:]
        return torch.cat([of_prefix[:, :h], patches], dim=2), of_prefix[:, h:], *others

    return reference


def in_one(form):
    """All results of several heads as one, each by another function so that their gradients differ."""

    def call(*inputs):
        y, *rest = form(*inputs)
        return torch.cat([y.flatten(), *(part.sin().flatten() for part in rest)])

    return call


@pytest.mark.parametrize(
    ("windows", "prefix", "d", "e", "dtype"),
    [
        *[([Windows(4, 4, 2)] * 2, 1, 12, 10, FLOAT32), ([Windows(4, 8, 4)], 0, 16, 16, FLOAT32)],
        *[([Windows(5, 7, 4)], 5, 64, 64, FLOAT32), ([Windows(5, 1, 2, 3)], 1, 12, 12, FLOAT32)],
        *[([Windows(6, 7, 4, shift=2)], 1, 16, 16, FLOAT32), ([Windows(7, 6, 2, 2, shift=1)], 0, 12, 12, FLOAT32)],
        pytest.param([Windows(9, 3, 2, 3)], 1, 16, 16, FLOAT32, marks=ON_A_GPU),
        pytest.param([Windows(8, 11, 8)], 1, 64, 64, FLOAT32, marks=ON_A_GPU),
        pytest.param([Windows(14, 7, 7)], 5, 12, 12, FLOAT32, marks=ON_A_GPU),
        pytest.param([Windows(3, 4, 1)], 16, 12, 12, FLOAT32, marks=ON_A_GPU),
        ([Windows(5, 4, 2), Windows(5, 4, 3, 2), Windows(5, 4, 3, 2), Windows(5, 4, 4, shift=2)], 5, 12, 12, FLOAT32),
        *[([Windows(5, 7, 4)], 1, 64, 64, BFLOAT16), ([Windows(9, 8, 7, shift=3)], 5, 16, 12, BFLOAT16)],
        ([Windows(3, 4, 2), Windows(3, 4, 3, 2)], 1, 12, 12, BFLOAT16),
    ],
)
def test_attention_in_windows(windows, prefix, d, e, dtype):
    q, k, v = windowed(windows, prefix, d, e, dtype)
    patches = q[:, :, prefix:]
    assert_equal(
        lambda *x: window_attention.in_triton(*x, windows),
        lambda *x: window_attention.reference(*x, windows),
        [patches, k, v],
    )
    if prefix:
        assert_equal(
            lambda *x: window_attention.in_triton(*x, windows),
            lambda *x: of_all_tokens(windows, prefix)(*x)[0],
            [q, k, v],
        )


@pytest.mark.parametrize(("prefix", "dtype"), [(0, FLOAT32), pytest.param(5, FLOAT32, marks=ON_A_GPU), (1, BFLOAT16)])
def test_gradients_of_heads_without_windows_get_to_their_place(prefix, dtype):
    windows = [Windows(3, 5, 2), Windows(3, 5, 2, 2)]
    assert_equal(
        in_one(lambda *x: window_attention.tokens_in_triton(*x, windows)),
        in_one(of_all_tokens(windows, prefix)),
        windowed(windows, prefix, 12, 10, dtype, heads=3),
    )


def test_sums_over_many_windows_are_joined():
    windows = [Windows(3, 11, 1)]
    assert_equal(
        lambda *x: window_attention.in_triton(*x, windows),
        lambda *x: of_all_tokens(windows, 1)(*x)[0],
        windowed(windows, 1, 12, 12),
    )


def test_scores_far_apart_neither_overflow_nor_vanish_in_windows():
    windows = [Windows(5, 6, 4, shift=2)]
    q, k, v = windowed(windows, 2, 12, 12)
    k[:, :, 9] *= 300
    q[:, :, 0] *= 30
    y = window_attention.in_triton(q, k, v, windows)
    expected, *_ = of_all_tokens(windows, 2)(q.double(), k.double(), v.double())
    assert (y - expected).norm() < 2e-5 * expected.norm()


def test_windows_of_a_sample_do_not_depend_on_its_batch_and_two_runs_are_equal():
    windows = [Windows(3, 2, 2), Windows(3, 2, 3)]
    tensors = windowed(windows, 1, 12, 12, heads=3, b=2)

    def run(tensors):
        inputs = [x.detach().requires_grad_() for x in tensors]
        results = window_attention.tokens_in_triton(*inputs, windows)
        return *results, *torch.autograd.grad([y.sin().sum() for y in results], inputs)

    both = run(tensors)
    assert all(map(torch.equal, both, run(tensors)))
    assert all(map(torch.equal, [x[1:] for x in both], run([x[1:] for x in tensors])))


@pytest.mark.parametrize(
    ("windows", "prefix", "width", "dropout_p", "expected"),
    [
        *[(Windows(9, 9, 8), 16, 64, 0.0, True), (Windows(9, 9, 9), 1, 12, 0.0, False)],
        *[(Windows(4, 4, 2), 17, 12, 0.0, False), (Windows(4, 4, 2), 1, 65, 0.0, False)],
        (Windows(4, 4, 2), 1, 12, 0.1, False),
    ],
)
def test_windows_that_do_not_fit_are_left_to_pytorch(windows, prefix, width, dropout_p, expected):
    q, k, v = windowed([windows], prefix, 12, width)
    assert dispatch.windows_suit_triton(q, k, v, [windows], dropout_p) == expected


OPTIONS = {
    "performer": {"num_features": 20},
    "linear": {},
    "focused": {},
    "hybrid": {"window_size": 2, "branches": ["regional", "linear"]},
    "window": {"window_size": 2},
    "nystromformer": {"num_landmarks": 5, "pinv_iterations": 1, "conv_kernel_size": 3},
}


def mechanism(name):
    torch.manual_seed(0)
    return build_attention(name, dim=24, num_heads=2, grid_size=(3, 4), **OPTIONS[name]).to(DEVICE)


FEATURES = ("feature_attention.attend", "feature_gradients.attend_backward")
WINDOWS = ("window_attention.attend", "window_gradients.attend_backward")
EXPECTED = {
    "performer": FEATURES,
    "linear": FEATURES,
    "focused": FEATURES,
    "hybrid": FEATURES + WINDOWS,
    "window": WINDOWS,
    "nystromformer": (
        *("pseudo_inverse.invert", "pseudo_inverse.invert_backward"),
        *("token_convolution.convolution", "token_convolution.convolution_backward"),
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_mechanisms_use_them_once_a_step(name, launched, monkeypatch):
    module, (x,) = mechanism(name), drawn((2, 13, 24))
    parameters = list(module.parameters())
    y = module(x)
    gradients = torch.autograd.grad(y.sin().sum(), parameters)
    assert launched == dict.fromkeys(EXPECTED[name], 1)
    monkeypatch.setattr(policy, "TRITON_ON", None)
    torch.testing.assert_close(y, module(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients, torch.autograd.grad(module(x).sin().sum(), parameters), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "prefix", "options"),
    [
        *[("window", 0, {"window_size": 2}), ("window", 5, {"window_size": 2, "shift": True})],
        pytest.param("hybrid", 0, {"window_size": 3}, marks=ON_A_GPU),
        ("hybrid", 5, {"window_size": 3}),
        pytest.param("hybrid", 1, {"window_size": 2, "dilations": [1], "branches": ["regional"]}, marks=ON_A_GPU),
        ("hybrid", 1, {"window_size": 2, "dilations": [1], "branches": ["regional", "linear"], "fusion": "gate"}),
    ],
)
def test_mechanisms_with_windows_are_what_they_are_without_triton(name, prefix, options, launched, monkeypatch):
    torch.manual_seed(0)
    place = {"prefix_tokens": prefix, "layer": 1, "depth": 2}  # in every second block windows are shifted
    heads = 3 if name == "hybrid" else 1  # one for each branch
    module = build_attention(name, dim=12 * heads, num_heads=heads, grid_size=(3, 4), **place, **options)
    module, (x,) = module.to(DEVICE), drawn((1, prefix + 12, 12 * heads))
    parameters = list(module.parameters())
    y, matrix = module(x), module(x, return_map=True)[1]
    gradients = torch.autograd.grad(y.sin().sum(), parameters)
    assert launched[WINDOWS[0]] and launched[WINDOWS[1]]
    monkeypatch.setattr(policy, "TRITON_ON", None)
    torch.testing.assert_close(y, module(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(matrix, module(x, return_map=True)[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients, torch.autograd.grad(module(x).sin().sum(), parameters), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["performer", "nystromformer", "window", pytest.param("hybrid", marks=ON_A_GPU)])
def test_a_compiled_step_has_them_as_operators_and_no_break(name):
    from torch._dynamo.backends.common import aot_autograd

    module, (x,) = mechanism(name), drawn((1, 13, 24))
    parameters, graphs = list(module.parameters()), []

    def note(graph, _):
        graphs.append({str(node.target).split(".")[1] for node in graph.graph.nodes if "effvit" in str(node.target)})
        return graph

    compiled = torch.compile(module, backend=aot_autograd(fw_compiler=note), fullgraph=True)
    y = compiled(x)
    gradients = torch.autograd.grad(y.sin().sum(), parameters)
    operators = {
        "performer": {"feature_attention"},
        "nystromformer": {"pseudo_inverse", "token_convolution"},
        "window": {"window_attention"},
        "hybrid": {"window_attention", "feature_attention"},
    }[name]
    assert graphs == [operators, {f"{operator}_backward" for operator in operators}]
    expected = module(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sin().sum(), parameters))


def test_exporters_and_functional_transforms_are_given_the_equations(launched):
    module, (x, tangent) = mechanism("performer").eval(), drawn((1, 13, 24), (1, 13, 24))
    program = torch.export.export(module, (x,))
    assert not [node for node in program.graph.nodes if "effvit" in str(node.target)]
    _, along = torch.func.jvp(module, (x,), (tangent,))
    gradient = torch.func.grad(lambda x: module(x).sin().sum())(x)
    torch.func.vmap(module)(x[None])
    assert not launched
    # With them: of the same function, by a difference and by a step.
    step = 1e-2
    torch.testing.assert_close(
        along, (module(x + step * tangent) - module(x - step * tangent)) / (2 * step), atol=1e-2, rtol=1e-2
    )
    x.requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(module(x).sin().sum(), x)[0], atol=1e-4, rtol=1e-3)
    assert launched


@pytest.mark.parametrize("name", ["performer", "nystromformer", "window", "hybrid"])
def test_gradients_of_gradients(name, launched, monkeypatch):
    module, (x,) = mechanism(name), drawn((1, 13, 24))
    x.requires_grad_()

    def second():
        with sdpa_kernel(SDPBackend.MATH):
            (gradient,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    actual = second()
    assert launched
    monkeypatch.setattr(policy, "TRITON_ON", None)
    torch.testing.assert_close(actual, second(), atol=1e-3, rtol=1e-3)
