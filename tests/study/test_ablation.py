import json
import re
import shutil
from itertools import combinations

import dvc.api
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from dvc.repo import Repo
from synthetic_study import write_study

from effvit import ViT, ViTConfig, figures
from effvit.errors import UserError
from effvit.model.checkpoint import save_model
from effvit.study.ablation import accuracy_over, branch_shares, collect

BRANCHES = ("regional", "dilated", "linear")
SETS = [list(chosen) for size in (1, 2, 3) for chosen in combinations(BRANCHES, size)]
IN_ORDER = ["+".join(chosen) for chosen in SETS]


def model_of(branches, fusion="gate"):
    torch.manual_seed(0)
    options = {"window_size": 2, "dilations": [1, 2], "branches": branches, "fusion": fusion}
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model = ViT(ViTConfig(image_size=12, **size, attention="hybrid", attention_options=options)).eval()
    for attention in model.attentions():
        if attention.gate is not None:
            torch.nn.init.normal_(attention.gate.weight)
    return model


class Sweep:
    """Stands for DVC: experiments as directories, read as DVC reads them from its cache."""

    def __init__(self, root, prepared):
        self.root, self.prepared, self.rows = root, prepared, []

    def add(self, attention, seeds=(0,), epochs=3):
        name = f"e{len(self.rows)}"
        repository = self.root / name
        study = write_study(repository / "metrics", attentions=list(attention), seeds=seeds)
        (repository / "metrics/cells/digits/fused/benchmark").mkdir(parents=True, exist_ok=True)
        params = {"attention": attention, "dataset": {"digits": {}}, "seeds": list(seeds), "train": {"epochs": epochs}}
        (repository / "params.yaml").write_text(yaml.safe_dump(params))
        if "hybrid" in attention:
            directory = repository / "models/digits/hybrid" / f"seed{seeds[0]}"
            directory.mkdir(parents=True)
            save_model(model_of(attention["hybrid"]["branches"]), directory)
        (repository / "data/prepared").mkdir(parents=True)
        (repository / "data/prepared/digits").symlink_to(self.prepared)
        self.rows.append({"Experiment": name, "rev": name, "Created": f"2026-01-01T00:00:{len(self.rows):02}"})
        return study

    def file_system(self, repository, rev):
        root = self.root / rev

        class Files:
            def read_text(self, path):
                return (root / path).read_text()

            def get(self, source, target, recursive):
                shutil.copytree(root / source, target)

        return Files()


@pytest.fixture
def sweep(tmp_path, digits12_dir, monkeypatch):
    made = Sweep(tmp_path, digits12_dir)
    (tmp_path / ".dvc").mkdir()
    monkeypatch.setattr(dvc.api, "exp_show", lambda repository: [{"Experiment": None, "rev": "workspace"}, *made.rows])
    monkeypatch.setattr(dvc.api, "DVCFileSystem", made.file_system)
    return made


def hybrid(branches):
    return {"hybrid": {"window_size": 2, "dilations": [1, 2], "branches": branches, "fusion": "gate"}}


def test_every_set_of_branches_is_gathered_once_smaller_sets_first(sweep):
    for branches in reversed(SETS):
        sweep.add(hybrid(branches))
    tables = collect(sweep.root)
    assert tables.accuracy["branches"].tolist() == tables.cost["branches"].tolist() == IN_ORDER
    gated = tables.shares.groupby("branches", sort=False).size().to_dict()
    assert gated == {name: 2 * len(name.split("+")) for name in IN_ORDER[3:]}
    assert tables.shares.groupby(["branches", "layer"])["share"].sum().to_numpy() == pytest.approx(1)
    figures.ablation(tables.accuracy, tables.cost, tables.shares).draw_without_rendering()


def test_experiments_that_differ_in_more_than_their_branches_do_not_mix(sweep):
    sweep.add(hybrid(["regional"]), epochs=9)
    sweep.add(hybrid(["linear"]))
    sweep.add({"fused": {}})
    sweep.add(hybrid(["dilated"]))
    sweep.add(hybrid(["dilated"]) | {"fused": {}})
    assert collect(sweep.root).accuracy["branches"].tolist() == ["dilated", "linear"]


def test_of_the_same_setting_the_newest_counts(sweep):
    for top1 in (0.5, 0.75):
        study = sweep.add(hybrid(["linear"]))
        file = study / "cells/digits/hybrid/seed0/evaluate/evaluation.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"top1": top1}))
    assert collect(sweep.root).accuracy["top1"].tolist() == [0.75]


def test_no_experiment_of_the_hybrid_alone_is_told_with_what_makes_them(sweep):
    sweep.add({"fused": {}})
    with pytest.raises(UserError, match="no experiment with attention=hybrid on this commit; `make ablation`"):
        collect(sweep.root)


@pytest.mark.parametrize("repository", ["", "nowhere", "without-git"])
def test_a_directory_that_is_no_repository_is_told_in_a_line(effvit, tmp_path, repository):
    if repository == "without-git":
        (tmp_path / repository).mkdir()
        Repo.init(str(tmp_path / repository), no_scm=True).close()
    where = ["--repository", tmp_path / repository] if repository else []
    outcome = effvit("ablation", *where, "--output-dir", tmp_path / "out")
    assert outcome.code == 1 and outcome.err.count("\n") == 1, outcome.err
    assert f"--repository {tmp_path / repository if repository else '.'}: " in outcome.err
    assert "expected a Git repository with DVC" in outcome.err
    assert not (tmp_path / "out").exists()


def test_branches_alone_have_no_gates_and_still_a_picture(sweep):
    sweep.add(hybrid(["linear"]))
    tables = collect(sweep.root)
    assert tables.shares.empty
    figures.ablation(tables.accuracy, tables.cost, tables.shares).draw_without_rendering()


def test_one_seed_has_wilsons_interval_over_images_and_several_have_students_t(tmp_path):
    study = write_study(tmp_path, attentions=["hybrid"], seeds=(0, 1, 2))
    directories = [study / f"cells/digits/hybrid/seed{seed}/evaluate" for seed in (0, 1, 2)]
    top1 = [json.loads((directory / "evaluation.json").read_text())["top1"] for directory in directories]
    one = accuracy_over(directories[:1])
    p, n, z = top1[0], 360, 1.959964
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (one["n_seeds"], one["n_images"], one["interval"]) == (1, n, "images")
    ends = ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n))
    assert (one["top1_low"], one["top1_high"]) == pytest.approx(ends, abs=1e-6)
    several = accuracy_over(directories)
    half = 4.302653 * np.std(top1, ddof=1) / np.sqrt(3)  # t of two degrees of freedom
    assert several["interval"] == "seeds"
    assert several["top1_high"] - several["top1_low"] == pytest.approx(2 * half, rel=1e-5)
    assert several["top1"] == pytest.approx(np.mean(top1))


def test_gate_shares_are_the_mean_softmax_over_images_and_patches():
    model = model_of(["regional", "linear"])
    images = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    rows = pd.DataFrame(branch_shares(model, images))
    assert set(rows["of"]) == {"gate"}
    table = rows.pivot(index="layer", columns="branch", values="share")
    block = model.blocks[0]
    with torch.inference_mode():
        tokens = torch.cat([model.cls_token.expand(5, -1, -1), model.patch_embed(images)], dim=1) + model.pos_embed
        tokens = block.norm1(tokens)[:, 1:].reshape(-1, 8)
        expected = torch.stack([torch.softmax(block.attn.gate(token), 0) for token in tokens]).mean(0)
    assert table.loc[1, block.attn.branch_names].to_numpy() == pytest.approx(expected.numpy(), abs=1e-6)
    assert not model.blocks[0].attn._forward_pre_hooks
    assert branch_shares(model_of(["linear"]), images) == []


def test_without_a_gate_shares_are_those_of_the_heads():
    images = torch.zeros(1, 3, 12, 12)
    rows = branch_shares(model_of(["regional", "dilated", "linear"], "heads"), images)
    # Two heads in each of two blocks: of branches 0, 1 and 2, 0.
    names = ["window r=1", "window r=2", "linear"]
    shares = [(1, name, share) for name, share in zip(names, (0.5, 0.5, 0), strict=True)]
    shares += [(2, name, share) for name, share in zip(names, (0.5, 0, 0.5), strict=True)]
    assert [(row["layer"], row["branch"], row["share"]) for row in rows] == shares
    assert {row["of"] for row in rows} == {"heads"}
    assert branch_shares(model_of(["linear"], "heads"), images) == []


def test_the_command_writes_tables_and_a_picture(sweep, effvit, tmp_path):
    for branches in (["linear"], ["regional", "linear"]):
        sweep.add(hybrid(branches))
    outcome = effvit("ablation", "--output-dir", "to/ablation")
    assert outcome.code == 0, outcome.err
    written = {file.name for file in (tmp_path / "to/ablation").iterdir()}
    assert written == {"accuracy.csv", "cost.csv", "shares.csv", "digits.png"}
    assert "2 sets of branches in to/ablation" in outcome.out


def test_make_ablation_names_every_set_of_branches():
    from pathlib import Path

    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    (line,) = re.findall(r"^BRANCHES := (.*)$", makefile, re.MULTILINE)
    assert yaml.safe_load(f"[{line}]") == SETS
