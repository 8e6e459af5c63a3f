"""The conformance kit and plain formulas on every kind of model that the families serve, small and at full size.

`python tests/full_size_table.py --work FOLDER` prints the same as tables.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")
pytest.importorskip("transformers", reason="needs the extra 'siglip'")
pytest.importorskip("peft", reason="needs the extra 'lora'")

import open_clip
import torch
from full_size_table import TINY, main, measure
from helpers_full_size import (
    BACKBONES,
    CLIP_CONTEXT,
    CLIP_VOCABULARY,
    SIGLIP_CONTEXT,
    SIGLIP_IDS,
    OriginalTokenize,
    clip_tokenizer,
    open_clip_siglip_stand_in,
    siglip_stand_in,
)
from ttd_siglip.architectures import KNOWN
from typer.testing import CliRunner

from ttd_plugins import cli
from ttd_plugins.testing import CHECKS

SKIPPED = {
    "siglip": {"text_trimming": "text_needs_full_context = True"},
    # LayerNorms of that class compute in float32, so model.to(torch.bfloat16) breaks the model itself.
    "original": {"half_precision": "the model itself does not support"},
}
UNSTATED = {"preferred_size", "patches_match_library", "tokens_match_library", "pixels_match_library"}
"""Images are square, and shipped adapters state these references of no library."""
OF_THE_LIBRARY = {"sizes_match_library", "empty_batches", "export_holds_model", "float16", "grad_checkpointing"}
"""Checks that are skipped where the library cannot do it itself: other sizes, empty batches, export, float16."""
TEXTS = ["a dog", "Two CATS, on the grass!", "", "naïve café 3 x 14's", "word " * 100]


def expect_all_well(name: str, found: dict[str, Any]) -> None:
    """No check failed, those that were skipped had to be, and features are those of plain formulas to 1e-5."""
    failed = [check for check in found["checks"] if check["status"] == "failed"]
    assert not failed, json.dumps(failed, indent=2)
    allowed = SKIPPED["siglip"] if "siglip" in name else SKIPPED["original"] if name.startswith("original") else {}
    skipped = {check["name"]: check["reason"] for check in found["checks"] if check["status"] == "skipped"}
    assert allowed.keys() <= skipped.keys() <= allowed.keys() | UNSTATED | OF_THE_LIBRARY
    assert all(reason in skipped[check] for check, reason in allowed.items()), skipped
    assert len(found["checks"]) == len(CHECKS)
    assert set(found["differences"]) == {"pooled", "text", "dense"} | ({"one_patch"} if "siglip" in name else set())
    assert all(value <= 1e-5 for value in found["differences"].values()), found["differences"]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_small_model_of_every_kind_passes_the_kit_and_equals_plain_formulas(name: str) -> None:
    expect_all_well(name, measure(BACKBONES[name], full=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_models_at_full_size_pass_the_kit_and_equal_plain_formulas(name: str) -> None:
    expect_all_well(name, measure(BACKBONES[name], full=True))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["check-adapter", *arguments])


@pytest.mark.parametrize("name", TINY)
def test_the_command_passes_the_small_models_of_the_package(name: str) -> None:
    answer = run(name, "--json")
    assert answer.exit_code == 0, answer.output
    report = json.loads(answer.stdout)
    assert report["ok"] and len(report["checks"]) == len(CHECKS)
    skipped = {check["name"] for check in report["checks"] if check["status"] == "skipped"}
    assert skipped <= {"text_trimming"} | UNSTATED | OF_THE_LIBRARY


def test_the_table_of_the_command_says_the_same() -> None:
    answer = run("siglip:tiny@random")
    assert answer.exit_code == 0, answer.output
    # Besides references that are not stated: text_trimming, empty batches and other sizes, which the library refuses.
    assert f"{len(CHECKS) - 7} passed, 0 failed, 7 skipped" in answer.stdout
    assert all(check.name in answer.stdout for check in CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [one.name for one in BACKBONES.values() if one.name])
def test_the_command_passes_full_size_models_by_name(name: str) -> None:
    answer = run(name, "--json")
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["ok"]


# Tokenizers that stand in for those of a hub -------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", SIGLIP_IDS)
def test_siglip_stand_ins_have_the_real_size_and_padding(vocabulary: int) -> None:
    name = {32000: "ViT-B-16-SigLIP", 256000: "ViT-B-16-SigLIP2"}[vocabulary]
    config = open_clip.get_model_config(name)["text_cfg"]
    assert (config["vocab_size"], config["context_length"]) == (vocabulary, SIGLIP_CONTEXT)
    ids = SIGLIP_IDS[vocabulary]
    for tokenizer in (siglip_stand_in(vocabulary), open_clip_siglip_stand_in(vocabulary)):
        inner = getattr(tokenizer, "tokenizer", tokenizer)
        assert len(inner) == vocabulary
        assert (inner.pad_token_id, inner.eos_token_id) == (ids["pad"], ids["end"])
    rows = open_clip_siglip_stand_in(vocabulary)(["a dog", "dog " * 99])
    assert rows.shape == (2, SIGLIP_CONTEXT)
    assert rows[0, -1] == ids["pad"] and rows[1, -1] == ids["end"]
    # open_clip cleans for SigLIP: lower case, no punctuation.
    assert torch.equal(*open_clip_siglip_stand_in(vocabulary)(["A dog!", "a dog"]))
    assert int(rows.max()) >= vocabulary - 256


def test_clip_tokenizers_give_the_ids_of_open_clips_own() -> None:
    packaged = open_clip.SimpleTokenizer()(TEXTS)
    rows = clip_tokenizer()(TEXTS, padding="max_length", truncation=True, max_length=CLIP_CONTEXT)["input_ids"]
    assert len(clip_tokenizer()) == CLIP_VOCABULARY
    ends = packaged.argmax(dim=-1)
    for row, mine, end in zip(packaged, torch.tensor(rows), ends.tolist(), strict=True):
        # transformers pads with the end token, OpenAI's own with zeros.
        assert torch.equal(row[: end + 1], mine[: end + 1])
        assert (mine[end:] == CLIP_VOCABULARY - 1).all() and (row[end + 1 :] == 0).all()
    original = OriginalTokenize()
    assert torch.equal(original(TEXTS, truncate=True).long(), packaged)
    assert original(TEXTS[:1]).dtype == torch.int32
    with pytest.raises(RuntimeError, match="too long"):
        original(TEXTS)


# Architectures -------------------------------------------------------------------------------------------------------

SIZES = {"base": "B", "large": "L", "so400m": "SO400M", "giant-opt": "gopt"}


def twin(name: str) -> str:
    """open_clip's name of the checkpoint that transformers' hub has as ``google/...``."""
    generation, size, patch, image = re.fullmatch(
        r"google/siglip(2?)-([a-z0-9-]+)-patch(\d+)-(\d+)(?:-multilingual)?", name
    ).groups()
    middle = "-i18n" if name.endswith("multilingual") else ""
    # open_clip rounds this one's 384 pixels down to a multiple of the patch side, in the name too.
    image = "378" if (generation, patch, image) == ("2", "14", "384") else image
    return f"ViT-{SIZES[size]}-{patch}-SigLIP{generation}{middle}" + ("" if image == "224" else f"-{image}")


@pytest.mark.parametrize("name", KNOWN)
def test_known_siglip_architectures_are_those_of_open_clip(name: str) -> None:
    config = open_clip.get_model_config(twin(name))
    vision, text = KNOWN[name]["vision_config"], KNOWN[name]["text_config"]
    assert vision["image_size"] - config["vision_cfg"]["image_size"] in (0, 6)
    assert vision["hidden_size"] == text["projection_size"] == config["embed_dim"]
    theirs = config["text_cfg"]
    assert text["max_position_embeddings"] == theirs["context_length"] and text["vocab_size"] == theirs["vocab_size"]
    tower = (text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"], text["intermediate_size"])
    assert tower == (
        theirs["width"], theirs["layers"], theirs["heads"], int(theirs["width"] * theirs.get("mlp_ratio", 4.0))
    )  # fmt: skip


def test_known_siglip_image_towers_are_those_of_timm() -> None:
    import timm

    seen: dict[str, tuple[int, ...]] = {}
    for name, config in KNOWN.items():
        vision = config["vision_config"]
        trunk = open_clip.get_model_config(twin(name))["vision_cfg"]["timm_model_name"]
        size = trunk.rpartition("_")[0]
        if size not in seen:
            with torch.device("meta"):
                built = timm.create_model(trunk, pretrained=False, num_classes=0)
            block = built.blocks[0]
            seen[size] = (built.embed_dim, len(built.blocks), block.attn.num_heads, block.mlp.fc1.out_features)
        shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        assert tuple(vision[key] for key in shape) == seen[size], name
        assert f"_patch{vision['patch_size']}_" in trunk
    assert len(seen) == 6


# The table -----------------------------------------------------------------------------------------------------------


def test_the_table_is_printed_and_what_is_there_is_not_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["open_clip", "original_vit", "--small", "--work", str(tmp_path)]
    main(arguments)
    first = capsys.readouterr().out
    assert "| A | open_clip `ViT-B-16` |" in first and "| B | original `clip`, ViT-B/16 |" in first
    assert "| `patches_in_place` | yes | yes |" in first and "| `half_precision` | yes | – |" in first
    assert "- `half_precision` (B): skipped: the model itself does not support" in first
    path = tmp_path / "open_clip-small.json"
    changed = json.loads(path.read_text())
    changed["checks"][-1] |= {"status": "failed", "seen": "a spoon"}
    path.write_text(json.dumps(changed))
    main(arguments)
    second = capsys.readouterr().out
    assert f"| `{CHECKS[-1].name}` | **no** | yes |" in second
    assert f"- `{CHECKS[-1].name}` (A): failed: a spoon" in second
    with pytest.raises(SystemExit):
        main(["nothing", "--work", str(tmp_path)])
