"""TTD in the loops of other libraries, as they are: Trainer, Lightning, accelerate, and torch's own wrappers."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_training import caption_of, join, two_processes
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from toy_backbone import ToyAdapter, toy, toy_images

from ttd_plugins.engine import TTD, TTDOutput
from ttd_plugins.errors import InputError, InputWarning, TTDError
from ttd_plugins.utils import distributed

KEYS = ["loss", "losses", "caption_maps", "union", "usable"]


class Pairs(Dataset):
    """Items with the names of the engine's arguments."""

    def __init__(self, count: int = 8) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"images": toy_images(1, seed=number)[0], "captions": caption_of(number)}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {"images": torch.stack([item["images"] for item in items]), "captions": [item["captions"] for item in items]}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def differ(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(found[name], value)]


def ema(seed: int = 0) -> TTD:
    return TTD(toy(seed), teacher="ema", ema_decay=0.5)


# The output as a mapping and as a tuple ------------------------------------------------------------------------------


def output_of(**options: Any) -> TTDOutput:
    return TTD(toy(), **options)(toy_images(3), [caption_of(number) for number in range(3)])


def test_an_output_is_a_mapping_and_a_tuple_of_what_its_attributes_are() -> None:
    output = output_of()
    assert isinstance(output, Mapping) and list(output) == list(output.keys()) == KEYS
    for number, key in enumerate(KEYS):
        assert key in output
        for value in (output[key], output[number], output.to_tuple()[number]):
            assert value is output.get(key)
            attribute = getattr(output, key)
            assert torch.equal(value, attribute) if isinstance(value, Tensor) else value is attribute
    assert output[0] is output.loss and output[1:] == output.to_tuple()[1:]
    assert output["alignment"] is output.alignment and output["targets"] is output.targets
    assert len(output) == len(KEYS) and dict(output).keys() == set(KEYS) and "tag" in output["losses"]
    with pytest.raises(KeyError):
        output["logits"]
    assert "loss" in repr(output) and output != output_of()


def test_the_loss_alone_has_a_gradient() -> None:
    output = output_of()
    assert output.loss.requires_grad
    assert not any(value.requires_grad for key, value in output.items() if key not in ("loss", "losses"))
    assert not any(value.requires_grad for value in output.losses.values())


@pytest.mark.parametrize("how", ["items", "tree", "deepcopy"])
def test_an_output_that_is_made_from_its_items_has_everything(how: str) -> None:
    """As accelerate and Lightning do to move an output or to convert it."""
    output = output_of()
    if how == "items":
        made = type(output)(
            {key: value.double() if isinstance(value, Tensor) else value for key, value in output.items()}
        )
        assert made.loss.dtype == torch.float64
    elif how == "tree":
        from torch.utils import _pytree

        made = _pytree.tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, output)
    else:
        with torch.no_grad():
            output = output_of()
        made = copy.deepcopy(output)
    assert isinstance(made, TTDOutput) and list(made) == KEYS
    assert made.statistics == output.statistics
    assert made.alignment.candidates.tags == output.alignment.candidates.tags
    with pytest.raises(TypeError, match="the items of another TTDOutput"):
        TTDOutput({"loss": output.loss, "losses": {}})


def test_an_output_is_freed_with_its_last_reference() -> None:
    output = output_of()
    graph = weakref.ref(output.alignment.patches)
    gc.disable()
    try:
        del output
        assert graph() is None
    finally:
        gc.enable()


def test_an_output_without_loss_cannot_be_had() -> None:
    with pytest.raises(InputError, match="TTD always returns its loss"):
        TTD(toy())(toy_images(1), ["dog"], return_loss=False)


# A moving average in a state dict ------------------------------------------------------------------------------------


def steps(ttd: TTD, first: int, last: int) -> None:
    """SGD without state, so that weights and average are all that a loop has."""
    ttd.train()
    for number in range(first, last):
        ttd.zero_grad(set_to_none=True)
        ttd(toy_images(4, seed=number), [caption_of(number + row) for row in range(4)]).loss.backward()
        with torch.no_grad():
            for parameter in ttd.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad


def test_a_loop_goes_on_from_a_state_dict_as_if_it_had_not_stopped() -> None:
    whole, first = ema(), ema()
    steps(whole, 0, 6)
    steps(first, 0, 3)
    state = weights(first)
    resumed = ema(seed=5)
    assert not any(resumed.load_state_dict(state))
    steps(resumed, 3, 6)
    assert not differ(weights(resumed), weights(whole))
    # The average matters: from the student's weights the loop would go elsewhere.
    other = ema(seed=5)
    with pytest.warns(InputWarning, match="it starts anew at the loaded weights"):
        missing, unexpected = other.load_state_dict(
            {key: value for key, value in state.items() if not key.startswith("teacher.")}, strict=False
        )
    assert set(missing) == {key for key in state if key.startswith("teacher.")} and not unexpected
    assert other.teacher is not None
    assert not differ(other.teacher.state_dict(), other.backbone.state_dict())
    steps(other, 3, 6)
    assert differ(weights(other), weights(whole))


def test_a_state_dict_without_its_average_is_refused_and_so_is_one_that_has_no_use() -> None:
    state, plain = weights(ema()), TTD(toy())
    lost = {key: value for key, value in state.items() if not key.startswith("teacher.")}
    with pytest.raises(InputError, match="has no moving average, and teacher='ema' needs it"):
        ema().load_state_dict(lost)
    with pytest.raises(InputError, match="and this TTD has teacher='self'"):
        plain.load_state_dict(state)
    _, unexpected = plain.load_state_dict(state, strict=False)
    assert unexpected == [key for key in state if key.startswith("teacher.")]
    partial = dict(state)
    name = next(key for key in state if key.startswith("teacher."))
    del partial[name]
    with pytest.raises(
        InputError, match=rf"another backbone \(1 tensors differ, such as {name.removeprefix('teacher.')}"
    ):
        ema().load_state_dict(partial)
    with pytest.raises(InputError, match="another backbone"):
        ema().load_state_dict(state | {name: torch.zeros(3, 3, 3)})


def test_an_average_is_a_part_of_whatever_contains_the_engine() -> None:
    holder = nn.ModuleDict({"first": nn.Linear(2, 2), "loss": ema()})
    steps(holder["loss"], 0, 2)  # type: ignore[arg-type]
    other = nn.ModuleDict({"first": nn.Linear(2, 2), "loss": ema(3)})
    other.load_state_dict(holder.state_dict())
    assert not differ(other.state_dict(), holder.state_dict())
    # A state dict of other parts says nothing of the average.
    other.load_state_dict({"first.weight": torch.zeros(2, 2)}, strict=False)


def test_an_average_has_the_running_statistics_of_the_backbone() -> None:
    backbone = toy()
    backbone.model.dropout = Running(affine=True)
    ttd = TTD(backbone, teacher="ema").train()
    assert ttd.teacher is not None
    means = []
    for number in range(2):
        ttd(toy_images(4, seed=number), ["dog on grass", "red kite", "one", "old boat"])
        means.append(backbone.model.dropout[1].running_mean.clone())
    # Those of the step before, as the teacher is updated before the student's step.
    teacher = ttd.teacher.model.dropout[1].running_mean
    assert not torch.equal(means[0], torch.zeros(5)) and torch.equal(teacher, means[1])


class Running(nn.Sequential):
    """Batch normalisation over the last axis, without parameters of its own, beside ones that are trained."""

    def __init__(self, affine: bool = False) -> None:
        super().__init__(nn.Linear(5, 5), nn.BatchNorm1d(5, affine=affine))

    def forward(self, values: Tensor) -> Tensor:
        hidden = self[0](values)
        return self[1](hidden.flatten(0, -2)).view(hidden.shape)


# Trainer -------------------------------------------------------------------------------------------------------------


def trainer(ttd: TTD, out: Path, **arguments: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="Trainer needs transformers")
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    options: dict[str, Any] = {
        "output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01,
        "logging_steps": 1, "save_steps": 2, "report_to": "none", "use_cpu": True, "seed": 0, "disable_tqdm": True,
    } | arguments  # fmt: skip
    return transformers.Trainer(
        model=ttd,
        args=transformers.TrainingArguments(**options),
        train_dataset=Pairs(),
        eval_dataset=Pairs(6),
        data_collator=collate,
    )


@pytest.mark.parametrize("bf16", [False, True])
def test_the_trainer_trains_and_evaluates(tmp_path: Path, bf16: bool) -> None:
    ttd = TTD(toy())
    before = weights(ttd)
    used = trainer(ttd, tmp_path, bf16=bf16, eval_strategy="steps", eval_steps=2)
    used.train()
    losses = [line["loss"] for line in used.state.log_history if "loss" in line]
    assert len(losses) == 4 and differ(weights(ttd), before)
    evaluated = [line["eval_loss"] for line in used.state.log_history if "eval_loss" in line]
    assert len(evaluated) == 2 and used.evaluate()["eval_loss"] == pytest.approx(evaluated[-1])
    ttd.eval()
    items = [Pairs(6)[number] for number in range(6)]
    with torch.no_grad():
        expected = float(ttd(**collate(items)).loss)
    assert evaluated[-1] == pytest.approx(expected, rel=0.05 if bf16 else 1e-5)


def test_the_trainer_predicts_and_computes_metrics(tmp_path: Path) -> None:
    used = trainer(TTD(toy()), tmp_path)
    found = used.predict(Pairs(6))
    losses, maps, union, usable = found.predictions
    assert (
        maps.shape == union.shape == (6, 16)
        and usable.shape == (6,)
        and set(losses) == {"tag", "distill", "contrastive"}
    )
    used.compute_metrics = lambda predictions: {"captions": float(len(predictions.predictions[1]))}
    assert used.evaluate()["eval_captions"] == 6


def test_the_trainer_resumes_with_its_average(tmp_path: Path) -> None:
    whole = ema()
    trainer(whole, tmp_path).train()
    resumed = ema(seed=4)
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not differ(weights(resumed), weights(whole))


# Lightning -----------------------------------------------------------------------------------------------------------


def lightning_module(ttd: TTD, whole_output: bool) -> Any:
    lightning = pytest.importorskip("lightning", reason="needs lightning")

    class Tuning(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.ttd = ttd

        def training_step(self, batch: dict[str, Any], number: int) -> Any:
            output = self.ttd(**batch)
            return output if whole_output else output.loss

        def validation_step(self, batch: dict[str, Any], number: int) -> None:
            self.log("val_loss", self.ttd(**batch).loss, batch_size=len(batch["captions"]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Tuning()


def lightning_trainer(out: Path, **options: Any) -> Any:
    import lightning

    return lightning.Trainer(
        default_root_dir=out, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, **{"max_steps": 4, "enable_checkpointing": False} | options,
    )  # fmt: skip


def loader() -> DataLoader:
    return DataLoader(Pairs(), batch_size=4, collate_fn=collate)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole_output", [False, True])
def test_lightning_trains_and_validates(tmp_path: Path, whole_output: bool) -> None:
    ttd = TTD(toy())
    module = lightning_module(ttd, whole_output)
    before = weights(ttd)
    used = lightning_trainer(tmp_path)
    used.fit(module, loader(), loader())
    assert differ(weights(ttd), before) and used.callback_metrics["val_loss"] > 0


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_with_its_average(tmp_path: Path) -> None:
    whole, resumed = (lightning_module(ema(seed), False) for seed in (0, 4))
    used = lightning_trainer(tmp_path, max_steps=2)
    used.fit(whole, loader())
    used.save_checkpoint(tmp_path / "two.ckpt")
    # On from there in the same objects, and in new ones.
    steps_left = lightning_trainer(tmp_path)
    steps_left.fit(resumed, loader(), ckpt_path=tmp_path / "two.ckpt")
    lightning_trainer(tmp_path).fit(whole, loader(), ckpt_path=tmp_path / "two.ckpt")
    assert steps_left.global_step == 4
    assert not differ(resumed.state_dict(), whole.state_dict())


# accelerate ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def accelerator(**options: Any) -> Any:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    from ttd_plugins.training.processes import reset_accelerate

    reset_accelerate()
    try:
        yield accelerate.Accelerator(cpu=True, **options)
    finally:
        reset_accelerate()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loop_with_accelerate_trains_and_resumes(tmp_path: Path, precision: str) -> None:
    with accelerator(mixed_precision=precision) as used:
        ttd = ema()
        model, optimizer, batches = used.prepare(ttd, torch.optim.SGD(ttd.parameters(), lr=0.05), loader())
        model.train()

        def epoch() -> None:
            for batch in batches:
                optimizer.zero_grad()
                output = model(**batch)
                used.backward(output.loss)
                optimizer.step()
                assert output["loss"] is output.loss and output.statistics["tags_per_caption"] > 0

        epoch()
        used.save_state(str(tmp_path / "state"))
        epoch()
        expected = weights(ttd)
        epoch()
        used.load_state(str(tmp_path / "state"))
        epoch()
        assert not differ(weights(ttd), expected)


# torch's own wrappers ------------------------------------------------------------------------------------------------


def two_that_train(rank: int, port: int, out: str) -> None:
    join(rank, port)
    found = {}
    for case, (options, wrapping) in DISTRIBUTED.items():
        ttd = TTD(toy(3), **options).train()
        model = nn.parallel.DistributedDataParallel(ttd, **wrapping)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for number in range(3):
            part = slice(0, 2) if rank == 0 else slice(2, 4)
            optimizer.zero_grad()
            ids = [7, 8, 7, 9]
            output = model(
                toy_images(4, seed=number)[part], [caption_of(row) for row in range(4)][part], groups=ids[part]
            )
            output.loss.backward()
            optimizer.step()
        found[case] = weights(ttd)
    torch.save(found, f"{out}/{rank}.pt")
    distributed.end_process(0)


DISTRIBUTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "without a contrastive term": ({"contrastive_weight": 0.0}, {}),
    "tags alone": ({"contrastive_weight": 0.0, "distill_weight": 0.0}, {}),
    "unused ones are looked for": ({"contrastive_weight": 0.0}, {"find_unused_parameters": True}),
    "a static graph": ({"contrastive_weight": 0.0}, {"static_graph": True}),
    "an average": ({"teacher": "ema"}, {}),
}


def test_two_processes_train_the_weights_of_one_whatever_the_loss_uses(tmp_path: Path) -> None:
    out = two_processes(two_that_train, tmp_path)
    for case, (options, _) in DISTRIBUTED.items():
        alone = TTD(toy(3), **options).train()
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.05)
        for number in range(3):
            optimizer.zero_grad()
            alone(
                toy_images(4, seed=number), [caption_of(row) for row in range(4)], groups=[7, 8, 7, 9]
            ).loss.backward()
            optimizer.step()
        for rank in range(2):
            found = torch.load(out / f"{rank}.pt", weights_only=True)[case]
            assert found.keys() == alone.state_dict().keys()
            for name, value in alone.state_dict().items():
                torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=f"{case}: {name}")


def test_the_copies_of_data_parallel_are_refused_in_one_sentence() -> None:
    ttd = TTD(toy())
    ttd._is_replica = True  # type: ignore[assignment]  # as torch marks them, which needs two GPUs
    with pytest.raises(TTDError, match=r"nn\.DataParallel copies the backbone .* start one process for each GPU"):
        ttd(toy_images(1), ["dog"])


def test_a_compiled_engine_returns_the_same() -> None:
    ttd = TTD(toy())
    compiled = torch.compile(ttd, backend="eager")
    images, captions = toy_images(2), ["dog on grass", "kite"]
    torch.testing.assert_close(compiled(images, captions).loss, ttd(images, captions).loss)
    assert isinstance(ttd.backbone, ToyAdapter)
