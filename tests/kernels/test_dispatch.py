"""Which form runs is noted, eagerly, compiled and exported, and is in the provenance of results."""

import json
from collections import defaultdict

import pytest
import torch

from effvit import available_attention, build_attention, policy
from effvit.device import this_machine
from effvit.provenance import write_provenance


@pytest.fixture
def noted(monkeypatch):
    monkeypatch.setattr(policy, "_ran", defaultdict(set))
    return policy.ran


def performer():
    """Of as many features as a head has columns, so that they may go into the maps."""
    return build_attention("performer", 12, 3, (4, 4), num_features=4)


def test_a_result_says_which_forms_computed_it(noted, tmp_path):
    performer()(torch.randn(1, 17, 12))
    write_provenance(tmp_path, {}, this_machine(torch.device("cpu")))
    record = json.loads((tmp_path / "provenance.json").read_text())
    assert record["forms"] == noted()
    assert record["forms"]["turned_qkv"] == "in_the_maps"


def test_features_of_few_tokens_stay_out_of_the_maps_and_nothing_is_noted_of_what_did_not_run(noted):
    build_attention("performer", 12, 3, (2, 2), num_features=4)(torch.randn(1, 5, 12))
    assert "turned_qkv" not in noted()
    assert noted()["feature_attention"] == "reference"


def test_all_forms_of_a_primitive_are_noted(noted):
    attention = build_attention("linear", 12, 3, (4, 4))
    attention(torch.randn(1, 17, 12))
    attention.train().attn_drop = 0.5
    attention(torch.randn(1, 17, 12))
    assert noted()["feature_attention"] == "by_blocks, reference"


@pytest.mark.parametrize("name", available_attention())
def test_the_equations_are_noted_where_they_are_asked_for(name, noted, monkeypatch):
    monkeypatch.setattr(policy, "ONLY_REFERENCE", True)
    build_attention(name, 12, 3, (6, 6))(torch.randn(1, 37, 12))
    assert set(", ".join(noted().values()).split(", ")) <= {"reference", "of_the_layer"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [
        lambda attention, x: torch.compile(attention, fullgraph=True, backend="aot_eager")(x),
        lambda attention, x: torch.export.export(attention, (x,)),
    ],
    ids=["compiled", "exported"],
)
def test_what_is_compiled_or_exported_is_noted_as_it_is_traced(run, noted):
    run(performer(), torch.randn(1, 17, 12))
    assert noted() == {"feature_attention": "reference", "linear": "of_the_layer", "qkv": "of_the_layer"}


def test_what_runs_only_to_be_counted_is_not_noted(noted):
    performer()(torch.randn(1, 17, 12))
    before = noted()
    with policy.nothing_noted():
        build_attention("fused", 12, 3, (4, 4))(torch.randn(1, 17, 12))
        assert noted() != before
    assert noted() == before
