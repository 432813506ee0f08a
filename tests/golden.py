"""The first losses of a tiny training run of each mechanism, in float64, where no BLAS changes the first ten digits.

``python tests/golden.py`` writes them anew; do that only for a change that is meant to change what is computed.
"""

import json
from pathlib import Path

import torch
from torch.nn import functional as F

from effvit import ViT, ViTConfig, available_attention

FILE = Path(__file__).with_name("golden_losses.json")
STEPS = 20
OPTIONS = {
    "linformer": {"k": 6},
    "performer": {"num_features": 24, "redraw_every": 8},
    "nystromformer": {"num_landmarks": 6, "conv_kernel_size": 5},
    "hybrid": {"window_size": 3},
    "agent": {"agent_size": 3},
    "pooled": {"pool_size": 2},
    "window": {"window_size": 2, "shift": True},
}


def losses(name):
    """Losses of 20 AdamW steps on images whose class is the quadrant with the brightest spot."""
    torch.manual_seed(0)
    config = ViTConfig.from_dict(
        {
            "image_size": 20,
            "patch_size": 4,
            "num_channels": 1,
            "num_classes": 4,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "initializer_range": 0.1,
            "attention": name,
            "attention_options": OPTIONS.get(name, {}),
        }
    )
    model = ViT(config).double().train()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(STEPS, 16, 1, 20, 20, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (STEPS, 16), generator=generator)
    for step_images, step_labels in zip(images, labels, strict=True):
        for image, label in zip(step_images, step_labels.tolist(), strict=True):
            image[0, 5 + 10 * (label // 2), 5 + 10 * (label % 2)] += 8
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    result = []
    for step in range(STEPS):
        loss = F.cross_entropy(model(images[step]), labels[step])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        for attention in model.attentions():
            attention.after_step(step + 1, generator)
        result.append(loss.item())
    return result


if __name__ == "__main__":
    golden = {name: [round(loss, 10) for loss in losses(name)] for name in available_attention()}
    FILE.write_text(json.dumps(golden, indent=1) + "\n")
