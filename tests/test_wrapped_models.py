"""Models that come wrapped, compiled or quantised; and what merge() and unload() leave behind."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_backbone import ToyAdapter, toy, toy_images

from ttd_plugins.engine import TTD
from ttd_plugins.errors import TTDError, UnsupportedModelError
from ttd_plugins.plugins import load, wrap
from ttd_plugins.training.trainable_parameters import train_mode
from ttd_plugins.utils import wrapped_models
from ttd_plugins.utils.running_state import keep_frozen_norms_in_eval

CAPTIONS = ["a dog on grass", "red kite"]


@pytest.fixture(scope="module")
def model() -> Any:
    pytest.importorskip("transformers")
    return load("openai_clip:tiny").model


class Forwards(nn.Module):
    """A user's wrapper that looks like its model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.clip = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["clip"], name)


def holder(inner: nn.Module) -> nn.Module:
    return nn.ModuleDict({"loss": nn.ModuleDict({"net": inner})})


def peft_model(inner: nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(copy.deepcopy(inner), peft.LoraConfig(target_modules=["q_proj"]))


class Named:
    """Makes a class whose name and module are those of a library that is not installed."""

    @staticmethod
    def around(inner: nn.Module, name: str, module: str) -> nn.Module:
        cls = type(name, (nn.Module,), {"__module__": module})
        made = cls()
        made.module = inner
        return made


WRAPPERS: dict[str, tuple[Any, str]] = {
    "compiled": (
        torch.compile,
        r"OptimizedModule is a wrapper around a model; pass the model itself, model\._orig_mod",
    ),
    "DataParallel": (nn.DataParallel, r"model\.module, and train with DistributedDataParallel\(TTD\(wrap\(model\)\)\)"),
    "averaged": (torch.optim.swa_utils.AveragedModel, r"pass the model itself, model\.module"),
    "PeftModel": (peft_model, r"pass what merge_and_unload\(\) returns \(its LoRA merged\)"),
    "LoraModel": (lambda inner: peft_model(inner).base_model, r"pass what merge_and_unload\(\) or unload\(\) returns"),
    "FSDP": (
        lambda inner: Named.around(inner, "FullyShardedDataParallel", "torch.distributed.fsdp"),
        r"put FullyShardedDataParallel around the engine",
    ),
    "DDP": (
        lambda inner: Named.around(inner, "DistributedDataParallel", "torch.nn.parallel.distributed"),
        r"around the engine: DistributedDataParallel\(TTD\(wrap\(model\)\)\)",
    ),
    "DeepSpeed": (
        lambda inner: Named.around(inner, "DeepSpeedEngine", "deepspeed.runtime"),
        r"pass the model itself, model\.module",
    ),
    "forwards": (Forwards, r"Forwards is a wrapper around a model; pass the model inside it, model\.clip"),
    "holds": (holder, r"pass the model inside it, model\.loss\.net"),
    "a pair": (lambda inner: (inner, None), "pass the model alone, item 0 of this tuple"),
    "weights": (
        lambda inner: inner.state_dict(),
        r"weights without a model: build the model, call load_state_dict\(\)",
    ),
    "a class": (type, "pass an object of the class, not the class CLIPModel"),
    "one tower": (lambda inner: inner.vision_model, "no family claims an object of class"),
    "TorchScript": (lambda inner: torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), r"jit=False"),
    "an engine": (lambda inner: TTD(wrap(inner)), "has an adapter already, its attribute backbone"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_is_refused_with_what_to_pass_instead(model: Any, kind: str) -> None:
    make, said = WRAPPERS[kind]
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        wrap(make(model))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["compiled", "DataParallel", "averaged", "holds", "forwards"])
def test_the_advice_leads_to_the_model(model: Any, kind: str) -> None:
    wrapped = WRAPPERS[kind][0](model)
    with pytest.raises(UnsupportedModelError) as caught:
        wrap(wrapped)
    path = str(caught.value).split("model.")[-1].split(",")[0]
    for part in path.split("."):
        wrapped = wrapped[part] if isinstance(wrapped, nn.ModuleDict) else getattr(wrapped, part)
    adapter = wrap(wrapped)
    assert all(len(list(adapter.tower_parameters(tower))) > 5 for tower in ("image", "text"))


@pytest.mark.parametrize("kind", ["compiled", "DataParallel", "averaged"])
def test_no_adapter_is_made_of_a_wrapper_by_hand(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match="is a wrapper around a model"):
        ToyAdapter(WRAPPERS[kind][0](toy().model), logits="softmax")


def test_a_tower_whose_names_are_not_found_is_an_error(model: Any) -> None:
    adapter = wrap(model)
    adapter.model = Forwards(model)
    with pytest.raises(UnsupportedModelError, match=r"no parameters of the image tower, whose names begin with"):
        adapter.tower_parameters("image")


def test_models_of_a_library_that_no_family_takes_are_refused_with_the_reason() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(image_size=16, patch_size=8, **sizes))
    with pytest.raises(UnsupportedModelError, match="it is one tower alone, and TTD needs both; pass a CLIPModel"):
        wrap(tower)
    with pytest.raises(UnsupportedModelError, match="it is an image tower alone, and TTD needs both towers"):
        wrap(load("open_clip:tiny").model.visual)


# Quantised models ----------------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """torch's quantised layers have a method ``weight``."""

    def weight(self) -> Tensor:
        return torch.zeros(2, 2)


class Integers(nn.Module):
    """Layers of 8-bit libraries store integers."""

    def __init__(self, dtype: torch.dtype = torch.int8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2).to(dtype), requires_grad=False)


class Columns(nn.Module):
    """Layers of GPTQ and AWQ."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))


class Four(nn.Parameter):
    """A parameter of a library's own class."""


Four.__module__ = "bitsandbytes.nn.modules"


class FourBits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = Four(torch.zeros(2, 2))


@pytest.mark.parametrize(
    "part",
    [Packed(), Integers(), Integers(torch.uint8), Integers(torch.float8_e4m3fn), Columns(), FourBits()],
    ids=lambda part: type(part).__name__,
)
def test_a_quantised_model_is_refused_in_one_sentence(part: nn.Module) -> None:
    model = toy().model
    model.extra = nn.Sequential(nn.Identity(), part)
    with pytest.raises(UnsupportedModelError, match=r"ToyModel is quantised \(extra\.1.*quantise it after merge\(\)"):
        ToyAdapter(model, logits="softmax")


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_torch_quantised_is_refused(model: Any) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    with pytest.raises(UnsupportedModelError, match="is quantised"):
        wrap(quantised)


def test_other_models_are_not_called_quantised(model: Any) -> None:
    odd = toy().model
    odd.counter = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    for one in (model, odd, toy(dtype=torch.bfloat16).model, nn.BatchNorm1d(3, affine=False)):
        assert wrapped_models.refusal(one) is None


# merge() and unload() ------------------------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def step(backbone: ToyAdapter) -> None:
    ttd = TTD(backbone).train()
    ttd(toy_images(2), CAPTIONS).loss.backward()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None


def with_lora(frozen: bool = False) -> ToyAdapter:
    pytest.importorskip("peft", reason="LoRA needs peft")
    backbone = toy()
    backbone.model.requires_grad_(not frozen)
    return backbone.add_lora(2)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_unload_after_merge_refuses_to_pass_tuned_weights_for_the_originals(tuning: str) -> None:
    backbone = with_lora() if tuning == "lora" else toy()
    step(backbone)
    merged = state(backbone.merge())
    with pytest.raises(TTDError, match=r"was merged into its weights, so unload\(\) cannot restore the originals"):
        backbone.unload()
    step(backbone)  # a later step takes no snapshot that would pass for the originals
    with pytest.raises(TTDError, match="load the model again"):
        backbone.unload()
    backbone.merge()
    assert merged.keys() == state(backbone.model).keys()


def test_lora_after_a_merge_is_removed_with_a_warning() -> None:
    backbone = with_lora()
    step(backbone)
    merged = state(backbone.merge())
    backbone.add_lora(2)
    step(backbone)
    with pytest.warns(UserWarning, match="the weights are those of the earlier merge"):
        backbone.unload()
    assert same(backbone.model, merged)


def test_a_frozen_teacher_of_a_merged_backbone_is_the_merged_one() -> None:
    backbone = with_lora()
    step(backbone)
    merged = state(backbone.merge())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for built in (TTD(backbone, teacher="frozen"), TTD(backbone.add_lora(2), teacher="frozen")):
            assert built.teacher is not None and same(built.teacher.model, merged)


def test_unload_without_any_tuning_changes_nothing() -> None:
    backbone = toy()
    before = state(backbone.model)
    backbone.merge()
    assert same(backbone.unload(), before)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("end", ["merge", "unload"])
def test_as_many_parameters_require_gradients_afterwards_as_before(frozen: bool, end: str) -> None:
    backbone = with_lora(frozen)
    step(backbone)
    model = getattr(backbone, end)()
    assert [parameter.requires_grad for parameter in model.parameters()] == [not frozen] * len(list(model.parameters()))


def test_peft_layers_of_others_are_not_called_merged(model: Any) -> None:
    foreign = wrap(peft_model(model).base_model.model)
    for call in (foreign.merge, lambda: foreign.add_lora(2)):
        with pytest.raises(TTDError, match="is a peft layer that this adapter did not add"):
            call()
    assert any("lora_" in name for name, _ in foreign.model.named_parameters())


# Running statistics --------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A layer with batch normalisation, over the last axis."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5, affine=affine)

    def forward(self, values: Tensor) -> Tensor:
        return self.norm(values.flatten(0, -2)).view(values.shape)


def normed(affine: bool = True) -> ToyAdapter:
    backbone = toy()
    backbone.model.dropout = Normed(affine)
    return backbone


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("end", ["merge", "unload"])
def test_lora_leaves_running_statistics_alone(affine: bool, end: str) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    backbone = normed(affine)
    before = state(backbone.model)
    buffers = {name: value.clone() for name, value in backbone.model.named_buffers()}
    backbone.add_lora(2)
    for _ in range(2):
        step(backbone)
        backbone.model.train()  # a caller's loop knows its model, not our wrappers
    model = getattr(backbone, end)()
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert same(model, before) is (end == "unload")


def test_unload_restores_buffers_whatever_changed_them() -> None:
    for lora in (False, True):
        backbone = with_lora() if lora else toy()
        if not lora:
            backbone.snapshot_weights()
        before = {name: value.clone() for name, value in backbone.model.named_buffers()}
        backbone.model.steps += 3  # type: ignore[operator]
        # Moving and casting a model makes new buffers.
        backbone.double().float()
        backbone.unload()
        assert {name: value.tolist() for name, value in backbone.model.named_buffers()} == {
            name: value.tolist() for name, value in before.items()
        }


@pytest.mark.parametrize("mode", ["train_mode", "keep_frozen_norms_in_eval"])
def test_norms_that_are_trained_stay_in_training_mode(mode: str) -> None:
    model = toy().model
    model.frozen = nn.BatchNorm1d(3).requires_grad_(False)
    model.tuned = nn.BatchNorm1d(3)
    model.plain = nn.BatchNorm1d(3, affine=False)
    model.instance = nn.InstanceNorm1d(3, track_running_stats=True)
    model.block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)).requires_grad_(False)
    backbone = ToyAdapter(model, logits="softmax")
    if mode == "train_mode":
        train_mode(backbone)
    else:
        backbone.train()
        keep_frozen_norms_in_eval(model)
    assert [m.training for m in (model.frozen, model.tuned, model.plain, model.instance, model.block[1])] == [
        False, True, True, True, False,
    ]  # fmt: skip
    assert model.training and model.block.training


def test_full_fine_tuning_trains_its_norms_and_unload_restores_them() -> None:
    backbone = normed()
    before = state(backbone.model)
    step(backbone)
    assert not torch.equal(backbone.model.dropout.norm.running_mean, before["dropout.norm.running_mean"])
    assert same(backbone.unload(), before)


def test_lora_on_a_resnet_of_the_original_package_is_unloaded_bitwise() -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    from helpers_openai_clip import Words, original_resnet

    model = original_resnet()
    before = state(model)
    backbone = wrap(model, tokenizer=Words(), lora=2)
    ttd = TTD(backbone)
    model.train()
    side = backbone.description.image_size
    ttd(torch.randn(2, 3, *side, generator=torch.Generator().manual_seed(0)), CAPTIONS).loss.backward()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    assert same(backbone.unload(), before)
