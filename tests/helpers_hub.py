"""Tiny models of every family, from configurations and with random weights, in the form in which a hub holds them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from helpers_eva_clip import trunk_options
from helpers_siglip import config as siglip_config
from helpers_siglip import siglip_like_tokenizer
from safetensors.torch import save_file
from torch import Tensor, nn

EMBED, SIDE, CONTEXT, VOCABULARY = 24, 32, 12, 49408
SIGLIP_CONTEXT = 10
TOKENIZER_REPOSITORY = "words/tokenizer"
PREPROCESSING = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}


@dataclass(frozen=True)
class Served:
    """A way to a model by name.

    Attributes:
        name: the backbone's name.
        repository: where its weights are.
        weights_file: the name of the file with the weights.
        library: ``"open_clip"`` or ``"transformers"``: which of the two loads it.
        folder: the name of the same model in a folder, ``{}`` standing for the path; ``None`` for a tag, whose
            repository holds nothing but weights.
    """

    name: str
    repository: str
    weights_file: str
    library: str
    folder: str | None = None

    @property
    def family(self) -> str:
        """The part of the name before the colon."""
        return self.name.partition(":")[0]


def _hub(family: str, repository: str) -> Served:
    weights = "open_clip_model.safetensors"
    return Served(f"{family}:hf-hub:{repository}", repository, weights, "open_clip", f"{family}:local-dir:{{}}")


def _transformers(family: str, repository: str, name: str | None = None) -> Served:
    return Served(f"{family}:{name or repository}", repository, "model.safetensors", "transformers", f"{family}:{{}}")


HUB_NAMES = {
    "open_clip": _hub("open_clip", "some/native-vit"),
    "eva_clip": _hub("eva_clip", "some/eva"),
    "siglip": _transformers("siglip", "some/siglip"),
    "siglip of open_clip": _hub("siglip", "some/timm-siglip"),
    "openai_clip": _transformers("openai_clip", "some/clip"),
}
TAGS = {
    "open_clip": Served("open_clip:hub-test-vit@served", "tags/vit", "open_clip_model.safetensors", "open_clip"),
    "eva_clip": Served("eva_clip:hub-test-eva@served", "tags/eva", "open_clip_model.safetensors", "open_clip"),
    "siglip": Served("siglip:hub-test-map@served", "tags/map", "open_clip_model.safetensors", "open_clip"),
    # The family has no tags; a short name stands for one of OpenAI's repositories.
    "openai_clip": _transformers("openai_clip", "openai/clip-vit-base-patch16", "ViT-B-16"),
}
ARCHITECTURES = {"hub-test-vit": "some/native-vit", "hub-test-eva": "some/eva", "hub-test-map": "some/timm-siglip"}


def open_clip_config(repository: str) -> dict[str, Any]:
    """``model_cfg`` of the models that open_clip builds."""
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 8, "heads": 2, "layers": 1}
    if repository == "some/native-vit":
        vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": SIDE}
        return {"embed_dim": EMBED, "vision_cfg": vision, "text_cfg": text}
    trunk, pool = ("eva_of_hub_tests", "token") if repository == "some/eva" else ("hub_test_siglip", "map")
    timm_vision = {"image_size": SIDE, "timm_model_name": trunk, "timm_pool": pool, "timm_proj": None}
    if repository == "some/eva":
        return {"embed_dim": EMBED, "vision_cfg": timm_vision, "text_cfg": text, "custom_text": True}
    text |= {
        "context_length": SIGLIP_CONTEXT, "vocab_size": 64, "no_causal_mask": True, "proj_bias": True,
        "pool_type": "last", "hf_tokenizer_name": TOKENIZER_REPOSITORY,
    }  # fmt: skip
    timm_vision |= {"image_size": 160, "timm_proj": "none"}
    return {"embed_dim": 64, "init_logit_bias": -10, "custom_text": True, "vision_cfg": timm_vision, "text_cfg": text}


def _eva_trunk(pretrained: bool = False, **options: Any) -> Any:
    return timm.create_model(**(trunk_options() | {"num_classes": EMBED} | options))


def _siglip_trunk(pretrained: bool = False, **options: Any) -> Any:
    return timm.create_model("test_vit", pretrained=pretrained, class_token=False, **options)


@contextmanager
def architectures(folder: Path, *, tags: bool = True) -> Iterator[None]:
    """Let timm and open_clip know the small architectures and their tags by name."""
    with pytest.MonkeyPatch.context() as patch:
        for name, trunk in (("eva_of_hub_tests", _eva_trunk), ("hub_test_siglip", _siglip_trunk)):
            patch.setitem(timm.models._registry._model_entrypoints, name, trunk)
        patch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
        patch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
        for name, repository in ARCHITECTURES.items():
            (folder / f"{name}.json").write_text(json.dumps(open_clip_config(repository)))
            open_clip.add_model_config(folder / f"{name}.json")
        for served in TAGS.values() if tags else ():
            if served.library == "open_clip":
                architecture, _, tag = served.name.partition(":")[2].partition("@")
                config = open_clip.pretrained._pcfg(hf_hub=f"{served.repository}/", mean=(0.1, 0.2, 0.3))
                patch.setitem(open_clip.pretrained._PRETRAINED, architecture, {tag: config})
        yield


def random_model(served: Served, seed: int) -> Any:
    """A model with random weights, of the architecture that a name stands for."""
    torch.manual_seed(seed)
    if served.library == "open_clip":
        model = served.name.partition(":")[2].partition("@")[0]
        repository = ARCHITECTURES.get(model, served.repository)
        architecture = next(name for name, other in ARCHITECTURES.items() if other == repository)
        return open_clip.create_model(model_name=architecture, load_weights=False).eval()
    if served.family == "siglip":
        return transformers.SiglipModel(transformers.SiglipConfig(**siglip_config())).eval()
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
    vision = tower | {"image_size": SIDE, "patch_size": 8}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = tower | {"vocab_size": 64, "max_position_embeddings": CONTEXT, **ends}
    return transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=EMBED)
    ).eval()


def clip_like_tokenizer() -> Any:
    """A transformers tokenizer with CLIP's rules: a start token, words, an end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = "a cat and dog on the grass photo of two red blue , . one more".split()
    vocabulary = {"<pad>": 0, "<start>": 1, "<end>": 2} | {word: 3 + index for index, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<start>", 1), ("<end>", 2)]
    inner.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<start>", eos_token="<end>", pad_token="<pad>", model_max_length=CONTEXT
    )


def write(served: Served, folder: Path, seed: int) -> dict[str, Tensor]:
    """Write the files of a repository, and return its weights."""
    model = random_model(served, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    weights = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
    folder.mkdir(parents=True)
    if served.library == "open_clip":
        save_file(weights, folder / served.weights_file)
        if served.folder is not None:
            content = {"model_cfg": open_clip_config(served.repository), "preprocess_cfg": PREPROCESSING}
            (folder / "open_clip_config.json").write_text(json.dumps(content))
            if served.family == "siglip":
                siglip_like_tokenizer().save_pretrained(folder)
        return weights
    model.save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    if served.family == "siglip":
        siglip_like_tokenizer().save_pretrained(folder)
        transformers.SiglipImageProcessor(size=side, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
    else:
        clip_like_tokenizer().save_pretrained(folder)
        transformers.CLIPImageProcessor(
            size={"shortest_edge": SIDE}, crop_size=side, image_mean=[0.1, 0.2, 0.3]
        ).save_pretrained(folder)
    return weights


def same_weights(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Whether a model's tensors are bitwise those that were served."""
    found = model.state_dict()
    return found.keys() == weights.keys() and all(torch.equal(found[name], value) for name, value in weights.items())
