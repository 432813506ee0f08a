"""README.md and docs/: what they show runs, or takes the options given; their numbers are those of the data."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer.main
import yaml
from PIL import Image
from scipy.stats import gmean

from effvit.attention import available_attention
from effvit.attention.linformer import LinformerAttention
from effvit.cli.app import app

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in sorted(ROOT.glob("docs/*.md"))}
PAGES |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def block(language, holding, text=README):
    (found,) = (each for each in blocks(language, text) if holding in each)
    return found


def commands(text, program):
    lines = "".join(blocks("bash", text)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


def test_readme_has_at_most_200_lines():
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if commands(text, "effvit")])
def test_commands_have_the_options_that_a_page_gives_them(page):
    cli = typer.main.get_command(app)
    for name, *arguments in commands(PAGES[page], "effvit"):
        command = cli.commands[name]
        arguments = [word for word in arguments if word != "…"]
        given = command.make_context(name, arguments, resilient_parsing=page == "docs/training.md")
        assert given.info_name == name


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if commands(text, "make")])
def test_make_has_the_targets_that_a_page_names(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {name for name, *_ in commands(PAGES[page], "make")} <= targets


@pytest.mark.parametrize("page", ["README.md", "docs/pipeline.md", "docs/hardware.md", "docs/cifar10.md"])
def test_experiments_set_what_conf_has(page):
    params = {}
    for file in (ROOT / "conf").glob("*/*.yaml"):
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        params.setdefault(file.parent.name, {}).update(values)
    params |= yaml.safe_load((ROOT / "conf/config.yaml").read_text(encoding="utf-8"))
    settings = re.findall(r"-S '?([\w.]+)=([^'\s`]+)", PAGES[page])
    assert settings
    for key, value in settings:
        group, *rest = key.split(".")
        if not rest and (ROOT / "conf" / group).is_dir():
            named = value.strip("[]").split(",")
            assert [each for each in named if not (ROOT / f"conf/{group}/{each}.yaml").is_file()] in ([], ["mean"])
            continue
        found = params
        for part in [group, *rest]:
            found = found[part]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path) if path else ROOT / page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}, target


def test_index_lists_every_page():
    pages = {Path(page).name for page in PAGES if page.startswith("docs/")} - {"index.md"}
    assert {page for page in pages if f"]({page})" not in PAGES["docs/index.md"]} == set()


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_pages_are_short_but_for_tables_and_code(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    assert len(" ".join(line for line in text.splitlines() if not line.lstrip().startswith("|")).split()) <= 1200


def test_the_line_that_swaps_attention_runs():
    pytest.importorskip("timm", reason="not installed: pip install timm")
    names = {}
    exec(block("python", "deit_tiny_patch16_224"), names)
    assert all(isinstance(layer.attn, LinformerAttention) for layer in names["model"].blocks)


def test_every_python_block_of_the_readme_is_run():
    runs = (
        "deit_tiny_patch16_224",
        "layers=range(6, 12)",
        "class MeanAttention",
    )  # here, in adapters/test_docs.py, below
    assert [sum(holding in each for holding in runs) for each in blocks("python")] == [1] * len(runs)


def test_images_of_ones_own_are_prepared_trained_and_predicted(effvit, tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 4)):
        for name, shade in (("dark", 40), ("light", 200)):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(shade, 20, (70, 90, 3)), 0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    shutil.copy(tmp_path / "photos/test/light/0.jpg", tmp_path / "photo.jpg")
    section = README.partition("## Your own images")[2].partition("\n## ")[0]
    ran = {}
    for name, *arguments in commands(section, "effvit"):
        ran[name] = effvit(name, *arguments)
        assert ran[name].code == 0, ran[name].err
    assert list(ran) == ["prepare", "train", "evaluate", "predict"]
    assert json.loads((tmp_path / "runs/photos-test/evaluation.json").read_text(encoding="utf-8"))["top1"] == 1.0
    assert "light" in ran["predict"].out
    assert "top-1 100.00%" in ran["evaluate"].out and "top-5" not in ran["evaluate"].out  # of two classes


def test_the_mechanism_that_the_readme_adds_passes_the_tests_that_all_mechanisms_pass(tmp_path):
    for part in ("effvit", "tests", "conf"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "effvit/attention/mean.py").write_text(block("python", "class MeanAttention"), encoding="utf-8")
    (tmp_path / "conf/attention/mean.yaml").write_text(block("yaml", "mean: {}"), encoding="utf-8")
    ((program, *arguments),) = (["pytest", *each] for each in commands(README, "pytest"))
    ran = subprocess.run(
        [sys.executable, "-m", program, "-p", "no:cacheprovider", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) > 15


def test_every_model_that_the_commands_use_is_trained_before():
    made = set()
    for line in (
        block("bash", "effvit prepare --dataset digits", PAGES["docs/commands.md"]).replace("\\\n", " ").splitlines()
    ):
        assert set(re.findall(r"--model-dir (runs/\S+)", line)) <= made, line
        made |= set(re.findall(r"effvit train .*--output-dir (\S+)", line))
    assert made == {"runs/linformer", "runs/fused"}


def test_the_number_of_mechanisms_is_right():
    assert len(available_attention()) == 12 and "compare twelve" in README.replace("\n", " ")


def test_tables_of_machines_are_those_of_docs_machines():
    from stages.tables import pages

    for page, text in pages(ROOT).items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name}: run `make tables`"


def test_a_table_of_a_machine_has_its_ratios_and_names_the_fastest(tmp_path):
    from stages.choosing import choice

    rows = [
        ("model", 224, 197, "fused", 10.4, 1.0, 1.0, 1.0, "ok"),
        ("model", 224, 197, "pooled", 8.3, 0.8, 0.79, 0.81, "ok"),
        ("model", 224, 197, "linear", 8.3, 0.804, 0.8, 0.81, "ok"),
        ("model", 224, 197, "window", None, None, None, None, "out of memory"),
        ("block", 224, 197, "pooled", 8.3, 0.1, 0.1, 0.1, "ok"),
    ]
    columns = [
        "scope",
        "image_size",
        "tokens",
        "attention",
        "median",
        "ratio_to_fused",
        "ratio_low",
        "ratio_high",
        "status",
    ]
    table = pd.DataFrame(rows, columns=columns).assign(
        model="deit_tiny", batch_size=1, machine="A GPU", device="cuda", threads=16, precision="float32"
    )
    table.to_csv(tmp_path / "gpu.csv", index=False)
    lines = choice(tmp_path / "gpu.csv").splitlines()
    assert lines[0] == "| mechanism | 224 px, 197 tokens |"
    assert lines[2:6] == [
        "| `fused` | 1.00 (10 ms) |",
        "| `pooled` | **0.80** |",
        "| `linear` | **0.80** |",
        "| `window` | out of memory |",
    ]
    assert lines[7].endswith("A GPU, float32, random weights.")


def written(path, made, **columns):
    """A machine's file with a model and a block of these mechanisms: name, image size, ratio to fused, upper end."""
    rows = [
        {"scope": scope, "image_size": size, "tokens": size, "attention": attention, "ratio_to_fused": ratio, "n": 7}
        | {"ratio_low": ratio and ratio - 0.01, "ratio_high": high, "status": "ok" if ratio else "out of memory"}
        | {"median": ratio and 10 * ratio, "macs": 2e9, "memory_bytes": None if ratio is None else ratio * 2**20}
        for attention, size, ratio, high in made
        for scope in ("model", "block")
    ]
    given = {"model": "vit_base", "batch_size": 1, "machine": "A CPU", "device": "cpu", "threads": 4}
    given |= {"precision": "float32", "contended": False} | columns
    pd.DataFrame(rows).assign(**given).to_csv(path, index=False)
    return path


def test_a_machines_page_says_what_fits_which_budget_and_never_the_control(tmp_path):
    from stages.choosing import machine

    made = [
        ("fused", 224, 1.0, 1.0),
        ("linear", 224, 0.8, 0.95),  # perhaps not a tenth
        ("fused", 768, 1.0, 1.0),
        ("uniform", 768, 0.1, 0.11),
        ("pooled", 768, 0.45, 0.504),  # as it is printed, half
        ("linear", 768, 0.4, 0.51),
        ("window", 768, 0.7, 0.8),
        ("performer", 768, 0.35, 0.91),  # the fastest, perhaps
        ("standard", 768, None, None),
        ("fused", 1536, None, None),
    ]
    text = machine(written(tmp_path / "cpu.csv", made))
    lines = text.splitlines()
    assert lines[0] == "### A CPU, 4 threads, float32" and lines[2] == "#### vit_base, one image"
    assert lines[4:7] == [
        "- At 224 px stay with `fused`: no other is shown to save a tenth of the time.",
        "- At 768 px take `linear` (0.39 to 0.51): 0.40 of `fused`'s time.",
        "- At 1536 px `fused` is out of memory: nothing to compare with; the table of the whole model has the times.",
    ]
    assert "| 224 px, 224 tokens | 10 ms | – | – | – |" in lines
    assert "| 768 px, 768 tokens | 10 ms | `pooled` | `linear` | `window` |" in lines
    assert "| 1536 px, 1,536 tokens | out of memory | – | – | – |" in lines
    assert "| `performer` | – | **0.35** (0.34 to 0.91) | – |" in lines
    costs = text[text.index("<details>") :]
    assert "| `fused` | 2 GMACs, 1.0 MiB | 2 GMACs, 1.0 MiB | 2 GMACs, – |" in costs
    assert "| `pooled` | – | 1.00, 0.45 | – |" in costs and "| `standard` | – | 1.00, – | – |" in costs


def test_a_gpus_page_names_its_batch_and_takes_cudnns_kernel_for_exact_attention(tmp_path):
    from stages.choosing import machine

    made = [("fused", 224, 1.0, 1.0), ("fused_cudnn", 224, 0.5, 0.52), ("agent", 224, 0.78, 0.8)]
    text = machine(
        written(
            tmp_path / "gpu.csv", made, machine="A GPU", device="cuda", batch_size=128, options=None, contended=True
        )
    )
    assert "### A GPU, float32" in text and "#### vit_base, 128 images at a time" in text
    assert (
        "- At 224 px take `agent` (0.77 to 0.80): 0.78 of `fused`'s time. Exact attention by cuDNN (`fused_cudnn`) "
        "takes 0.50 of it.\n"
    ) in text
    assert "| `agent` | **0.78** (0.77 to 0.80) |" in text and "| `fused_cudnn` | 0.50 (0.49 to 0.52) |" in text
    assert "Relative to `fused`, 7 rounds; other programs were running, so measure again. `fused_cudnn`: " in text


def test_ratios_without_an_interval_are_shown_and_choose_nothing(tmp_path):
    from stages.choosing import machine

    made = [("fused", 224, 1.0, None), ("agent", 224, 0.5, None)]
    text = machine(written(tmp_path / "cpu.csv", made))
    assert "At 224 px too little was measured to choose" in text and "| `agent` | **0.50** |" in text


@pytest.mark.parametrize(
    ("given", "said"), [("{}", ", default options."), ('{"pool_size": 7}', ", options `pooled` `pool_size=7`.")]
)
def test_a_table_of_a_machine_names_options_that_are_not_the_default(tmp_path, given, said):
    from stages.choosing import choice

    row = {"scope": "model", "image_size": 224, "tokens": 197, "median": 10.4, "status": "ok", "threads": 2}
    row |= dict.fromkeys(("ratio_to_fused", "ratio_low", "ratio_high"), 1.0)
    row |= {"model": "deit_tiny", "batch_size": 1, "machine": "A CPU", "device": "cpu", "precision": "float32"}
    rows = [row | {"attention": "fused", "options": "{}"}, row | {"attention": "pooled", "options": given}]
    pd.DataFrame(rows).to_csv(tmp_path / "cpu.csv", index=False)
    assert choice(tmp_path / "cpu.csv").rstrip().endswith(f"A CPU, 2 threads, float32, random weights{said}")


def test_the_table_of_cifar10_says_what_the_data_say():
    data = ROOT / "docs/cifar10/data"
    section = PAGES["docs/cifar10.md"].split("## Twelve mechanisms")[1].split("\n## ")[0]
    accuracy, paired = (pd.read_csv(data / f"{name}.csv").set_index("attention") for name in ("accuracy", "paired"))
    cost = pd.read_csv(data / "cost.csv").set_index(["attention", "quantity", "batch_size"])
    for attention, row in accuracy.iterrows():
        (line,) = re.findall(rf"^\| `{attention}` \| \d.*%.*\|$", section, re.MULTILINE)
        latency = cost.loc[(attention, "latency", 64)]
        memory = cost.loc[(attention, "train_memory", 64), "ratio_to_fused"]
        said = [
            f"{100 * row['top1']:.1f} %",
            f"{latency['ratio_to_fused']:.2f} ({latency['ratio_low']:.2f} to {latency['ratio_high']:.2f})",
        ]
        if attention != "fused":
            of = paired.loc[attention, ["difference", "difference_low", "difference_high"]]
            difference, low, high = (re.sub(r"^[+-](?=0\.0$)", "", f"{100 * x:+.1f}").replace("-", "−") for x in of)
            said += [f"{difference} ({low} to {high})", f" {memory:.2f} |"]
        assert [each for each in said if each not in line] == [], line


def test_what_nystromformer_is_without_its_convolution_is_what_its_runs_say():
    runs = [ROOT / f"docs/cifar10/no-convolution/seed{seed}/evaluation.json" for seed in range(3)]
    top1 = [json.loads(run.read_text())["top1"] for run in runs]
    fused = pd.read_csv(ROOT / "docs/cifar10/data/accuracy.csv").set_index("attention").loc["fused", "top1"]
    first, second, third = (f"{100 * each:.1f}" for each in top1)
    page = " ".join(PAGES["docs/cifar10.md"].split())
    assert f"it is {100 * (fused - sum(top1) / 3):.1f} points below `fused`" in page
    assert f"{first}, {second} and {third} %" in page


def test_what_a_convolution_gains_is_what_the_logs_say():
    section = PAGES["docs/cifar10.md"].split("## Convolution or mixing")[1].split("\n## ")[0]
    curves = pd.read_csv(ROOT / "docs/cifar10/data/curves.csv").query("seed == 0")
    logs = {path.name: path for path in (ROOT / "docs/cifar10/convolution").iterdir()}
    logs |= {path.name.removesuffix("_vc3"): path for path in (ROOT / "docs/hybrid-runs").glob("*_vc3")}
    logs["hybrid"] = logs["heads_elu"]
    for attention in ("hybrid", "linear", "uniform", "fused", "linformer", "focused", "window"):
        without = curves.loc[curves["attention"] == attention, "val_accuracy"].max()
        convolved = pd.read_csv(logs[attention] / "history.csv")["val_accuracy"].max()
        gain = f"{100 * convolved:.1f} % | {100 * (convolved - without):+.1f} |"
        assert f"| `{attention}` | {100 * without:.1f} % | {gain}" in section


def test_the_table_of_public_modules_says_what_the_data_say():
    points = pd.read_csv(ROOT / "docs/peers/peers.csv")
    for attention, rows in points[points["peer"].notna()].groupby("attention"):
        (line,) = re.findall(rf"^\| `{attention}` \| (?:timm|`).*\|$", PAGES["docs/peers.md"], re.MULTILINE)
        said = []
        for mode in ("forward", "train"):
            ratios = rows.loc[rows["mode"] == mode, "ratio"]
            said.append(f"{gmean(ratios):.2f} ({ratios.min():.2f} – {ratios.max():.2f})")
        (longest,) = rows.query("tokens == 4097 and hidden_size == 192 and mode == 'train'").itertuples()
        said.append(f"{longest.peer_bytes / longest.ours_bytes:.2f} |")
        assert " | ".join(said) in line, said
