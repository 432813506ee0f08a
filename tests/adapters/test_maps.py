"""Attention maps of swapped models, by the means that each library has for them."""

import pytest
import torch
from hosts import HUGGING_FACE, OPTIONS, TIMM_REASON, attention_name, host, hugging_face, images

from effvit import available_attention, swap_attention
from effvit.attention.base import Attention

pytestmark = pytest.mark.slow


def implied_maps(model, run):
    """By definition: the map of each block's attention, of the tokens that it gets when the model runs."""
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    seen = {}

    def keep(module, args, kwargs):
        seen[module] = (*args, *kwargs.values())[0]

    handles = [attention.register_forward_pre_hook(keep, with_kwargs=True) for attention in attentions]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    maps = []
    with torch.no_grad():
        for attention in attentions:
            # attend(q, k, I), column by column
            q, k, v, *context = attention.project(seen[attention])
            columns = attention.map_values(v)
            maps.append(torch.cat([attention.attend(q, k, column, *context) for column in columns.split(1, -1)], -1))
    return maps


@pytest.mark.parametrize("family", HUGGING_FACE)
@pytest.mark.parametrize("name", available_attention())
def test_hugging_face_gives_the_implied_maps(family, name):
    model = host(family)
    swap_attention(model, name, **OPTIONS.get(name, {}))
    expected = implied_maps(model, lambda: model(images()))
    with torch.no_grad():
        found = model(images(), output_attentions=True).attentions
    assert len(found) == 2
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_with_exact_attention_they_are_the_maps_of_the_original(implementation):
    torch.manual_seed(0)
    eager = hugging_face("ViTModel", "ViTConfig", "eager").eval()
    model = hugging_face("ViTModel", "ViTConfig", implementation).eval()
    model.load_state_dict(eager.state_dict())
    swap_attention(model, "fused")
    with torch.no_grad():
        expected, found = (each(images(), output_attentions=True).attentions for each in (eager, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_maps_are_recorded_where_they_were_before_the_swap():
    model = hugging_face("ViTModel", "ViTConfig", "eager").eval()
    with torch.no_grad():
        model(images(), output_attentions=True)  # from here on the model records by hooks
        swap_attention(model, "linformer", k=6)
        assert len(model(images(), output_attentions=True).attentions) == 2
        assert model(images()).attentions is None


def test_a_configuration_may_ask_for_maps():
    model = hugging_face("ViTModel", "ViTConfig", "eager").eval()
    swap_attention(model, "fused")
    model.config.output_attentions = True
    with torch.no_grad():
        assert [each.shape for each in model(images()).attentions] == [(2, 2, 17, 17)] * 2


def test_no_map_is_made_that_nobody_asks_for(monkeypatch):
    models = [host(family) for family in ("vit", "timm vit", "torchvision")]
    for model in models:
        swap_attention(model, "fused")
    monkeypatch.setattr(Attention, "map_values", lambda *_: pytest.fail("a map was made"))
    for model in models:
        model(images())


@pytest.mark.parametrize("name", available_attention())
def test_timms_extraction_finds_the_implied_maps(name):
    utils = pytest.importorskip("timm.utils", reason=TIMM_REASON)
    model = host("timm qk_norm")
    swap_attention(model, name, **OPTIONS.get(name, {}))
    expected = implied_maps(model, lambda: model(images()))
    with torch.no_grad():
        found = utils.AttentionExtract(model, method="hook")(images())
    assert list(found) == ["blocks.0.attn.attn_drop", "blocks.1.attn.attn_drop"]
    torch.testing.assert_close(list(found.values()), expected, rtol=0, atol=1e-5)


def test_timms_extraction_by_graph_finds_the_softmax_that_is_written_out():
    utils = pytest.importorskip("timm.utils", reason=TIMM_REASON)
    model = host("timm vit")
    swap_attention(model, "standard")
    expected = implied_maps(model, lambda: model(images()))
    with torch.no_grad():
        found = utils.AttentionExtract(model, method="fx")(images())
    torch.testing.assert_close(list(found.values()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in available_attention() if name != "standard"])
def test_timms_extraction_by_graph_takes_nothing_else_for_attention(name):
    """Such as the softmax of a gate: where no N x N softmax is written out, timm says that it found nothing."""
    utils = pytest.importorskip("timm.utils", reason=TIMM_REASON)
    model = host("timm vit")
    swap_attention(model, name, **OPTIONS.get(name, {}))
    with pytest.raises(RuntimeError, match="No node names found"):
        utils.AttentionExtract(model, method="fx")


@pytest.mark.parametrize("average", [True, False])
def test_multihead_attention_gives_its_map_when_asked(average):
    original, model = host("torchvision"), host("torchvision")
    swap_attention(model, "fused")
    name = attention_name("torchvision", 0)
    x = torch.randn(2, 17, 32)
    with torch.no_grad():
        (y, ours), (expected, theirs) = (
            each.get_submodule(name)(x, x, x, average_attn_weights=average) for each in (model, original)
        )
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
