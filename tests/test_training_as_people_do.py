"""Schedules, the best checkpoint, early stopping, more steps, averaged weights, and LoRA's scale and its start."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_training import MemoryPairs, assert_same, log_of, run_toy, toy_config, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_backbone import toy, toy_images

from ttd_plugins.engine import TTD
from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.lora import load_lora, save_lora, scale_lora
from ttd_plugins.training.best_checkpoint import judge
from ttd_plugins.training.checkpoints import checkpoint_steps, read_checkpoint, restore_backbone
from ttd_plugins.training.config import EvaluationConfig, TrainConfig
from ttd_plugins.training.falling_loss import fall_at_end
from ttd_plugins.training.run import TrainResult
from ttd_plugins.training.step import learning_rate_factor
from ttd_plugins.training.stop_signals import TrainingStoppedError

LORA = {"towers": {"image": "lora", "text": "lora", "rank": 2}}


def stopped_at(step: int, out: Path, config: TrainConfig, **more: Any) -> None:
    """Run until SIGTERM arrives after ``step`` steps."""
    pairs = MemoryPairs()
    pairs.on_batch = lambda epoch, batch: os.kill(os.getpid(), signal.SIGTERM) if batch == step else None
    with pytest.raises(TrainingStoppedError):
        run_toy(out, config, pairs=pairs, backbone=toy(), **more)


# Schedules -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(steps=st.integers(1, 300), warm_up=st.integers(0, 100))
def test_schedules_have_their_names(steps: int, warm_up: int) -> None:
    after = range(warm_up, max(steps, warm_up))
    for step in range(min(warm_up, steps)):
        for schedule in ("cosine", "linear", "constant"):
            assert learning_rate_factor(step, steps, warm_up, schedule) == (step + 1) / warm_up
    length = max(steps - warm_up, 1)
    for step in after:
        done = (step - warm_up) / length
        assert learning_rate_factor(step, steps, warm_up) == 0.5 * (1 + math.cos(math.pi * done))
        assert learning_rate_factor(step, steps, warm_up, "linear") == pytest.approx(1 - done)
        assert learning_rate_factor(step, steps, warm_up, "constant") == 1


@pytest.mark.parametrize(("schedule", "rates"), [
    ("linear", [0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025]), ("constant", [0.005, *[0.01] * 5]),
])  # fmt: skip
def test_a_run_follows_its_schedule(schedule: str, rates: list[float], tmp_path: Path) -> None:
    run_toy(tmp_path, toy_config(optimizer={"steps": 6, "schedule": schedule}))
    assert [line["learning_rate"] for line in log_of(tmp_path)] == pytest.approx(rates)


def test_an_unknown_schedule_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"optimizer\.schedule 'step'; known: constant, cosine, linear"):
        toy_config(optimizer={"schedule": "step"})
    with pytest.raises(InputError, match="unknown schedule"):
        learning_rate_factor(0, 10, 2, "stairs")  # type: ignore[arg-type]


# The best checkpoint and early stopping -------------------------------------------------------------------------------


def run_with_values(values: list[float], out: Path, *, resume: bool = False, **evaluation: Any) -> TrainResult:
    """A run of ten steps with an evaluation after every second one, whose metric has the values, in order."""
    config = toy_config(
        optimizer={"steps": 10},
        run={"evaluate_every": 2, "checkpoint_every": 3, "keep": 1},
        evaluation={"best": "val/score"} | evaluation,
    )

    def evaluate(ttd: TTD, step: int) -> dict[str, float]:
        return {"val/score": values[step // 2], "other": 1.0}

    return run_toy(out, config, backbone=toy(), evaluate=evaluate, resume=resume)


def test_the_best_checkpoint_is_kept_and_restored_by_name(tmp_path: Path) -> None:
    weights: dict[int, Any] = {}

    def evaluate(ttd: TTD, step: int) -> dict[str, float]:
        weights[step] = {name: p.detach().clone() for name, p in ttd.backbone.model.named_parameters()}
        return {"val/score": [0.1, 0.2, 0.7, 0.7, 0.3, 0.4][step // 2]}

    config = toy_config(
        optimizer={"steps": 10},
        run={"evaluate_every": 2, "checkpoint_every": 3, "keep": 1},
        evaluation={"best": "val/score"},
    )
    result = run_toy(tmp_path, config, backbone=toy(), evaluate=evaluate)
    assert result.best == 4  # the first of equal values
    assert checkpoint_steps(tmp_path) == [4, 10]
    best = dict(restore_backbone(tmp_path, "best", backbone=toy()).model.named_parameters())
    assert all(torch.equal(best[name], value) for name, value in weights[4].items())
    said = (
        f"the best checkpoint by val/score is that of step 4 (0.7); export it with: ttd export {tmp_path} --step best"
    )
    assert said in " ".join(result.notes)
    with pytest.raises(InputError, match="the step of a checkpoint is a number or best, not 'last'"):
        restore_backbone(tmp_path, "last", backbone=toy())


def test_smaller_is_better_for_losses_and_where_the_mode_says_so(tmp_path: Path) -> None:
    values = [5.0, 3.0, 2.0, 4.0, 6.0, 7.0]
    assert run_with_values(values, tmp_path / "max").best == 10
    result = run_with_values(values, tmp_path / "min", best_mode="min")
    assert (result.best, checkpoint_steps(tmp_path / "min")) == (4, [4, 10])
    for name, smallest in (("val/loss", 2), ("text/mfpr", 2), ("retrieval/r1", 4)):
        verdict = judge([(2, {name: 1.0}), (4, {name: 2.0})], EvaluationConfig(best=name), [2, 4])
        assert verdict is not None and verdict.step == smallest


def test_patience_ends_a_run_early_and_a_resumed_run_decides_the_same(tmp_path: Path) -> None:
    values = [0.1, 0.5, 0.4, 0.3, 0.9, 1.0]
    result = run_with_values(values, tmp_path, patience=2)
    assert (result.step, result.best) == (6, 2)
    assert result.notes[0] == (
        "stopped early after step 6: 2 evaluations in a row had no better val/score than 0.5 (evaluation.patience=2)"
    )
    # There is nothing left to do, until the patience is larger.
    again = run_with_values(values, tmp_path, resume=True, patience=2)
    assert (again.step, again.best) == (6, 2)
    assert again.notes == result.notes
    longer = run_with_values(values, tmp_path, resume=True, patience=3)
    assert (longer.step, longer.best) == (10, 10)
    whole = run_with_values(values, tmp_path / "whole", patience=9)
    assert_same(weights_of(longer), weights_of(whole))


def test_an_interrupted_run_keeps_the_best_of_the_uninterrupted_one(tmp_path: Path) -> None:
    values = [0.1, 0.2, 0.9, 0.3, 0.4, 0.5]
    whole = run_with_values(values, tmp_path / "whole")
    config = toy_config(
        optimizer={"steps": 10},
        run={"evaluate_every": 2, "checkpoint_every": 3, "keep": 1},
        evaluation={"best": "val/score"},
    )
    stopped_at(5, tmp_path / "part", config, evaluate=lambda ttd, step: {"val/score": values[step // 2], "other": 1.0})
    resumed = run_with_values(values, tmp_path / "part", resume=True)
    assert (resumed.best, checkpoint_steps(tmp_path / "part")) == (whole.best, checkpoint_steps(tmp_path / "whole"))
    assert_same(weights_of(resumed), weights_of(whole))


def test_a_run_that_never_beats_the_start_says_so(tmp_path: Path) -> None:
    result = run_with_values([0.9, 0.2, 0.3, 0.1, 0.1, 0.1], tmp_path)
    assert result.best == 4
    assert "is that of step 4 (0.3), and the value before the first step is better (0.9)" in " ".join(result.notes)


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4]), min_size=1, max_size=8),
    existing=st.sets(st.integers(0, 7)),
    patience=st.integers(1, 4),
    smallest=st.booleans(),
)
def test_the_verdict_agrees_with_a_loop(values: list[float], existing: set[int], patience: int, smallest: bool) -> None:
    options = EvaluationConfig(best="m", best_mode="min" if smallest else "max", patience=patience)
    verdict = judge([(step, {"m": value}) for step, value in enumerate(values)], options, existing)
    top = kept = None
    without = 0
    for step, value in enumerate(values):

        def better(than: int | None, value: float = value) -> bool:
            return than is None or (value < values[than] if smallest else value > values[than])

        top, without = (step, 0) if better(top) else (top, without + 1)
        if step in existing and better(kept):
            kept = step
    assert verdict is not None
    assert (verdict.top_step, verdict.step, verdict.without_gain) == (top, kept, without)
    assert verdict.ends_run == (without >= patience)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"evaluation": {"patience": 2}}, "evaluation.patience needs the metric to watch; name it in evaluation.best"),
        ({"evaluation": {"best": "m", "patience": 0}}, "patience must be 1 or more"),
        ({"towers": {"image": "full", "text": "full", "lora_scale": 0.5}}, "towers.lora_scale needs LoRA, and neither"),
        ({"towers": {"image": "full", "text": "frozen", "lora_from": "x"}}, "towers.lora_from needs LoRA, and neither"),
        ({"run": {"weight_ema": 1.0}}, "weight_ema must be"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        toy_config(**sections)
    assert said in str(caught.value)


def test_a_metric_that_nobody_measures_is_found_before_the_first_step(tmp_path: Path) -> None:
    config = toy_config(evaluation={"best": "retrieval/r1"})
    with pytest.raises(InputError, match=r"evaluation\.best names a metric, and nothing is evaluated; name a labelled"):
        run_toy(tmp_path / "nothing", config, backbone=toy())
    config = toy_config(evaluation={"best": "retrieval/r1"}, run={"evaluate_every": 1})
    with pytest.raises(
        InputError, match=r"'retrieval/r1', and the evaluation has no finite metric of that name; it has"
    ):
        run_toy(tmp_path / "other", config, backbone=toy(), evaluate=lambda ttd, step: {"score": 1.0})
    assert checkpoint_steps(tmp_path / "other") == []
    run_toy(tmp_path / "plain", toy_config(optimizer={"steps": 1}), backbone=toy())
    with pytest.raises(InputError, match=r"has no best checkpoint, because evaluation\.best names no metric"):
        restore_backbone(tmp_path / "plain", "best", backbone=toy())


# More steps ----------------------------------------------------------------------------------------------------------


def test_more_steps_with_a_constant_rate_are_those_of_a_longer_run(tmp_path: Path) -> None:
    def config(steps: int) -> TrainConfig:
        return toy_config(optimizer={"steps": steps, "schedule": "constant"})

    run_toy(tmp_path / "part", config(4), backbone=toy())
    longer = run_toy(tmp_path / "part", config(9), backbone=toy(), resume=True)
    whole = run_toy(tmp_path / "whole", config(9), backbone=toy())
    assert longer.step == 9
    assert_same(weights_of(longer), weights_of(whole))
    assert log_of(tmp_path / "part") == log_of(tmp_path / "whole")
    assert TrainConfig.read(tmp_path / "part" / "config.yaml").optimizer.steps == 9


def test_more_steps_follow_the_schedule_of_all_steps_and_say_so(tmp_path: Path) -> None:
    from ttd_plugins.training.reporting import Reporter

    class Messages(Reporter):
        def __init__(self) -> None:
            self.sentences: list[str] = []

        def on_message(self, sentence: str) -> None:
            self.sentences.append(sentence)

    run_toy(tmp_path, toy_config(optimizer={"steps": 4}), backbone=toy())
    reporter = Messages()
    run_toy(tmp_path, toy_config(optimizer={"steps": 8}), backbone=toy(), resume=True, reporter=reporter)
    rates = [line["learning_rate"] for line in log_of(tmp_path)]
    assert rates[4:] == pytest.approx([0.01 * learning_rate_factor(step, 8, 2) for step in range(4, 8)])
    assert reporter.sentences[0] == (
        "the run has 8 steps instead of 4; from step 5 on, its learning rate is that of a run of 8 steps (cosine, next "
        "0.0075)"
    )
    with pytest.raises(InputError, match=r"has 8 steps already, and 6 are requested; set optimizer\.steps"):
        run_toy(tmp_path, toy_config(optimizer={"steps": 6}), backbone=toy(), resume=True)
    assert TrainConfig.read(tmp_path / "config.yaml").optimizer.steps == 8


# The average of the weights ------------------------------------------------------------------------------------------


def test_the_average_is_the_stated_formula_and_is_what_the_run_yields(tmp_path: Path) -> None:
    config = toy_config(optimizer={"steps": 6}, run={"weight_ema": 0.6})
    start = {name: p.detach().clone() for name, p in toy().model.named_parameters()}
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def evaluate(ttd: TTD, step: int) -> dict[str, float]:
        seen[step] = {name: p.detach().clone() for name, p in ttd.backbone.model.named_parameters()}
        return {"m": float(step)}

    config = toy_config(optimizer={"steps": 6}, run={"weight_ema": 0.6, "evaluate_every": 1})
    result = run_toy(tmp_path, config, backbone=toy(), evaluate=evaluate)
    average = {name: value.double() for name, value in start.items()}
    for step in range(1, 7):
        trained = read_checkpoint(tmp_path, step).trained
        decay = min(0.6, step / (9 + step))
        for name, value in trained.items():
            average[name] = decay * average[name] + (1 - decay) * value.double()
            np.testing.assert_allclose(read_checkpoint(tmp_path, step).average[name], average[name], atol=1e-6)
            assert torch.equal(seen[step][name], read_checkpoint(tmp_path, step).average[name])
    last = read_checkpoint(tmp_path)
    found = dict(result.backbone.model.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in last.average.items())
    averaged = dict(restore_backbone(tmp_path, backbone=toy()).model.named_parameters())
    assert all(torch.equal(averaged[name], value) for name, value in last.average.items())
    plain = dict(restore_backbone(tmp_path, backbone=toy(), averaged=False).model.named_parameters())
    assert all(torch.equal(plain[name], value) for name, value in last.trained.items())
    assert any(not torch.equal(last.trained[name], value) for name, value in last.average.items())
    assert "moving average of the trained weights (run.weight_ema=0.6)" in " ".join(result.notes)


def test_the_average_does_not_change_training_and_resumes_bitwise(tmp_path: Path) -> None:
    config = toy_config(optimizer={"steps": 6}, run={"weight_ema": 0.9})
    whole = run_toy(tmp_path / "whole", config, backbone=toy())
    stopped_at(3, tmp_path / "part", config)
    resumed = run_toy(tmp_path / "part", config, backbone=toy(), resume=True)
    assert_same(weights_of(resumed), weights_of(whole))
    run_toy(tmp_path / "plain", toy_config(optimizer={"steps": 6}), backbone=toy())
    without, ours, again = (read_checkpoint(tmp_path / name) for name in ("plain", "whole", "part"))
    assert_same(ours.trained, without.trained)
    assert_same(again.average, ours.average)
    assert not without.average
    assert not (tmp_path / "plain" / "checkpoints" / "step-00000006" / "average.safetensors").exists()


def test_a_lost_average_is_one_sentence(tmp_path: Path) -> None:
    config = toy_config(optimizer={"steps": 2}, run={"weight_ema": 0.9})
    run_toy(tmp_path, config, backbone=toy())
    (tmp_path / "checkpoints" / "step-00000002" / "average.safetensors").unlink()
    with pytest.raises(InputError, match=r"average\.safetensors cannot be read"):
        run_toy(tmp_path, config, backbone=toy(), resume=True)


# LoRA's scale --------------------------------------------------------------------------------------------------------


def test_the_scale_holds_for_result_evaluation_and_restored_backbone_but_not_for_training(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    measured: dict[float, list[float]] = {}

    @torch.no_grad()
    def seen(backbone: Any) -> float:
        """A number that LoRA of both towers changes."""
        patches = backbone.encode_image(toy_images(2)).patches
        return float(patches.sum() + backbone.encode_text(backbone.tokenize(["a dog"]).ids).sum())

    def run(scale: float) -> TrainResult:
        def evaluate(ttd: TTD, step: int) -> dict[str, float]:
            measured.setdefault(scale, []).append(seen(ttd.backbone))
            return {"m": 1.0}

        config = toy_config(
            **{"towers": LORA["towers"] | {"lora_scale": scale}}, optimizer={"steps": 3}, run={"evaluate_every": 3}
        )
        return run_toy(tmp_path / str(scale), config, backbone=toy(), evaluate=evaluate)

    full, half = run(1.0), run(0.5)
    ours, theirs = (read_checkpoint(tmp_path / name).trained for name in ("0.5", "1.0"))
    assert_same(ours, theirs)
    scale_lora(full.backbone, 0.5)
    assert_same(weights_of(half), weights_of(full))
    assert measured[0.5][-1] == pytest.approx(seen(full.backbone), rel=1e-6)
    assert measured[1.0][-1] != pytest.approx(seen(full.backbone), rel=1e-6)
    assert_same(dict(restore_backbone(tmp_path / "0.5", backbone=toy()).model.state_dict()), weights_of(full))
    whole = restore_backbone(tmp_path / "0.5", backbone=toy(), lora_scale=1.0)
    assert all(torch.equal(whole.model.state_dict()[name], value) for name, value in ours.items())
    assert "LoRA is scaled by 0.5" in " ".join(half.notes) and not full.notes
    # The scale may change when a run continues.
    config = toy_config(**{"towers": LORA["towers"] | {"lora_scale": 0.25}}, optimizer={"steps": 3},
                        run={"evaluate_every": 3})  # fmt: skip
    again = run_toy(tmp_path / "0.5", config, backbone=toy(), resume=True)
    scale_lora(full.backbone, 0.5)
    assert_same(weights_of(again), weights_of(full))


# LoRA that peft made -------------------------------------------------------------------------------------------------


def peft_folder(out: Path, modules: Any, **options: Any) -> Any:
    """LoRA that peft adds to the toy's model itself, with weights that are not zero; returns peft's model."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=modules, **options)
    model = peft.get_peft_model(toy().model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(out)
    return model.eval()


def some_targets() -> list[str]:
    backbone = toy()
    return [backbone.lora_targets("image")[0], backbone.lora_targets("text")[0]]


@pytest.mark.parametrize("how", ["list", "expression", "stabilised"])
def test_a_lora_of_peft_computes_the_same_here(how: str, tmp_path: Path) -> None:
    names = some_targets()
    modules: Any = "|".join(names) if how == "expression" else names
    model = peft_folder(tmp_path, modules, use_rslora=how == "stabilised")
    backbone = load_lora(toy(), tmp_path)
    merged = model.merge_and_unload().state_dict()
    ours = backbone.merge().state_dict()
    assert ours.keys() == merged.keys()
    for name, value in merged.items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=1e-5)


def test_a_run_starts_from_a_lora_of_peft_and_resumes_without_that_folder(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    peft_folder(folder, some_targets())
    start = {n: p.detach().clone() for n, p in load_lora(toy(), folder).model.named_parameters() if "lora_" in n}
    config = toy_config(
        towers=LORA["towers"] | {"lora_from": str(folder)}, optimizer={"steps": 4, "learning_rate": 1e-9}
    )
    result = run_toy(tmp_path / "slow", config, backbone=toy())
    trained = read_checkpoint(tmp_path / "slow").trained
    assert trained.keys() == start.keys()
    assert all(torch.allclose(trained[name], value, atol=1e-6) for name, value in start.items())
    config = toy_config(towers=LORA["towers"] | {"lora_from": str(folder)}, optimizer={"steps": 6})
    whole = run_toy(tmp_path / "whole", config, backbone=toy())
    stopped_at(3, tmp_path / "part", config)
    shutil.rmtree(folder)
    resumed = run_toy(tmp_path / "part", config, backbone=toy(), resume=True)
    assert_same(weights_of(resumed), weights_of(whole))
    assert_same(dict(restore_backbone(tmp_path / "part", backbone=toy()).model.state_dict()), weights_of(whole))
    assert result.backbone._lora is not None and result.backbone._lora.config.r == 3
    save_lora(resumed.backbone, tmp_path / "ours")
    assert_same(dict(load_lora(toy(), tmp_path / "ours").eval().model.state_dict()), weights_of(whole))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("dora", r"describes more than plain LoRA \(use_dora\)"),
        ("lost", r"lacks the LoRA of 1 modules that adapter_config\.json declares"),
        ("tower", r"adapts the text tower, and towers\.text is frozen; set towers\.text: lora"),
        ("gone", r"no LoRA can be read from"),
        (
            "other",
            r"holds LoRA for 1 modules that .* cannot adapt in the dense mode plain, such as pool_head; load the",
        ),
    ],
)
def test_a_lora_that_cannot_start_a_run_is_one_sentence(change: str, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    peft_folder(folder, [*some_targets(), *(["pool_head"] if change == "other" else [])], use_dora=change == "dora")
    towers = LORA["towers"] | {"lora_from": str(folder)}
    if change == "lost":
        from safetensors.torch import load_file, save_file

        file = folder / "adapter_model.safetensors"
        lost = some_targets()[0]
        save_file({name: value for name, value in load_file(file).items() if lost not in name}, file)
    elif change == "tower":
        towers["text"] = "frozen"
    elif change == "gone":
        shutil.rmtree(folder)
    with pytest.raises(TTDError, match=said):
        run_toy(tmp_path / "run", toy_config(towers=towers), backbone=toy())
    assert not (tmp_path / "run" / "config.yaml").exists()


# The contrastive loss at the end -------------------------------------------------------------------------------------


def lines_of(shape: Callable[[float], float], count: int, noise: float, seed: int) -> list[float]:
    generator = np.random.default_rng(seed)
    return [shape(place) + noise * generator.standard_normal() for place in np.linspace(0, 1, count)]


def test_only_a_steep_fall_is_reported() -> None:
    quiet, reported = 0, 0
    for seed in range(300):
        for noise in (0.01, 0.05, 0.2):
            quiet += fall_at_end(lines_of(lambda place: 1.0, 20, noise, seed)) is None
        # It fell early, and hardly at the end.
        quiet += fall_at_end(lines_of(lambda place: 0.8 + 0.6 * math.exp(-12 * place), 20, 0.02, seed)) is None
        reported += fall_at_end(lines_of(lambda place: 3.0 - 2.0 * place, 20, 0.05, seed)) is not None
    assert quiet >= 1197
    assert reported == 300
    assert fall_at_end(lines_of(lambda place: 3.0 - 2.0 * place, 15, 0.0, 0)) == pytest.approx(0.5, abs=0.05)
    assert fall_at_end([3.0, 2.0, 1.0, 0.5]) is None  # too short to say
    assert fall_at_end([]) is None
    assert fall_at_end([3.0, math.nan] * 20) is None


def test_a_run_whose_contrastive_loss_falls_says_so_once_and_the_control_does_not(tmp_path: Path) -> None:
    def notes(out: Path, **ttd: Any) -> list[str]:
        config = toy_config(
            optimizer={"steps": 40, "learning_rate": 0.005, "warm_up": 0, "schedule": "constant", "weight_decay": 0.0},
            run={"log_every": 2, "checkpoint_every": 0},
            ttd={"tag_weight": 0.01, "distill_weight": 0.01} | ttd,
        )

        class Same(MemoryPairs):
            def batch(self, numbers: list[int]) -> Any:
                return super().batch(list(range(len(numbers))))

        return run_toy(out, config, pairs=Same(), backbone=toy()).notes

    (sentence,) = notes(tmp_path / "ttd")
    assert sentence.startswith("the contrastive loss still fell by ") and "no longer rises" in sentence
    assert notes(tmp_path / "control", tag_weight=0.0, distill_weight=0.0) == []


# On the command line --------------------------------------------------------------------------------------------------


def test_the_command_line_trains_extends_and_exports_as_it_says(tmp_path: Path) -> None:
    for package in ("peft", "open_clip", "accelerate"):
        pytest.importorskip(package)
    from safetensors.torch import load_file
    from test_train_kill import make_pairs
    from typer.testing import CliRunner

    from ttd_plugins import cli

    def ttd(*arguments: Any) -> str:
        done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return done.output

    run = tmp_path / "run"
    said = ttd(
        "train", "--backbone", "open_clip:tiny", "--data", make_pairs(tmp_path / "pairs"), "--out", run, "--cpu",
        "--steps", 2, "--batch-size", 4, "--size", 64, "--warm-up", 0, "--schedule", "constant", "--rank", 2,
        "--lora-scale", 0.5, "--weight-ema", 0.9, "--evaluate", "scenes:8", "--evaluate-every", 1,
        "--best", "scenes/tag_ap", "--anchor-weight", 1,
    )  # fmt: skip
    assert "note: LoRA is scaled by 0.5 in the backbone, its evaluations and its export (towers.lora_scale)" in said
    assert "note: the best checkpoint by scenes/tag_ap is that of step" in said
    assert "anchor" in said
    assert "3 steps on open_clip:tiny" in ttd("train", "--out", run, "--resume", "--steps", 3)
    said = ttd("export", run, "--out", tmp_path / "best", "--step", "best", "--form", "lora")
    assert "LoRA is scaled by 0.5, as in the run; --lora-scale 1 exports it as trained" in said
    ttd("export", run, "--out", tmp_path / "last", "--form", "lora", "--lora-scale", 1, "--not-averaged")
    scaled = ttd("export", run, "--out", tmp_path / "average", "--form", "lora")
    assert "wrote" in scaled
    stored = read_checkpoint(run)
    last = load_file(tmp_path / "last" / "adapter_model.safetensors")
    average = load_file(tmp_path / "average" / "adapter_model.safetensors")
    for name, value in stored.trained.items():
        key = "base_model.model." + name.replace(".default.", ".")
        factor = 0.5 if "lora_B" in name else 1.0
        assert torch.equal(last[key], value)
        assert torch.equal(average[key], factor * stored.average[name])
    card = (tmp_path / "average" / "README.md").read_text()
    assert "| lora_scale | 0.5 |" in card and "| weights | average, decay 0.9 |" in card
    done = CliRunner().invoke(cli.app, ["export", str(run), "--out", str(tmp_path / "x"), "--step", "newest"])
    assert done.exit_code != 0 and "a number or best, not 'newest'" in str(done.output) + str(done.exception)
