"""``open_clip:photo``, the embedded backbone for photographs: its files, what it knows, and its export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")
pytest.importorskip("timm", reason="needs timm")

from ttd_open_clip.photo import EMBEDDED_FOLDER, load_photo
from ttd_open_clip.tiny import build_tiny

from ttd_plugins import TTD, export_backbone, load
from ttd_plugins.adapter import image_pixels
from ttd_plugins.data.images import read_image
from ttd_plugins.embedded import PHOTOGRAPHS_FOLDER
from ttd_plugins.embedded.folder import INDEX_FILE, MAX_SHARD, save_weights
from ttd_plugins.errors import TTDError
from ttd_plugins.evaluation.datasets import open_captions
from ttd_plugins.evaluation.protocols import TAG_PRESETS, evaluate_tags
from ttd_plugins.testing import AdapterConformance

LIMIT = 16 * 1024**2


@pytest.fixture(scope="module")
def photo() -> Any:
    return load("open_clip:photo")


class TestConformance(AdapterConformance):
    family = "open_clip"

    def make_adapter(self) -> Any:
        return load("open_clip:photo")


def test_the_weights_fit_and_the_recipe_names_what_went_in() -> None:
    files = [path for path in EMBEDDED_FOLDER.iterdir() if path.suffix == ".safetensors"]
    assert len(files) > 1
    assert all(path.stat().st_size < 4 * 1024**2 for path in files)
    assert sum(path.stat().st_size for path in EMBEDDED_FOLDER.iterdir()) < LIMIT
    recipe = json.loads((EMBEDDED_FOLDER / "recipe.json").read_text(encoding="utf-8"))
    assert recipe["settings"]["licences"] == [4, 5]
    assert all(len(package["sha256"]) == 64 for package in recipe["settings"]["packages"].values())


def test_patches_average_to_the_pooled_embedding_of_the_library(photo: Any) -> None:
    pixels = torch.randn(2, 3, 224, 320, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = photo.encode_image(pixels)
        library = photo.model.encode_image(pixels)
    assert features.patches.shape == (2, 7, 10, 256)
    torch.testing.assert_close(features.pooled, library, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.patches.mean((1, 2)), library, atol=1e-4, rtol=1e-4)


def test_it_knows_what_photographs_show(photo: Any, tmp_path: Path) -> None:
    """On photographs of the package; the bounds are far above chance, and below what was measured."""
    protocol = TAG_PRESETS["fast"]
    protocol = replace(protocol, dense=replace(protocol.dense, size=320))
    data = open_captions("coco_captions", PHOTOGRAPHS_FOLDER)
    metrics = evaluate_tags(photo, data, protocol, out=tmp_path).metrics
    assert metrics is not None
    assert metrics["pixel"]["map"] > 0.45
    assert metrics["zero_shot"]["top5"] > 0.7
    assert metrics["retrieval"]["r1"] > 0.3


def test_a_wrong_caption_is_not_believed(photo: Any) -> None:
    ttd = TTD(photo)
    image = read_image(PHOTOGRAPHS_FOLDER / "images" / "000000078499.jpg")
    maps = ttd.maps(image, "horses in the grass", tags=["horses", "pizza", "laptop"])
    assert maps.scores[0] > max(maps.scores[1:])


def test_open_clip_alone_loads_the_export_and_gives_the_same_embeddings(photo: Any, tmp_path: Path) -> None:
    done = export_backbone(photo, tmp_path / "out")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{done.folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{done.folder}")
    model.eval()
    image = read_image(PHOTOGRAPHS_FOLDER / "images" / "000000078499.jpg")
    texts = ["horses in the grass", "a laptop on a desk"]
    with torch.no_grad():
        pixels = preprocess(image)[None]
        torch.testing.assert_close(pixels[0], photo.native_transform()(image))
        torch.testing.assert_close(model.encode_image(pixels), photo.encode_image(pixels).pooled, atol=1e-5, rtol=1e-5)
        ours = photo.encode_text(photo.tokenize(texts).ids)
        torch.testing.assert_close(model.encode_text(tokenizer(texts)), ours, atol=1e-5, rtol=1e-5)
    again = load(f"open_clip:local-dir:{done.folder}")
    with torch.no_grad():
        inputs = image_pixels(photo, image)[None]
        torch.testing.assert_close(again.encode_image(inputs).patches, photo.encode_image(inputs).patches)


def test_weights_are_split_below_the_limit_and_read_back(tmp_path: Path) -> None:
    model = build_tiny(EMBEDDED_FOLDER)
    # A tensor is never split, and in float32 one alone is above the limit.
    tensors = {name: t.half() if t.ndim > 1 else t for name, t in model.state_dict().items()}
    save_weights({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3 and all(shard.stat().st_size < MAX_SHARD + 100_000 for shard in shards)
    for name in ("open_clip_config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((EMBEDDED_FOLDER / name).read_bytes())
    again, _ = load_photo(tmp_path)
    found = again.state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in tensors.items())


def test_an_index_never_leads_out_of_its_folder(tmp_path: Path) -> None:
    for name in ("open_clip_config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((EMBEDDED_FOLDER / name).read_bytes())
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"logit_scale": "../../elsewhere.safetensors"}}))
    with pytest.raises(TTDError, match=r"elsewhere\.safetensors cannot be loaded") as caught:
        load_photo(tmp_path)
    assert str(tmp_path / "elsewhere.safetensors") in str(caught.value)
    (tmp_path / INDEX_FILE).write_text("[]")
    with pytest.raises(TTDError, match="must contain a JSON object"):
        load_photo(tmp_path)
