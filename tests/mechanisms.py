"""What the tests of attention share: options of every mechanism that fit small grids, and a merged view of the maps."""

import torch
from hypothesis import strategies as st

from effvit import available_attention
from effvit.model.names import standard_to_fused

# Options that fit a grid of 3 x 5 patches (16 tokens). A mechanism not named here is tested with its defaults.
SMALL = {
    "linformer": [{"k": 5, "share": share} for share in ("none", "heads", "kv", "layers")],
    "performer": [{"num_features": 11}, {"num_features": 11, "kernel": "relu"}, {"num_features": 4}],
    "nystromformer": [{"num_landmarks": 5}, {"num_landmarks": 5, "conv_kernel_size": 0}, {"num_landmarks": 40}],
    "hybrid": [
        {"window_size": 2},
        {"window_size": 2, "fusion": "gate"},
        {"window_size": 3, "branches": ["linear"]},
        {"window_size": 2, "feature_map": "focused"},
        {"window_size": 2, "feature_map": "relu", "global_every": 1},
    ],
    "linear": [{"feature_map": feature_map} for feature_map in ("elu", "relu", "softmax")],
    "focused": [{}, {"power": 1.5}],
    "agent": [{"agent_size": 2}, {"agent_size": 4}],
    "pooled": [{"pool_size": 2}, {"pool_size": 4}],
    "window": [{"window_size": 2}],
}
# Where values of the patches come from differs by mechanism; `build_attention` takes it beside the options.
WITH_VALUE_CONV = [
    (name, SMALL.get(name, [{}])[0] | {"value_conv": 3}) for name in ("fused", "linformer", "hybrid", "pooled")
]
CASES = [(name, options) for name in available_attention() for options in SMALL.get(name, [{}])] + WITH_VALUE_CONV
FIRST = [(name, SMALL.get(name, [{}])[0]) for name in available_attention()]


def options_for(name, grid, prefix_tokens=1):
    """Strategy for options of a mechanism that fit a grid, its extremes included."""
    tokens, side = prefix_tokens + grid[0] * grid[1], max(grid)
    return {
        "linformer": st.fixed_dictionaries(
            {"k": st.integers(1, tokens), "share": st.sampled_from(["none", "heads", "kv", "layers"])}
        ),
        "performer": st.fixed_dictionaries(
            {"num_features": st.integers(1, 3 * tokens), "kernel": st.sampled_from(["softmax", "relu"])}
        ),
        "nystromformer": st.fixed_dictionaries(
            {"num_landmarks": st.integers(1, tokens + 3), "conv_kernel_size": st.sampled_from([0, 1, 5])}
        ),
        "hybrid": st.fixed_dictionaries(
            {
                "window_size": st.integers(1, side),
                "dilations": st.lists(st.integers(2, side), unique=True).map(lambda more: [1, *more])
                if side > 1
                else st.just([1]),
                "branches": st.sampled_from([["regional"], ["linear"], ["regional", "linear"]]),
                "fusion": st.sampled_from(["heads", "gate"]),
                "feature_map": st.sampled_from(["elu", "relu", "focused"]),
                "global_every": st.integers(0, 3),
            }
        )
        .map(lambda o: o | {"branches": [*o["branches"], *(["dilated"] if len(o["dilations"]) > 1 else [])]})
        .map(lambda o: o if "linear" in o["branches"] and len(o["branches"]) > 1 else o | {"global_every": 0}),
        "linear": st.fixed_dictionaries({"feature_map": st.sampled_from(["elu", "relu", "softmax"])}),
        "focused": st.fixed_dictionaries({"power": st.floats(0.5, 8)}),
        "agent": st.fixed_dictionaries({"agent_size": st.integers(1, side + 2)}),
        "pooled": st.fixed_dictionaries({"pool_size": st.integers(1, side + 2)}),
        "window": st.fixed_dictionaries(
            {
                "window_size": st.integers(1, side + 2),
                "shift": st.booleans(),
                "global_every": st.integers(0, 3),
            }
        ),
    }.get(name, st.just({}))


def merged_maps(attention):
    """Weight (3C, C) and bias (3C) of the query, key and value maps, whatever a mechanism calls them."""
    state = standard_to_fused(attention.state_dict())
    if "value.weight" in state:  # the control has no queries and keys
        return torch.cat([state["value.weight"]] * 3), torch.cat([state["value.bias"]] * 3)
    return state["qkv.weight"], state["qkv.bias"]


def heads_of(tokens, num_heads):
    """Tokens (B, N, C) to (B, H, N, d)."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def qkv_of(attention, x):
    """Queries, keys and values (B, H, N, d) by the maps' definition."""
    weight, bias = merged_maps(attention)
    return [heads_of(part, attention.num_heads) for part in (x @ weight.T + bias).chunk(3, dim=-1)]


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def copy_maps(source, target):
    """Give ``target`` the maps of ``source``, leaving what only ``target`` has."""
    with torch.no_grad():
        unexpected = target.load_state_dict(source.state_dict(), strict=False).unexpected_keys
    assert not unexpected
    return target
