"""Export of a model of the original ``clip`` package as a state dict for the package's ``build_model``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ttd_plugins.adapter import DenseAdapter, ExportedModel
from ttd_plugins.errors import UnsupportedModelError
from ttd_plugins.toolkit.exporting import ALTERNATIVES, write_weights

WEIGHTS = "model.safetensors"
HEAD_WIDTH = 64
HALF = (
    "clip's build_model converts most weights to float16; for full precision call model.float() and then "
    "model.load_state_dict(safetensors.torch.load_file('PATH/model.safetensors'))."
)
NOT_A_FILE = (
    "clip.load, which also returns clip's preprocessing, reads files of torch.save: "
    "torch.save(safetensors.torch.load_file('PATH/model.safetensors'), FILE) writes one."
)


def export_original(adapter: DenseAdapter, folder: Path) -> ExportedModel:
    """Write ``model.safetensors`` for ``clip.model.build_model``.

    Raises:
        UnsupportedModelError: ``build_model`` would build a different model.
        OSError, safetensors.SafetensorError: the folder cannot be written.
    """
    reason = build_model_mismatch(adapter.model)
    if reason is not None:
        raise UnsupportedModelError(
            f"{adapter.description.name} cannot be rebuilt by clip's build_model: {reason}; {ALTERNATIVES}"
        )
    write_weights(adapter.model, folder / WEIGHTS)
    load = f'model = clip.model.build_model(safetensors.torch.load_file("PATH/{WEIGHTS}"))'
    return ExportedModel("clip", load, notes=(HALF, NOT_A_FILE))


def build_model_mismatch(model: Any) -> str | None:
    """What ``build_model`` assumes and this model does not have, as the end of a sentence; ``None`` where all fits."""
    visual = model.visual
    blocks = list(model.transformer.resblocks)
    towers = [("text", blocks, int(model.ln_final.weight.shape[0]))]
    if hasattr(visual, "layer1"):
        width = int(visual.layer1[0].conv1.weight.shape[0])
        heads = width * 32 // HEAD_WIDTH
        if visual.attnpool.num_heads != heads:
            return f"its attention pool has {visual.attnpool.num_heads} heads where build_model assumes {heads}"
        cells, resolution = len(visual.attnpool.positional_embedding) - 1, visual.input_resolution
        due = round(cells**0.5) * 32
    else:
        towers.append(("image", list(visual.transformer.resblocks), int(visual.conv1.weight.shape[0])))
        cells, resolution = len(visual.positional_embedding) - 1, visual.input_resolution
        due = round(cells**0.5) * int(visual.conv1.weight.shape[-1])
    if resolution != due:
        return f"its input resolution is {resolution} where its position embeddings imply {due}"
    for tower, layers, width in towers:
        for block in layers:
            heads = width // HEAD_WIDTH
            if block.attn.num_heads != heads:
                return (
                    f"the {tower} tower has {block.attn.num_heads} heads of {width} channels where build_model assumes "
                    f"{heads}"
                )
            if tuple(block.mlp.c_fc.weight.shape) != (4 * width, width):
                return f"the MLP of the {tower} tower is not four times as wide as the tower"
            x = torch.linspace(-4, 4, 33, device=block.mlp.c_fc.weight.device)
            if not torch.allclose(block.mlp.gelu(x), x * torch.sigmoid(1.702 * x), atol=1e-6):
                return f"the {tower} tower's activation is not QuickGELU"
            norms = {block.ln_1.eps, block.ln_2.eps}
            if norms != {1e-5}:
                return f"the LayerNorms of the {tower} tower add {max(norms)} to the variance and not 1e-5"
    if not all(torch.equal(block.attn_mask.cpu().float(), _causal(block.attn_mask)) for block in blocks):
        return "its text tower is not causal"
    return None


def _causal(mask: torch.Tensor) -> torch.Tensor:
    return torch.full(mask.shape, float("-inf")).triu(1)
