import json

import pandas as pd
import pytest
import torch

from effvit import available_attention, build_attention
from effvit.cli.scaling import scaling
from effvit.errors import UserError
from effvit.measure import compare, latency
from effvit.measure import scaling as module
from effvit.measure.growth import Budget, foretell
from effvit.measure.scaling import Block, measure_scaling, square_grid, with_probes
from effvit.measure.workload import block_forward

CPU = torch.device("cpu")
NUMBERS = ["median", "q25", "q75", "n", "fused_median", "ratio_to_fused"]


def measure(attention="standard", tokens=(17, 65), dim=8, memory_mib=1000, budget_s=0.02, **options):
    block = Block(attention, options, dim, 2)
    steps = measure_scaling(block, tokens, batch_size=1, memory_mib=memory_mib, budget_s=budget_s, device=CPU)
    return pd.DataFrame([row for rows in steps for row in rows])


def status(table, tokens):
    return dict(table[table["tokens"] == tokens].groupby("mode")["status"].agg(lambda s: " ".join(sorted(set(s)))))


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Make every call, but let it take 10 ms, or what ``clock`` says for it: statuses must not hang on real time."""
    seconds = {}

    def stopwatch_for(device):
        def measure(call, repeats):
            call()
            return seconds.get(call, 0.01) * repeats

        return measure

    monkeypatch.setattr(compare, "stopwatch_for", stopwatch_for)
    monkeypatch.setattr(latency, "stopwatch_for", stopwatch_for)
    return seconds


@pytest.fixture
def built(monkeypatch):
    """Token counts of the mechanisms built, fused aside, in order."""
    seen = []

    def build(name, dim, heads, grid, **options):
        if name != "fused":
            seen.append(1 + grid[0] * grid[1])
        return build_attention(name, dim, heads, grid, **options)

    monkeypatch.setattr(module, "build_attention", build)
    return seen


@pytest.mark.parametrize("tokens, side", [(2, 1), (5, 2), (65, 8), (4097, 64)])
def test_a_token_count_is_a_class_token_and_a_square_of_patches(tokens, side):
    assert square_grid(tokens) == (side, side)


@pytest.mark.parametrize("tokens", [-3, 0, 1, 3, 64, 66])
def test_another_token_count_is_an_error_that_names_right_ones(tokens):
    with pytest.raises(UserError, match=rf"tokens={tokens}: must be 1 \+ n²"):
        square_grid(tokens)


@pytest.mark.parametrize("attention", available_attention())
def test_every_point_has_time_and_memory_of_both_passes_beside_fused(attention):
    table = measure(attention, **({"k": 9} if attention == "linformer" else {}))
    assert len(table) == 2 * 2 * 2 and (table["status"] == "ok").all()
    assert (table[[*NUMBERS, "p90"]] > 0).all().all()
    assert set(table.loc[table["quantity"] == "time", "unit"]) == {"ms"}
    assert set(table.loc[table["quantity"] == "memory", "unit"]) == {"bytes"}
    exact = table[table["quantity"] == "memory"]
    assert (exact["ratio_to_fused"] == exact["median"] / exact["fused_median"]).all()
    if attention == "fused":
        assert (exact["ratio_to_fused"] == 1).all()


def test_memory_grows_with_the_square_of_tokens_for_standard_and_not_for_fused():
    table = measure(tokens=(257, 1025))
    memory = table[(table["quantity"] == "memory") & (table["mode"] == "forward")].set_index("tokens")
    assert 12 < memory.loc[1025, "median"] / memory.loc[257, "median"] < 17
    assert memory.loc[1025, "fused_median"] / memory.loc[257, "fused_median"] < 8


def test_points_beyond_the_memory_are_rows_and_are_not_tried(built):
    # Standard attention needs about 2 heads x 257² x 4 bytes x 2 at 257 tokens, sixteen times that at 1025.
    table = measure(tokens=(65, 257, 1025, 4097), memory_mib=4)
    assert status(table, 257) == {"forward": "ok", "train": "ok"}
    for tokens in (1025, 4097):
        assert status(table, tokens) == {"forward": "out of memory", "train": "out of memory"}
        assert table.loc[table["tokens"] == tokens, NUMBERS].isna().all().all()
    assert max(built) == 257


def test_a_large_point_alone_is_foreseen_from_smaller_ones_which_are_no_rows(built):
    table = measure(tokens=(16385,), memory_mib=4)
    assert set(table["tokens"]) == {16385} and set(table["status"]) == {"out of memory"}
    assert built and max(built) < 16385


def test_points_beyond_the_time_are_rows_and_are_not_tried(monkeypatch, built, clock):
    def forward(block, tokens):
        call = block_forward(block, tokens)
        clock[call] = 100.0 if tokens.shape[1] >= 65 else 0.01
        return call

    monkeypatch.setitem(module.MODES, "forward", forward)
    table = measure(tokens=(17, 65, 257), budget_s=1.0)
    assert [status(table, n)["forward"] for n in (17, 65, 257)] == [
        "ok",
        "ok over budget",  # its memory is known all the same
        "over budget",
    ]
    assert set(table.loc[table["mode"] == "train", "status"]) == {"ok"}


def test_one_slow_small_point_refuses_no_larger_one_that_was_never_tried(monkeypatch, clock):
    def forward(block, tokens):
        call = block_forward(block, tokens)
        clock[call] = 3.0 if tokens.shape[1] == 17 else 0.01  # within the limit of 4 s, and not what tokens cost
        return call

    monkeypatch.setitem(module.MODES, "forward", forward)
    assert set(measure(tokens=(17, 65, 257), budget_s=1.0)["status"]) == {"ok"}


def test_two_points_on_their_way_over_the_budget_do_refuse_a_larger_one(monkeypatch, clock, built):
    def forward(block, tokens):
        call = block_forward(block, tokens)
        clock[call] = 1e-5 * tokens.shape[1] ** 2  # 4.2 s at 650 tokens
        return call

    monkeypatch.setitem(module.MODES, "forward", forward)
    monkeypatch.setitem(module.MODES, "train", forward)
    table = measure(tokens=(65, 257, 1025), budget_s=1.0)
    assert status(table, 1025) == {"forward": "over budget", "train": "over budget"}
    assert max(built) == 257


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_running_out_of_memory_is_a_row_and_stops_larger_points_of_that_pass_alone(monkeypatch, error):
    def forward(block, tokens):
        if tokens.shape[1] >= 65:
            raise error
        return block_forward(block, tokens)

    monkeypatch.setitem(module.MODES, "forward", forward)
    table = measure(tokens=(17, 65, 257))
    assert [status(table, n) for n in (17, 65, 257)] == [
        {"forward": "ok", "train": "ok"},
        {"forward": "out of memory", "train": "ok"},
        {"forward": "out of memory", "train": "ok"},
    ]


def test_a_mechanism_is_measured_alone_where_fused_runs_out_of_memory(monkeypatch):
    def make(self, tokens, real=module._Subject.make):
        if self.block.attention == "fused" and tokens > 17:
            raise MemoryError
        return real(self, tokens)

    monkeypatch.setattr(module._Subject, "make", make)
    table = measure(tokens=(17, 65))
    larger = table[table["tokens"] == 65]
    assert (larger["status"] == "ok").all() and larger["median"].notna().all()
    assert larger[["fused_median", "ratio_to_fused"]].isna().all().all()


def test_any_other_error_is_not_taken_for_a_result(monkeypatch):
    def forward(block, tokens):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setitem(module.MODES, "forward", forward)
    with pytest.raises(RuntimeError, match="shapes"):
        measure()


def test_what_more_tokens_cost_is_foretold_exactly_on_a_parabola_and_never_too_low_from_one_point():
    def cost(n):
        return 3 * n**2 + 500 * n

    points = [(65, cost(65)), (257, cost(257))]
    assert foretell(points, 1025) == pytest.approx(cost(1025))
    assert foretell(points[:1], 1025) >= cost(1025)
    assert foretell([(65, 65.0), (257, 257.0)], 1025) == pytest.approx(1025)
    assert foretell([], 1025) == 0


def test_a_budget_once_exceeded_stays_exceeded():
    budget = Budget(memory_mib=1, sampling_s=1)
    budget.stop("over budget")
    assert budget.foresee(2) == "over budget"


def test_probes_leave_no_gap_above_four_times_the_patches_and_keep_to_what_the_options_allow():
    assert with_probes(Block("standard", {}, 8, 2), [4097]) == [65, 257, 1025, 4097]
    assert with_probes(Block("standard", {}, 8, 2), [17, 65, 101, 1025]) == [17, 65, 101, 401, 1025]
    assert with_probes(Block("linformer", {"k": 100}, 8, 2), [1025]) == [257, 1025]


def test_the_command_writes_exact_macs_apart_from_what_is_measured(tmp_path):
    out = tmp_path / "out"
    arguments = {"option": ["k=5"], "hidden_size": 8, "num_attention_heads": 2, "budget_s": 0.02, "device": "cpu"}
    scaling(attention="linformer", output_dir=out, tokens=[17, 5], **arguments)
    macs = pd.read_csv(out / "macs.csv")
    expected = [build_attention("linformer", 8, 2, (side, side), k=5).macs() for side in (2, 4)]
    assert macs.to_dict("list") == {"tokens": [5, 17], "macs": expected}
    columns = ["tokens", "mode", "quantity", "unit", *NUMBERS, "ratio_low", "ratio_high", "status"]
    assert list(pd.read_csv(out / "scaling.csv").columns) == columns
    assert json.loads((out / "provenance.json").read_text())["config"]["options"] == {"k": 5}
    first = (out / "macs.csv").read_bytes()
    scaling(attention="linformer", output_dir=out, tokens=[5, 17], **arguments)
    assert (out / "macs.csv").read_bytes() == first


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"tokens": [65, 66]}, "tokens=66"),
        ({"attention": "linformer", "option": ["k=60"], "tokens": [65, 17]}, r"tokens=17: attention.linformer.k=60"),
        ({"option": ["k=60"]}, "attention.standard.k"),
        ({"attention": "quadratic"}, "attention='quadratic'"),
        ({"num_attention_heads": 5}, "num_heads=5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"budget_s": -1.0}, "budget_s=-1.0"),
        ({"budget_s": float("nan")}, "budget_s=nan"),
        ({"memory_mib": 0}, "memory_mib=0"),
        ({"threads": 0}, "threads=0"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"device": "mps"}, "device=mps"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_measured_or_written(tmp_path, monkeypatch, bad, message):
    monkeypatch.setattr("effvit.measure.scaling.measure_scaling", lambda *_, **__: pytest.fail("measured"))
    arguments = {"attention": "standard", "tokens": [65], "device": "cpu"} | bad
    with pytest.raises(UserError, match=message) as error:
        scaling(output_dir=tmp_path / "out", **arguments)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
