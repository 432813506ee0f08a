import json
import math

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from effvit.cli.app import app
from effvit.errors import UserError
from effvit.figures.peers import peer_ratios
from effvit.measure import peers
from effvit.measure.peers import Point, build_ours, compare_with_peer, require_peers
from effvit.measure.public import PEERS, PLAIN
from effvit.measure.subject import parse_width

pytestmark = pytest.mark.slow

SMALL = {"tokens_per_batch": 65, "budget_s": 0.01, "dtype": torch.float32, "device": torch.device("cpu")}


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("attention", PEERS)
def test_a_peer_has_our_hyperparameters(attention):
    needs(attention)
    ours = build_ours(attention, 48, 3, (8, 8))
    peer = PEERS[attention].build(ours)
    assert count(ours) == count(peer)
    x = torch.randn(2, ours.num_tokens, 48)
    assert peer(x).shape == ours(x).shape


def needs(attention):
    if PEERS[attention].package != PLAIN:
        pytest.importorskip(PEERS[attention].package.replace("-", "_"))


@pytest.mark.parametrize(
    ("attention", "grid"),
    [
        *((attention, grid) for attention in ("linear", "pooled", "agent", "focused") for grid in ((8, 8), (7, 6))),
        *(("window", grid) for grid in ((8, 8), (4, 12))),  # where timm pads, what it pads with takes part
    ],
)
def test_a_peer_with_our_weights_gives_our_output(attention, grid):
    needs(attention)
    ours = build_ours(attention, 48, 3, grid).double()
    peer = PEERS[attention].build(ours).double()
    parts = {"to_q": 0, "q": 0, "to_k": 1, "to_v": 2}
    with torch.no_grad():
        if attention == "focused":
            peer.scale.copy_(ours.scale.normal_().unflatten(0, (3, 1, 16)))
        for name, parameter in peer.named_parameters():
            *_, layer, kind = ("", *name.split("."))[-3:]
            if layer in parts:
                parameter.copy_(ours.qkv.weight.chunk(3)[parts[layer]])
            elif layer in ("qkv", "kv"):
                parameter.copy_(ours.qkv.weight[-len(parameter) :])
            elif layer in ("proj", "to_out"):
                parameter.copy_(getattr(ours.proj, kind))
        x = torch.randn(2, ours.num_tokens, 48, dtype=torch.float64)
        torch.testing.assert_close(ours(x), peer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_comparison_holds_ratio_floor_and_memory_of_both(mode):
    pytest.importorskip("timm")
    row = compare_with_peer(Point("standard", 48, 3, 65, mode), **SMALL)
    assert row["ratio"] > 0 and row["n"] >= 3
    assert row["macs"] == 4 * 65 * 48**2 + 2 * 65**2 * 48
    assert row["floor_share"] == pytest.approx(row["floor_ms"] / row["ours_ms"])
    assert min(row["ours_bytes"], row["peer_bytes"]) >= 4 * 3 * 65 * 65  # the scores of three heads in float32


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"linformer is not installed; pip install 'effvit\[peers\]'"):
        require_peers(["linformer"])


def test_a_mechanism_without_a_peer_is_measured_alone():
    require_peers(["hybrid"])
    row = compare_with_peer(Point("hybrid", 48, 3, 65, "train"), **SMALL)
    assert row["autocast_ratio"] > 0 and row["ours_ms"] > 0
    assert row["peer"] is None and math.isnan(row["ratio"])


def test_an_unknown_mechanism_is_refused():
    with pytest.raises(UserError, match="attention='nope': unknown mechanism"):
        require_peers(["nope"])


@pytest.mark.parametrize("text", ["192", "192x0", "192x5", "ax3", "0x0", "x"])
def test_a_width_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="expected WIDTHxHEADS"):
        parse_width(text)


def test_the_command_writes_a_row_a_point_and_mode(tmp_path):
    timm = pytest.importorskip("timm")
    arguments = ["--attention", "fused", "--width", "48x3", "--tokens", "5", "--tokens", "17"]
    more = ["--tokens-per-batch", "34", "--budget-s", "0.01", "--output-dir", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["bench-peers", *arguments, *more])
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"peers.csv", "peers.png", "provenance.json"}
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["config"]["peers"] == {"timm": timm.__version__}
    table = pd.read_csv(tmp_path / "out" / "peers.csv")
    assert list(zip(table["tokens"], table["mode"], table["batch_size"], strict=True)) == [
        (5, "forward", 6),
        (5, "train", 6),
        (17, "forward", 2),
        (17, "train", 2),
    ]


def test_the_picture_has_a_panel_a_width_and_mode_and_shows_ratios_with_their_intervals():
    rows = [
        {"attention": attention, "hidden_size": width, "num_attention_heads": width // 64, "tokens": tokens}
        | {"mode": mode, "ratio": ratio, "ratio_low": ratio - 0.1, "ratio_high": None if tokens == 65 else ratio + 0.2}
        for attention, ratio in (("fused", 1.0), ("performer", 1.5))
        for width in (192, 384)
        for mode in ("forward", "train")
        for tokens in (65, 197)
    ]
    figure = peer_ratios(pd.DataFrame(rows))
    assert [axes.get_title() for axes in figure.axes] == [
        f"{name}, width {width}, {width // 64} heads"
        for width in (192, 384)
        for name in ("Forward pass", "Forward and backward pass")
    ]
    level, fused, performer = figure.axes[0].lines[:1] + [bars.lines[0] for bars in figure.axes[0].containers]
    assert set(level.get_ydata()) == {1}
    assert fused.get_ydata().tolist() == [1.0, 1.0]
    assert performer.get_ydata().tolist() == [1.5, 1.5]
    (_, _, (bars,)) = figure.axes[0].containers[1].lines
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx([1.4, 1.5]), pytest.approx([1.4, 1.7])]


def test_bad_input_leaves_nothing_behind(tmp_path):
    command = ["bench-peers", "--output-dir", str(tmp_path / "out")]
    for bad in (["--tokens", "66"], ["--width", "7"], ["--budget-s", "-1"], ["--attention", "x"]):
        result = CliRunner().invoke(app, command + bad)
        assert isinstance(result.exception, UserError)
    assert not (tmp_path / "out").exists()
