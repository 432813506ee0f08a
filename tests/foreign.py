"""Small ViTs of other libraries with random weights, all of the same size, as references."""

import pytest
import torch

IMAGES = (3, 3, 16, 16)


def shaken(model):
    """Every weight moved, so that norms and biases matter as well."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def timm_vit(**changes):
    timm = pytest.importorskip("timm.models.vision_transformer", reason="a peer: pip install effvit[peers]")
    torch.manual_seed(0)
    fields = {"img_size": 16, "patch_size": 4, "num_classes": 7, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return shaken(timm.VisionTransformer(**(fields | changes)))


def transformers_vit(family="ViT", task="ForImageClassification", **changes):
    """Return a ``ViT`` or ``DeiT`` of transformers."""
    transformers = pytest.importorskip("transformers", reason="a peer: pip install transformers")
    torch.manual_seed(0)
    fields = {"image_size": 16, "patch_size": 4, "num_labels": 7, "hidden_size": 48, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 3, "intermediate_size": 192}
    config = getattr(transformers, f"{family}Config")(**(fields | changes))
    return shaken(getattr(transformers, f"{family}{task}")(config))


def torchvision_vit(**changes):
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    fields = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 192}
    return shaken(VisionTransformer(**(fields | {"num_classes": 7} | changes)))


@torch.no_grad()
def logits(model, images):
    """Logits of a model of any library."""
    out = model(images)
    return getattr(out, "logits", out)


# Parts of names in files of transformers 4 and what they are in version 5 in memory, later ones applied to the result.
VERSION_5 = (
    ("encoder.layer.", "layers."),
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
)


def renamed(state, version):
    """The state dict of a ViT of transformers, whichever is installed, in the names of version 4 or 5."""
    result = {}
    for name, tensor in state.items():
        for four, five in VERSION_5 if version == 5 else tuple((b, a) for a, b in VERSION_5):
            if version == 5 or four in name:
                name = name.replace(four, five)
        result[name] = tensor
    return result
