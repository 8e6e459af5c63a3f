"""The configuration of a run: what it takes, what it refuses and how it says so."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("yaml", reason="needs the extra 'train'")

import typer
import yaml
from typer.testing import CliRunner

from ttd_plugins import cli
from ttd_plugins.adapter import Calibration
from ttd_plugins.cli.config_flags import flags_of
from ttd_plugins.cli.train import FLAGS
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation.protocol_options import DenseOptions
from ttd_plugins.options import TTDOptions
from ttd_plugins.training.config import TrainConfig
from ttd_plugins.utils.configuration import field_information
from ttd_plugins.utils.settings import flatten


def write(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_configuration_comes_back_from_its_own_yaml(tmp_path: Path) -> None:
    config = TrainConfig.read(
        None,
        [
            "backbone.name=open_clip:tiny",
            "backbone.options={dense: value}",
            "data.image_size=[32, 48]",
            "data.source=Бild/パ",
            "data.max_skipped=0.05",
            "ttd.calibration={scale: 3, shift: 1}",
            "ttd.extractor_options={stop_words: [a, no]}",
            "optimizer.learning_rate=1e-4",
            "optimizer.clip_norm=null",
            "run.mixed_precision=no",
            "run.trackers=[tensorboard]",
        ],
    )
    assert config.data.image_size == (32, 48) and config.data.max_skipped == 0.05
    assert config.ttd.calibration == Calibration(3.0, 1.0)
    assert config.optimizer.learning_rate == 1e-4 and config.optimizer.clip_norm is None
    assert config.run.mixed_precision == "no"
    assert TrainConfig.read(write(tmp_path, config.yaml())) == config
    assert TrainConfig.from_dict(config.as_dict()) == config
    assert set(yaml.safe_load(config.yaml())) == {
        "backbone", "data", "towers", "optimizer", "ttd", "evaluation", "run",
    }  # fmt: skip


def test_flags_win_over_the_file_and_leave_the_rest(tmp_path: Path) -> None:
    file = write(tmp_path, "optimizer: {steps: 7, batch_size: 3}\ntowers: {image: frozen, text: frozen}\n")
    config = TrainConfig.read(file, ["optimizer.steps=9", "towers.text=full"])
    assert (config.optimizer.steps, config.optimizer.batch_size) == (9, 3)
    assert (config.towers.image, config.towers.text) == ("frozen", "full")
    assert TrainConfig.read(write(tmp_path, "optimizer:\nrun:\n")) == TrainConfig() == TrainConfig.read(None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer: {lr: 1}", "unknown key 'optimizer.lr'"),
        ("optimiser: {lr: 1}", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("optimizer: {steps: 1.5}", "optimizer.steps must be a whole number or null, not 1.5"),
        ("optimizer: {steps: many}", "optimizer.steps must be a whole number or null, not the text 'many'"),
        ("optimizer: {steps: true}", "optimizer.steps must be a whole number or null, not true"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas must be a list of 2, each item a number, not [0.9]"),
        ("optimizer: {betas: [0.9, 1]}", "optimizer.betas must be at least 0 and below 1"),
        ("optimizer: 3", "optimizer must be keys and values, not 3"),
        ("towers: {image: half}", "unknown value of towers.image 'half'; known: frozen, full, lora"),
        ("towers: {image: frozen, text: frozen}", "nothing is trained"),
        ("towers: {rank: 0}", "towers.rank must be 1 or more, not 0"),
        ("towers: {dropout: 1}", "towers.dropout must be at least 0 and below 1"),
        ("optimizer: {learning_rate: .nan}", "optimizer.learning_rate must be a finite number, 0 or more, not nan"),
        ("ttd: {rule: top}", "unknown value of ttd.rule 'top'"),
        ("ttd: {template: photo}", "ttd: the template 'photo' must contain {} once"),
        ("ttd: {calibration: {scale: x}}", "ttd.calibration.scale must be a number, not the text 'x'"),
        ("data: {image_size: [1, 2, 3]}", "data.image_size must be a whole number or a list of 2"),
        ("run: {seed: null}", "run.seed must be a whole number, not null"),
        ("run: {trackers: wandb}", "run.trackers must be a list"),
        ("- a", "must have sections of keys"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_mistake_is_one_sentence_with_file_and_key(text: str, said: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        TrainConfig.read(file)
    assert said in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["steps=3", "optimizer=3", "optimizer.steps", ".steps=3", "a..b=1"])
def test_a_change_that_names_no_key_is_told(change: str) -> None:
    with pytest.raises(InputError, match=r"does not follow section\.key=value"):
        TrainConfig.read(None, [change])


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        TrainConfig.read(tmp_path / "none.yaml")


@settings(deadline=None, max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["optimizer", "run", "ttd", "steps", "seed", "betas", "calibration"]), inner
            )
        ),
        max_leaves=8,
    )
)
def test_whatever_yaml_holds_is_a_configuration_or_one_sentence(values: Any) -> None:
    with suppress(InputError):
        config = TrainConfig.from_dict(values)
        assert TrainConfig.from_dict(config.as_dict()) == config


def test_every_field_has_a_flag_with_its_default_in_the_help() -> None:
    """All but calibrations, which are objects."""
    values = flatten(TrainConfig().as_dict())
    by_path = {flag.path: flag for flag in FLAGS}
    assert set(values) - {"ttd.calibration"} == {path for path in by_path if not path.startswith("data.options.")}
    assert len({flag.name for flag in FLAGS}) == len(FLAGS)
    text = " ".join(CliRunner().invoke(cli.app, ["train", "--help"], env={"COLUMNS": "200"}).output.split())
    for path, value in values.items():
        if path in by_path and value not in (None, {}, []):
            shown = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
            shown = ",".join(map(str, shown)) if isinstance(shown, list) else shown
            assert f"[default: {shown}]" in text, path
            assert by_path[path].name in text


def test_flags_set_the_values_of_their_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[TrainConfig] = []

    def keep(config: TrainConfig, out: Path, resume: bool) -> None:
        read.append(config)
        raise InputError("enough")

    monkeypatch.setattr("ttd_plugins.fine_tuning.fine_tune", keep)
    arguments = (
        "--backbone a:b --backbone-option dense=value --data x --data-option delimiter=; --image-column path "
        "--size 32x48 "
        "--max-skipped 0.05 --betas 0.8,0.9 --lr 0.5 --logit-scale --no-compile --tracker a --tracker b --precision no "
        "--tags-option stop_words=[] --text-activation-checkpointing --clip-norm 2 --set run.seed=4"
    )
    CliRunner().invoke(cli.app, ["train", "--out", str(tmp_path), *arguments.split()])
    (config,) = read
    assert (config.backbone.name, config.backbone.options) == ("a:b", {"dense": "value"})
    assert config.data.options == {"delimiter": ";", "image_column": "path"}
    assert (config.data.image_size, config.data.max_skipped) == ((32, 48), 0.05)
    assert (config.optimizer.betas, config.optimizer.learning_rate) == ((0.8, 0.9), 0.5)
    assert (config.towers.logit_scale, config.run.compile, config.run.mixed_precision) == (True, False, "no")
    assert (config.run.trackers, config.run.seed) == (("a", "b"), 4)
    assert config.ttd.extractor_options == {"stop_words": []}
    assert config.ttd.text_activation_checkpointing is True


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ttd.caption_weight", "ttd.distill_weight"),
        ("ttd.remembered_texts", "ttd.text_cache_size"),
        ("run.pictures", "run.heatmap_samples"),
        ("run.picture_every", "run.heatmap_every"),
        ("evaluation.most", "evaluation.limit"),
    ],
)
def test_old_keys_are_read_and_warn(old: str, new: str, tmp_path: Path) -> None:
    section, key = old.split(".")
    with pytest.warns(FutureWarning, match=f"{key} is now"):
        from_file = TrainConfig.read(write(tmp_path, f"{section}: {{{key}: 3}}"))
    with pytest.warns(FutureWarning, match=f"{key} is now"):
        from_change = TrainConfig.read(None, [f"{old}=3"])
    assert from_file == from_change == TrainConfig.read(None, [f"{new}=3"])
    with pytest.raises(InputError, match=f"has both {key} and {new.split('.')[1]}"):
        TrainConfig.read(None, [f"{old}=3", f"{new}=3"])


def test_old_options_of_the_engine_are_accepted_and_warn() -> None:
    with pytest.warns(FutureWarning, match=r"TTDOptions\.caption_weight is now TTDOptions\.distill_weight"):
        assert TTDOptions(caption_weight=2.0) == TTDOptions(distill_weight=2.0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"threshold": math.nan}, "threshold must be a finite number, not nan"),
        ({"threshold": "0.5"}, "threshold must be a number, not the text '0.5'"),
        ({"tag_weight": -1}, "tag_weight must be 0 or more, not -1"),
        ({"ema_decay": 2.0}, "ema_decay must be at least 0 and at most 1, not 2.0"),
        ({"rule": "top"}, "unknown value of rule 'top'"),
        ({"distance": "bce", "activation": "none"}, "needs maps in"),
        ({"wieght": 1.0}, "unknown option of TTDOptions 'wieght'"),
    ],
)
def test_a_mistake_in_python_is_one_sentence(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        TTDOptions(**values)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_mistake_in_a_positional_argument_names_its_field() -> None:
    with pytest.raises(InputError, match="scale must be a finite number, not inf"):
        Calibration(math.inf, 0.0)


def test_every_field_is_documented() -> None:
    sections = (type(getattr(TrainConfig(), section)) for section in TrainConfig().as_dict())
    for kind in (TrainConfig, Calibration, *sections):
        for name, information in field_information(kind).items():
            assert information.description and information.description.endswith("."), f"{kind.__name__}.{name}"


def test_the_schema_knows_every_key_and_refuses_others() -> None:
    schema = json.loads(CliRunner().invoke(cli.app, ["train", "--schema"]).output)
    section = schema["$defs"]["OptimizerConfig"]
    assert set(section["properties"]) == set(TrainConfig().as_dict()["optimizer"])
    assert section["additionalProperties"] is False
    assert section["properties"]["learning_rate"]["description"] == "Peak learning rate."
    assert section["properties"]["batch_size"]["minimum"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say what to train: a YAML file, or --backbone NAME and --data SOURCE"),
        (["--size", "big"], "HEIGHTxWIDTH"),
        (["--set", "run.sead=1"], "did you mean 'run.seed'"),
        (["--image-tower", "frozen", "--text-tower", "frozen"], "nothing is trained"),
        (["--resume"], "say what to train"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], said: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(cli.app, ["train", "--out", str(tmp_path / "run"), *arguments])
    assert found.exit_code == 2 and said in found.output
    assert not (tmp_path / "run").exists()


def flags_of_command(*words: str) -> set[str]:
    command: Any = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]
    return {name for parameter in command.params for name in parameter.opts if name.startswith("--")}


def test_no_command_lacks_a_flag_that_another_has() -> None:
    """Commands that read the same section have the same flags for it."""
    reads_pairs = {flag.name for flag in FLAGS if flag.path.startswith(("backbone.", "data.options"))}
    reads_pairs |= {"--size", "--workers", "--max-skipped", "--batch-size"}
    for command in (("train",), ("prune",)):
        assert reads_pairs <= flags_of_command(*command), command
    protocols = [flags_of_command("eval", name) for name in ("tags", "text", "segment")]
    views = {flag.name for flag in flags_of(DenseOptions)}
    shared = {
        "--backbone",
        "--backbone-option",
        "--device",
        "--preset",
        "--out",
        "--split",
        "--limit",
        "--rank",
        "--world",
    }
    for flags in protocols:
        assert views | shared | {"--threshold", "--json"} <= flags
    assert {"--tags", "--tags-option", "--rule", "--template"} <= protocols[0] & flags_of_command("train")
