"""`effvit cells`, on the study's own configuration."""

from pathlib import Path

PARAMS = Path(__file__).parents[2] / "params.yaml"


def test_missing_leaves_out_cells_with_files_of_a_result(effvit, tmp_path):
    every = effvit("cells", "--params", PARAMS).out.split()
    assert every[0] == "evaluate@digits-standard-0" and len(set(every)) == len(every) > 2
    cells = tmp_path / "metrics/cells/digits"
    (cells / "standard/seed0/evaluate").mkdir(parents=True)
    (cells / "standard/seed0/evaluate/evaluation.json").touch()
    (cells / "fused/seed0/evaluate").mkdir(parents=True)  # of a run that ended before it wrote
    (cells / "linformer/seed0/train").mkdir(parents=True)
    (cells / "linformer/seed0/train/result.json").touch()
    assert effvit("cells", "--params", PARAMS, "--missing").out.split() == every[1:]
    trained = effvit("cells", "--params", PARAMS, "--missing", "--stage", "train").out.split()
    assert "train@digits-linformer-0" not in trained and len(trained) == len(every) - 1
