"""The wider field beside brute force: a loop over tokens in float64, by each mechanism's definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mechanisms import copy_maps, options_for, qkv_of

from effvit import build_attention
from effvit.attention import attention_class

WIDTH, HEADS, HEAD = 12, 3, 4


def softmax(scores):
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def scored(query, keys):
    return softmax([dot(query, key) / math.sqrt(HEAD) for key in keys])


def cells_of(grid, side, prefix):
    """Tokens of each cell of the pooled grid, by PyTorch's rule for adaptive pooling."""
    rows, columns = grid
    down, across = min(side, rows), min(side, columns)
    for i in range(down):
        for j in range(across):
            inside_rows = range(i * rows // down, math.ceil((i + 1) * rows / down))
            inside_columns = range(j * columns // across, math.ceil((j + 1) * columns / across))
            yield [prefix + row * columns + column for row in inside_rows for column in inside_columns]


def mean(vectors):
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def linear_map(attention, q, k, head):
    kind = attention.options.feature_map
    if kind == "softmax":
        of_keys = list(zip(*[softmax(feature) for feature in zip(*k, strict=True)], strict=True))
        return [[dot(softmax(query), key) for key in of_keys] for query in q]
    phi = {"elu": lambda h: h + 1 if h > 0 else math.exp(h), "relu": lambda h: max(h, 0.0)}[kind]
    return normalised(*([[phi(h) + 1e-6 for h in token] for token in tokens] for tokens in (q, k)))


def normalised(of_queries, of_keys):
    rows = [[dot(query, key) for key in of_keys] for query in of_queries]
    return [[weight / sum(row) for weight in row] for row in rows]


def focused_map(attention, q, k, head):
    scale = torch.nn.functional.softplus(attention.scale.detach())[head * HEAD : (head + 1) * HEAD].tolist()
    power = attention.options.power

    def phi(token):
        x_hat = [(max(h, 0.0) + 1e-6) / s for h, s in zip(token, scale, strict=True)]
        powers = [h**power for h in x_hat]
        return [math.hypot(*x_hat) * h / math.hypot(*powers) for h in powers]

    return normalised([phi(token) for token in q], [phi(token) for token in k])


def agent_map(attention, q, k, head):
    cells = cells_of(attention.grid_size, attention.options.agent_size, attention.prefix_tokens)
    agents = [mean([q[token] for token in cell]) for cell in cells]
    gathered = [scored(agent, k) for agent in agents]
    return [
        [dot(of_agents, column) for column in zip(*gathered, strict=True)]
        for of_agents in (scored(query, agents) for query in q)
    ]


def pooled_map(attention, q, k, head):
    prefix = attention.prefix_tokens
    groups = [[token] for token in range(prefix)]
    groups += cells_of(attention.grid_size, attention.options.pool_size, prefix)
    keys = [mean([k[token] for token in group]) for group in groups]
    matrix = []
    for query in q:
        row = [0.0] * len(k)
        for weight, group in zip(scored(query, keys), groups, strict=True):
            for token in group:
                row[token] += weight / len(group)
        matrix.append(row)
    return matrix


def window_map(attention, q, k, head):
    options, prefix = attention.options, attention.prefix_tokens
    (rows, columns), w = attention.grid_size, options.window_size
    number = attention.layer + 1
    everywhere = w >= max(rows, columns) or (options.global_every and number % options.global_every == 0)
    first = w // 2 if options.shift and number % 2 == 0 else 0  # the side of the first, cut window

    def window(token):
        row, column = divmod(token - prefix, columns)
        return tuple((place - first) // w for place in (row, column))

    matrix = []
    for token, query in enumerate(q):
        all_of_them = everywhere or token < prefix
        seen = [o for o in range(len(k)) if all_of_them or o < prefix or window(o) == window(token)]
        row = [0.0] * len(k)
        for other, weight in zip(seen, scored(query, [k[other] for other in seen]), strict=True):
            row[other] = weight
        matrix.append(row)
    return matrix


def uniform_map(attention, q, k, head):
    return [[1 / len(k)] * len(k) for _ in q]


MAPS = {
    "linear": linear_map,
    "focused": focused_map,
    "agent": agent_map,
    "pooled": pooled_map,
    "window": window_map,
    "uniform": uniform_map,
}


def build(name, grid, **options):
    torch.manual_seed(0)
    attention = build_attention(name, WIDTH, HEADS, grid, **options).double().eval()
    with torch.no_grad():
        for label, parameter in attention.named_parameters():
            if label == "scale" or label.endswith("bias"):
                parameter.normal_()
    return attention


@pytest.mark.parametrize("name", MAPS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_loop_over_tokens_gives_the_same_map_and_output(name, data):
    grid = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    prefix = data.draw(st.sampled_from([0, 1, 5]))
    place = {"layer": data.draw(st.integers(0, 3)), "depth": 4, "prefix_tokens": prefix}
    attention = build(name, grid, **place, **data.draw(options_for(name, grid, prefix)))
    x = torch.randn(1, prefix + grid[0] * grid[1], WIDTH, dtype=torch.float64)
    with torch.no_grad():
        y, matrix = attention(x, return_map=True)
        q, k, v = (part[0].tolist() for part in qkv_of(attention, x))
        expected = torch.tensor([MAPS[name](attention, q[h], k[h], h) for h in range(HEADS)], dtype=torch.float64)
        torch.testing.assert_close(matrix[0], expected, rtol=1e-9, atol=1e-10)
        mixed = expected @ torch.tensor(v, dtype=torch.float64)
        torch.testing.assert_close(y[0], attention.proj(mixed.transpose(0, 1).flatten(1)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pooled", {"pool_size": 5}),
        ("pooled", {"pool_size": 9}),
        ("window", {"window_size": 5}),
        ("window", {"window_size": 9, "shift": True, "layer": 1, "depth": 2}),
        ("window", {"window_size": 2, "global_every": 3, "layer": 5, "depth": 6}),
    ],
)
def test_a_pool_or_window_as_large_as_the_grid_and_a_global_block_are_fused(name, options, prefix):
    grid = (3, 5)
    fused = build_attention("fused", WIDTH, HEADS, grid, prefix_tokens=prefix)
    same = copy_maps(fused, build_attention(name, WIDTH, HEADS, grid, prefix_tokens=prefix, **options))
    x = torch.randn(2, prefix + 15, WIDTH)
    torch.testing.assert_close(same(x), fused(x), rtol=1e-5, atol=1e-6)


def test_a_power_of_one_leaves_features_as_they_are_up_to_their_scale():
    focused = build("focused", (3, 5), power=1.0)
    with torch.no_grad():
        focused.scale.fill_(math.log(math.e - 1))  # softplus is 1
        linear = build("linear", (3, 5), feature_map="relu")
        linear.load_state_dict({key: value for key, value in focused.state_dict().items() if key != "scale"})
        x = torch.randn(2, 16, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(focused(x), linear(x), rtol=1e-5, atol=1e-5)


def test_windows_shift_in_every_second_block_and_global_blocks_are_every_gth():
    blocks = [
        build_attention("window", WIDTH, HEADS, (8, 8), window_size=4, shift=True, global_every=3, layer=i, depth=6)
        for i in range(6)
    ]
    assert [block.windows.shift for block in blocks] == [0, 2, 0, 2, 0, 2]
    assert [block.is_global for block in blocks] == [False, False, True, False, False, True]


@pytest.mark.parametrize("feature_map", ["elu", "relu", "softmax"])
@pytest.mark.parametrize("value", [-1e4, 0.0, 1e4])
def test_features_that_are_all_zero_do_not_divide_by_zero(feature_map, value):
    attention = build_attention("linear", 3, 3, (4, 4), feature_map=feature_map)
    x = torch.full((2, 17, 3), value)
    assert attention(x).isfinite().all()
    with torch.autocast("cpu", dtype=torch.float16):
        assert attention(x / 100).isfinite().all()


N, P, S, C, D = 17, 16, 1, 12, 4


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("linear", {}, 4 * N * C**2 + 2 * N * C * D + N * C),
        ("linear", {"feature_map": "relu"}, 4 * N * C**2 + 2 * N * C * D + N * C),
        ("linear", {"feature_map": "softmax"}, 4 * N * C**2 + 2 * N * C * D),
        ("focused", {}, 4 * N * C**2 + 2 * N * C * D + N * C),
        ("pooled", {"pool_size": 2}, 2 * N * C**2 + 2 * 5 * C**2 + 2 * N * 5 * C),
        ("agent", {"agent_size": 2}, 4 * N * C**2 + 4 * N * 4 * C),
        ("uniform", {}, 2 * N * C**2 + N * C),
        ("window", {"window_size": 2}, 4 * N * C**2 + 2 * S * N * C + 2 * P * C * (4 + S)),
        ("window", {"window_size": 3}, 4 * N * C**2 + 2 * S * N * C + 2 * 36 * C * (9 + S)),
        ("window", {"window_size": 2, "global_every": 1}, 4 * N * C**2 + 2 * N**2 * C),
    ],
)
def test_macs_are_the_closed_form(name, options, expected):
    attention = build_attention(name, C, HEADS, (4, 4), **options)
    assert attention.macs() == expected
    extra = build_attention(name, C, HEADS, (4, 4), value_conv=5, **options).macs() - expected
    assert extra == 25 * P * C + (P * C**2 if name == "pooled" else 0)


def test_value_conv_starts_small_and_is_the_convolution_of_the_values():
    torch.manual_seed(0)
    plain = build_attention("fused", 48, 4, (6, 7))
    convolved = copy_maps(plain, build_attention("fused", 48, 4, (6, 7), value_conv=3))
    x = torch.randn(4, 43, 48)
    with torch.no_grad():
        difference = convolved(x) - plain(x)
        assert torch.equal(difference[:, 0], torch.zeros(4, 48)), "nothing of the class token"
        v = plain.qkv(x).chunk(3, dim=-1)[2][:, 1:]
        padded = torch.nn.functional.pad(v.unflatten(1, (6, 7)), (0, 0, 1, 1, 1, 1))
        expected = torch.zeros(4, 6, 7, 48)
        for row in range(6):
            for column in range(7):
                for i in range(3):
                    for j in range(3):
                        expected[:, row, column] += (
                            convolved.value_conv.weight[:, 0, i, j] * padded[:, row + i, column + j]
                        )
        torch.testing.assert_close(difference[:, 1:], expected.flatten(1, 2) @ plain.proj.weight.T)
        assert expected.norm() < 0.1 * v.norm()


@pytest.mark.parametrize("name", MAPS)
def test_capabilities_are_what_they_need(name):
    mechanism = attention_class(name)
    assert mechanism.needs_grid == (name in ("agent", "pooled", "window"))
    assert not mechanism.fixed_length and not mechanism.exact and mechanism.has_map
