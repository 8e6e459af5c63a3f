"""A run, an exported folder and LoRA are backbones wherever a name is: load(), commands, results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from ttd_plugins import cli, load, load_lora, restore_backbone, save_lora
from ttd_plugins.adapter import Calibration, DenseAdapter
from ttd_plugins.backbone_sources import check_backbone, split_source, split_step
from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.evaluation.protocols.runner import describe_backbone
from ttd_plugins.export import export_backbone, export_named, export_run
from ttd_plugins.toolkit.weights_hash import weights_hash
from ttd_plugins.training.checkpoints import TUNED_FROM, Checkpoint, write_checkpoint
from ttd_plugins.training.config import TrainConfig

TINY = "open_clip:tiny"
FIXED = torch.Generator().manual_seed(0)
PIXELS = torch.rand(1, 3, 64, 64, generator=FIXED)


@torch.no_grad()
def outputs(adapter: DenseAdapter) -> Tensor:
    image = adapter.encode_image(PIXELS)
    text = adapter.encode_text(adapter.tokenize(["a dog"]).ids)
    return torch.cat([image.patches.flatten(), text.flatten()])


def same(found: DenseAdapter, expected: DenseAdapter, *, but: DenseAdapter | None = None) -> None:
    torch.testing.assert_close(outputs(found), outputs(expected), rtol=1e-4, atol=1e-5)
    if but is not None:
        assert (outputs(found) - outputs(but)).abs().max() > 1e-2


def tuned(seed: int, name: str = TINY, **options: Any) -> DenseAdapter:
    """LoRA of rank 2 with random values."""
    adapter = load(name, lora=2, **options)
    with torch.no_grad():
        for number, parameter in enumerate(adapter.lora_parameters()):
            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(100 * seed + number))
    return adapter


def add_step(run: Path, adapter: DenseAdapter, step: int, **state: Any) -> None:
    trained = {n: p.detach() for n, p in adapter.model.named_parameters() if p.requires_grad}
    write_checkpoint(run, Checkpoint({"step": step, **state}, trained), 9)


def make_run(folder: Path, steps: Mapping[int, DenseAdapter], name: str | None = TINY, **backbone: Any) -> Path:
    config = TrainConfig.from_dict({"backbone": {"name": name, **backbone}, "towers": {"rank": 2}})
    folder.mkdir()
    (folder / "config.yaml").write_text(config.yaml())
    for step, adapter in steps.items():
        add_step(folder, adapter, step)
    return folder


@pytest.fixture(scope="module")
def first() -> DenseAdapter:
    return tuned(1)


@pytest.fixture(scope="module")
def second() -> DenseAdapter:
    return tuned(2)


@pytest.fixture
def run(tmp_path: Path, first: DenseAdapter, second: DenseAdapter) -> Path:
    return make_run(tmp_path / "run", {10: first, 20: second})


# load() --------------------------------------------------------------------------------------------------------------


def test_a_run_is_loaded_merged_as_any_backbone(run: Path, first: DenseAdapter, second: DenseAdapter) -> None:
    for name in (str(run), run, f"{run}@20", f"{TINY}+{run}", run / "checkpoints" / "step-00000020"):
        found = load(name)
        same(found, second, but=first)
        assert not found.has_lora and not found.training
    same(load(f"{run}@10"), first, but=second)
    same(load(f"{TINY}+{run}@10"), first)
    plain, found = load(TINY), load(run)
    flags = {name: parameter.requires_grad for name, parameter in found.model.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in plain.model.named_parameters()}
    kept = restore_backbone(run)
    assert kept.has_lora and str(kept.tuned_from) == str(found.tuned_from)


def test_a_loaded_run_is_identified(run: Path) -> None:
    source = load(f"{run}@10").tuned_from
    assert source is not None
    assert (source.kind, source.name, source.step, source.base) == ("run", "run", 10, TINY)
    other = load(run).tuned_from
    assert other is not None and other.step == 20 and other.sha256 != source.sha256
    assert load(TINY).tuned_from is None
    assert "tuned_from" not in describe_backbone(load(TINY))
    assert describe_backbone(load(run))["tuned_from"] == other.as_dict()


def test_more_lora_and_a_device_on_a_run(run: Path, second: DenseAdapter) -> None:
    found = load(run, lora=3, device="cpu")
    assert found.has_lora and len(found.lora_parameters()) > 0
    same(found, second)
    with pytest.raises(InputError, match="unknown argument of lora"):
        load(run, lora={"rang": 3})


def test_options_of_the_family_replace_those_of_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {1: tuned(1, dense="value_only")}, options={"dense": "value_only"})
    assert load(run).description.dense_mode == "value_only"
    own = Calibration(3.0, -1.0)
    assert load(run, calibration=own).description.calibration == own
    assert load(run, calibration=own).description.dense_mode == "value_only"


@pytest.mark.parametrize("form", ["native", "lora", "weights"])
def test_an_exported_folder_needs_no_name(tmp_path: Path, form: Any, first: DenseAdapter) -> None:
    export_backbone(first, tmp_path / "out", form=form)
    found = load(tmp_path / "out")
    same(found, first)
    assert found.description.dense_mode == first.description.dense_mode
    assert found.description.calibration == first.description.calibration
    assert found.description.calibrated == first.description.calibrated
    assert not found.has_lora and found.tuned_from is not None and found.tuned_from.name == "out"
    if form == "lora":
        same(load(f"{TINY}+{tmp_path / 'out'}"), first)
        assert found.tuned_from.kind == "lora"


def test_an_export_without_a_record_is_found_by_its_card(tmp_path: Path, first: DenseAdapter) -> None:
    export_backbone(first, tmp_path / "old")
    (tmp_path / "old" / "ttd_export.json").unlink()
    same(load(tmp_path / "old", dense=first.description.dense_mode), first)


def test_lora_that_save_lora_wrote_needs_its_backbone(tmp_path: Path, first: DenseAdapter) -> None:
    save_lora(first, tmp_path / "lora")
    same(load(f"{TINY}+{tmp_path / 'lora'}"), first)
    with pytest.raises(InputError, match=r"contains only LoRA and no backbone name; .* as NAME\+PATH"):
        load(tmp_path / "lora")


def test_lora_on_a_run_and_a_run_on_a_run(run: Path, tmp_path: Path, second: DenseAdapter) -> None:
    onto = tuned(3, str(run))
    save_lora(onto, tmp_path / "lora")
    same(load(f"{run}+{tmp_path / 'lora'}"), onto, but=second)
    assert onto.tuned_from is not None
    next_run = make_run(tmp_path / "next", {}, str(run))
    add_step(next_run, onto, 5, **{TUNED_FROM: onto.tuned_from.as_dict()})
    same(load(next_run), onto)
    # The first run goes on; the second still means the step that it was tuned from.
    add_step(run, tuned(7), 30)
    same(load(next_run), onto)
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    with pytest.raises(InputError, match="has no checkpoint of step 20; there are those of 10, 30"):
        load(next_run)
    add_step(run, tuned(8), 20)
    with pytest.raises(InputError, match=r"was tuned from run run, step 20 \(\w+\), and that is now run run, step 20"):
        load(next_run)


def test_a_run_that_names_itself_is_refused(tmp_path: Path, first: DenseAdapter) -> None:
    run = make_run(tmp_path / "run", {1: first}, str(tmp_path / "run"))
    with pytest.raises(InputError, match="names itself as the backbone that it was tuned from"):
        load(run)
    with pytest.raises(InputError, match="names itself"):
        check_backbone(str(run))
    # The guard is left behind in no state that would refuse the next load.
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(run), TINY))
    same(load(run), first)


# Safety --------------------------------------------------------------------------------------------------------------


def test_damaged_weights_are_refused(run: Path, tmp_path: Path, first: DenseAdapter) -> None:
    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[-3] ^= 0x55
        file.write_bytes(content)

    for form in ("native", "lora", "weights"):
        export_backbone(first, tmp_path / form, form=form)  # type: ignore[arg-type]
        (file,) = (tmp_path / form).glob("*.safetensors")
        flip(file)
        with pytest.raises(InputError, match=r"is damaged: its SHA-256 is \w+… and not \w+… as in ttd_export.json"):
            load(tmp_path / form)
        file.unlink()
        with pytest.raises(TTDError):
            load(tmp_path / form)
    flip(run / "checkpoints" / "step-00000020" / "trained.safetensors")
    with pytest.raises(InputError, match="it is damaged, its SHA-256"):
        load(run)
    load(f"{run}@10")


@pytest.mark.parametrize(
    "record",
    [
        "x",
        "[]",
        '{"form": "native", "format": 2}',
        '{"form": "own", "format": 1}',
        '{"form": "native", "name": 3}',
        '{"form": "native", "name": "open_clip:local-dir:PATH", "sha256": {"../x": "y"}}',
        '{"form": "native", "name": "open_clip:local-dir:PATH", "sha256": {"/etc/passwd": "y"}}',
        "[" * 100_000,
    ],
)
def test_a_strange_record_is_one_sentence(tmp_path: Path, first: DenseAdapter, record: str) -> None:
    export_backbone(first, tmp_path / "out", form="weights")
    (tmp_path / "out" / "ttd_export.json").write_text(record)
    with pytest.raises(InputError) as raised:
        load(tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_nothing_of_a_folder_is_executed(run: Path, tmp_path: Path, first: DenseAdapter) -> None:
    mark = tmp_path / "executed"
    code = f"open({str(mark)!r}, 'w')"
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(f"backbone: !!python/object/apply:eval [{code!r}]\n")
    with pytest.raises(InputError):
        load(run)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("sitecustomize.py", "modeling.py", "conftest.py"):
        (run / name).write_text(code)
    load(run)
    export_backbone(first, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    (tmp_path / "out" / "evil.py").write_text(code)
    settings["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (tmp_path / "out" / "tokenizer_config.json").write_text(json.dumps(settings))
    with suppress(TTDError):
        load(tmp_path / "out").tokenize(["a dog"])
    assert not mark.exists()


# Names ---------------------------------------------------------------------------------------------------------------


def test_names_are_split_where_a_path_exists(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_source(TINY) == (TINY, None)
    assert split_source(f"{TINY}@random+{run}") == (f"{TINY}@random", str(run))
    assert split_source(f"{run}@10") == (None, f"{run}@10")
    assert split_step(f"{run}@10") == (run, 10) and split_step(run) == (run, None)
    plus = tmp_path / "a+b@1"
    shutil.copytree(run, plus)
    assert split_source(str(plus)) == (None, str(plus))
    assert split_step(f"{plus}@20") == (plus, 20)
    # A file that is called as the step changes nothing.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "10").write_text("x")
    assert split_source("run@10") == (None, "run@10")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("RUN@15", "has no checkpoint of step 15; there are those of 10, 20"),
        ("RUN@last", r"after the run and '@', write the step of a checkpoint, as in RUN@200"),
        ("RUN@", "write the step of a checkpoint"),
        ("RUN@" + "9" * 40, "write the step of a checkpoint"),
        ("RUN/nowhere", r"nowhere' does not exist; name the folder of a run of `ttd train` \(RUN or RUN@STEP\)"),
        (f"{TINY}+RUN/nowhere", "nowhere' does not exist; after 'open_clip:tiny' and '"),
        ("siglip:tiny+RUN", "is a run of open_clip:tiny and not of siglip:tiny; use it with open_clip:tiny"),
        ("RUN/..", "contains no tuned backbone of a known form"),
        ("RUN/config.yaml", r"is a file and not \*\.safetensors"),
        ("EMPTY", "has no checkpoint yet"),
        ("OBJECT", "contains a run of a model object and no backbone name; name the backbone too"),
        ("EXPORT@3", "only runs have steps"),
        ("", "does not follow family:model@weights"),
        ("\0", "does not follow|null"),
        ("x" * 5000, "does not follow"),
    ],
)
def test_what_is_no_backbone_is_one_sentence(run: Path, first: DenseAdapter, name: str, sentence: str) -> None:
    make_run(run.parent / "empty", {})
    make_run(run.parent / "object", {1: first}, None)
    export_backbone(first, run.parent / "export", form="lora")
    for word in ("RUN", "EMPTY", "OBJECT", "EXPORT"):
        name = name.replace(word, str(run.parent / word.lower()))
    for action in (load, check_backbone):
        with pytest.raises(TTDError, match=sentence) as raised:
            action(name)
        assert "\n" not in str(raised.value)


# Commands and results ------------------------------------------------------------------------------------------------


def ttd(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_tags_of_a_run_are_those_of_its_backbone(run: Path, tmp_path: Path, second: DenseAdapter) -> None:
    from ttd_plugins import TTD

    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(photo)
    export_run(run, tmp_path / "out")
    expected = TTD(second).maps(photo, "a dog on the grass")
    for name in (run, f"{run}@20", tmp_path / "out"):
        done = ttd("tags", photo, "a dog on the grass", "--backbone", name, "--json")
        assert done.exit_code == 0, done.output
        answer = json.loads(done.stdout)
        assert answer["backbone"] == str(name)
        assert [row["tag"] for row in answer["tags"]] == expected.tags
        np.testing.assert_allclose([row["score"] for row in answer["tags"]], expected.scores, atol=1e-4)
    done = ttd("tags", photo, "a dog", "--backbone", f"{run}@11")
    assert done.exit_code == 2 and "error: " in done.output and "step 11" in done.output


def test_export_takes_every_form(run: Path, tmp_path: Path, first: DenseAdapter, second: DenseAdapter) -> None:
    done = ttd("export", f"{run}@10", "--out", tmp_path / "a", "--form", "lora")
    assert done.exit_code == 0, done.output
    same(load_lora(load(TINY), tmp_path / "a"), first)
    half = ["--form", "lora", "--lora-scale", "0.5", "--out", tmp_path / "half"]
    assert ttd("export", "--backbone", f"{TINY}+{tmp_path / 'a'}", *half).exit_code == 0
    assert (outputs(load(tmp_path / "half")) - outputs(first)).abs().max() > 1e-3
    card = (tmp_path / "half" / "README.md").read_text()
    assert "LoRA a (" in card and "lora_scale | 0.5" in card
    export_named(str(run), tmp_path / "b")
    assert "| step | 20 |" in (tmp_path / "b" / "README.md").read_text()
    same(load(tmp_path / "b"), second)
    done = ttd("export", f"{run}@10", "--step", "20", "--out", tmp_path / "c")
    assert done.exit_code == 2 and "names the step 10, and --step is 20" in done.output
    done = ttd("export", "--backbone", TINY, "--lora-scale", "0.5", "--out", tmp_path / "c")
    assert done.exit_code == 2 and "a plain name has no LoRA" in done.output


def test_the_list_of_backbones_names_ones_own() -> None:
    assert "your own: RUN or RUN@STEP (`ttd train`), NAME+LORA" in ttd("backbones").output


def test_a_comparison_is_not_continued_with_another_step(run: Path, tmp_path: Path, second: DenseAdapter) -> None:
    from ttd_plugins import compare

    def again(name: str) -> Any:
        return compare(name, out=tmp_path / "out", tune=False, limit=4, gallery=0, progress=False)

    found = again(str(run)).backbones[0]
    assert found.about["tuned_from"]["step"] == 20 and found.about["weights_sha256"] == weights_hash(load(run))
    assert again(str(run)).backbones[0].metrics == found.metrics
    add_step(run, tuned(9), 30)
    with pytest.raises(TTDError, match=r"has changed since .* \(step 20, now 30\); name the step, as in "):
        again(str(run))


def test_an_evaluation_is_not_continued_with_other_lora(tmp_path: Path, first: DenseAdapter) -> None:
    from ttd_plugins.evaluation.protocol_options import TAG_PRESETS
    from ttd_plugins.evaluation.protocols.runner import run_protocol, run_settings
    from ttd_plugins.options import Calibration as Map

    save_lora(first, tmp_path / "lora")
    name = f"{TINY}+{tmp_path / 'lora'}"

    def evaluate() -> Any:
        adapter = load(name)
        settings = run_settings("tags", adapter, TAG_PRESETS["fast"], Map(), {"name": "none"})
        return run_protocol(
            "tags", adapter, ["a"], lambda key: {}, lambda records: {"count": len(list(records))}, settings,
            check=lambda keys, progress: None, out=tmp_path / "out",
        )  # fmt: skip

    stored = evaluate().settings["backbone"]["tuned_from"]
    assert stored["kind"] == "lora" and stored["name"] == "lora" and len(stored["sha256"]) == 16
    evaluate()
    save_lora(tuned(2), tmp_path / "lora")
    with pytest.raises(InputError, match="contains results with other settings"):
        evaluate()
