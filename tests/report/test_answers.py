import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from synthetic_study import ATTENTIONS, FIELD, write_study
from synthetic_tables import drop_optional_tables, optional_tables

from effvit.report import answers, charts, overview
from effvit.report import wording as w
from effvit.report.choice import which_one
from effvit.report.compare import cost_verdicts
from effvit.report.hardware import constrained_hardware
from effvit.report.representations import representations
from effvit.report.resolution import resolution
from effvit.report.tables import read
from effvit.study.aggregate import aggregate

FEW = ["fused", "linformer", "performer"]
IMAGES = 360


def study_of(directory, attentions=FEW, seeds=(0,)):
    write_study(directory / "metrics", attentions=attentions, seeds=seeds)
    aggregate(directory / "metrics", directory / "data", ["digits"], attentions, list(seeds))
    drop_optional_tables(directory / "data")
    return read(directory / "data")


@pytest.fixture(scope="module")
def one_seed(tmp_path_factory):
    return study_of(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return replace(study_of(tmp_path_factory.mktemp("full"), ATTENTIONS), **optional_tables())


def test_every_table_that_aggregate_writes_is_read(tmp_path):
    write_study(tmp_path / "metrics")
    aggregate(tmp_path / "metrics", tmp_path / "data", ["digits"], ATTENTIONS, [0])
    study = read(tmp_path / "data")
    assert [name for name, table in vars(study).items() if isinstance(table, pd.DataFrame) and table.empty] == []


def with_accuracy(study, seeds=3, **intervals):
    """Mechanisms with these (low, high) of top-1; NaN for one seed."""
    table = study.accuracy.assign(n_seeds=seeds)
    for attention, (low, high) in intervals.items():
        row = table["attention"] == attention
        table.loc[row, ["top1", "top1_low", "top1_high"]] = [(low + high) / 2, low, high]
        if seeds == 1:
            table.loc[row, ["top1_low", "top1_high"]] = np.nan
    confusion = study.confusion.assign(count=study.confusion["count"] * seeds)
    return replace(study, accuracy=table, confusion=confusion)


def with_latency(study, **ratios):
    """Mechanisms with these (ratio, low, high) of latency at the largest batch; that of `fused` is the noise."""
    table = study.cost.copy()
    for attention, numbers in ratios.items():
        row = (table["attention"] == attention) & (table["quantity"] == "latency") & (table["batch_size"] == 64)
        table.loc[row, ["ratio_to_fused", "ratio_low", "ratio_high"]] = list(numbers)
    return replace(study, cost=table)


QUIET = {"fused": (1.0, 0.98, 1.02)}
SLOW = {"linformer": (1.5, 1.4, 1.6), "performer": (2.0, 1.9, 2.1)}
FAST = {"linformer": (0.5, 0.45, 0.55), "performer": (2.0, 1.9, 2.1)}
SAME = {"fused": (0.90, 0.92), "linformer": (0.91, 0.93), "performer": (0.91, 0.93)}


def with_difference(study, seeds=3, **intervals):
    """Mechanisms with these (low, high) of top-1 minus that of `fused`, and the verdict that follows."""
    rows = [
        {"dataset": "digits", "attention": attention, "n_seeds": seeds, "difference": (low + high) / 2}
        | {"difference_low": low, "difference_high": high, "p_holm": np.nan}
        | {"verdict": "better" if low > 0 else "worse" if high < 0 else "no difference shown"}
        for attention, (low, high) in intervals.items()
    ]
    return replace(study, paired=pd.DataFrame(rows))


def text(sentences):
    return " ".join(sentences).replace("\N{NO-BREAK SPACE}", " ")


def best(study):
    return text([next(answers.tradeoff(study, "digits"))])


@pytest.mark.parametrize(
    ("accuracy", "latency", "expected"),
    [
        (SAME, FAST, "Faster than Fused: Linformer (0.50×; +1.0 points). With 3 seeds the data cannot tell"),
        (
            SAME | {"linformer": (0.95, 0.97)},
            FAST,
            "Linformer: 0.50× (0.45 to 0.55) the latency of Fused, more accurate",
        ),
        (
            SAME | {"linformer": (0.80, 0.82)},
            FAST,
            "No mechanism is shown to beat Fused here: Linformer saves time and loses",
        ),
        (SAME, SLOW, "No mechanism is shown to beat Fused here: at batch 64 none saves a tenth of the time"),
        (SAME | {"performer": (0.95, 0.97)}, SLOW, "More accurate but not faster: Performer (2.00× its latency)"),
        (SAME, SLOW | {"linformer": (0.97, 0.95, 0.99)}, "none saves a tenth of the time"),
        (SAME, SLOW | {"linformer": (0.92, 0.91, 0.93)}, "none saves a tenth of the time"),
    ],
    ids=[
        "faster",
        "faster and better",
        "faster and worse",
        "slower",
        "slower and better",
        "within the noise",
        "little",
    ],
)
def test_best_trade_off_with_several_seeds(one_seed, accuracy, latency, expected):
    assert expected in best(with_latency(with_accuracy(one_seed, **accuracy), **QUIET, **latency))


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (
            (-0.009, 0.011),
            "Linformer: 0.50× (0.45 to 0.55) the latency of Fused, a loss of more than 1 point excluded "
            "(+0.1 points, −0.9 to +1.1, 2 seeds).",
        ),
        (
            (0.01, 0.03),
            "Linformer: 0.50× (0.45 to 0.55) the latency of Fused, more accurate as well "
            "(+2.0 points, +1.0 to +3.0, 2 seeds).",
        ),
        (
            (-0.25, 0.05),
            "Faster than Fused: Linformer (0.50×; −10.0 points, −25.0 to +5.0). With 2 seeds the data cannot tell "
            "whether that costs more than 1 point of accuracy.",
        ),
        ((-0.03, -0.02), "No mechanism is shown to beat Fused here: Linformer saves time and loses accuracy"),
    ],
    ids=["loss excluded", "better", "too wide", "worse"],
)
def test_a_faster_mechanism_is_recommended_where_the_interval_excludes_a_loss_of_more_than_a_point(
    one_seed, interval, expected
):
    study = with_latency(with_accuracy(one_seed, seeds=2, **SAME), **QUIET, **FAST)
    assert expected in best(with_difference(study, seeds=2, linformer=interval, performer=(-0.2, 0.2)))


def test_recommended_mechanisms_each_have_their_interval(one_seed):
    fast = FAST | {"performer": (0.7, 0.6, 0.8)}
    study = with_latency(with_accuracy(one_seed, **SAME), **QUIET, **fast)
    said = best(with_difference(study, linformer=(-0.002, 0.004), performer=(-0.01, 0.02)))
    assert (
        said.startswith("Linformer: ") and "; the same holds for Performer (0.70×; +0.5 points, −1.0 to +2.0)." in said
    )


def test_one_seed_ranks_nothing_and_says_how_many_images_a_difference_is(one_seed):
    nine = 9 / IMAGES
    accuracy = {"fused": (0.9, 0.9), "linformer": (0.9 + nine, 0.9 + nine), "performer": (0.9, 0.9)}
    study = with_latency(with_accuracy(one_seed, seeds=1, **accuracy), **QUIET, **SLOW)
    said = text(answers.tradeoff(study, "digits"))
    assert "one seed cannot rank accuracies" in said
    assert "9 images apart" in said and f"{IMAGES} test images" in said
    assert "ore accurate" not in said and "ess accurate" not in said
    faster = text(answers.tradeoff(with_latency(study, **QUIET, **FAST), "digits"))
    assert faster.startswith("Faster than Fused: Linformer (0.50×). One seed cannot show what that costs in accuracy.")


def test_paired_differences_decide_over_overlapping_intervals(one_seed):
    row = {"dataset": "digits", "attention": "linformer", "n_seeds": 3, "difference": 0.01, "p_holm": 0.01}
    paired = pd.DataFrame([row | {"difference_low": 0.005, "difference_high": 0.015, "verdict": "better"}])
    study = with_latency(with_accuracy(one_seed, **SAME), **QUIET, **SLOW)
    assert "More accurate than Fused: Linformer" not in text(answers.tradeoff(study, "digits"))
    said = text(answers.tradeoff(replace(study, paired=paired), "digits"))
    assert "More accurate than Fused: Linformer (+1.0 points, +0.5 to +1.5)." in said
    tested = with_accuracy(one_seed, seeds=1, **SAME)
    models = replace(tested, paired=paired.assign(verdict="one seed", n_seeds=1, p_holm=0.01))
    said = text(answers.tradeoff(with_latency(models, **QUIET, **SLOW), "digits"))
    assert "the accuracy difference to Fused is significant for Linformer (+1.0 points) (McNemar" in said
    assert "More accurate" not in said
    both = pd.concat([models.paired, models.paired.assign(attention="performer")])
    said = text(answers.tradeoff(with_latency(replace(models, paired=both), **QUIET, **SLOW), "digits"))
    assert "significant for Linformer (+1.0 points) and Performer (+1.0 points) (" in said
    chance = replace(models, paired=models.paired.assign(p_holm=0.2))
    assert "no accuracy difference to Fused is significant (McNemar, Holm-corrected)" in text(
        answers.tradeoff(chance, "digits")
    )
    worse = paired.assign(difference=-0.01, difference_low=-0.015, difference_high=-0.005, verdict="worse")
    assert "Less accurate than Fused: Linformer" in text(answers.tradeoff(replace(study, paired=worse), "digits"))


def test_a_time_is_a_difference_only_beyond_the_noise_of_the_baseline_and_bytes_beyond_a_hundredth():
    rows = pd.DataFrame(
        [
            ("fused", 1.0, 0.9, 1.1),
            ("a", 0.95, 0.94, 0.96),
            ("b", 0.8, 0.7, 0.89),
            ("c", 1.3, 1.2, 1.4),
            ("d", 1.05, 1.02, 1.2),
            ("e", 0.995, np.nan, np.nan),
            ("f", 0.5, np.nan, np.nan),
            ("g", np.nan, np.nan, np.nan),
        ],
        columns=["attention", "ratio_to_fused", "ratio_low", "ratio_high"],
    )
    same, shown = "no difference shown", {"b": "cheaper", "c": "more expensive", "f": "cheaper"}
    assert cost_verdicts(rows) == dict.fromkeys("ade", same) | shown


def test_without_fused_nothing_is_compared(tmp_path):
    study = study_of(tmp_path, ["linformer", "hybrid"])
    for answer in answers.answers(study)[:2]:
        assert "it needs Fused" in text(answer.findings[0].sentences)
    assert "There is no comparison: Fused is not among" in text(answers.hybrid(study, "digits"))


def test_one_mechanism_alone_has_a_report(tmp_path):
    study = study_of(tmp_path, ["fused"])
    said = [text(finding.sentences) for answer in answers.answers(study) for finding in answer.findings]
    assert len(said) == 5 and all(said)
    assert "not among the selected mechanisms" in said[3]


def test_tables_that_are_absent_are_said_to_be(one_seed):
    assert overview.efficiency_of_a_block(one_seed).rows == []
    assert text(representations(one_seed, "digits")).startswith("Not measured")
    assert text(constrained_hardware(one_seed, "digits")).startswith("Not measured")


def with_efficiency(study, attention="linformer", **columns):
    """The table with these entries of one mechanism's forward time on one block, and what the short table has there."""
    table = study.efficiency.copy()
    case = (table["attention"] == attention) & (table["scope"] == "block") & (table["mode"] == "forward")
    table.loc[case & (table["quantity"] == "time"), list(columns)] = list(columns.values())
    changed = replace(study, efficiency=table)
    rows = {row[0].text: row for row in overview.efficiency_of_a_block(changed).rows}
    return changed, text([rows[w.name(attention)][1].text])


def test_an_efficiency_length_is_at_every_length_from_one_on_in_between_or_never(full):
    for length, low, high, expected in (
        (65.0, 65.0, 65.0, "≤ 65"),
        (65.0, 65.0, 76.2, "≤ 65 (≤ 65 to 76)"),
        (80.0, 65.0, 91.0, "80 (≤ 65 to 91)"),
        (257.6, 257.6, 257.6, "260"),
        (580.0, 550.0, np.nan, "580 (550 to > 4,097)"),
    ):
        assert with_efficiency(full, length=length, length_low=low, length_high=high)[1] == expected
    none = {"length": np.nan, "length_low": np.nan, "length_high": np.nan}
    assert with_efficiency(full, **none, cheaper_from=257.0, cheaper_to=2305.0)[1] == "257 to 2,305 only"
    assert with_efficiency(full, **none, cheaper_from=1025.0, cheaper_to=1025.0)[1] == "1,025 only"
    assert with_efficiency(full, **none, measured_to=2305)[1] == "> 2,305"
    assert with_efficiency(full, **none, measured_to=np.nan)[1] == "–"
    assert with_efficiency(full, attention="standard")[1] == "> 4,097"


def test_lengths_come_with_what_they_were_measured_at_and_what_their_interval_covers(full):
    said = text(resolution(full))
    assert "noise within one run only. Measured: 65, 145, 257, 577, 1,025, 2,305 and 4,097 tokens." in said


def test_the_long_table_of_lengths_has_predictions_and_fused_for_its_slope(full):
    changes = {"length": np.nan, "cheaper_from": 257.0, "cheaper_to": 2305.0, "predicted_length": 65.0}
    table = overview.efficiency(with_efficiency(full, **changes)[0])
    first = {row[0].text: [cell.text.replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in table.rows[::-1]}
    assert first["Linformer"][2:4] == ["257 to 2,305 only", "200 (180 to 220)"]
    assert first["Linformer"][6:] == ["≤ 65", "1.10 (1.00 to 2.00)", "1.00", "257 to 4,097"]
    assert first["Standard"][2] == "> 4,097"
    assert first["Fused"][2:6] == ["–"] * 4 and first["Fused"][7] == "1.90 (1.00 to 2.00)"


def test_a_slope_is_told_where_its_interval_tells_linear_growth_from_quadratic(full):
    def growth(**changes):
        table = overview.efficiency(with_efficiency(full, **changes)[0])
        place = table.columns.index("Slope of time")
        return {row[0].text: row[place].text for row in reversed(table.rows)}["Linformer"]

    changes = {"slope": 0.2, "slope_low": -0.2, "slope_high": 0.6}
    assert growth(**changes) == "0.20 (−0.20 to 0.60)"
    assert growth(**changes | {"slope_high": 0.9}) == "–"
    assert growth(**changes | {"slope_low": np.nan, "slope_high": np.nan}) == "–"


def test_resolution_says_at_which_end_who_is_faster(full):
    headline = text([next(resolution(full))])
    assert re.search(r"at 4,097 tokens \d mechanisms are faster than Fused, Linformer \(0\.\d+×\) most", headline)
    rows = full.scaling.assign(ratio_to_fused=1.0, ratio_low=0.9, ratio_high=1.1)
    same = text([next(resolution(replace(full, scaling=rows)))])
    assert "at 4,097 tokens none is faster than Fused by a tenth or more" in same


def test_resolution_speaks_of_one_block_and_one_sample(full):
    model = full.scaling.assign(scope="model", ratio_to_fused=0.01, ratio_low=0.01, ratio_high=0.01)
    both = replace(full, scaling=pd.concat([full.scaling, model]))
    assert list(resolution(both)) == list(resolution(full))


def test_how_many_times_are_contended_is_said_where_any_are(full):
    assert "Do not trust 2 of the 82 times here: other programs were running." in text(resolution(full))
    all_busy = replace(full, scaling=full.scaling.assign(contended=True))
    assert "trust 82 of the 82 times here" in text(resolution(all_busy))
    assert "other programs" not in text(resolution(replace(full, scaling=full.scaling.assign(contended=False))))


def test_the_scaling_chart_marks_contended_points_where_there_are_any(full):
    busy = charts.scaling(full).specs.values()
    marked = {(v["attention"], v["tokens"]) for spec in busy for v in spec["data"]["values"]
              if v.get("contended") == "while other programs ran"}  # fmt: skip
    assert marked == {("hybrid", 577)}
    assert any(spec.get("title", {}).get("text") == "Hollow: measured while other programs ran" for spec in busy)
    for spec in charts.scaling(replace(full, scaling=full.scaling.assign(contended=False))).specs.values():
        assert "title" not in spec and all("contended" not in value for value in spec["data"]["values"])


def with_similarity(study, **to_fused):
    """CKA of each mechanism's layers with the same layer of `fused`."""
    keys = {"dataset": "digits", "attention_a": "fused", "n_images": 145}
    rows = [
        keys | {"layer_a": layer, "attention_b": attention, "layer_b": layer, "cka": cka + offset}
        for attention, cka in to_fused.items()
        for layer, offset in ((1, 0.05), (2, -0.05))
    ]
    return replace(study, cka=pd.DataFrame(rows))


def test_similarity_is_compared_with_that_of_exact_attention_trained_again(full):
    study = with_similarity(full, standard=0.68, linformer=0.33, performer=0.63, hybrid=0.70)
    said = text(representations(study, "digits"))
    assert said.startswith(
        "With one training of each this is no ranking: linear CKA with Fused, mean over layers, from 0.33 (Linformer) "
        "to 0.70 (Hybrid); exact attention trained again has 0.68. Compared on 145 images. Other seeds may differ."
    )
    shown = {row[0].text: row[1].text for row in overview.representations(study, "digits").rows}
    assert shown["Linformer"] == "0.33" and shown["Hybrid"] == "0.70" and shown["Fused"] == "–"
    none = text(representations(with_similarity(full, standard=0.6, linformer=0.7), "digits"))
    assert "mean over layers: 0.70 (Linformer); exact attention trained again has 0.60." in none
    alone = text(representations(with_similarity(full, linformer=0.7, hybrid=0.6), "digits"))
    assert alone.startswith("There is no scale: Standard")


def test_where_heads_look_is_held_against_uniform_attention(full):
    table = overview.representations(full, "digits")
    shown = {row[0].text: [cell.text for cell in row[2:4]] for row in table.rows}
    assert shown["Standard"] == ["5.5", "3.50"] and shown["Hybrid"] == ["10.5", "3.50"]
    assert "Uniform attention: 16.5 px, 4.17 nats." in table.note


def test_only_sizes_that_cost_less_than_exact_attention_stand_in_for_it(full):
    shown = {
        row[0].text: [text([cell.text]) for cell in row[4:]] for row in overview.representations(full, "digits").rows
    }
    # place / 8 at k = 8: 320 multiply-adds, exact attention 500; k = 32, with a smaller error, takes 1,280
    assert shown["Linformer"] == ["k = 8", "25.0 %", "72.0 %"]
    assert shown["Fused"] == shown["Standard"] == shown["Hybrid"] == ["–"] * 3
    said = text(representations(full, "digits"))
    assert "(top-1 97.0 % on 145 images) without retraining" in said and "no mechanism keeps its accuracy" in said
    near = replace(
        full, replaced=full.replaced.assign(top1=full.replaced["top1"].where(full.replaced["value"] != 8, 0.965))
    )
    kept = "Linformer, Performer and Nyströmformer keep its accuracy to within 1 point"
    assert kept in text(representations(near, "digits"))
    costly = replace(full, fidelity=full.fidelity.assign(mixing_macs=full.fidelity["fused_macs"]))
    assert "Swapped into" not in text(representations(costly, "digits"))
    assert all(row[4].text == "–" for row in overview.representations(costly, "digits").rows)


def test_hybrid_says_what_it_adds_and_where_its_gate_goes(full):
    deep = replace(full, gates=optional_tables(layers=4)["gates"])
    said = text(answers.hybrid(deep, "digits"))
    assert said.startswith("No difference in accuracy to Fused is shown: +0.1 points")
    assert "In the first block its gate gives 50.0 % to regional, 20.0 % to dilated and 30.0 % to linear." in said
    assert "In block 3, the last in which it is trained, its gate gives 30.0 % to regional" in said
    assert "20.0 % to regional" not in said  # of the fourth, which has no gradient
    assert text(answers.hybrid(full, "digits")).count("its gate gives") == 1
    one = replace(full, gates=full.gates[full.gates["layer"] == 1])
    assert "Its one gate, in block 1, is not trained" in text(answers.hybrid(one, "digits"))
    assert "`make ablation` compares every set of its branches." in said
    for verdict, expected in (("better", "It adds accuracy"), ("worse", "It costs accuracy")):
        assert text(answers.hybrid(replace(full, paired=full.paired.assign(verdict=verdict)), "digits")).startswith(
            expected
        )
    assert "with one seed" in text(answers.hybrid(replace(full, paired=full.paired.iloc[:0]), "digits"))


def test_hardware_tells_losses_in_images_and_what_is_not_exported(full):
    said = text(constrained_hardware(full, "digits"))
    assert "it costs at most 5 of 360 validation images" in said
    assert "is 0.50× the size of PyTorch's weights" in said
    assert "Under onnxruntime the same models run at 2.00× the speed of PyTorch." in said
    assert "outputs within 3e-06 of PyTorch's" in said  # 2.1e-6 is not within 2e-6
    table = full.hardware.copy()
    table.loc[table["attention"] == "performer", "onnx_error"] = np.nan
    table["int8_top1"] = table["top1"]
    said = text(constrained_hardware(replace(full, hardware=table), "digits"))
    assert "Not exported to ONNX: Performer." in said and "none gets fewer of 360 validation images right" in said
    ratios = table.assign(
        ratio_to_fused=[2, 1, 0.5, 2, 2, 2], ratio_low=[2, 1, 0.4, 2, 2, 2], ratio_high=[2, 1, 0.6, 2, 2, 2]
    )
    assert "Linformer is faster than Fused" in text(constrained_hardware(replace(full, hardware=ratios), "digits"))
    unknown = replace(full, hardware=table.assign(ratio_to_fused=np.nan))
    assert text(constrained_hardware(unknown, "digits")).startswith("Latency on one thread relative to Fused was not")


def test_hardware_names_all_that_tie(full):
    tied = full.hardware.assign(int8_top1=[0.98, 0.97, 0.97, 0.98, 0.98, 0.98])
    said = text(constrained_hardware(replace(full, hardware=tied.assign(n_images=100)), "digits"))
    assert "it costs at most 1 of 100 validation images" in said


def test_absolute_times_in_the_tables_are_ratios_times_one_baseline(full):
    """Each mechanism's own median came from a process of its own: here they say the opposite of the ratios."""
    cost = full.cost.copy()
    one = (cost["quantity"] == "latency") & (cost["batch_size"] == 1)
    medians, ratios = {"fused": 8.0, "linformer": 6.0}, {"fused": 0.97, "linformer": 1.25}
    for a in medians:
        numbers = [medians[a], ratios[a], 0.9 * ratios[a], 1.1 * ratios[a]]
        cost.loc[one & (cost["attention"] == a), ["median", "ratio_to_fused", "ratio_low", "ratio_high"]] = numbers
    table = overview.accuracy_and_cost(replace(full, cost=cost), "digits")
    ratio, time = (table.columns.index(f"Latency{text}, one image") for text in (" × Fused", ""))
    shown = {row[0].text: (row[ratio].text, row[time].key) for row in table.rows}
    assert shown["Linformer"] == ("1.25× (1.12 to 1.38)", 10.0)  # 1.25 * 8, though its own median is 6
    assert shown["Fused"][1] == 8.0
    hardware = overview.hardware_latency(full, "digits")
    time = hardware.columns.index("Latency, onnxruntime")
    baseline = full.hardware["fused_latency_ms"].median()
    expected = list(full.hardware["onnx_ratio_to_fused"] * baseline)
    assert [row[time].key for row in hardware.rows] == pytest.approx(expected)
    assert hardware.rows[2][hardware.columns.index("× Fused, onnxruntime")].text == "0.75× (0.68 to 0.83)"


def about_times(study):
    """Each part of the report that has times or memory of `cost` and `scaling`."""
    yield text(s for s in answers.hybrid(study, "digits") if "latency" in s)
    yield text([next(resolution(study))])
    yield overview.accuracy_and_cost(study, "digits").note
    yield overview.efficiency(study).note
    yield overview.efficiency_of_a_block(study).note
    yield which_one(study).note
    yield text(constrained_hardware(replace(study, hardware=study.hardware.iloc[:0]), "digits"))


def test_times_of_a_cpu_are_told_with_its_name_and_threads(full):
    parts = list(about_times(full))
    assert [part for part in parts if "on 2 threads of made up in float32" not in part] == []
    assert "One image at a time in PyTorch on 1 thread of made up in float32:" in text(
        constrained_hardware(full, "digits")
    )
    assert overview.hardware_latency(full, "digits").note.startswith("One image at a time on 1 thread of made up")


def test_times_of_a_gpu_are_told_with_its_name_and_without_threads(full):
    tables = {name: getattr(full, name).assign(machine="NVIDIA H200", threads=np.nan) for name in ("cost", "scaling")}
    parts = list(about_times(replace(full, **tables)))
    assert [part for part in parts if "on NVIDIA H200 in float32" not in part or "threads" in part] == []


def test_times_of_two_machines_are_told_with_both(full):
    fused = full.cost["attention"] == "fused"
    cost = full.cost.assign(
        machine=full.cost["machine"].mask(fused, "NVIDIA H200"),
        threads=full.cost["threads"].mask(fused),
        dtype=full.cost["dtype"].mask(fused, "bfloat16"),
    )
    note = overview.accuracy_and_cost(replace(full, cost=cost), "digits").note
    assert "on 2 threads of made up in float32 and on NVIDIA H200 in bfloat16" in note


@pytest.mark.slow
def test_of_many_mechanisms_sentences_name_both_ends_alone(tmp_path):
    write_study(tmp_path / "metrics", attentions=FIELD)
    aggregate(tmp_path / "metrics", tmp_path / "data", ["digits"], list(FIELD), [0])
    study = read(tmp_path / "data")
    sentences = [s for answer in answers.answers(study) for finding in answer.findings for s in finding.sentences]
    named = {a: w.name(a) for a in FIELD}
    for sentence in sentences:
        assert len([name for name in named.values() if re.search(rf"\b{name}\b", sentence)]) <= 8, sentence


def take(study):
    """Columns of the first table, by what one has: tokens, device and whether one may retrain."""
    rows = [[text([cell.text]) for cell in row] for row in which_one(study).rows]
    return {tuple(row[:3]): row[3:] for row in rows}


def with_model_times(study, **ratios):
    """Forward time of the whole model relative to `fused`, by mechanism at 65 and at 577 tokens."""
    rows = []
    for attention, (short, long) in ({"fused": (1.0, 1.0)} | ratios).items():
        for tokens, ratio in ((65, short), (577, long)):
            key = {"attention": attention, "machine": "made up", "threads": 2, "dtype": "float32", "tokens": tokens}
            key |= {"scope": "model", "batch": "one", "mode": "forward", "quantity": "time", "median": 1.0}
            key |= {"ratio_to_fused": ratio, "ratio_low": ratio - 0.01, "ratio_high": ratio + 0.01}
            rows.append(key | {"status": "ok", "contended": False})
    return replace(study, scaling=pd.DataFrame(rows))


YES, NO = ("PyTorch, 2 threads", "yes"), ("PyTorch, 2 threads", "no")


def test_the_first_table_takes_the_fastest_whose_accuracy_may_be_as_high(full):
    study = with_model_times(full, linformer=(1.1, 0.5), performer=(0.95, 0.4), uniform=(0.5, 0.3))
    shown = take(study)
    assert shown[("65", *YES)] == ["Fused", "1", "0", "the baseline"]  # a twentieth is not worth it
    # Uniform is the control, and no choice
    assert shown[("577", *YES)] == [
        "Performer",
        "0.40×",
        "digits +0.1 (−1.0 to +1.2)",
        "digits: 1 seed, no difference shown at its number of tokens",
    ]
    worse = full.paired["verdict"].mask(full.paired["attention"] == "performer", "worse")
    shown = take(replace(study, paired=full.paired.assign(verdict=worse)))
    assert shown[("577", *YES)][:2] == ["Linformer", "0.50×"]
    # One seed makes a loss likely; several do not exclude one of more than a point.
    for verdict, end, value in (("one seed", "high", -0.001), ("no difference shown", "low", -0.011)):
        paired = full.paired.assign(verdict=verdict)
        lost = paired["attention"] == "performer"
        paired[f"difference_{end}"] = paired[f"difference_{end}"].mask(lost, value)
        assert take(replace(study, paired=paired))[("577", *YES)][0] == "Linformer"
    busy = study.scaling.assign(contended=study.scaling["tokens"] == 577)
    assert ("577", *YES) not in take(replace(study, scaling=busy))


def test_an_interval_below_zero_that_correction_leaves_open_is_told_apart(full):
    row = full.paired["attention"] == "linformer"
    paired = full.paired.assign(verdict="no difference shown")
    columns = ["difference", "difference_low", "difference_high"]
    paired.loc[row, columns] = [-0.015, -0.02, -0.01]
    paired.loc[~row, columns] = [-0.002, -0.02, 0.01]
    said = text(answers.tradeoff(replace(full, paired=paired), "digits"))
    others = len(full.paired) - 1
    assert (
        f"Probably less accurate (the interval is below 0, but not after correction for {others + 1} comparisons): "
        "Linformer (−1.5 points, −2.0 to −1.0)." in said
    )
    (rest,) = re.findall(r"No difference in accuracy to Fused is shown for [^.]*", said)
    assert "Linformer" not in rest


def test_lengths_with_one_answer_are_one_row(full):
    study = with_model_times(full, linformer=(0.8, 0.5))
    assert take(study)[("65 to 577", *YES)][:2] == ["Linformer", "0.80× to 0.50×"]


def test_a_tenth_must_be_saved_at_the_upper_end_of_the_interval(full):
    study = with_model_times(full, linformer=(0.895, 0.885))  # each 0.01 to either side
    shown = take(study)
    assert shown[("65", *YES)][0] == "Fused" and shown[("577", *YES)][0] == "Linformer"


def test_without_retraining_a_mechanism_must_keep_the_accuracy_of_the_trained_model(full):
    cost = full.cost.copy()
    row = (cost["quantity"] == "latency") & (cost["batch_size"] == 1) & (cost["attention"] == "linformer")
    cost.loc[row, ["ratio_to_fused", "ratio_low", "ratio_high"]] = [0.5, 0.49, 0.51]
    study = replace(full, cost=cost)
    assert take(study)[("those of digits", *NO)][0] == "Fused"
    kept = full.replaced.assign(top1=full.replaced["top1"].mask(full.replaced["attention"] == "linformer", 0.965))
    assert take(replace(study, replaced=kept))[("those of digits", *NO)] == [
        "Linformer", "0.50×", "−0.5", "digits: 145 validation images, one model"
    ]  # fmt: skip
    # The time is that of the trained size: another one, such as an exact one, says nothing of it.
    first = kept.index[kept["attention"] == "linformer"][0]
    kept = pd.concat([kept, kept.loc[[first]].assign(value=8.0, top1=0.3)], ignore_index=True)
    assert take(replace(study, replaced=kept))[("those of digits", *NO)][0] == "Fused"


def test_under_onnxruntime_another_mechanism_must_beat_fused_there(full):
    there = "those of digits", "onnxruntime, 1 thread"
    # Made up to take half of Fused's 0.5; nobody need train for it, as its weights are those of Fused.
    known = ["Standard", "0.25× of Fused in PyTorch", "0", "the function of Fused, with its weights"]
    assert take(full)[(*there, "no need")] == known
    assert "There Standard takes least time, 0.50× that of Fused." in text(constrained_hardware(full, "digits"))
    other = full.hardware["attention"].replace({"standard": "linformer", "linformer": "standard"})
    assert take(replace(full, hardware=full.hardware.assign(attention=other)))[(*there, "yes")][0] == "Linformer"
    level = replace(
        full, hardware=full.hardware.assign(onnx_ratio_to_fused=0.5, onnx_ratio_low=0.45, onnx_ratio_high=0.55)
    )
    assert take(level)[(*there, "yes")][:2] == ["Fused", "0.50× of Fused in PyTorch"]
    assert "takes least time" not in text(constrained_hardware(level, "digits"))
