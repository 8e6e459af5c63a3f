"""The configuration of a run: what it takes, what it refuses and how it says so."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("yaml", reason="needs the extra 'train'")

import yaml
from typer.testing import CliRunner

from ttd_plugins import cli
from ttd_plugins.adapter import Calibration
from ttd_plugins.cli.train import FLAGS
from ttd_plugins.errors import InputError
from ttd_plugins.training.config import TrainConfig


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


def test_every_flag_sets_an_option_that_there_is() -> None:
    known = {f"{section}.{key}" for section, keys in TrainConfig().as_dict().items() for key in keys}
    assert set(FLAGS.values()) <= known
    assert len(set(FLAGS.values())) == len(FLAGS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say what to train: a YAML file, or --backbone NAME and --data SOURCE"),
        (["--size", "big"], "--size is SIDE or HEIGHTxWIDTH"),
        (["--set", "run.sead=1"], "did you mean 'run.seed'"),
        (["--image-tower", "frozen", "--text-tower", "frozen"], "nothing is trained"),
        (["--resume"], "say what to train"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], said: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(cli.app, ["train", "--out", str(tmp_path / "run"), *arguments])
    assert found.exit_code == 2 and said in found.output
    assert not (tmp_path / "run").exists()
