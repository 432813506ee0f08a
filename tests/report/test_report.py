"""The page as a browser shows it, and what is written when tables are absent, wrong or the same again."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from html import unescape
from math import isfinite, nan
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from synthetic_study import ATTENTIONS, TOKENS, write_study
from synthetic_tables import drop_optional_tables, write_optional_tables

from effvit.cli.report import report
from effvit.errors import UserError
from effvit.report import answers as answers_module
from effvit.report import charts, overview, tables, wording
from effvit.report import page as page_module
from effvit.report.answers import answers
from effvit.report.overview import origin
from effvit.report.page import _CAPTIONS, markdown, pictures
from effvit.report.tables import Study, read
from effvit.study.aggregate import aggregate

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")


def write_inputs(directory, attentions=ATTENTIONS, datasets=("digits",), optional=True, lengths=TOKENS):
    """Arguments of `report`."""
    write_study(directory / "metrics", datasets=datasets, attentions=attentions, lengths=lengths)
    aggregate(directory / "metrics", directory / "plots" / "data", list(datasets), list(attentions), [0])
    drop_optional_tables(directory / "plots" / "data")
    if optional:
        write_optional_tables(directory / "plots" / "data", attentions=attentions)
    figures = directory / "plots" / "figures"
    figures.mkdir()
    for name in ("scaling", *(f"{dataset}-curves" for dataset in datasets)):
        Image.new("RGB", (600, 300), "white").save(figures / f"{name}.png")
    return {"data_dir": directory / "plots" / "data", "figures_dir": figures, "output_dir": directory / "report"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    arguments = write_inputs(tmp_path_factory.mktemp("report"))
    report(**arguments)
    return arguments


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page(browser, written):
    """The report from its file, without a network; whatever the page complained of is in `page.complaints`."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, offline=True)
    page = context.new_page()
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on(
        "request", lambda request: re.match("file:|data:|blob:", request.url) or page.complaints.append(request.url)
    )
    page.goto((written["output_dir"] / "index.html").as_uri())
    page.wait_for_selector("#scaling .chart svg.marks")
    page.wait_for_selector("#tradeoff-digits .chart svg.marks")
    yield page
    context.close()


def marks(page, chart):
    return page.locator(f"#{chart} .mark-symbol path").count()


@needs_browser
def test_page_draws_its_charts_and_complains_of_nothing(page):
    assert marks(page, "tradeoff-digits") == len(ATTENTIONS)
    assert marks(page, "scaling") > len(ATTENTIONS)
    assert page.complaints == []
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth && image.alt)")


@needs_browser
def test_a_check_box_takes_a_mechanism_out_of_every_chart_and_puts_it_back(page):
    box = page.locator('#scaling input[data-attention="performer"]')
    before = {chart: marks(page, chart) for chart in ("scaling", "tradeoff-digits")}
    box.focus()
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelectorAll('#tradeoff-digits .mark-symbol path').length == 5")
    assert marks(page, "scaling") < before["scaling"]
    assert not page.locator('#tradeoff-digits input[data-attention="performer"]').is_checked()
    box.check()
    page.wait_for_function("document.querySelectorAll('#tradeoff-digits .mark-symbol path').length == 6")
    assert {chart: marks(page, chart) for chart in before} == before


@needs_browser
def test_another_cost_is_another_axis_and_what_was_hidden_stays_so(page):
    choice, box = (
        page.locator("#tradeoff-digits select"),
        page.locator('#tradeoff-digits input[data-attention="fused"]'),
    )
    assert "MMACs" in page.locator("#tradeoff-digits .chart").inner_text()
    box.uncheck()
    choice.select_option("Latency")
    page.wait_for_selector("#tradeoff-digits .chart :text('× Fused')")
    page.wait_for_function("document.querySelectorAll('#tradeoff-digits .mark-symbol path').length == 5")
    box.check()
    choice.select_option("Computation")
    page.wait_for_selector("#tradeoff-digits .chart :text('MMACs')")


@needs_browser
def test_a_point_tells_its_mechanism_and_numbers(page):
    page.locator("#tradeoff-digits .mark-symbol path").first.hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    told = page.locator("#vg-tooltip-element").inner_text()
    assert any(wording.name(a) in told for a in ATTENTIONS)
    assert "Top-1" in told and "MMACs" in told


@needs_browser
def test_a_heading_sorts_its_column_up_and_down(page):
    table = page.locator("#answers table").first
    heading = table.locator("th", has_text="MACs")
    column = heading.evaluate("th => th.cellIndex")

    def shown():
        return [float(row.locator("td").nth(column).inner_text()) for row in table.locator("tbody tr").all()]

    start = shown()
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert shown() == sorted(start) != start
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert shown() == sorted(start, reverse=True)


@needs_browser
def test_nothing_is_wider_than_a_phone(page):
    page.set_viewport_size({"width": 400, "height": 800})
    page.wait_for_timeout(300)
    widest = page.evaluate("document.documentElement.scrollWidth")
    drawn = page.locator("#scaling .chart svg.marks").bounding_box()
    page.set_viewport_size({"width": 1200, "height": 900})
    assert widest <= 400
    assert 200 < drawn["width"] <= 400


@needs_browser
def test_paper_has_every_answer_chart_and_table(page, written):
    page.emulate_media(media="print")
    shown = " ".join(page.locator("main").inner_text().split())
    cut = page.evaluate(
        "[...document.querySelectorAll('.scroll')].filter(e => getComputedStyle(e).overflowX != 'visible').length"
    )
    charts = [chart.is_visible() for chart in page.locator(".chart svg.marks").all()]
    document = page.pdf(format="A4")
    page.emulate_media(media="screen")
    for answer in answers(read(written["data_dir"])):
        for sentence in answer.findings[0].sentences:
            assert " ".join(sentence.split()) in shown
    assert cut == 0 and charts and all(charts)
    assert document.startswith(b"%PDF") and document.count(b"/Type /Page\n") > 1


@needs_browser
def test_several_data_sets_without_optional_tables_have_a_section_each(browser, tmp_path):
    arguments = write_inputs(tmp_path, ("fused", "linformer"), ("digits", "cifar10"), optional=False)
    report(**arguments)
    page = browser.new_page()
    page.goto((arguments["output_dir"] / "index.html").as_uri())
    assert page.locator(".interactive").count() == 3
    headings = page.locator("article").first.locator("h4").all_inner_texts()
    assert headings == ["digits", "Accuracy and cost", "cifar10", "Accuracy and cost"]
    assert page.locator(".absent").count() > 0
    page.close()


def test_the_same_tables_give_the_same_bytes_and_no_address_is_asked_for(written, tmp_path):
    again = tmp_path / "report"
    report(**written | {"output_dir": again})
    page = (again / "index.html").read_bytes()
    assert page == (written["output_dir"] / "index.html").read_bytes()
    markup = re.sub(rb"<script.*?</script>", b"", page, flags=re.DOTALL)
    assert b"http:" not in markup and b"https:" not in markup
    assert b"connect-src" not in markup and b"default-src 'none'" in markup


def test_every_figure_of_the_study_has_words_of_its_own_under_it():
    found = pictures(Path(__file__).parents[2] / "plots/figures", None, ["digits"])
    assert len(found[""]) == 2 and len(found["digits"]) == 6
    captions = [picture.caption for group in found.values() for picture in group]
    assert len(set(captions)) == len(captions)
    assert set(captions) <= set(_CAPTIONS.values())


def test_markdown_has_every_answer_and_links_to_the_figures(written):
    text = (written["output_dir"] / "report.md").read_text(encoding="utf-8")
    for answer in answers(read(written["data_dir"])):
        assert f"### {answer.question}" in text
        assert all(sentence in text for sentence in answer.findings[0].sentences)
    links = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert links and all((written["output_dir"] / link).is_file() for link in links)
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) >= 6
    for table in tables:
        assert len({line.count(" | ") for line in table.splitlines() if "---" not in line}) == 1


def test_drawn_lines_take_the_place_of_pixels(written, tmp_path):
    (tmp_path / "scaling.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    report(**written | {"output_dir": tmp_path / "report", "vector_dir": tmp_path})
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert len(re.findall("data:image/svg", page)) == 1 and len(re.findall("data:image/png", page)) == 1


def test_names_cannot_break_out_of_the_page(tmp_path):
    arguments = write_inputs(tmp_path, ("fused", "linformer"), optional=False)
    evil = "</script><b>&"
    for path in arguments["data_dir"].glob("*.csv"):
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        table.replace({"attention": {"linformer": evil}}).to_csv(path, index=False)
    report(**arguments)
    page = (arguments["output_dir"] / "index.html").read_text(encoding="utf-8")
    assert evil not in page and evil in unescape(page)


@pytest.mark.parametrize(
    ("table", "content", "problem"),
    [
        ("accuracy", None, "missing"),
        (
            "accuracy",
            "dataset,attention\ndigits,fused\n",
            "expected a CSV with the columns dataset, attention, n_seeds",
        ),
        ("cost", "", "expected a CSV with the columns"),
        ("cka", "dataset\ndigits\n", "expected a CSV with the columns dataset, attention_a"),
    ],
)
def test_a_table_that_cannot_be_read_is_named_and_nothing_is_written(written, tmp_path, table, content, problem):
    data = shutil.copytree(written["data_dir"], tmp_path / "data")
    path = data / f"{table}.csv"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{path}: {problem}") + ".*`dvc repro.*aggregate`"):
        report(**written | {"data_dir": data, "output_dir": tmp_path / "report"})
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("table", "column", "value", "problem"),
    [
        ("accuracy", "parameters", "12O", "line 3, parameters: '12O', expected a whole number"),
        ("accuracy", "n_seeds", "", "line 3, n_seeds: empty, expected a whole number"),
        ("accuracy", "top1", "1.5", "line 3, top1: 1.5, expected 0 to 1"),
        ("cost", "ratio_low", "inf", "line 3, ratio_low: inf, expected a finite number"),
        ("scaling", "tokens", "0", "line 3, tokens: 0, expected more than 0"),
        ("gates", "branch", "", "line 3, branch: empty, expected something"),
        ("accuracy", "attention", "standard", "line 3, attention: standard, expected one row of each mechanism"),
        ("hardware", "attention", "other", "no row of digits with attention fused, which accuracy.csv has"),
        ("efficiency", "attention", None, "no row with attention fused, which accuracy.csv has"),
        ("cka", "attention_b", None, "no row of digits with attention_b fused, which accuracy.csv has"),
    ],
)
def test_a_cell_that_cannot_be_is_named(written, tmp_path, table, column, value, problem):
    """The second row's cell is set, or all rows of `fused` are dropped."""
    data = shutil.copytree(written["data_dir"], tmp_path / "data")
    path = data / f"{table}.csv"
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if value is None:
        frame = frame[frame[column] != "fused"]
    else:
        frame.loc[1, column] = value
    frame.to_csv(path, index=False)
    with pytest.raises(UserError, match=re.escape(f"{path}: {problem}")):
        report(**written | {"data_dir": data, "output_dir": tmp_path / "report"})
    assert not (tmp_path / "report").exists()


def damaged(frame):
    """The table with one thing wrong, by what it is."""
    for column in frame:
        for value in ("abc", "", "-1", "0", "1e999"):
            yield f"{column}={value}", frame.assign(**{column: [value, *frame[column][1:]]})
        yield f"{column} blank", frame.assign(**{column: ""})
        yield f"{column} dropped", frame.drop(columns=column)
    yield "headers only", frame[:0]
    yield "first row twice", pd.concat([frame[:1], frame])
    for name in (column for column in frame if column.startswith("attention")):
        for attention in frame[name].unique():
            yield f"no {name} {attention}", frame[frame[name] != attention]


class Noting(Study):
    """A study that notes which of its tables are read."""

    def __getattribute__(self, name):
        if name in NAMES:
            noted.add(name)
        return super().__getattribute__(name)


NAMES = [field.name for field in fields(Study)]
noted: set[str] = set()
OF_STUDY = [(answers_module, "resolution"), (charts, "scaling"), (overview, "efficiency"), (overview, "origin"),
            (overview, "efficiency_of_a_block"), (page_module, "which_one")]  # fmt: skip
OF_DATASET = [(answers_module, name) for name in ("tradeoff", "representations", "hybrid", "constrained_hardware")]
OF_DATASET += [
    (overview, name) for name in ("fine_tuning", "fidelity", "representations", "hardware_latency", "hardware")
]
OF_DATASET += [(overview, "accuracy_and_cost"), (charts, "tradeoff")]


def keep_what_does_not_read(table, study, monkeypatch):
    """Parts of the page that do not look at a table are not made again for each damage to it."""
    noting = Noting(**vars(study))
    for module, name in OF_STUDY + OF_DATASET:
        noted.clear()
        made = getattr(module, name)(noting, *["digits"] * ((module, name) in OF_DATASET))
        kept = list(made) if isinstance(made, Iterator) else made
        if table not in noted:
            monkeypatch.setattr(module, name, lambda *_, kept=kept: kept)


@pytest.fixture(scope="module")
def of_three(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("three"), ("fused", "linformer", "hybrid"), lengths=(65, 4097))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("table", NAMES)
def test_a_damaged_table_gives_one_line_or_a_page(of_three, tmp_path, monkeypatch, table):
    arguments = of_three | {"data_dir": shutil.copytree(of_three["data_dir"], tmp_path / "data")}
    path = arguments["data_dir"] / f"{table}.csv"
    figures = pictures(arguments["figures_dir"], None, ["digits"])
    whole, read_table = read(arguments["data_dir"]), tables._read
    # What a damage cannot touch is not done again with each.
    others_kept = lambda file, name: read_table(file, name) if name == table else getattr(whole, name)  # noqa: E731
    monkeypatch.setattr(tables, "_read", others_kept)
    monkeypatch.setattr(page_module, "_environment", cache(page_module._environment))
    keep_what_does_not_read(table, whole, monkeypatch)
    refused = 0
    for damage, frame in damaged(pd.read_csv(path, dtype=str, keep_default_na=False)):
        frame.to_csv(path, index=False)
        try:
            study = read(arguments["data_dir"])
        except UserError as error:
            assert str(error).startswith(f"{path.parent}/") and "\n" not in str(error), damage
            refused += 1
        else:
            if getattr(study, table).equals(getattr(whole, table)):
                continue  # of a column that the report does not read
            try:
                text = markdown(study, {"": [], **figures}, tmp_path)
            except Exception as error:
                raise AssertionError(f"{table}.csv with {damage}") from error
            assert "| nan" not in text and "inf×" not in text, damage
    assert refused


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no such directory"),
        ({}, "no PNG files in it"),
        ({"scaling.png": b"notpng"}, "scaling.png: not a whole PNG file"),
        ({"scaling.png": b""}, "scaling.png: not a whole PNG file"),
    ],
)
def test_figures_that_are_none_are_named_and_nothing_is_written(written, tmp_path, content, problem):
    figures = tmp_path / "figures"
    if content is not None:
        figures.mkdir()
        for name, data in content.items():
            (figures / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{re.escape(str(figures))}.*{problem}.*`dvc repro.*plot`"):
        report(**written | {"figures_dir": figures, "output_dir": tmp_path / "report"})
    assert not (tmp_path / "report").exists()


def test_a_vector_figure_that_is_none_is_named(written, tmp_path):
    with pytest.raises(UserError, match=r"--vector-dir .*no SVG files in it"):
        report(**written | {"vector_dir": tmp_path, "output_dir": tmp_path / "report"})
    for content in ("notsvg", "<html/>"):
        (tmp_path / "scaling.svg").write_text(content)
        with pytest.raises(UserError, match=r"scaling\.svg: not a whole SVG file"):
            report(**written | {"vector_dir": tmp_path, "output_dir": tmp_path / "report"})


def test_a_picture_cut_short_is_named(written, tmp_path):
    whole = (written["figures_dir"] / "scaling.png").read_bytes()
    (tmp_path / "scaling.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"scaling\.png: not a whole PNG file"):
        report(**written | {"figures_dir": tmp_path, "output_dir": tmp_path / "report"})


def test_one_seed_has_the_interval_over_images_in_the_chart(written):
    study = read(written["data_dir"])
    chart = charts.tradeoff(study, "digits")
    rows = chart.specs["Computation"]["data"]["values"]
    expected = study.tradeoff["top1_images_low"].tolist()
    assert all(map(isfinite, expected)) and [row["top1_low"] for row in rows] == expected
    assert "Wilson" in chart.note and "(" in rows[0]["accuracy"]
    seeds = study.accuracy.assign(top1_low=0.5, top1_high=0.9)
    several = replace(study, accuracy=seeds, tradeoff=study.tradeoff.assign(top1_images_low=nan, top1_images_high=nan))
    chart = charts.tradeoff(several, "digits")
    assert {row["top1_low"] for row in chart.specs["Computation"]["data"]["values"]} == {0.5}
    assert "over seeds" in chart.note


def test_origin_has_the_days_on_which_results_were_made(written):
    study = read(written["data_dir"])
    times = ["2026-01-03T01:00:00+00:00", *study.provenance["time"][1:]]
    table = origin(replace(study, provenance=study.provenance.assign(time=times)))
    assert table.rows[0][table.columns.index("Date")].text == "2026-01-01 to 2026-01-03"


@needs_browser
def test_figures_keep_their_width_in_a_box_that_scrolls_and_fit_on_paper(page):
    widths = "[...document.querySelectorAll('.picture img')].map(image => image.getBoundingClientRect().width)"
    page.set_viewport_size({"width": 400, "height": 800})
    narrow = page.evaluate(widths)
    page.emulate_media(media="print")
    printed = page.evaluate(widths)
    page.set_viewport_size({"width": 680, "height": 1000})  # A4 within its margins
    wider = page.evaluate(
        "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth + 1)"
        ".map(box => box.getAttribute('aria-label'))"
    )
    page.emulate_media(media="screen")
    page.set_viewport_size({"width": 1200, "height": 900})
    assert narrow and min(narrow) >= 600
    assert max(printed) <= 400
    assert wider == []


def test_output_must_not_replace_the_inputs(written):
    with pytest.raises(UserError, match="is replaced as a whole"):
        report(**written | {"output_dir": written["data_dir"].parent})


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (wording.ratio, 0.976, "0.98"),
        (wording.ratio, 0.0364, "0.036"),
        (wording.ratio, 12.34, "12.3"),
        (wording.ratio, 1234.0, "1,234"),
        (wording.about, 143.7, "140"),
        (wording.about, 12_345.0, "12,000"),
        (wording.about, 7.0, "7"),
        (wording.points, -0.0123, "−1.2"),
        (wording.points, -0.0001, "0.0"),
        (wording.size, 500_000, "488 KiB"),
        (wording.size, 3 * 2**20, "3.0 MiB"),
        (wording.milliseconds, 2.5133, "2.51 ms"),
        (wording.milliseconds, 13.0, "13.0 ms"),
        (wording.milliseconds, 250.0, "250 ms"),
        (wording.milliseconds, 999.7, "1,000 ms"),
        (wording.percent, 0.98328, "98.3 %"),
        (wording.several, ["a", "b", "c"], "a, b and c"),
        (wording.several, ["a"], "a"),
    ],
)
def test_numbers_have_the_digits_that_mean_something(function, value, expected):
    assert function(value).replace("\N{NO-BREAK SPACE}", " ") == expected
