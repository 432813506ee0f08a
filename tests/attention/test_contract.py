"""What holds for every mechanism; a new one is tested here without a word being added."""

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mechanisms import CASES, FIRST, heads_of, merged_maps, options_for, relative_error
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from effvit import available_attention, build_attention
from effvit.attention import attention_class, check_options
from effvit.errors import UserError
from effvit.measure.memory import peak_bytes
from effvit.measure.workload import block_training

pytestmark = pytest.mark.slow

GRID, TOKENS, WIDTH, HEADS = (3, 5), 16, 12, 3
COMPILED = ("performer", "hybrid")  # which have kernels of most kinds; g++ takes 20 s for each
# Whose rows are weighted means of the values.
SOFT = ("standard", "fused", "performer", "hybrid", "linear", "focused", "agent", "pooled", "window", "uniform")


def small(name, options, grid=GRID, width=WIDTH, heads=HEADS, seed=0, **more):
    torch.manual_seed(seed)
    attention = build_attention(name, width, heads, grid, **options, **more).eval()
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if name.endswith("bias") or name.startswith("gate"):  # so that biases and gates are seen to matter
                parameter.normal_()
    return attention


def check_map(attention, x, y, matrix, tolerance=1e-5):
    """Apply the implied matrix to the values token by token and compare with what attention returned.

    Each channel has its own kernel of ``value_conv``, of which the matrix has the mean, so it is compared separately.
    """
    weight, bias = (part.chunk(3)[2] for part in merged_maps(attention))
    values = heads_of(x @ weight.T, attention.num_heads)
    bias = bias.view(attention.num_heads, 1, -1)
    after = type(attention).__module__.endswith("linformer")  # its bias comes after the projection, once a row
    if attention.value_conv is not None:
        matrix, convolved = matrix - attention.value_conv_map(x), convolution(attention, values + bias)
    mixed = matrix @ values + bias if after else matrix @ (values + bias)
    if attention.value_conv is not None:
        mixed[:, :, attention.prefix_tokens :] += convolved
    expected = attention.proj(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def convolution(attention, values):
    """Values (B, H, N, d) of the patches convolved, a channel at a time: (B, H, P, d)."""
    images = values[:, :, attention.prefix_tokens :].transpose(2, 3).flatten(1, 2).unflatten(2, attention.grid_size)
    side = attention.value_conv.weight.shape[-1]
    channels = [
        torch.nn.functional.conv2d(images[:, c : c + 1], kernel[None], padding=side // 2)
        for c, kernel in enumerate(attention.value_conv.weight)
    ]
    return torch.cat(channels, dim=1).unflatten(1, (attention.num_heads, -1)).flatten(3).transpose(2, 3)


def test_the_mechanisms_come_in_the_order_of_tables():
    assert available_attention()[:6] == ("standard", "fused", "linformer", "performer", "nystromformer", "hybrid")


@pytest.mark.parametrize("name", available_attention())
def test_a_mechanism_says_what_it_is(name):
    assert attention_class(name).complexity.startswith("O(")
    assert attention_class(name).paper


@pytest.mark.parametrize("name", available_attention())
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_grid_batch_and_option_that_fits_gives_the_map_that_reproduces_the_output(name, data):
    grid = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    prefix = data.draw(st.sampled_from([0, 1, 5]))
    attention = small(name, data.draw(options_for(name, grid, prefix)), grid, prefix_tokens=prefix)
    x = torch.randn(data.draw(st.integers(1, 3)), prefix + grid[0] * grid[1], WIDTH)
    with torch.no_grad():
        y, matrix = attention(x, return_map=True)
        assert y.shape == x.shape
        assert matrix.shape == (len(x), HEADS, x.shape[1], x.shape[1])
        torch.testing.assert_close(attention(x), y, rtol=1e-4, atol=1e-4)
        check_map(attention, x, y, matrix, tolerance=1e-4)


@pytest.mark.parametrize("name, options", [case for case in CASES if case[0] in SOFT and "value_conv" not in case[1]])
def test_rows_of_the_map_are_weights_that_sum_to_one(name, options):
    with torch.no_grad():
        _, matrix = small(name, options)(torch.randn(2, TOKENS, WIDTH), return_map=True)
    assert matrix.min() >= 0
    torch.testing.assert_close(matrix.sum(dim=-1), torch.ones(2, HEADS, TOKENS))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name, options", CASES)
def test_a_sample_does_not_depend_on_its_batch(name, options, half):
    attention = small(name, options)
    x = torch.randn(1, TOKENS, WIDTH)
    mates = [torch.randn(1, TOKENS, WIDTH) * scale for scale in (1e-3, 1, 30)]
    mates += [torch.zeros_like(x), torch.ones_like(x)]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        alone, among = attention(x), attention(torch.cat([*mates, x]))[-1:]
    torch.testing.assert_close(among, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, options", CASES)
def test_no_sample_gives_no_sample_and_tensors_without_numbers_have_shapes(name, options):
    attention = small(name, options)
    assert attention(torch.zeros(0, TOKENS, WIDTH)).shape == (0, TOKENS, WIDTH)
    assert attention.to("meta")(torch.empty(2, TOKENS, WIDTH, device="meta")).shape == (2, TOKENS, WIDTH)


@pytest.mark.parametrize("name, options", CASES)
def test_the_state_dict_through_safetensors_holds_all_that_the_output_depends_on(name, options, tmp_path):
    first, second = small(name, options, seed=1), small(name, options, seed=2)
    save_file({key: tensor.clone() for key, tensor in first.state_dict().items()}, tmp_path / "attention.safetensors")
    second.load_state_dict(load_file(tmp_path / "attention.safetensors"))
    x = torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("name, options", CASES)
def test_a_seed_fixes_every_initial_value(name, options):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_attention(name, WIDTH, HEADS, GRID, **options).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("grid", [(2, 2), GRID, (24, 24)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name, options", CASES)
def test_inputs_fifty_times_too_large_stay_finite_under_autocast(name, options, dtype, grid):
    tokens = 1 + grid[0] * grid[1]
    fits = dict(options)
    if name == "hybrid":
        fits["window_size"] = 2
    # Heads of width 4, and as many samples as give queries far from every key.
    attention = small(name, fits, grid, width=16, heads=4)
    x = 50 * torch.randn(max(2, 500 // tokens), tokens, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        y, matrix = attention(x, return_map=True)
        assert attention(x).isfinite().all()
    assert y.isfinite().all()
    assert matrix.isfinite().all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("name, options", CASES)
def test_autocast_changes_the_output_by_no_more_than_its_rounding(name, options, dtype, tolerance):
    attention = small(name, options)
    x = torch.randn(4, TOKENS, WIDTH)
    with torch.no_grad():
        exact = attention(x)
        with torch.autocast("cpu", dtype=dtype):
            rounded = attention(x)
    assert rounded.dtype == dtype
    powers = options.get("power", 3.0) if name == "focused" else 1  # of p times what is rounded
    assert relative_error(rounded.float(), exact) < powers * tolerance


@pytest.mark.parametrize("name, options", CASES)
def test_gradients_of_large_inputs_are_finite(name, options):
    attention = small(name, options, width=16, heads=4).train()
    x = (50 * torch.randn(8, TOKENS, 16)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = attention(x).float().square().mean()
    loss.backward()
    assert x.grad.isfinite().all()
    for key, parameter in attention.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name, options", CASES)
def test_gradients_equal_finite_differences(name, options):
    fits = {key: min(value, 2) if key in ("k", "num_landmarks") else value for key, value in options.items()}
    if name == "hybrid":
        fits["window_size"] = 2
    if name == "nystromformer" and options.get("conv_kernel_size", 33):
        fits["conv_kernel_size"] = 3
    attention = small(name, fits, grid=(1, 3), width=4, heads=2).double()
    parameters = dict(attention.named_parameters())

    def forward(x, *values):
        return functional_call(attention, dict(zip(parameters, values, strict=True)), (x,))

    x = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forward, (x, *parameters.values()), atol=2e-5)


@pytest.mark.parametrize("name, options", CASES)
def test_it_compiles_without_a_graph_break_and_gives_the_same_output_and_gradients(name, options):
    check_close(*compiled_and_eager(name, options, "aot_eager"))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler here")
@pytest.mark.parametrize("name, options", [case for case in FIRST if case[0] in COMPILED])
def test_the_generated_code_gives_the_same_output_and_gradients(name, options):
    check_close(*compiled_and_eager(name, options, "inductor"))


def check_close(actual, expected):
    for a, e in zip(actual, expected, strict=True):  # sums in another order round at the scale of the largest
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5 * max(1.0, e.abs().max().item()))


def compiled_and_eager(name, options, backend):
    attention = small(name, options).train()
    x = torch.randn(2, TOKENS, WIDTH, requires_grad=True)
    inputs = (x, *attention.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend=backend)
    return [(y, *torch.autograd.grad(y.square().sum(), inputs)) for y in (compiled(x), attention(x))]


@pytest.mark.parametrize("name, options", CASES)
def test_the_exported_program_gives_the_same_output(name, options):
    attention = small(name, options)
    x = torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        program = torch.export.export(attention, (x,)).module()
        other = torch.randn(2, TOKENS, WIDTH)
        torch.testing.assert_close(program(other), attention(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, options", CASES)
def test_output_and_gradients_are_the_same_bits_every_time(name, options):
    attention = small(name, options).train()
    x = torch.randn(3, TOKENS, WIDTH, requires_grad=True)
    runs = []
    for _ in range(2):
        y = attention(x)
        runs.append((y, *torch.autograd.grad(y.square().sum(), (x, *attention.parameters()))))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("name", available_attention())
def test_memory_of_a_training_step_is_linear_in_tokens_but_for_the_matrix_of_standard(name):
    peaks = []
    for side in (32, 64):
        attention = build_attention(name, 48, 2, (side, side))
        step = block_training(attention, torch.randn(1, 1 + side**2, 48))
        step()
        peaks.append(peak_bytes(step, torch.device("cpu")))
    slope = math.log(peaks[1] / peaks[0]) / math.log(4097 / 1025)
    if name == "standard":
        assert slope > 1.9
    else:
        assert slope <= 1.05


@pytest.mark.parametrize("name, options", CASES)
def test_dropout_of_attention_is_unbiased_and_off_in_eval_mode(name, options):
    x = torch.randn(1, TOKENS, WIDTH)
    attention = small(name, options, attn_drop=0.3)
    with torch.no_grad():
        expected = attention(x)
        assert torch.equal(expected, attention(x))
        dropped = attention.train()(x.expand(4000, -1, -1))
    assert not torch.equal(dropped[0], dropped[1])
    standard_error = dropped.std(dim=0) / len(dropped) ** 0.5
    assert ((dropped.mean(dim=0) - expected[0]).abs() < 5 * standard_error + 1e-6).all()


@pytest.mark.parametrize("name, options", CASES)
def test_the_map_under_dropout_is_the_one_that_was_applied(name, options):
    attention = small(name, options, attn_drop=0.3).train()
    x = torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        y, matrix = attention(x, return_map=True)
        if name == "linformer":  # rows no longer sum to one, and the bias of the values is dropped with them
            _, bias = merged_maps(attention)
            bias.chunk(3)[2].zero_()
            torch.manual_seed(1)
            y, matrix = attention(x, return_map=True)
        check_map(attention, x, y, matrix)


@pytest.mark.parametrize("name, options", CASES)
def test_without_bias_the_maps_have_none(name, options):
    torch.manual_seed(0)
    attention = build_attention(name, WIDTH, HEADS, GRID, qkv_bias=False, **options)
    biases = [key for key in attention.state_dict() if key.endswith("bias") and not key.startswith("gate")]
    assert biases == ["proj.bias"]
    assert attention(torch.randn(1, TOKENS, WIDTH)).isfinite().all()


@pytest.mark.parametrize("name, options", FIRST)
@pytest.mark.parametrize("shape", [(1, TOKENS - 1, WIDTH), (1, TOKENS, WIDTH + 1), (TOKENS, WIDTH)])
def test_tokens_of_a_wrong_shape_are_refused_by_both_shapes(name, options, shape):
    any_number = not (attention_class(name).needs_grid or attention_class(name).fixed_length)
    if any_number and shape == (1, TOKENS - 1, WIDTH):
        longer = small(name, options, (7, 2))
        x = torch.randn(2, 15, WIDTH)
        torch.testing.assert_close(small(name, options)(x, return_map=True), longer(x, return_map=True))
        return
    with pytest.raises(UserError, match=r"expected \(batch, 16, 12\)") as error:
        small(name, options)(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    "name, arguments, says",
    [
        ("flash", {}, "attention='flash'.*fused"),
        ("fused", {"num_heads": 5}, "num_heads=5.*12"),
        ("fused", {"num_heads": 0}, "num_heads=0"),
        ("fused", {"grid_size": (0, 4)}, "grid_size="),
        ("fused", {"k": 4}, r"attention\.fused\.k: unknown"),
        ("standard", {"k": 4}, r"attention\.standard\.k: unknown"),
        ("linformer", {"k": 17}, r"attention\.linformer\.k=17.*at most 16"),
        *(("linformer", {"k": k}, rf"attention\.linformer\.k={k!r}") for k in (0, -1, 2.5, "8", True)),
        ("linformer", {"k": 4, "share": "all"}, r"attention\.linformer\.share='all'.*layers"),
        *(("performer", {"num_features": m}, r"attention\.performer\.num_features=") for m in (0, -3, 1.5)),
        ("performer", {"kernel": "elu"}, r"attention\.performer\.kernel='elu'.*relu"),
        ("performer", {"redraw_every": -1}, r"attention\.performer\.redraw_every=-1"),
        *(("nystromformer", {"num_landmarks": m}, r"attention\.nystromformer\.num_landmarks=") for m in (0, -3, 1.5)),
        ("nystromformer", {"pinv_iterations": 0}, r"attention\.nystromformer\.pinv_iterations=0"),
        ("nystromformer", {"conv_kernel_size": 4}, r"attention\.nystromformer\.conv_kernel_size=4.*odd"),
        ("linear", {"feature_map": "exp"}, r"attention\.linear\.feature_map='exp'.*relu"),
        *(("pooled", {"pool_size": size}, r"attention\.pooled\.pool_size=") for size in (0, -1, 2.5)),
        *(("agent", {"agent_size": size}, r"attention\.agent\.agent_size=") for size in (0, -1, 2.5)),
        *(("focused", {"power": power}, r"attention\.focused\.power=") for power in (0, -1.0, 1e6, "3")),
        *(("window", {"window_size": size}, r"attention\.window\.window_size=") for size in (0, -1, 2.5)),
        ("window", {"shift": 1}, r"attention\.window\.shift=1"),
        ("window", {"global_every": -1}, r"attention\.window\.global_every=-1"),
        ("uniform", {"k": 1}, r"attention\.uniform\.k: unknown"),
        *(
            ("fused", {"value_conv": side}, rf"value_conv={side!r}: must be odd")
            for side in (-1, 2, 1001, 3.0, "3", None, True)
        ),
        ("hybrid", {"window_size": 6}, r"attention\.hybrid\.window_size=6.*at most 5"),
        *(("hybrid", {"window_size": w}, r"attention\.hybrid\.window_size=") for w in (0, -1, 2.5)),
        ("hybrid", {"window_size": 2, "dilations": [1, 6]}, r"attention\.hybrid\.dilations=\[1, 6\].*at most 5"),
        *(
            ("hybrid", {"window_size": 2, "dilations": r}, r"attention\.hybrid\.dilations")
            for r in ([], [1, 1], [0], [1.5], 2)
        ),
        ("hybrid", {"branches": ["global"]}, r"attention\.hybrid\.branches.*'global'"),
        ("hybrid", {"branches": []}, r"attention\.hybrid\.branches=\[\]"),
        ("hybrid", {"window_size": 2, "branches": ["regional"], "dilations": [2]}, r"attention\.hybrid.*regional"),
        ("hybrid", {"window_size": 2, "branches": ["dilated"], "dilations": [1]}, r"attention\.hybrid.*dilated"),
        ("hybrid", {"feature_map": "softmax"}, r"attention\.hybrid\.feature_map='softmax'.*focused"),
        ("hybrid", {"global_every": -1}, r"attention\.hybrid\.global_every=-1"),
        ("hybrid", {"global_every": 2, "branches": ["linear"]}, r"attention\.hybrid.*global_every: needs 'linear'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_that_names_it(name, arguments, says):
    with pytest.raises(UserError, match=says) as error:
        build_attention(name, **({"dim": WIDTH, "num_heads": HEADS, "grid_size": GRID} | arguments))
    assert "\n" not in str(error.value)


def test_options_are_checked_against_a_grid_only_where_one_is_given():
    assert check_options("linformer", {"k": 50}).k == 50
    with pytest.raises(UserError, match="at most 16"):
        check_options("linformer", {"k": 50}, GRID)
