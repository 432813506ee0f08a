import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mechanisms import copy_maps, options_for, qkv_of

from effvit import ViT, ViTConfig, build_attention
from effvit.kernels.window_attention import Windows, from_windows, to_windows


def hybrid(grid=(6, 6), **options):
    torch.manual_seed(0)
    attention = build_attention("hybrid", 12, 3, grid, **options).double()
    if attention.gate is not None:
        torch.nn.init.normal_(attention.gate.weight)
        torch.nn.init.normal_(attention.gate.bias)
    if attention.scale is not None:
        torch.nn.init.normal_(attention.scale)
    return attention


def neighbours(patch, grid, w, r):
    """Patches in the window of a patch, by the definition: same phase, same window of that phase. Row-major numbers."""
    rows, columns = grid

    def window(number):
        row, column = divmod(number, columns)
        return row % r, column % r, row // r // w, column // r // w

    return [other for other in range(rows * columns) if window(other) == window(patch)]


def brute_force_map(attention, x, w, dilations, linear):
    """The implied matrix, token by token and branch by branch."""
    s = attention.prefix_tokens
    q, k, _ = qkv_of(attention, x)
    grid, n, d = attention.grid_size, x.shape[1], q.shape[-1]
    matrix = torch.zeros(*q.shape[:2], n, n, dtype=x.dtype)
    matrix[:, :, :s] = (q[:, :, :s] @ k.mT / d**0.5).softmax(dim=-1)
    shares = shares_of(attention, x, len(dilations) + linear)  # (B, H, N, branches)

    def phi(t):  # (B, H, ..., d)
        if attention.options.feature_map == "elu":
            return torch.where(t > 0, t + 1, t.exp())
        if attention.options.feature_map == "relu":
            return t.clamp(min=0) + 1e-6
        # Scales belong to the heads that the linear branch has, the last ones.
        scale = torch.ones(attention.dim, dtype=t.dtype)
        scale[len(scale) - len(attention.scale) :] = (1 + attention.scale.exp()).log()
        x_hat = (t.clamp(min=0) + 1e-6) / scale.view(-1, *[1] * (t.ndim - 3), d)
        cubes = x_hat**3
        return cubes * x_hat.norm(dim=-1, keepdim=True) / cubes.norm(dim=-1, keepdim=True)

    for token in range(s, n):
        for branch, r in enumerate(dilations):
            seen = [*range(s), *(s + other for other in neighbours(token - s, grid, w, r))]
            weights = torch.einsum("bhd,bhjd->bhj", q[:, :, token], k[:, :, seen]) / d**0.5
            matrix[:, :, token, seen] += shares[:, :, token, branch, None] * weights.softmax(dim=-1)
        if linear:
            weights = torch.einsum("bhd,bhjd->bhj", phi(q[:, :, token]), phi(k))
            matrix[:, :, token] += shares[:, :, token, -1, None] * weights / weights.sum(dim=-1, keepdim=True)
    return matrix


def shares_of(attention, x, branches):
    """The gate's shares of a token in all heads; without a gate 1 for the branch whose turn a head is."""
    if attention.gate is not None:
        shares = (x @ attention.gate.weight.T + attention.gate.bias).softmax(dim=-1)
        return shares[:, None].expand(-1, attention.num_heads, -1, -1)
    shares = torch.zeros(len(x), attention.num_heads, x.shape[1], branches, dtype=x.dtype)
    if attention.options.fusion == "gate":  # and one branch
        return shares + 1
    turns = [(attention.layer * attention.num_heads + head) % branches for head in range(attention.num_heads)]
    for head, branch in enumerate(sorted(turns)):
        shares[:, head, :, branch] = 1
    return shares


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_loop_over_tokens_with_explicit_neighbour_sets_gives_the_same(data):
    grid = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    options = data.draw(options_for("hybrid", grid))
    prefix = data.draw(st.sampled_from([0, 1, 5]))
    place = {"prefix_tokens": prefix, "layer": data.draw(st.integers(0, 3)), "depth": 4}
    attention = hybrid(grid, **place, **options)
    x = torch.randn(2, prefix + grid[0] * grid[1], 12, dtype=torch.float64)
    branches = options["branches"]
    if options["global_every"]:
        is_global = (place["layer"] + 1) % options["global_every"] == 0
        branches = [branch for branch in branches if (branch == "linear") == is_global]
    used = [r for r in options["dilations"] if ("regional" if r == 1 else "dilated") in branches]
    expected = brute_force_map(attention, x, options["window_size"], used, "linear" in branches)
    y, matrix = attention(x, return_map=True)
    torch.testing.assert_close(matrix, expected, rtol=1e-4, atol=1e-5)
    v = qkv_of(attention, x)[2]
    torch.testing.assert_close(y, attention.proj((expected @ v).transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 4), (3, 4), (1, 4)])
def test_one_window_over_the_whole_grid_is_fused_class_token_included(grid):
    fused = build_attention("fused", 12, 3, grid)
    one = build_attention("hybrid", 12, 3, grid, window_size=4, dilations=[1], branches=["regional"])
    x = torch.randn(2, 1 + grid[0] * grid[1], 12)
    torch.testing.assert_close(copy_maps(fused, one)(x), fused(x), rtol=1e-5, atol=1e-6)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(grid=st.tuples(st.integers(1, 9), st.integers(1, 9)), w=st.integers(1, 5), r=st.integers(1, 4))
def test_windows_are_a_partition_that_never_wraps(grid, w, r):
    windows, patches = Windows(*grid, w, r), grid[0] * grid[1]
    number = torch.arange(1.0, patches + 1).view(1, 1, patches, 1)
    members = to_windows(number, windows).flatten(2)[0].long() - 1  # -1 where a window hangs over the grid
    assert sorted(members[members >= 0].tolist()) == list(range(patches))
    for window in members:
        inside = window[window >= 0]
        for side in (inside // grid[1], inside % grid[1]) if len(inside) else ():
            assert side.max() - side.min() <= (w - 1) * r
            assert (side % r == side[0] % r).all()
    assert torch.equal(from_windows(to_windows(number, windows), 1, windows), number)


def test_a_patch_sees_its_window_and_the_class_token_only():
    attention = hybrid((5, 7), window_size=2, dilations=[2], branches=["dilated"])
    _, matrix = attention(torch.randn(1, 36, 12, dtype=torch.float64), return_map=True)
    for patch in range(35):
        seen = matrix[0, 0, 1 + patch].nonzero().flatten().tolist()
        assert seen == [0] + [1 + other for other in neighbours(patch, (5, 7), 2, 2)]


@pytest.mark.parametrize(
    "branches, shares",
    [
        (["regional"], 1),
        (["dilated"], 1),
        (["linear"], 1),
        (["regional", "linear"], 2),
        (["regional", "dilated"], 2),
        (["regional", "dilated", "linear"], 3),
    ],
)
def test_every_subset_of_branches_is_a_mechanism_and_a_gate_is_there_only_for_several(branches, shares):
    attention = build_attention("hybrid", 12, 3, (4, 4), branches=branches, fusion="gate")
    assert len(attention.branch_names) == shares
    assert (attention.gate is None) == (shares == 1)


@pytest.mark.parametrize("in_model", [False, True])
def test_the_gate_starts_with_equal_shares(in_model):
    if in_model:
        options = {"fusion": "gate"}
        model = ViT(ViTConfig(image_size=16, attention="hybrid", attention_options=options, initializer_range=0.3))
        attention, width = model.attentions()[1], 48
    else:
        attention, width = build_attention("hybrid", 12, 3, (4, 4), fusion="gate"), 12
    shares = attention.gate_shares(torch.randn(2, 17, width))
    torch.testing.assert_close(shares, torch.full((2, 16, 3), 1 / 3))


def test_shares_sum_to_one_and_follow_the_token():
    shares = hybrid(window_size=3, fusion="gate").gate_shares(torch.randn(2, 37, 12, dtype=torch.float64))
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(2, 36, dtype=torch.float64))
    assert shares.std(dim=1).min() > 0.01


@pytest.mark.parametrize("scale", [-100.0, 100.0])
def test_queries_far_below_zero_do_not_divide_zero_by_zero(scale):
    attention = build_attention("hybrid", 3, 3, (4, 4), branches=["linear"])  # heads of width 1
    assert attention(torch.randn(2, 17, 3) * scale).isfinite().all()


def test_its_macs_grow_linearly_with_the_grid():
    def mixing(side):
        return build_attention("hybrid", 12, 3, (side, side)).mixing_macs()

    # 8, 16, 32 patches a side are tiled without a rest: the cost of a patch is the same, that of the class token too.
    per_patch = [(mixing(2 * side) - mixing(side)) / (3 * side**2) for side in (8, 16, 32)]
    assert per_patch[0] == per_patch[1] == per_patch[2]


def test_its_macs_are_the_closed_form():
    n, p, c, d, w = 37, 36, 12, 4, 3
    windows = 2 * 2 * p * c * (w**2 + 1)  # both dilations tile 6 x 6
    linear = n * c * d + p * c * d + p * c
    gated = 4 * n * c**2 + 2 * n * c + windows + linear + p * c * 3
    assert hybrid(window_size=3, fusion="gate").macs() == gated
    # Three heads, one for each branch.
    dealt = 4 * n * c**2 + 2 * n * c + windows // 3 // 2 * 2 + linear // 3
    assert hybrid(window_size=3).macs() == dealt


def test_heads_are_dealt_in_turns_that_go_on_from_block_to_block():
    blocks = [build_attention("hybrid", 16, 4, (4, 4), layer=layer, depth=3) for layer in range(3)]
    assert [block.heads_of_branches for block in blocks] == [[2, 1, 1], [1, 2, 1], [1, 1, 2]]
    few = [build_attention("hybrid", 16, 2, (4, 4), layer=layer, depth=3) for layer in range(3)]
    assert [block.heads_of_branches for block in few] == [[1, 1, 0], [1, 0, 1], [0, 1, 1]]


def test_in_every_g_th_block_all_heads_are_linear_and_the_others_have_windows_alone():
    blocks = [build_attention("hybrid", 16, 4, (4, 4), layer=layer, depth=4, global_every=2) for layer in range(4)]
    assert [block.branch_names for block in blocks] == 2 * [["window r=1", "window r=2"], ["linear"]]
    assert [block.heads_of_branches for block in blocks] == 2 * [[2, 2], [4]]
    n, p, c, d, w = 17, 16, 16, 4, 4
    windows = p * c * (w**2 + 1) + p * c * (2**2 + 1)  # of dilation 2 there are 2 x 2 patches in a phase
    assert blocks[0].macs() == 4 * n * c**2 + 2 * n * c + windows
    assert blocks[1].macs() == 4 * n * c**2 + 2 * n * c + n * c * d + p * c * d + p * c


def test_focused_features_have_a_scale_for_each_channel_of_the_linear_heads():
    blocks = [build_attention("hybrid", 16, 4, (4, 4), layer=i, depth=3, feature_map="focused") for i in range(3)]
    assert [block.scale.shape for block in blocks] == [(4,), (4,), (8,)]
    windows_alone = build_attention("hybrid", 16, 4, (4, 4), feature_map="focused", branches=["regional"])
    assert windows_alone.scale is None


def test_windows_are_no_larger_than_the_phase_that_they_are_cut_from():
    clipped = build_attention("hybrid", 12, 3, (8, 8), window_size=4, dilations=[1, 2, 4], branches=["dilated"])
    assert [(windows.size, windows.area) for windows in clipped.branches] == [(4, 64), (2, 64)]
    n, p, c, d = 65, 64, 12, 4
    two_heads_of_dilation_2, one_of_4 = 2 * 2 * p * d * (4**2 + 1), 2 * p * d * (2**2 + 1)
    assert clipped.macs() == 4 * n * c**2 + 2 * n * c + two_heads_of_dilation_2 + one_of_4
