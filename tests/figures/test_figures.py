import itertools
import json
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from safetensors.numpy import load_file
from synthetic_study import ATTENTIONS, FIELD, TOKENS, write_study

from effvit import available_attention, figures
from effvit.figures.style import branch_colour, look
from effvit.report.charts import SHAPES
from effvit.study.aggregate import collect

SVG = "{http://www.w3.org/2000/svg}"
TEMPLATES = sorted((Path(__file__).parents[2] / ".dvc" / "plots").glob("*.json"))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"), seeds=(0, 1))


@pytest.fixture(scope="module")
def tables(study):
    return collect(study, ["digits"], ATTENTIONS, [0, 1])


@pytest.fixture(scope="module")
def maps(study):
    cells = study / "cells" / "digits"
    return {a: load_file(cells / a / "seed0" / "evaluate" / "attention_maps.safetensors") for a in ATTENTIONS}


def png(figure):
    file = BytesIO()
    figures.save(figure, file)
    return file.getvalue()


def of(table, *attentions):
    return table[table["attention"].isin(attentions)]


def draw_all(tables, maps, *attentions):
    return [
        figures.training_curves(of(tables.curves, *attentions)),
        figures.accuracy_tradeoff(of(tables.tradeoff, *attentions)),
        figures.scaling(of(tables.scaling, *attentions)),
        figures.scaling(of(tables.scaling, *attentions), "model"),
        figures.hardware(of(tables.hardware, *attentions)),
        figures.attention_maps({a: maps[a] for a in attentions}, [str(i) for i in range(10)]),
        figures.fidelity(of(tables.fidelity, *attentions), of(tables.replaced, *attentions)),
        figures.cka(tables.cka[tables.cka[["attention_a", "attention_b"]].isin(attentions).all(axis=1)]),
    ]


@pytest.mark.slow
def test_the_same_bytes_whatever_style_the_user_has_and_no_date_in_them(tables, maps):
    first = [png(figure) for figure in draw_all(tables, maps, "fused", "linformer")]
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "savefig.facecolor": "red", "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        second = [png(figure) for figure in draw_all(tables, maps, "fused", "linformer")]
        assert dict(matplotlib.rcParams) == before
    assert first == second
    assert not any(word in data for data in first for word in (b"tEXt", b"iTXt", b"tIME"))


@pytest.mark.slow
def test_vector_figures_are_the_same_bytes_without_a_date_and_their_text_is_text(tables, maps, tmp_path):
    for i, figures_again in enumerate(draw_all(tables, maps, "fused", "linformer")[:4] for _ in range(2)):
        for j, figure in enumerate(figures_again):
            figures.save(figure, tmp_path / f"{i}-{j}.svg")
    for j in range(4):
        first = (tmp_path / f"0-{j}.svg").read_text(encoding="utf-8")
        assert first == (tmp_path / f"1-{j}.svg").read_text(encoding="utf-8")
        assert "<dc:date>" not in first and "Matplotlib v" not in first
        words = " ".join("".join(element.itertext()) for element in ElementTree.fromstring(first).iter(f"{SVG}text"))
        assert "Fused" in words and "Linformer" in words
        assert '<path id="DejaVu' not in first and words.count("Linformer") >= 1


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["fused", "standard"])
def test_every_figure_can_be_drawn_of_one_mechanism_alone(tables, maps, attention):
    for figure in draw_all(tables, maps, attention):
        figure.draw_without_rendering()


def test_colours_and_markers_are_distinct_and_a_new_mechanism_has_its_own():
    looks = [look(a) for a in FIELD]
    assert available_attention() == FIELD
    assert len({colour for _, colour, _ in looks}) == len({marker for *_, marker in looks}) == len(FIELD)
    assert {marker for *_, marker in looks} <= SHAPES.keys()
    label, colour, marker = look("sparse")
    assert label == "sparse"
    assert colour not in {c for _, c, _ in looks} and marker not in {m for *_, m in looks}


# What is left of linear red, green and blue without one kind of cone: Machado et al. 2009, severity 1.
SEEN_WITH = {
    "all cones": np.eye(3),
    "no long": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no middle": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]


def lab(colour, cones):
    """CIE L*a*b* of a colour as somebody sees it."""
    shown = np.array(to_rgb(colour))
    rgb = np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(SEEN_WITH[cones] @ rgb, 0, 1) / [0.95047, 1, 1.08883]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("cones", SEEN_WITH)
def test_the_colour_blind_tell_colours_apart(cones):
    """A difference of 2.3 is just noticeable side by side; lines and points are thin and apart."""
    for a, b in itertools.combinations(FIELD, 2):
        assert np.linalg.norm(lab(look(a)[1], cones) - lab(look(b)[1], cones)) > 14, (a, b)


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    """Tables of a made-up study of all mechanisms."""
    study = write_study(tmp_path_factory.mktemp("field"), attentions=FIELD, lengths=(*TOKENS, 16385))
    return collect(study, ["digits"], FIELD, [0])


def overlaps(figure):
    """Pairs of texts of one panel that lie over each other, and texts that leave the figure."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        texts = [text for text in axes.texts if text.get_text()]
        boxes = [text.get_window_extent() for text in texts]
        for (a, box), (b, other) in itertools.combinations(zip(texts, boxes, strict=True), 2):
            if box.y0 + 1 < other.y1 and other.y0 + 1 < box.y1 and box.x0 < other.x1 and other.x0 < box.x1:
                yield a.get_text(), b.get_text()
        ticks = sorted((box.x0, box.x1) for label in axes.get_xticklabels() for box in [label.get_window_extent()])
        if any(start - end < 4 for (_, end), (start, _) in itertools.pairwise(ticks)):
            yield "numbers", "under the axis"
        for text, box in zip(texts, boxes, strict=True):
            if not figure.bbox.padded(2).containsx(box.x1) or not figure.bbox.padded(2).containsy(box.y1):
                yield text.get_text(), "the border"


@pytest.mark.slow
def test_of_many_mechanisms_names_stand_apart_where_lines_end(field):
    for figure, panels in ((figures.scaling(field.scaling), 4), (figures.training_curves(field.curves), 2)):
        assert not list(overlaps(figure))
        named = [
            {look(a)[0] for a in FIELD for text in axes.texts if text.get_text().split()[0] == look(a)[0]}
            for axes in figure.axes[:panels]
        ]
        assert max(map(len, named)) == len(FIELD)
        drawn = {label.get_text() for legend in figure.legends for label in legend.get_texts()}
        assert not drawn & {look(a)[0] for a in FIELD}


def test_a_mechanism_has_the_same_colour_in_any_company(tables):
    for attentions in (("linformer",), ATTENTIONS):
        axes = figures.training_curves(of(tables.curves, *attentions)).axes[1]
        drawn = {to_hex(line.get_color()).upper() for line in axes.lines}
        assert drawn == {look(a)[1] for a in attentions}


def test_curves_show_the_mean_over_seeds(tables):
    axes = figures.training_curves(of(tables.curves, "hybrid")).axes[1]
    mean = of(tables.curves, "hybrid").groupby("epoch")["val_accuracy"].mean()
    np.testing.assert_allclose(axes.lines[0].get_ydata(), mean)


def test_error_bars_are_the_interval_where_there_is_one(study, tables):
    def bars(tradeoff):
        container, _ = figures.accuracy_tradeoff(of(tradeoff, "hybrid")).axes[0].containers
        return container.lines[2][0].get_segments()

    row = tables.tradeoff.set_index("attention").loc["hybrid"]
    np.testing.assert_allclose(bars(tables.tradeoff)[0][:, 1], [row["top1_low"], row["top1_high"]])
    one_seed = bars(collect(study, ["digits"], ATTENTIONS, [0]).tradeoff)
    assert not any(len(segment) and np.isfinite(segment).all() for segment in one_seed)


def test_a_single_seed_has_dotted_bars_over_test_images_and_says_so(study, tables):
    one = collect(study, ["digits"], ["hybrid"], [0]).tradeoff
    figure = figures.accuracy_tradeoff(one)
    dotted = figure.axes[0].containers[1].lines[2][0].get_segments()[0][:, 1]
    np.testing.assert_allclose(dotted, one.iloc[0][["top1_images_low", "top1_images_high"]].astype(float))
    assert figure.get_supxlabel().startswith("One seed.")
    assert not figures.accuracy_tradeoff(tables.tradeoff).get_supxlabel()


@pytest.mark.parametrize(("half", "drawn"), [(0.001, True), (0.2, False)])
def test_a_pareto_front_is_drawn_where_intervals_along_it_do_not_overlap(half, drawn):
    costs = {"gmacs": [1.0, 2.0, 3.0], "latency_ratio": [1.0, 2.0, 3.0], "train_memory_mib": [1.0, 2.0, 3.0]}
    top1 = np.array([0.7, 0.8, 0.75])  # the last is behind the front
    intervals = {
        "top1_low": top1 - half,
        "top1_high": top1 + half,
        "top1_images_low": np.nan,
        "top1_images_high": np.nan,
    }
    ratios = {"latency_ratio_low": costs["latency_ratio"], "latency_ratio_high": costs["latency_ratio"]}
    names = {"dataset": "digits", "attention": ["linformer", "fused", "performer"], "batch_size": 64}
    figure = figures.accuracy_tradeoff(pd.DataFrame(names | costs | {"top1": top1} | intervals | ratios))
    for axes in figure.axes:
        fronts = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
        assert [list(line.get_ydata()) for line in fronts] == ([[0.7, 0.8]] if drawn else [])
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert ("Pareto front" in labels) == drawn


def test_a_cost_that_nobody_could_measure_leaves_its_panel_empty(tables):
    figure = figures.accuracy_tradeoff(tables.tradeoff.assign(train_memory_mib=np.nan))
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.axes[2].texts] == ["not measured"]


def texts(axes):
    return {label: value for text in axes.texts for label, colon, value in [text.get_text().partition(": ")] if colon}


def test_scaling_tells_the_length_from_which_each_mechanism_is_cheaper():
    """Costs N² (fused), 1000 N (cheaper from 1000 tokens), 0.5 N² (always), 2 N² (never), and some in between."""
    tokens = np.array([64, 256, 1024, 4096])
    costs = {"fused": tokens**2, "linformer": 1000 * tokens, "performer": tokens**2 / 2, "hybrid": tokens**2 * 2}
    costs["nystromformer"] = tokens**2 * np.array([2, 0.5, 0.5, 2])
    rows = [
        {"attention": a, "tokens": n, "mode": m, "quantity": q, "median": c, "q25": c, "q75": c}
        | {"ratio_to_fused": c / n**2, "ratio_low": c / n**2, "ratio_high": c / n**2, "status": "ok"}
        | {"scope": "block", "batch": "one", "batch_size": 1, "contended": False}
        for a, cost in costs.items()
        for n, c in zip(tokens.tolist(), cost.tolist(), strict=True)
        for m in ("forward", "train")
        for q in ("time", "memory")
    ]
    table = pd.DataFrame(rows)
    for chosen in (table, table[table["attention"] != "fused"]):
        for axes in figures.scaling(chosen).axes:
            assert texts(axes) == {"Linformer": "1,000", "Performer": "≤ 64", "Hybrid": "> 4,096"} | {
                "Nyströmformer": "256 to 1,024 only"
            }


def test_scaling_draws_what_was_timed_in_turns_and_not_times_of_different_processes(tables):
    """The hybrid's own process ran ten times slower; its ratio to fused, and hence its line, is as before."""
    table = of(tables.scaling, "fused", "hybrid")
    table = table[table["batch"] == "one"]
    slower = table.assign(median=table["median"].where(table["attention"] == "fused", table["median"] * 10))

    def lines(table):
        return [line.get_ydata() for axes in figures.scaling(table).axes for line in axes.lines]

    for one, other in zip(lines(table), lines(slower), strict=True):
        np.testing.assert_allclose(one, other)


def test_scaling_draws_the_scope_asked_for_one_sample_at_a_time_and_a_model_against_pixels_too(tables):
    table = of(tables.scaling, "fused")
    axes = {scope: figures.scaling(table, scope).axes for scope in ("block", "model")}
    drawn = {scope: panels[0].lines[0].get_ydata() for scope, panels in axes.items()}
    np.testing.assert_allclose(drawn["model"], 6 * drawn["block"])
    for tick, label in zip(axes["model"][2].get_xticks(), axes["model"][2].get_xticklabels(), strict=True):
        tokens, side = (int(number.replace(",", "")) for number in label.get_text().split("\n"))
        assert tokens == tick == 1 + (side // 16) ** 2 and side % 16 == 0
    assert "Image side [px]" in axes["model"][2].get_xlabel()
    assert "Image side [px]" not in axes["block"][2].get_xlabel()


def test_contended_points_are_hollow_and_in_the_legend(tables):
    def hollow(figure):
        return [x for axes in figure.axes for line in axes.lines for x in line.get_xdata()
                if line.get_markerfacecolor() == "white"]  # fmt: skip

    for attention, contended in (("hybrid", True), ("performer", False)):
        figure = figures.scaling(of(tables.scaling, "fused", attention))
        assert hollow(figure) == ([577] * 2 if contended else [])  # times of both passes
        assert ("other programs ran" in [t.get_text() for t in figure.legends[0].get_texts()]) is contended


def test_latency_is_drawn_as_the_ratio_to_fused_with_its_batch(tables):
    axes = figures.accuracy_tradeoff(tables.tradeoff).axes[1]
    assert axes.get_xlabel() == "Latency [× Fused, batch 64]"
    drawn = {line.get_xdata()[0] for line in axes.lines if line.get_marker() == look("hybrid")[2]}
    assert drawn == set(of(tables.tradeoff, "hybrid")["latency_ratio"])


def test_hardware_says_where_a_mechanism_does_not_run_and_draws_the_rest(tables):
    figure = figures.hardware(of(tables.hardware, "fused", "performer", "hybrid"))
    said = {text.get_position()[1]: text.get_text() for text in figure.axes[1].texts}
    assert said == {1: "onnxruntime, int8 weights: not supported", 2: "onnxruntime: not supported"}
    markers = [line.get_marker() for line in figure.axes[0].lines if np.isfinite(line.get_xdata().astype(float)).all()]
    assert [markers.count(marker) for marker in "oD^"] == [3, 2, 1]


def test_hardware_draws_ratios_of_one_process_and_not_times_of_several(tables):
    slower = tables.hardware.assign(latency_ms=tables.hardware["latency_ms"] * 10)
    assert png(figures.hardware(slower)) == png(figures.hardware(tables.hardware))


@pytest.mark.slow
def test_a_stopped_mechanism_is_crossed_at_its_first_length_and_does_not_pay_off(tables):
    figure = figures.scaling(of(tables.scaling, "standard", "fused"))
    for axes, stopped in zip(figure.axes, (False, True, False, True), strict=True):
        crosses = [line for line in axes.lines if line.get_marker() == "x"]
        assert [line.get_xdata()[0] for line in crosses] == ([TOKENS[5]] if stopped else [])
        assert all(line.get_ydata()[0] > 1 and not line.get_clip_on() for line in crosses)  # above what was measured
        assert texts(axes)["Standard"].startswith(">")


def test_a_mechanism_that_runs_where_fused_was_stopped_is_cheaper_there(tables):
    table = of(tables.scaling, "fused", "performer").copy()
    beyond = table["tokens"] == TOKENS[-1]
    table.loc[beyond & (table["attention"] == "fused"), ["median", "status"]] = [np.nan, "out of memory"]
    table.loc[beyond, "ratio_to_fused"] = np.nan
    memory = figures.scaling(table).axes[2]
    assert texts(memory)["Performer"] == f"{TOKENS[-1]:,}"


def test_a_mechanism_stopped_everywhere_does_not_stop_the_figure(tables):
    table = of(tables.scaling, "linformer").assign(status="over budget", median=np.nan, ratio_to_fused=np.nan)
    assert texts(figures.scaling(table).axes[0]) == {"Linformer": "never"}


def test_classes_may_be_called_like_formulas(maps):
    png(figures.attention_maps({"fused": maps["fused"]}, ["$x$ $", *"123456789"]))


def test_fidelity_has_a_line_a_mechanism_and_marks_what_is_exact(tables):
    exact = tables.fidelity["attention"].eq("nystromformer") & tables.fidelity["value"].eq(64).fillna(False)
    table = tables.fidelity.assign(error=tables.fidelity["error"].mask(exact.astype(bool), 0.0))
    random, _, accuracy = figures.fidelity(table, tables.replaced).axes
    lines = {line.get_marker(): line for line in random.lines if line.get_linestyle() == "-"}
    for attention in ("linformer", "performer", "nystromformer", "hybrid"):
        rows = table.query("attention == @attention and source == 'random' and error > 0")
        line = lines[look(attention)[2]]
        assert line.get_ydata().tolist() == pytest.approx(rows["error"].tolist())
        assert line.get_xdata().tolist() == pytest.approx((rows["mixing_macs"] / 1e6).tolist())
    points = [line for line in random.lines if line.get_marker() == "v" and line.get_linestyle() == "None"]
    assert [x for line in points for x in line.get_xdata()] == [pytest.approx(48 * 65 * 4 * 64 / 1e6)]
    assert accuracy.lines[0].get_ydata()[0] == 0.9


def test_fidelity_has_a_point_for_a_mechanism_without_a_size(tables):
    alone = of(tables.fidelity, "fused").assign(attention="mean", error=0.3)
    line = figures.fidelity(alone, tables.replaced).axes[0].lines[0]
    assert line.get_ydata().tolist() == pytest.approx([0.3])


def test_fidelity_without_a_trained_fused_model_says_so(tables):
    table = tables.fidelity[tables.fidelity["source"] == "random"]
    panels = figures.fidelity(table, tables.replaced.iloc[:0]).axes
    assert [axes.texts[0].get_text() for axes in panels[1:]] == ["no trained Fused model"] * 2
    panels = figures.fidelity(of(tables.fidelity, "fused"), of(tables.replaced, "fused")).axes
    assert [axes.texts[0].get_text() for axes in panels] == ["exact attention alone"] * 3


def test_cka_is_drawn_block_by_block_in_the_order_of_the_table(tables):
    figure = figures.cka(tables.cka.assign(cka=np.arange(len(tables.cka)) / len(tables.cka)))
    axes = figure.axes[0]
    drawn = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(drawn.ravel(), np.arange(144) / 144)
    labels = [label.get_text() for child in axes.child_axes for label in child.get_xticklabels() if label.get_text()]
    assert labels[: len(ATTENTIONS)] == [look(a)[0] for a in ATTENTIONS]


def test_wrong_predictions_stand_out(maps):
    figure = figures.attention_maps({"fused": maps["fused"]}, [str(i) for i in range(10)])
    marked = [axes.xaxis.label.get_weight() == "bold" for axes in figure.axes[1::2]]
    assert marked == (maps["fused"]["labels"] != maps["fused"]["predictions"]).tolist()


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_dvc_fills_every_anchor_of_the_templates(path, tables):
    from dvc_render.vega import VegaRenderer

    rows = tables.scaling[["attention", "tokens", "median"]].dropna().assign(rev="workspace").to_dict("records")
    renderer = VegaRenderer(
        rows, "plot", template=path.stem, template_dir=str(path.parent), x="tokens", y="median", title="t"
    )
    filled = renderer.partial_html()
    assert "<DVC_METRIC" not in filled
    assert json.loads(filled)["data"]["values"] == rows


def test_the_templates_have_the_colours_of_the_figures():
    templates = [path.read_text() for path in TEMPLATES]
    assert len(templates) == 4
    for template in templates:
        places = [template.index(f'"{look(a)[1]}"') for a in FIELD]
        assert places == sorted(places)
        assert [template.index(f'"{i} {a}"') for i, a in enumerate(ATTENTIONS)]
        assert f"indexof({list(FIELD)}, datum.attention)" in template


def test_each_branch_of_a_hybrid_has_a_colour_of_its_own():
    branches = ["window r=1", "window r=2", "window r=3", "window r=4", "linear"]
    assert len({branch_colour(branch) for branch in branches}) == len(branches)
