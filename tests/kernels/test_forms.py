"""Every form of every primitive gives the output and the gradients of its reference in float64."""

import importlib
import os
import pkgutil
import subprocess
import sys

import pytest
import torch

from effvit import kernels, policy
from effvit.kernels import dispatch
from effvit.kernels.feature_attention import Features
from effvit.kernels.token_means import landmark_members, scaled
from effvit.kernels.window_attention import Windows

pytestmark = pytest.mark.slow

MODULES = {
    name: module
    for _, name, _ in pkgutil.iter_modules(kernels.__path__)
    if hasattr(module := importlib.import_module(f"effvit.kernels.{name}"), "reference")
}


def heads(n, m, d=4, e=4, b=2, h=3):
    """Shapes of queries, keys and values."""
    return [(b, h, n, d), (b, h, m, d), (b, h, m, e)]


def omega(m, d=4):
    return torch.randn(m, d, generator=torch.Generator().manual_seed(1))


# By primitive: shapes of the tensors it takes, and further arguments made for their dtype.
CASES = {
    "linear": [
        ([(2, 17, 12), (20, 12), (20,)], lambda dtype: ()),
        ([(2, 17, 20), (12, 20), (12,)], lambda dtype: ()),
        ([(7, 5), (5, 5), None], lambda dtype: ()),
        ([(2, 3, 1), (1, 1), (1,)], lambda dtype: ()),
    ],
    "qkv": [([(2, 5, 12), (36, 12), (36,)], lambda dtype: ()), ([(1, 1, 3), (9, 3), None], lambda dtype: ())],
    "softmax_attention": [
        (heads(9, 5), lambda dtype: ()),
        (heads(13, 13, e=7), lambda dtype: ()),
        (heads(1, 130, b=5), lambda dtype: ()),
    ],
    "feature_attention": [
        (shapes, lambda dtype, kernel=kernel, m=m: (features(kernel, m, dtype),))
        for kernel in ("exp", "relu", "elu", "softmax")
        for m in (None, 4, 11)
        for shapes in (heads(13, 13), heads(12, 13, e=6), heads(1, 1, b=1))
    ],
    "focus": [
        ([(2, 3, 7, 5), (3, 1, 5)], lambda dtype: (3.0,)),
        ([(1, 1, 300, 4), (1, 1, 4)], lambda dtype: (1.5,)),
    ],
    "grid_convolution": [
        (
            [(2, prefix + rows * columns, 4), (2, rows * columns, 4), (4, w, w)],
            lambda dtype, grid=(rows, columns): (grid,),
        )
        for rows, columns, w in [(4, 6, 3), (5, 3, 5), (1, 2, 7), (3, 3, 1)]
        for prefix in (0, 1, 5)
    ],
    "grid_pooling": [
        ([(2, rows * columns, 4)], lambda dtype, grid=(rows, columns), cells=cells: (grid, cells))
        for rows, columns, cells in [(4, 6, (2, 3)), (5, 7, (3, 3)), (5, 3, (5, 2)), (3, 3, (3, 3)), (4, 4, (1, 1))]
    ],
    "pseudo_inverse": [([(2, 3, 7, 7)], lambda dtype: (6,)), ([(1, 1, 1, 1)], lambda dtype: (3,))],
    "token_convolution": [
        ([(2, 21, 4), (4, 5)], lambda dtype: ()),
        ([(3, 3, 2), (2, 7)], lambda dtype: ()),
        ([(1, 70, 6), (6, 33)], lambda dtype: ()),
    ],
    "token_projection": [
        ([(2, 9, 4), (3, 9), (2, 9)], lambda dtype: ()),
        ([(1, 5, 3), (5, 5)], lambda dtype: ()),
    ],
    "token_means": [
        ([(2, 9, 4)], lambda dtype, m=m: (scaled(landmark_members((2, 4), m)).to(dtype),)) for m in (1, 3, 9)
    ],
    "turned_qkv": [
        ([(2, 9, 12), (36, 12), (36,), (4, 4)], lambda dtype: (0.7,)),
        ([(1, 1, 3), (9, 3), (9,), (3, 3)], lambda dtype: (1.0,)),
    ],
    "window_attention": [
        (heads(rows * columns, prefix + rows * columns, e=5), lambda dtype, w=w: (w,))
        for w in (
            *([w] * 3 for w in (Windows(4, 6, 2), Windows(5, 7, 2, 2), Windows(3, 4, 4), Windows(6, 6, 3, 2))),
            *([w] * 3 for w in (Windows(5, 1, 2, 3), Windows(4, 6, 2, shift=1), Windows(5, 7, 3, shift=1))),
            *([w] * 3 for w in (Windows(7, 6, 2, 2, shift=1),)),
            [Windows(4, 4, 2), Windows(4, 4, 2, 2), Windows(4, 4, 2, 2)],  # as many of the same size
            [Windows(5, 5, 3), Windows(5, 5, 3, 2), Windows(5, 5, 3, shift=1)],
            [Windows(7, 6, 2), Windows(7, 6, 2, shift=1), Windows(7, 6, 2)],
        )
        for rows, columns in [(w[0].rows, w[0].columns)]
        for prefix in (0, 1, 5)
    ],
}


def features(kernel, m, dtype, eps=1e-2):
    dtype = torch.promote_types(dtype, torch.float32)
    if m is None:
        return Features(kernel, eps, None, torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=dtype))
    return Features(kernel, eps, omega(m).to(dtype), 4**-0.25)


def drawn(name, shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in filter(None, shapes)]
    if name == "pseudo_inverse":
        tensors = [tensor.softmax(dim=-1) for tensor in tensors]
    if name == "focus":  # scales are positive
        tensors[1] = tensors[1].exp()
    return [tensor.to(dtype) for tensor in tensors] + [None] * shapes.count(None)


def output_and_gradients(form, tensors, more):
    inputs = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    outputs = form(*inputs, *more)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [x for x in inputs if x is not None], gradients)]


FORMS = [
    (name, form, case)
    for name, module in MODULES.items()
    for form in ("chosen", *getattr(module, "FORMS", ()))
    for case in range(len(CASES[name]))
]


def test_every_primitive_has_cases():
    assert MODULES.keys() == CASES.keys()


@pytest.mark.parametrize("processor", [True, False], ids=["AMD", "other"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "form", "case"), FORMS)
def test_output_and_gradients_are_those_of_the_reference_in_float64(name, form, case, dtype, processor, monkeypatch):
    if name == "pseudo_inverse" and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("the iteration squares the condition number: it is given float32")
    if "in float32" in form and dtype == torch.float64:
        pytest.skip("rounds to float32")
    for flag in ("ONEDNN_WEIGHT_GRADIENTS", "POWERS_OF_TWO", "LONG_ATTENTION_IN_FLOAT32"):
        monkeypatch.setattr(policy, flag, processor)
    monkeypatch.setattr(policy, "ONEDNN_PRODUCTS", processor and policy._ONEDNN is not None)
    module = MODULES[name]
    shapes, more = CASES[name][case]
    tensors = drawn(name, shapes, dtype)
    run = getattr(dispatch, name) if form == "chosen" else module.FORMS[form]
    actual = output_and_gradients(run, tensors, more(dtype))
    exact = [None if tensor is None else tensor.double() for tensor in tensors]
    expected = output_and_gradients(module.reference, exact, more(torch.float64))
    eps = torch.finfo(dtype).eps
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        rounded = not (name == "focus" and number == 0)  # whose features are float32 or more
        assert a.dtype == (dtype if rounded else torch.promote_types(dtype, torch.float32))
        # Inputs and gradients are of unit scale, and what is 0 in truth is what rounding leaves of such numbers.
        assert (a.double() - e).norm().item() < 20 * eps * max(e.norm().item(), e.numel() ** 0.5)


@pytest.mark.parametrize("name", MODULES)
def test_the_equation_alone_runs_where_the_environment_asks_for_it(name, monkeypatch):
    module = MODULES[name]
    shapes, more = CASES[name][0]
    tensors = drawn(name, shapes, torch.float64)
    monkeypatch.setattr(policy, "ONLY_REFERENCE", True)

    def reference(*args):
        return "the equation"

    monkeypatch.setattr(module, "reference", reference)
    assert getattr(dispatch, name)(*tensors, *more(torch.float64)) == "the equation"


@pytest.mark.parametrize(("value", "code"), [("reference", 0), ("fast", 1)])
def test_the_environment_may_ask_for_the_equations_and_for_nothing_else(value, code):
    command = [
        sys.executable,
        "-c",
        "from effvit import policy; assert policy.kernels() == 'reference'",
    ]
    ran = subprocess.run(
        command, env=os.environ | {"EFFVIT_KERNELS": value}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == code
    assert ("EFFVIT_KERNELS=fast: expected reference, or nothing" in ran.stderr) == bool(code)


@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_gradients_are_those_of_finite_differences(name):
    shapes, more = CASES[name][0]
    tensors = [tensor.requires_grad_() for tensor in drawn(name, shapes, torch.float64)]
    if name == "feature_attention":  # c, of which no gradient is taken, cancels but for ε

        def more(dtype):
            return (features("exp", 11, dtype, eps=1e-14),)

    def function(*inputs):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            y = getattr(dispatch, name)(*inputs, *more(torch.float64))
        return sum(part.sin().sum() for part in (y if isinstance(y, tuple) else (y,)))

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("numbers", [1, 2 * 13 * 4, 10**6], ids=["sample by sample", "two samples", "at once"])
@pytest.mark.parametrize("kernel", ["exp", "relu", "elu"])
def test_attention_by_features_is_the_same_in_blocks_of_any_size(kernel, numbers, monkeypatch):
    module = MODULES["feature_attention"]
    monkeypatch.setattr(module, "BLOCK_NUMBERS", numbers)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    tensors = drawn("feature_attention", heads(13, 13, b=7), torch.float64)
    more = (features(kernel, 11, torch.float64),)
    torch.testing.assert_close(
        output_and_gradients(module.by_blocks, tensors, more), output_and_gradients(module.reference, tensors, more)
    )


def test_features_that_are_given_are_those_of_relu_where_they_are_positive():
    module = MODULES["feature_attention"]
    q, k, v = drawn("feature_attention", heads(13, 13, b=7), torch.float64)
    tensors = [q.exp(), k.exp(), v]
    expected = output_and_gradients(module.reference, tensors, (Features("relu", 0.0),))
    for form in (module.reference, module.by_blocks):
        torch.testing.assert_close(output_and_gradients(form, tensors, (Features("identity", 0.0),)), expected)


def test_blocks_cover_each_sample_and_head_once(monkeypatch):
    module = MODULES["feature_attention"]
    monkeypatch.setattr(module, "BLOCK_NUMBERS", 100)
    x = torch.zeros(7, 3, 13, 4)
    for block in module._blocks(x):
        x[block] += 1
    assert torch.equal(x, torch.ones_like(x))


@pytest.mark.parametrize("pays", [True, False])
def test_exponentials_are_those_of_e(pays, monkeypatch):
    monkeypatch.setattr(policy, "POWERS_OF_TWO", pays)
    x = torch.linspace(-90, 2, 1001, requires_grad=True)
    y = MODULES["feature_attention"].exp_(x * 1)
    exact = x.detach().double().exp()
    # Rounding x log₂e is an error of as much of the exponent, here up to 130.
    tolerance = {"rtol": 131 * 2.0**-24 + 2.0**-22, "atol": 0}
    torch.testing.assert_close(y.double(), exact, **tolerance)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0].double(), exact, **tolerance)
