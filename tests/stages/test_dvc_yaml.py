"""dvc.yaml names all code that a stage imports when it runs, or a change would go unnoticed."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import vl_convert
import yaml
from dvc_render.vega import VegaRenderer
from warm_python import SLOW

from effvit.attention import available_attention
from effvit.data import sources

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
STAGES = PIPELINE["stages"]
PLOTS = {name: plot for entry in PIPELINE["plots"] if isinstance(entry, dict) for name, plot in entry.items()}
ITEM = {"dataset": "digits", "attention": "linformer", "seed": "0"}

# Imported by stages, yet without a say in their results. Files that hold no more than a docstring are not named here.
INERT = {
    "effvit/__init__.py",  # names only
    "effvit/errors.py",  # how failures are reported
    "effvit/files.py",  # how what a caller says reaches the disk whole
    "effvit/provenance.py",  # records, next to the results
    # What the system says of the machine, and what follows from that alone, which metrics/machine.json records.
    "effvit/device.py",
    "effvit/memory.py",
    "effvit/policy.py",  # training's precision and determinism apart, see `test_training_depends_on_its_rules`
    "effvit/processor.py",
    "effvit/study/config.py",  # rules; the values themselves are params
    "effvit/cli/__init__.py",  # how long threads spin while another process is busy
    "effvit/cli/options.py",  # names and help of options, whose values are params
    "stages/study.py",  # paths, which are outs and deps
}
MOST_DEPS = 12  # that a reader takes in at a glance

# Runs stages as DVC does, each in a child of a process that has the slow libraries already, and prints which of the
# project's files each imported. What validating params.yaml imported is forgotten first, so that only a stage's own
# imports count.
RUN = """
import importlib, json, os, runpy, sys
for name in json.loads(sys.argv[2]):
    importlib.import_module(name)

KEPT = ("effvit", "effvit.errors", "effvit.study.config", "effvit.cli")

def forget_validation():
    for name in [n for n in sys.modules if n.startswith("effvit.") and not n.startswith(KEPT[1:])]:
        del sys.modules[name]
        parent, _, child = name.rpartition(".")
        if hasattr(sys.modules.get(parent), child):
            delattr(sys.modules[parent], child)

def run(stage, arguments):
    from stages import study
    load = study.load
    def load_and_forget():
        result = load()
        forget_validation()
        if stage == "hardware":  # as below
            importlib.import_module("effvit.deploy.footprint").peak_rss_bytes = lambda models: [1] * len(models)
        if stage == "plot":  # likewise the drawing of what is composed: each file is an empty figure
            figure = importlib.import_module("matplotlib.figure").Figure
            write = figure.savefig
            figure.savefig = lambda self, path, *, format, **_: write(figure((1, 1)), path, format=format)
        return result
    study.load = load_and_forget
    sys.argv = [stage, *arguments]
    runpy.run_module("stages." + stage, run_name="__main__")
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    with open(stage + ".json", "w") as file:
        json.dump(sorted(f for f in files if f), file)

for stage, *arguments in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        try:
            run(stage, arguments)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(stage + " failed")
"""


def fill(text):
    for key, value in ITEM.items():
        text = text.replace(f"${{item.{key}}}", value)
    return text


def code_of(stage):
    """Files of code among a stage's deps, folders as the files in them."""
    paths = [ROOT / fill(dep) for dep in STAGES[stage]["deps"] if dep.startswith(("effvit", "stages"))]
    files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
    return {str(file.relative_to(ROOT)) for file in files}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Files of the project that each stage imports, by running all stages on a tiny recipe in a copy of the study."""
    copy = tmp_path_factory.mktemp("study")
    for name in ("effvit", "stages"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["attention"] = {"linformer": {"k": 8, "share": "heads"}}
    params["model"] |= {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    params["train"] |= {"epochs": 2, "batch_size": 256, "device": "cpu"}
    params["dataset"]["digits"] |= {"image_size": 16}
    params["benchmark"] |= {"batch_size": 4, "memory_mib": 4, "budget_s": 0.01}
    params["scaling"] |= {"tokens": [17, 65], "budget_s": 0.02}
    (copy / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    commands = [fill(STAGES[stage]["cmd"]).removeprefix("python -m stages.").split() for stage in STAGES]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", RUN, json.dumps(commands), json.dumps(SLOW)]
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = {}
    for stage in STAGES:
        files = map(Path, json.loads((copy / f"{stage}.json").read_text()))
        found[stage] = {str(file.relative_to(copy)) for file in files if file.is_relative_to(copy)}
        found[stage].add(f"stages/{stage}.py")  # runs as __main__, which runpy takes away again
    return found


def test_stages_are_those_of_the_study():
    files = {path.stem for path in (ROOT / "stages").glob("*.py")} - {
        "__init__",
        "study",
        "params",
        "choosing",
        "tables",
        "jobs",
        "restore",
        "study_gpu",
    }
    assert set(STAGES) == files
    for stage, content in STAGES.items():
        assert content["cmd"].startswith(f"python -m stages.{stage}")


@pytest.mark.parametrize("stage", STAGES)
def test_no_dependency_on_code_that_is_not_there(stage):
    for attention in available_attention():
        for dep in STAGES[stage]["deps"]:
            if dep.startswith(("effvit", "stages")):
                assert (ROOT / fill(dep.replace("${item.attention}", attention))).exists(), dep


def has_a_say(file):
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    return file not in INERT and not (len(body) == 1 and ast.get_docstring(ast.Module(body, [])))


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_all_code_that_it_runs(imported, stage):
    assert len(imported[stage]) > 5
    assert {file for file in imported[stage] - code_of(stage) if has_a_say(file)} == set()


def test_a_stages_dependencies_are_seen_at_a_glance():
    assert {stage: len(content["deps"]) for stage, content in STAGES.items() if len(content["deps"]) > MOST_DEPS} == {}


def test_training_depends_on_its_rules():
    """What `auto` stands for as a precision, and what determinism sets."""
    assert "effvit/policy.py" in STAGES["train"]["deps"]


def test_code_without_a_say_is_there():
    assert [file for file in INERT if not (ROOT / file).is_file()] == []


def imports_of(path):
    """Files of the project that a file imports anywhere, but for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in for_types and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import) and node not in for_types:
            names |= {alias.name for alias in node.names}
    for name in names:
        base = ROOT / name.replace(".", "/")
        if name.startswith(("effvit", "stages")):
            yield from (file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file())


def test_prepare_depends_on_the_code_of_every_data_set():
    waiting = [ROOT / "stages/prepare.py"]
    waiting += [ROOT / (module.replace(".", "/") + ".py") for module in sources._SOURCES.values()]
    reached = set()
    while waiting:
        file = waiting.pop()
        name = str(file.relative_to(ROOT))
        if name not in reached and has_a_say(name):
            reached.add(name)
            waiting += imports_of(file)
    assert len(reached) > 10
    assert reached - code_of("prepare") == set()


def test_mechanism_depends_on_no_other():
    """So a mechanism's cells need the code of that mechanism, of the contract and of nothing else in its room."""
    room = ROOT / "effvit" / "attention"
    for attention in available_attention():
        others = {file for file in imports_of(room / f"{attention}.py") if file.parent == room}
        assert {file.name for file in others} <= {"__init__.py", "base.py"}, attention


def test_cells_depend_on_their_own_parameters_alone():
    for stage, content in STAGES.items():
        if "attention" in content.get("matrix", {}):
            assert "attention" not in content.get("params", []), stage
        for param in content.get("params", []):
            assert param.split(".")[0] in {"attention", "dataset", "model", "train", "seeds", "benchmark", "scaling"}


def drawn(plot):
    """The SVG of a plot's entry, of the tables in Git."""
    ((path, y),) = plot["y"].items()
    table = pd.read_csv(ROOT / path, dtype=str, keep_default_na=False)
    rows = table.assign(rev="workspace").to_dict("records")
    options = {key: plot[key] for key in ("x", "title", "x_label", "y_label", "template")}
    renderer = VegaRenderer(rows, "plot", y=y, template_dir=str(ROOT / ".dvc/plots"), **options)
    return vl_convert.vegalite_to_svg(renderer.partial_html())


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_has_a_title_labels_and_marks(name):
    plot = PLOTS[name]
    svg = drawn(plot)
    assert all(plot[key].split("$")[0] in svg for key in ("title", "x_label", "y_label"))
    assert "mark-symbol role-mark" in svg or "mark-rect role-mark" in svg


@pytest.mark.parametrize(
    ("name", "panels"),
    [
        ("scaling", ["block, forward, time", "block, forward, time, equal tokens", "model, training, memory"]),
        ("hardware-latency", ["PyTorch", "onnxruntime", "onnxruntime, int8"]),
    ],
)
def test_no_kind_of_row_is_left_out_of_a_plot(name, panels):
    svg = drawn(PLOTS[name])
    assert [panel for panel in panels if f">{panel}<" not in svg] == []


def test_similarity_is_that_of_the_same_layer_of_fused():
    table = pd.read_csv(ROOT / "plots/data/cka.csv")
    same = (
        (table["attention_a"] == "fused") & (table["attention_b"] != "fused") & (table["layer_a"] == table["layer_b"])
    )
    points = set(re.findall(r"Linear CKA \(0 to 1\): ([0-9.]+)", drawn(PLOTS["similarity-to-fused"])))
    assert sorted(map(float, points)) == pytest.approx(sorted(table.loc[same, "cka"]))
