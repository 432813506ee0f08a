import json
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch

from effvit import available_attention, build_attention
from effvit.cli.scaling import scaling
from effvit.errors import UserError
from effvit.measure import compare, latency
from effvit.measure import scaling as module
from effvit.measure import subject as subjects
from effvit.measure.display import print_rows
from effvit.measure.growth import Budget, predict
from effvit.measure.macs import count_macs
from effvit.measure.scaling import batch_sizes, measure_scaling, with_probes
from effvit.measure.subject import Block, Model, square_grid
from effvit.measure.workload import block_forward
from effvit.model.vit import ViT, ViTConfig

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
NUMBERS = ["median", "q25", "q75", "n", "fused_median", "ratio_to_fused"]


def measure(attention="standard", tokens=(17, 65), memory_mib=1000, budget_s=0.02, batch="one", **options):
    subject = options.pop("subject", None) or Block(attention, options, 8, 2)
    limits = {"memory_mib": memory_mib, "budget_s": budget_s, "tokens_per_batch": 1 if batch == "one" else 200}
    steps = measure_scaling(subject, tokens, **limits, device=CPU)
    table = pd.DataFrame([row for rows in steps for row in rows])
    return table[table["batch"] == batch]


def model(attention="fused", **options):
    shape = {"image_size": 8, "patch_size": 2, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Model(ViTConfig(**shape, intermediate_size=16, attention=attention, attention_options=options))


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

    monkeypatch.setattr(subjects, "build_attention", build)
    return seen


@pytest.mark.parametrize("tokens, side", [(2, 1), (5, 2), (65, 8), (4097, 64)])
def test_a_token_count_is_a_class_token_and_a_square_of_patches(tokens, side):
    assert square_grid(tokens) == (side, side)


@pytest.mark.parametrize("tokens", [-3, 0, 1, 3, 64, 66])
def test_another_token_count_is_an_error_that_names_right_ones(tokens):
    with pytest.raises(UserError, match=rf"tokens={tokens}: must be 1 \+ n²"):
        square_grid(tokens)


@pytest.mark.parametrize("attention", available_attention())
def test_every_point_has_time_and_memory_of_both_passes_relative(attention):
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
    def forward(block, tokens, how):
        call = block_forward(block, tokens)
        clock[call] = 100.0 if tokens.shape[1] >= 65 else 0.01
        return call

    monkeypatch.setattr(subjects, "block_forward", forward)
    table = measure(tokens=(17, 65, 257), budget_s=1.0)
    assert [status(table, n)["forward"] for n in (17, 65, 257)] == [
        "ok",
        "ok over budget",  # its memory is known all the same
        "over budget",
    ]
    assert set(table.loc[table["mode"] == "train", "status"]) == {"ok"}


def test_one_slow_small_point_refuses_no_larger_one_that_was_never_tried(monkeypatch, clock):
    def forward(block, tokens, how):
        call = block_forward(block, tokens)
        clock[call] = 3.0 if tokens.shape[1] == 17 else 0.01  # within the limit of 4 s, and not what tokens cost
        return call

    monkeypatch.setattr(subjects, "block_forward", forward)
    assert set(measure(tokens=(17, 65, 257), budget_s=1.0)["status"]) == {"ok"}


def test_two_points_on_their_way_over_the_budget_do_refuse_a_larger_one(monkeypatch, clock, built):
    def forward(block, tokens, how):
        call = block_forward(block, tokens)
        clock[call] = 1e-5 * tokens.shape[1] ** 2  # 4.2 s at 650 tokens
        return call

    monkeypatch.setattr(subjects, "block_forward", forward)
    monkeypatch.setattr(subjects, "block_training", forward)
    table = measure(tokens=(65, 257, 1025), budget_s=1.0)
    assert status(table, 1025) == {"forward": "over budget", "train": "over budget"}
    assert max(built) == 257


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_running_out_of_memory_is_a_row_and_stops_larger_points_of_that_pass_alone(monkeypatch, error):
    def forward(block, tokens, how):
        if tokens.shape[1] >= 65:
            raise error
        return block_forward(block, tokens)

    monkeypatch.setattr(subjects, "block_forward", forward)
    table = measure(tokens=(17, 65, 257))
    assert [status(table, n) for n in (17, 65, 257)] == [
        {"forward": "ok", "train": "ok"},
        {"forward": "out of memory", "train": "ok"},
        {"forward": "out of memory", "train": "ok"},
    ]


def test_a_mechanism_is_measured_alone_where_fused_runs_out_of_memory(monkeypatch):
    def call(self, mode, tokens, *rest, real=Block.call):
        if self.attention == "fused" and tokens > 17:
            raise MemoryError
        return real(self, mode, tokens, *rest)

    monkeypatch.setattr(Block, "call", call)
    table = measure(tokens=(17, 65))
    larger = table[table["tokens"] == 65]
    assert (larger["status"] == "ok").all() and larger["median"].notna().all()
    assert larger[["fused_median", "ratio_to_fused"]].isna().all().all()


def test_any_other_error_is_not_taken_for_a_result(monkeypatch):
    def forward(block, tokens, how):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(subjects, "block_forward", forward)
    with pytest.raises(RuntimeError, match="shapes"):
        measure()


def test_what_more_tokens_cost_is_predicted_exactly_on_a_parabola_and_never_too_low_from_one_point():
    def cost(n):
        return 3 * n**2 + 500 * n

    points = [(65, cost(65)), (257, cost(257))]
    assert predict(points, 1025) == pytest.approx(cost(1025))
    assert predict(points[:1], 1025) >= cost(1025)
    assert predict([(65, 65.0), (257, 257.0)], 1025) == pytest.approx(1025)
    assert predict([], 1025) == 0


def test_a_budget_once_exceeded_stays_exceeded():
    budget = Budget(memory_mib=1, sampling_s=1)
    budget.stop("over budget")
    assert budget.foresee(2) == "over budget"


def test_probes_leave_no_gap_above_four_times_the_patches_and_keep_to_what_the_options_allow():
    assert with_probes(Block("standard", {}, 8, 2), [4097]) == [65, 257, 1025, 4097]
    assert with_probes(Block("standard", {}, 8, 2), [17, 65, 101, 1025]) == [17, 65, 101, 401, 1025]
    assert with_probes(Block("linformer", {"k": 100}, 8, 2), [1025]) == [257, 1025]


@pytest.mark.parametrize(("tokens", "size"), [(65, 63), (1025, 3), (2048, 2)])
def test_the_larger_batch_has_no_more_tokens_than_asked_for(tokens, size):
    assert batch_sizes(tokens, 4096) == {"one": 1, "tokens": size}
    assert size * tokens <= 4096 < (size + 1) * tokens


@pytest.mark.parametrize("tokens", [2049, 4096, 16385])
def test_a_larger_batch_of_one_sample_is_none(tokens):
    assert batch_sizes(tokens, 4096) == {"one": 1}


def test_a_batch_costs_memory_by_the_sample_and_is_left_out_where_it_would_be_one_sample(built):
    table = pd.concat([measure(batch=batch, tokens=(65, 257)) for batch in ("one", "tokens")])
    memory = table[(table["quantity"] == "memory") & (table["mode"] == "forward")].set_index(["batch", "tokens"])
    assert memory["batch_size"].to_dict() == {("one", 65): 1, ("one", 257): 1, ("tokens", 65): 3}
    assert memory.loc[("tokens", 65), "median"] == pytest.approx(memory.loc[("one", 65), "median"], rel=0.05)
    built.clear()
    measure(batch="tokens", tokens=(65, 257))
    assert (built.count(65), built.count(257)) == (8, 4)  # time and memory of each mode, at 65 tokens in two batches


@pytest.mark.parametrize("attention", available_attention())
def test_the_macs_of_a_model_are_those_of_the_products_that_run(attention):
    subject = model(attention, **({"k": 9} if attention == "linformer" else {}))
    for tokens in (17, 101):
        side = square_grid(tokens)[0]
        config = subject.at(tokens)
        assert (config.image_size, config.num_tokens) == (2 * side, tokens)
        assert subject.macs(tokens) == ViT(config).macs()
        assert subject.macs(tokens) == count_macs(ViT(config), torch.empty(1, 3, 2 * side, 2 * side))
        block = Block(attention, config.attention_options, 8, 2)
        assert block.macs(tokens) == count_macs(block.build(tokens), torch.empty(1, tokens, 8))


def test_a_model_is_measured_like_a_block_and_needs_more():
    table = measure(subject=model())
    assert set(table["scope"]) == {"model"} and (table["status"] == "ok").all()
    memory = [t[t["quantity"] == "memory"]["median"].to_numpy() for t in (table, measure("fused"))]
    assert (memory[0] > memory[1]).all()


def test_a_models_step_finds_the_optimisers_moments_made_and_leaves_its_weights():
    call = model().call("train", 17, 1, CPU)
    built = next(c.cell_contents for c in call.__closure__ if isinstance(c.cell_contents, ViT))
    optimiser = next(c.cell_contents for c in call.__closure__ if isinstance(c.cell_contents, torch.optim.AdamW))
    assert set(optimiser.state) == set(built.parameters())
    before = [p.clone() for p in built.parameters()]
    call()
    assert all(map(torch.equal, before, built.parameters()))


def test_a_point_measured_beside_other_work_is_marked_and_its_memory_is_not(monkeypatch):
    monkeypatch.setattr(module.Load, "other_load", lambda self: 0.4)
    monkeypatch.setattr(module.Load, "contended", lambda self: True)
    table = measure(tokens=(17,)).groupby("quantity")[["other_load", "contended"]].agg(list)
    assert table.loc["time", "contended"] == [True, True] and table.loc["time", "other_load"] == [0.4, 0.4]
    assert table.loc["memory", "contended"] == [False, False]


def test_a_call_that_is_slow_beside_other_work_is_tried_again(monkeypatch):
    """Two slow calls are over budget, unless others had the processor at the second; then a third may be in time."""
    for contended, status in ((False, "over budget"), (True, "ok")):
        times = iter([9.0, 9.0])
        monkeypatch.setattr(compare, "stopwatch_for", lambda device, times=times: lambda *_: next(times, 0.01))
        monkeypatch.setattr(compare.Load, "contended", lambda self, contended=contended: contended)
        result = compare.compare_seconds(lambda: lambda: None, None, budget_s=0.1, device=CPU)
        assert result.status == status


def test_a_budget_judges_a_batch_by_its_samples():
    budget = Budget(memory_mib=1, sampling_s=1)
    budget.learn(65, 4, np.array([4 * 65.0 * 1000]), np.array([0.4]))
    assert budget.peaks == [(65, 65000.0)] and budget.times == [(65, 0.1)]
    assert budget.foresee(130, 4) == "ok"  # 4 x 260,000 bytes
    assert budget.foresee(130, 5) == "out of memory"


def test_the_first_batch_is_predicted_from_one_sample_and_not_tried(monkeypatch):
    tried = []

    def call(self, mode, tokens, batch_size, *rest, real=Block.call):
        tried.append(batch_size)
        assert batch_size <= 100, "a batch that cannot be afforded"
        return real(self, mode, tokens, batch_size, *rest)

    monkeypatch.setattr(Block, "call", call)
    limits = {"tokens_per_batch": 6500 * 65, "budget_s": 0.02, "device": CPU}
    for memory_mib, expected in ((1, "out of memory"), (1e9, "over budget")):  # a call takes 10 ms, 65 s in all
        steps = measure_scaling(Block("standard", {}, 8, 2), [65], memory_mib=memory_mib, **limits)
        table = pd.DataFrame([row for rows in steps for row in rows])
        assert set(table.loc[table["batch"] == "one", "status"]) == {"ok"}
        assert set(table.loc[table["batch"] == "tokens", "status"]) == {expected}
    assert set(tried) == {1}


def test_a_first_batch_is_not_refused_for_the_overhead_of_single_samples(clock):
    """10 ms a sample would be 300 ms for 30, beyond the limit of 80 ms; but a call of 30 takes 10 ms as well."""
    limits = {"tokens_per_batch": 30 * 65, "memory_mib": 100, "budget_s": 0.02, "device": CPU}
    steps = measure_scaling(Block("fused", {}, 8, 2), [65], **limits)
    assert {row["status"] for rows in steps for row in rows} == {"ok"}


def test_what_one_sample_cannot_afford_no_first_batch_can():
    one = Budget(memory_mib=1, sampling_s=1, status="out of memory")
    assert Budget(1, 1, one_sample=one).foresee(65, 4) == "out of memory"


@pytest.mark.parametrize("contended", [False, True])
def test_the_table_marks_what_was_measured_beside_other_work(capsys, contended):
    row = {"tokens": 65, "unit": "ms", "median": 2.0, "q25": 1.0, "q75": 3.0, "n": 9, "fused_median": 4.0}
    print_rows("title", [row | {"ratio_to_fused": 0.5, "status": "ok", "contended": contended}], ("tokens",))
    out = capsys.readouterr().out
    assert ("0.5*" in out, "* while other programs ran" in out) == (contended, contended)


def test_the_command_writes_exact_macs_apart_from_what_is_measured(tmp_path):
    out = tmp_path / "out"
    arguments = {"option": ["k=5"], "hidden_size": 8, "num_attention_heads": 2, "budget_s": 0.02, "device": "cpu"}
    arguments |= {"num_hidden_layers": 1, "intermediate_size": 8, "tokens_per_batch": 20}
    scaling(attention="linformer", output_dir=out, tokens=[17, 5], **arguments)
    macs = pd.read_csv(out / "macs.csv")
    expected = [build_attention("linformer", 8, 2, (side, side), k=5).macs() for side in (2, 4)]
    block = macs[macs["scope"] == "block"].drop(columns=["scope", "hidden_size"]).to_dict("list")
    fused = [build_attention("fused", 8, 2, (side, side)).macs() for side in (2, 4)]
    assert block == {"tokens": [5, 17], "macs": expected, "fused_macs": fused}
    columns = [
        "precision",
        "execution",
        "scope",
        "hidden_size",
        "batch",
        "batch_size",
        "tokens",
        "mode",
        "quantity",
        "unit",
        *NUMBERS,
        "ratio_low",
        "ratio_high",
    ]
    table = pd.read_csv(out / "scaling.csv")
    assert list(table.columns) == [*columns, "status", "other_load", "contended", "busy", "launch_bound"]
    assert set(zip(table["scope"], table["batch"], strict=True)) == set(product(("block", "model"), ("one", "tokens")))
    assert json.loads((out / "provenance.json").read_text())["config"]["model"]["attention_options"] == {"k": 5}
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
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"tokens_per_batch": 0}, "tokens_per_batch=0"),
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
