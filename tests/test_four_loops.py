"""One training in four loops (plain, accelerate, Lightning, Trainer): same losses, resumed bitwise, LoRA-only files."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_training import assert_same, caption_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from toy_backbone import toy, toy_images

pytest.importorskip("peft", reason="LoRA needs peft")

from ttd_plugins.engine import TTD
from ttd_plugins.errors import InputError, InputWarning
from ttd_plugins.training.own_loop import load_training_state, save_training_state, trained_state_dict

RATE, STEPS = 0.05, 6


class Pairs(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> tuple[Tensor, str]:
        return toy_images(1, seed=number)[0], caption_of(number)


def collate(pairs: list[tuple[Tensor, str]]) -> dict[str, Any]:
    images, captions = zip(*pairs, strict=True)
    return {"images": torch.stack(images), "captions": list(captions)}


def batches() -> DataLoader:
    """Three batches an epoch, in order; a run of six steps takes two epochs."""
    return DataLoader(Pairs(), batch_size=4, collate_fn=collate)


class Recorded(TTD):
    """The engine with a record of the losses of its training steps."""

    losses_seen: list[float]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if torch.is_grad_enabled():
            self.losses_seen.append(float(output.loss))
        return output


def engine(*, dropout: float = 0.0, **options: Any) -> Recorded:
    torch.manual_seed(0)
    backbone = toy(1, dropout=dropout)
    backbone.add_lora(rank=2)
    ttd = Recorded(backbone, **({"teacher": "ema", "ema_decay": 0.5} | options))
    ttd.losses_seen = []
    torch.manual_seed(7)
    return ttd


def optimizer_of(ttd: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW((p for p in ttd.parameters() if p.requires_grad), lr=RATE, weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)


# The loops: each takes ``steps`` steps in all, and continues from ``out`` if ``resume`` is set. -----------------------


def plain_loop(ttd: Recorded, out: Path, steps: int, resume: bool) -> None:
    optimizer, scheduler = optimizer_of(ttd)
    done = load_training_state(out, ttd, optimizer, scheduler=scheduler).step if resume else 0
    ttd.train()
    for step in range(done, steps):
        batch = list(batches())[step % 3]
        optimizer.zero_grad()
        ttd(**batch).loss.backward()
        optimizer.step()
        scheduler.step()
        save_training_state(out, ttd, optimizer, step=step + 1, scheduler=scheduler, extra={"epoch": step // 3})


@contextlib.contextmanager
def accelerate_state() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    from ttd_plugins.training.processes import reset_accelerate

    reset_accelerate()
    try:
        yield accelerate.Accelerator(cpu=True)
    finally:
        reset_accelerate()


def accelerate_loop(ttd: Recorded, out: Path, steps: int, resume: bool) -> None:
    with accelerate_state() as accelerator:
        optimizer, scheduler = optimizer_of(ttd)
        model, optimizer, scheduler, loader = accelerator.prepare(ttd, optimizer, scheduler, batches())
        if resume:
            accelerator.load_state(str(out / "state"))
        model.train()
        # load_state() restores the position of the scheduler, and so the number of steps.
        done = scheduler.scheduler.last_epoch
        while done < steps:
            for batch in loader:
                optimizer.zero_grad()
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                scheduler.step()
                done += 1
        accelerator.save_state(str(out / "state"))


def lightning_loop(ttd: Recorded, out: Path, steps: int, resume: bool) -> None:
    lightning = pytest.importorskip("lightning", reason="needs lightning")
    from ttd_plugins.training.lightning_callback import lightning_callback

    class Tuning(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.ttd = ttd

        def training_step(self, batch: dict[str, Any], number: int) -> Tensor:
            loss: Tensor = self.ttd(**batch).loss
            return loss

        def configure_optimizers(self) -> Any:
            optimizer, scheduler = optimizer_of(self)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    saving = lightning.pytorch.callbacks.ModelCheckpoint(out, "at-{step}", every_n_train_steps=3, save_top_k=-1,
                                                         auto_insert_metric_name=False)  # fmt: skip
    trainer = lightning.Trainer(
        default_root_dir=out, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, max_steps=steps, log_every_n_steps=1,
        callbacks=[lightning_callback(), saving],
    )  # fmt: skip
    trainer.fit(Tuning(), batches(), ckpt_path=out / "at-3.ckpt" if resume else None)
    if not resume:
        state = torch.load(out / "at-3.ckpt", weights_only=False)["state_dict"]
        assert set(state) == {f"ttd.{name}" for name in trained_state_dict(ttd)}
    metrics = {name.removeprefix("ttd/") for name in trainer.callback_metrics}
    assert {"tag", "distill", "contrastive", "selected_per_caption", "caption_map_spread"} <= metrics


def trainer_loop(ttd: Recorded, out: Path, steps: int, resume: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="Trainer needs transformers")
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")

    class TTDTrainer(transformers.Trainer):
        """The recipe of docs/own-loop.md."""

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            super()._save(output_dir, trained_state_dict(self.model))

    arguments = transformers.TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=4, logging_steps=1, save_steps=3,
        report_to="none", use_cpu=True, seed=7, disable_tqdm=True, max_grad_norm=0.0,
        train_sampling_strategy="sequential", remove_unused_columns=False,
    )  # fmt: skip
    trainer = TTDTrainer(
        model=ttd, args=arguments, train_dataset=Pairs(), data_collator=collate, optimizers=optimizer_of(ttd)
    )
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-3") if resume else None)
    from safetensors.torch import load_file

    stored = load_file(out / "checkpoint-3" / "model.safetensors")
    assert set(stored) == set(trained_state_dict(ttd))


LOOPS = {"plain": plain_loop, "accelerate": accelerate_loop, "lightning": lightning_loop, "trainer": trainer_loop}


@pytest.fixture(scope="module")
def expected() -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of the loop without any library or helper."""
    ttd = engine()
    optimizer, scheduler = optimizer_of(ttd)
    ttd.train()
    for batch in [*batches(), *batches()]:
        optimizer.zero_grad()
        ttd(**batch).loss.backward()
        optimizer.step()
        scheduler.step()
    return ttd.losses_seen, {name: value.detach().clone() for name, value in ttd.state_dict().items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(LOOPS))
def test_every_loop_has_the_same_losses_and_weights(name: str, tmp_path: Path, expected: Any) -> None:
    losses, weights = expected
    ttd = engine()
    LOOPS[name](ttd, tmp_path, STEPS, False)
    assert ttd.losses_seen == losses
    assert_same(dict(ttd.state_dict()), weights)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(LOOPS))
def test_every_loop_resumes_bitwise_in_new_objects(name: str, tmp_path: Path, expected: Any) -> None:
    losses, weights = expected
    LOOPS[name](engine(), tmp_path, 3, False)
    resumed = engine()
    LOOPS[name](resumed, tmp_path, STEPS, True)
    assert resumed.losses_seen == losses[3:]
    assert_same(dict(resumed.state_dict()), weights)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["plain", "accelerate", "trainer"])
def test_dropout_continues_too_where_the_random_state_is_stored(name: str, tmp_path: Path) -> None:
    """Lightning stores no random states; the other loops do."""
    whole = engine(dropout=0.3)
    LOOPS[name](whole, tmp_path / "whole", STEPS, False)
    LOOPS[name](engine(dropout=0.3), tmp_path / "part", 3, False)
    resumed = engine(dropout=0.3)
    LOOPS[name](resumed, tmp_path / "part", STEPS, True)
    assert resumed.losses_seen == whole.losses_seen[3:]
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))


# The files of one's own loop ------------------------------------------------------------------------------------------


def test_a_checkpoint_has_lora_alone_and_loads_into_another_process_object(tmp_path: Path) -> None:
    ttd = engine(teacher="self")
    plain_loop(ttd, tmp_path, 2, False)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "checkpoints" / "step-00000002" / "trained.safetensors")
    lora = {id(parameter) for parameter in ttd.backbone.lora_parameters()}
    assert set(stored) == {name for name, p in ttd.backbone.model.named_parameters() if id(p) in lora}
    again = engine(teacher="self")
    again.backbone.lora_parameters()[0].data.fill_(5.0)
    optimizer, scheduler = optimizer_of(again)
    found = load_training_state(tmp_path, again, optimizer, step=1, scheduler=scheduler)
    assert (found.step, found.extra) == (1, {"epoch": 0})
    # The learning rate, which a scheduler's own state does not set.
    assert optimizer.param_groups[0]["lr"] == RATE * 0.9 and optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_full_training_stores_buffers_as_well() -> None:
    backbone = toy()
    assert set(trained_state_dict(TTD(backbone))) == {f"backbone.model.{name}" for name in backbone.model.state_dict()}


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    ttd = engine()
    for step in range(5):
        save_training_state(tmp_path, ttd, step=step, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
    assert load_training_state(tmp_path, ttd).step == 4


def test_no_checkpoint_is_written_before_a_later_one(tmp_path: Path) -> None:
    """The later one would be loaded, and the new one could be deleted at once as the oldest."""
    ttd = engine()
    for step in (900, 1000, 1100):
        save_training_state(tmp_path, ttd, step=step)
    saved = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(InputError, match=r"has checkpoints of later steps than 810 \(900, 1000, 1100\); choose"):
        save_training_state(tmp_path, ttd, step=810, keep=3)
    with pytest.raises(InputError, match=r"later steps than 1050 \(1100\); choose another folder or delete"):
        save_training_state(tmp_path, ttd, step=1050, keep=3)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == saved
    # The same step again replaces its checkpoint.
    assert save_training_state(tmp_path, ttd, step=1100, extra={"again": True}) in saved
    assert load_training_state(tmp_path, ttd).extra == {"again": True}


@pytest.mark.parametrize("kind", ["MultiStepLR", "CosineAnnealingLR", "SequentialLR", "ReduceLROnPlateau"])
def test_schedulers_of_torch_continue(kind: str, tmp_path: Path) -> None:
    def made() -> tuple[Recorded, Any, Any]:
        ttd = engine()
        optimizer = torch.optim.AdamW((p for p in ttd.parameters() if p.requires_grad), lr=RATE)
        schedulers = torch.optim.lr_scheduler
        made: Any = {
            "MultiStepLR": lambda: schedulers.MultiStepLR(optimizer, [2, 4, 4]),
            "CosineAnnealingLR": lambda: schedulers.CosineAnnealingLR(optimizer, 8),
            "SequentialLR": lambda: schedulers.SequentialLR(
                optimizer, [schedulers.LinearLR(optimizer, 0.1), schedulers.ExponentialLR(optimizer, 0.9)], [2]
            ),
            "ReduceLROnPlateau": lambda: schedulers.ReduceLROnPlateau(optimizer, patience=0),
        }[kind]()
        return ttd, optimizer, made

    def steps(ttd: Recorded, optimizer: Any, scheduler: Any, first: int, last: int) -> list[float]:
        rates = []
        for step in range(first, last):
            optimizer.zero_grad()
            ttd(**list(batches())[step % 3]).loss.backward()
            optimizer.step()
            scheduler.step(*([1.0 + step] if kind == "ReduceLROnPlateau" else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    whole = made()
    rates = steps(*whole, 0, 6)
    part = made()
    steps(*part, 0, 3)
    save_training_state(tmp_path, part[0], part[1], step=3, scheduler=part[2])
    resumed = made()
    load_training_state(tmp_path, resumed[0], resumed[1], scheduler=resumed[2])
    assert steps(*resumed, 3, 6) == rates[3:]
    assert_same(dict(resumed[0].state_dict()), dict(whole[0].state_dict()))


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    ttd = engine()
    optimizer, scheduler = optimizer_of(ttd)
    save_training_state(tmp_path, ttd, optimizer, step=1, scheduler=scheduler)
    other = toy(1)
    other.add_lora(rank=2, towers=["image"])
    cases: list[tuple[Any, str]] = [
        (lambda: save_training_state(tmp_path, nn.Linear(2, 2), step=1), "pass the TTD, not an object of class"),
        (lambda: save_training_state(tmp_path, ttd, step=-1), "step must be a whole number of 0 or more, not -1"),
        (lambda: save_training_state(tmp_path, ttd, step=1, keep=0), "keep must be a whole number of 1 or more, not 0"),
        (lambda: save_training_state(tmp_path, ttd, step=1, extra={"a": torch}), "extra has a value of class"),
        (lambda: save_training_state(tmp_path, ttd, step=1, scheduler=3), "scheduler has no state_dict"),
        (lambda: save_training_state(tmp_path, ttd, torch.optim.SGD(nn.Linear(2, 3).parameters(), lr=1.0), step=1),
         "that is not the backbone's"),
        (lambda: load_training_state(tmp_path, ttd, optimizer), "has the parts scheduler; pass these by name"),
        (lambda: load_training_state(tmp_path, TTD(other, teacher="ema"), scheduler=scheduler), "has other tensors"),
        (lambda: load_training_state(tmp_path, engine(teacher="self"), scheduler=scheduler), "has a moving average"),
        (lambda: load_training_state(tmp_path / "none", ttd), "has no checkpoint"),
        (lambda: load_training_state(tmp_path, ttd, step=3, scheduler=scheduler), "has no checkpoint of step 3"),
    ]  # fmt: skip
    for call, said in cases:
        with pytest.raises(InputError) as caught:
            call()
        assert said in str(caught.value)
    frozen = toy()
    frozen.model.requires_grad_(False)
    with pytest.raises(InputError, match=r"nothing of .* requires a gradient; add LoRA, or unfreeze a tower"):
        trained_state_dict(TTD(frozen))


def test_a_counter_and_keys_that_are_no_texts_come_back() -> None:
    from ttd_plugins.training.own_loop import _decoded, _encoded

    value = {"a": Counter({4: 2, 8: 1}), "b": {1: [2, {"c": None}]}, "d": [1.5, True, "x"]}
    assert _decoded(_encoded("it", copy.deepcopy(value))) == value
    assert isinstance(_decoded(_encoded("it", value))["a"], Counter)


# Lightning -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_lightning_callback_warns_of_a_collapse_and_refuses_another_module(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="needs lightning")
    from ttd_plugins.training.lightning_callback import lightning_callback

    class Tuning(lightning.LightningModule):
        def __init__(self, part: nn.Module) -> None:
            super().__init__()
            self.ttd = part

        def training_step(self, batch: dict[str, Any], number: int) -> Tensor:
            loss: Tensor = self.ttd(**batch).loss
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def trainer() -> Any:
        return lightning.Trainer(
            default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, max_steps=2, log_every_n_steps=1,
            callbacks=[lightning_callback()],
        )  # fmt: skip

    used = trainer()
    with pytest.warns(InputWarning, match="hardly any tag is selected"):
        used.fit(Tuning(engine(teacher="self", rule="absolute", threshold=1.0)), batches())
    images_alone = toy(1)
    images_alone.add_lora(rank=2, towers=["image"])
    used = trainer()
    used.fit(Tuning(TTD(images_alone)), batches())
    used.save_checkpoint(tmp_path / "two.ckpt")
    backbone = toy(1)
    backbone.add_lora(rank=2)
    with pytest.raises(InputError, match=r"the checkpoint lacks \d+ of \d+ trained tensors, such as ttd\.backbone"):
        trainer().fit(Tuning(TTD(backbone)), batches(), ckpt_path=tmp_path / "two.ckpt")
    with pytest.raises(InputError, match="Tuning contains no TTD, which lightning_callback"):
        trainer().fit(Tuning(nn.Linear(2, 2)), batches())


def test_the_core_imports_no_lightning() -> None:
    import subprocess
    import sys

    code = (
        "import sys, ttd_plugins.training.own_loop, ttd_plugins.training.lightning_callback as _;"
        "assert not {'lightning', 'pytorch_lightning', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
