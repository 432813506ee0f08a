"""What swap_attention refuses, in the words of docs/own-model.md, and that it then has changed nothing."""

from pathlib import Path

import pytest
import torch
from hosts import OPTIONS, TIMM_REASON, host, hugging_face, images, timm_vit, torchvision_vit
from torch import nn

from effvit import ViT, ViTConfig, swap_attention
from effvit.errors import UserError

DOCS = (Path(__file__).parents[2] / "docs/own-model.md").read_text(encoding="utf-8")


def timm_model(name, **sizes):
    timm = pytest.importorskip("timm", reason=TIMM_REASON)
    return timm.create_model(name, depth=2, embed_dim=24, num_heads=2, **sizes)


def timm_block(**changes):
    model = timm_vit()
    for name, value in changes.items():
        setattr(model.blocks[0].attn, name, value)
    return model


def narrow_heads():
    layers = pytest.importorskip("timm.layers", reason=TIMM_REASON)
    if "attn_head_dim" not in layers.Attention.__init__.__annotations__:
        pytest.skip("this timm has no attn_head_dim")
    model = timm_vit()
    model.blocks[0].attn = layers.Attention(32, num_heads=2, attn_head_dim=8, qkv_bias=True)
    return model


def parallel():
    vision_transformer = pytest.importorskip("timm.models.vision_transformer", reason=TIMM_REASON)
    return timm_vit(block_fn=vision_transformer.ParallelScalingBlock)


def hugging_face_vit():
    model = hugging_face("ViTModel", "ViTConfig")
    if not hasattr(model, "layers"):
        pytest.skip("the lines have the names of transformers 5")
    return model


def hf_block(**changes):
    model = hugging_face_vit()
    for name, value in changes.items():
        setattr(model.layers[0].attention, name, value)
    return model


def partly_frozen():
    model = hugging_face_vit()
    model.layers[0].attention.q_proj.requires_grad_(False)
    return model


def tokens_first():
    model = torchvision_vit()
    model.encoder.layers[0].self_attention.batch_first = False
    return model


def multihead(**options):
    model = torchvision_vit()
    model.encoder.layers[0].self_attention = nn.MultiheadAttention(32, 2, batch_first=True, **options)
    return model


# What builds the model, more arguments, and the end of the line.
IN_DOCS = [
    (lambda: timm_vit(), {"name": "mean"}, "attention='mean': unknown mechanism, expected one of standard, fused, "),
    (lambda: timm_vit(), {"k": 64}, "attention.linformer.k=64: must be at most 17, the number of tokens"),
    (
        lambda: timm_vit(),
        {"layers": [2]},
        "layers=[2]: expected some of 0 to 1, the blocks of timm's VisionTransformer",
    ),
    (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
        {},
        "no Vision Transformer that swap_attention knows in this Sequential (timm's, torchvision's and effvit's, and "
        "transformers' ViT, DeiT, DINOv2, CLIP and SigLIP are known); looked at its 3 modules, none of which is called "
        "attention",
    ),
    (
        lambda: timm_model("eva02_tiny_patch14_224"),
        {},
        "looked at blocks.0.attn and 1 more (EvaAttention, which has rotary position embeddings inside)",
    ),
    (
        lambda: timm_model("vit_relpos_small_patch16_224"),
        {},
        "looked at blocks.0.attn and 1 more (RelPosAttention, which has a relative position bias inside)",
    ),
    (
        lambda: timm_model("naflexvit_base_patch16_gap"),
        {},
        "looked at blocks.0.attn and 1 more (Attention, which is called with masks)",
    ),
    (
        lambda: timm_vit(attn_layer="diff"),
        {},
        "blocks.0.attn (DiffAttention): is another attention than timm's Attention; its weights mean something else",
    ),
    (parallel, {}, "blocks.0 (ParallelScalingBlock): its attention is no module of its own"),
    (
        lambda: timm_block(scale=0.1),
        {},
        "blocks.0.attn (Attention): scales scores by 0.1; mechanisms here scale them by 1 / √16",
    ),
    (
        lambda: timm_vit(patch_drop_rate=0.5),
        {},
        "the model (VisionTransformer): patch_drop leaves out patches; linformer needs all of them",
    ),
    (lambda: hf_block(pruned_heads={1}), {}, "layers.0.attention (ViTAttention): heads [1] are pruned"),
    (
        lambda: hf_block(q_proj=nn.Sequential(nn.Linear(32, 32))),
        {},
        "layers.0.attention.q_proj (Sequential): not a plain nn.Linear (an adapter, quantised weights, a hook or a "
        "parametrisation): merge or remove it first",
    ),
    (
        partly_frozen,
        {},
        "layers.0.attention (ViTAttention): of q_proj, k_proj, v_proj only some are trained; freeze all of them or "
        "none",
    ),
    (
        lambda: nn.DataParallel(timm_vit()),
        {},
        "swap_attention: the model is inside DataParallel; swap attention first, then wrap it",
    ),
]
NOT_IN_DOCS = [
    (
        tokens_first,
        {},
        "encoder.layers.encoder_layer_0.self_attention (MultiheadAttention): takes tokens before samples; expected "
        "batch_first=True",
    ),
    (
        lambda: timm_block(forward=lambda x, **_: x),
        {},
        "blocks.0.attn (Attention): its forward was replaced on the object; swap attention first",
    ),
    (lambda: hf_block(is_causal=True), {}, "layers.0.attention (ViTAttention): lets no token attend to later ones"),
    (narrow_heads, {}, "blocks.0.attn (Attention): its heads have 16 columns in all, at a width of 32"),
    (
        lambda: timm_block(gate=nn.Linear(32, 32)),
        {},
        "blocks.0.attn (Attention): gates the output of attention, which the mechanisms do not",
    ),
    (lambda: {}, {}, "swap_attention: got a dict, expected a torch.nn.Module"),
    (lambda: timm_vit(), {"layers": []}, "layers=[]: expected some of 0 to 1, the blocks of timm's VisionTransformer"),
    (lambda: timm_vit(), {"m": 3}, "attention.linformer.m: unknown option"),
    (lambda: timm_model("beit_base_patch16_224"), {}, "(Attention, which has a relative position bias inside)"),
    (lambda: timm_vit().blocks[0], {}, "looked at attn (Attention)"),
    (lambda: multihead(add_zero_attn=True), {}, "(add_bias_kv, add_zero_attn), which the mechanisms have not"),
    (lambda: multihead(kdim=3, vdim=3), {}, "takes keys and values of other widths (kdim, vdim)"),
    (lambda: hf_block(scaling=1.0), {}, "(ViTAttention): scales scores by 1.0; mechanisms here scale them by 1 / √16"),
    (
        lambda: hf_block(k_proj=nn.Linear(32, 32, bias=False)),
        {},
        "layers.0.attention (ViTAttention): of q_proj, k_proj, v_proj only some have a bias",
    ),
]


@pytest.mark.parametrize(
    ("build", "arguments", "line"), IN_DOCS + NOT_IN_DOCS, ids=[each[2][:60] for each in IN_DOCS + NOT_IN_DOCS]
)
def test_it_is_refused_in_one_line_before_anything_is_changed(build, arguments, line):
    model = build()
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()} if modules else {}
    arguments = (
        {"name": "linformer"}
        | ({} if "k" in arguments or "m" in arguments or "name" in arguments else {"k": 5})
        | arguments
    )
    with pytest.raises(UserError) as caught:
        swap_attention(model, **({"name": "linformer"} | arguments))
    assert line in str(caught.value) and "\n" not in str(caught.value)
    if modules:
        assert dict(model.named_modules()) == modules
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("line", [line for _, _, line in IN_DOCS], ids=lambda line: line[:60])
def test_the_documentation_has_the_line(line):
    assert line in DOCS


def test_in_the_last_block_as_well_nothing_is_changed_before():
    model = timm_vit()
    model.blocks[1].attn.scale = 0.1
    before = model.blocks[0].attn
    with pytest.raises(UserError, match=r"blocks\.1\.attn"):
        swap_attention(model, "fused")
    assert model.blocks[0].attn is before
    swap_attention(model, "fused", layers=[0])
    assert model.blocks[0].attn is not before


MASK = "attention: got a mask; the mechanisms let all tokens attend to all"


def test_masks_are_refused_when_the_model_is_called():
    x, mask = images(), torch.ones(2, 17, dtype=torch.bool)
    models = {family: host(family) for family in ("timm vit", "vit", "torchvision")}
    for model in models.values():
        swap_attention(model, "fused")
    block = models["torchvision"].encoder.layers[0].self_attention
    tokens = torch.randn(2, 17, 32)
    calls = [
        lambda: models["timm vit"].blocks[0].attn(tokens, attn_mask=torch.ones(17, 17)),
        lambda: models["timm vit"].blocks[0].attn(tokens, is_causal=True),
        lambda: models["vit"](x, attention_mask=mask.int().index_fill(1, torch.tensor(3), 0)),
        lambda: block(tokens, tokens, tokens, key_padding_mask=mask),
        lambda: block(tokens, tokens, tokens, is_causal=True),
    ]
    for call in calls:
        with pytest.raises(UserError, match=f"^{MASK}$"):
            call()
    assert MASK in DOCS
    with pytest.raises(UserError, match="got other keys or values than queries"):
        block(tokens, tokens.clone(), tokens)


def test_another_number_of_tokens_is_told_as_documented():
    model = timm_vit(dynamic_img_size=True)
    swap_attention(model, "linformer", **OPTIONS["linformer"])
    with pytest.raises(UserError) as caught:
        model(torch.randn(1, 3, 32, 32))
    assert str(caught.value) in DOCS


@pytest.mark.parametrize("layers", [1, ["0"], [0.5], [True]])
def test_layers_that_are_no_indices_are_refused(layers):
    model = ViT(ViTConfig())
    with pytest.raises(UserError, match=r"^layers=.*: expected indices of blocks"):
        swap_attention(model, "performer", layers=layers)
    assert all(type(attention).__name__ == "FusedAttention" for attention in model.attentions())


def test_a_vit_whose_attention_is_all_somebody_elses_has_none_that_is_known():
    model = ViT(ViTConfig())
    for block in model.blocks:
        block.attn = torch.nn.Identity()
    with pytest.raises(UserError, match="no Vision Transformer that swap_attention knows in this ViT"):
        swap_attention(model, "performer")


def test_blocks_are_counted_with_those_that_have_somebody_elses_attention():
    model = ViT(ViTConfig())
    model.blocks[0].attn = torch.nn.Identity()
    report = swap_attention(model, "performer", layers=[2])
    assert type(model.blocks[2].attn).__name__ == "PerformerAttention"
    assert isinstance(model.blocks[0].attn, torch.nn.Identity)
    assert {type(block.attn).__name__ for block in (model.blocks[1], model.blocks[3])} == {"FusedAttention"}
    assert "performer in 1 of " in str(report)
