"""The variants of a benchmark: training steps and encodings of one backbone on one batch."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ttd_plugins.adapter import DenseAdapter, image_features, text_tokens
from ttd_plugins.backbone_sources import split_source
from ttd_plugins.benchmark import unshared_baseline
from ttd_plugins.benchmark.captions import BUILT_IN, SubstituteTokenizer, batch_of_captions, open_captions
from ttd_plugins.engine import TTD
from ttd_plugins.errors import InputError, TTDError, choices_sentence
from ttd_plugins.method.text_embeddings import encode_texts
from ttd_plugins.testing.library_reference import library_image_embedding
from ttd_plugins.training.compiling import compile_image_blocks, uncompiled

STEPS = ("contrastive", "contrastive_trimmed", "ttd", "ttd_alone", "unshared")
ENCODINGS = ("encode_image", "dense", "dense_and_pooled")
VARIANTS = STEPS + ENCODINGS
TITLES = {
    "contrastive": "contrastive step, texts at the full context",
    "contrastive_trimmed": "contrastive step, texts trimmed",
    "ttd": "TTD step with the contrastive term",
    "ttd_alone": "TTD step without the contrastive term",
    "unshared": "unshared TTD step (baseline)",
    "encode_image": "the library's image encoding",
    "dense": "dense features",
    "dense_and_pooled": "dense features and pooled embedding",
}
RATIOS = {
    "ttd_over_contrastive": ("ttd", "contrastive"),
    "ttd_over_trimmed_contrastive": ("ttd", "contrastive_trimmed"),
    "ttd_alone_over_contrastive": ("ttd_alone", "contrastive"),
    "unshared_over_ttd": ("unshared", "ttd"),
    "dense_over_encode_image": ("dense", "encode_image"),
    "dense_and_pooled_over_encode_image": ("dense_and_pooled", "encode_image"),
}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class BenchOptions:
    """Options of a benchmark.

    Attributes:
        backbone: ``family:model`` (random weights), ``family:model@weights``, a run or an exported folder.
        backbone_options: keyword arguments of the family's ``load``.
        batch_size: image-text pairs per step.
        data: captions; see :func:`ttd_plugins.benchmark.captions.open_captions`. By default built-in captions.
        image_size: side of the square input in pixels; by default the backbone's preferred size.
        lora: rank of LoRA on both towers; 0 trains all weights.
        compile: whether to compile the blocks of the image tower, which all variants share.
        precision: ``"float32"``, or ``"bfloat16"`` for autocast with float32 weights.
        repeats: number of rounds; each round times every variant once.
        device: the device.
        seed: seed of the random pixels.
        peak_tflops: peak performance of the device in 10^12 operations per second; by default it is measured.
    """

    backbone: str
    backbone_options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    data: str | None = None
    image_size: int | None = None
    lora: int = 0
    compile: bool = False
    precision: str = "float32"
    repeats: int = 5
    device: str | None = None
    seed: int = 0
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise InputError(f"batch_size must be at least 2, since one pair has no negatives, not {self.batch_size}")
        if self.repeats < 1:
            raise InputError(f"repeats must be at least 1, not {self.repeats}")
        if self.lora < 0:
            raise InputError(f"lora must be a positive rank, or 0 to train all weights, not {self.lora}")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise InputError(f"peak_tflops must be positive, not {self.peak_tflops}")
        if self.precision not in PRECISIONS:
            raise InputError(choices_sentence("precision", self.precision, PRECISIONS))

    @property
    def name(self) -> str:
        """The backbone's name including its weights; a run or an exported folder has its own."""
        is_bare = ":" in self.backbone and "@" not in self.backbone and split_source(self.backbone)[1] is None
        return f"{self.backbone}@random" if is_bare else self.backbone


class Bench:
    """One backbone, one batch and one optimizer, shared by all variants.

    Attributes:
        adapter: the backbone.
        ttd, ttd_alone: the engine with and without the contrastive term.
        optimizer: AdamW over all parameters that require a gradient, with a negligible learning rate.
        captions, tags: the texts of the batch.
        images: ``[B, 3, height, width]``, random normal pixels.
        own_size: whether images have the library's own size, so that its encoding can be measured; otherwise the
            adapter's pooled embedding replaces it.
        own_tokenizer: whether the backbone's own tokenizer is used, not a :class:`SubstituteTokenizer`.
    """

    def __init__(
        self,
        options: BenchOptions,
        *,
        adapter: DenseAdapter | None = None,
        captions: Sequence[str] | None = None,
        tags: Sequence[Sequence[str]] | None = None,
    ) -> None:
        """Load the backbone and create the batch.

        Args:
            options: the benchmark's options.
            adapter: an existing backbone to use instead of loading one.
            captions, tags: texts of the batch; by default those of the options, and the extracted tags.

        Raises:
            InputError: the data cannot be read.
            TTDError: the backbone cannot be loaded.
        """
        from ttd_plugins.plugins import load

        self.options = options
        if captions is None:
            captions = batch_of_captions(open_captions(options.data) if options.data else BUILT_IN, options.batch_size)
        self.captions = list(captions)
        is_new = adapter is None
        adapter = load(options.name, device=options.device, **options.backbone_options) if adapter is None else adapter
        self.adapter = adapter
        self.own_tokenizer = not is_new or self._ensure_tokenizer()
        if is_new and options.lora:
            adapter.add_lora(options.lora)
        if is_new and options.compile:
            compile_image_blocks(adapter)
        self.device = adapter.device
        self.ttd, self.ttd_alone = TTD(adapter), TTD(adapter, contrastive_weight=0.0)
        candidates = self.ttd.candidates(torch.zeros(len(self.captions), 3, 1, 1), self.captions, tags)
        self.tags = candidates.tags
        self.distinct = len(candidates.distinct)
        generator = torch.Generator().manual_seed(options.seed)
        side = options.image_size
        height, width = adapter.description.image_size if side is None else (side, side)
        self.grid = adapter.patch_grid(height, width)
        self.own_size = (height, width) == tuple(adapter.description.image_size)
        self.images = torch.randn(len(self.captions), 3, height, width, generator=generator).to(self.device)
        self.parameters = [p for p in adapter.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-7, fused=self.device.type == "cuda" or None)

    def _ensure_tokenizer(self) -> bool:
        try:
            self.adapter.tokenize(["a"])
        except TTDError:
            if not self.options.name.endswith("@random") or not hasattr(self.adapter, "tokenizer"):
                raise
            tables = [module for module in self.adapter.model.modules() if isinstance(module, nn.Embedding)]
            if not tables:
                raise
            vocabulary = max(table.num_embeddings for table in tables)
            adapter: Any = self.adapter
            adapter.tokenizer = SubstituteTokenizer(adapter.description.context_length, vocabulary)
            return False
        return True

    # Variants ------------------------------------------------------------------------------------------------------

    def call(self, variant: str, *, keep_gradients: bool = False) -> None:
        """Run a variant once: steps in training mode, encodings in evaluation mode without gradient.

        Args:
            variant: one of ``VARIANTS``.
            keep_gradients: whether to keep the memory of gradients between steps.
        """
        training = variant in STEPS
        if not training:
            with torch.no_grad():
                self._encode(variant)
            return
        self.adapter.train()
        self.optimizer.zero_grad(set_to_none=not keep_gradients)
        with self.autocast():
            loss = self.loss(variant)
        loss.backward()
        self.optimizer.step()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context of the chosen precision."""
        dtype = PRECISIONS[self.options.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def _encode(self, variant: str) -> None:
        self.adapter.eval()
        with self.autocast():
            if variant == "encode_image":
                self._library_image()
            else:
                self.adapter.encode_image(self.images, pooled=variant == "dense_and_pooled")

    def _library_image(self) -> Tensor:
        # At other sizes libraries fail, or need options with different names.
        found = library_image_embedding(self.adapter, self.images) if self.own_size else None
        pooled = self.adapter.encode_image(self.images).pooled if found is None else found
        assert pooled is not None
        return pooled

    def loss(self, variant: str) -> Tensor:
        """Return the loss of a training step, a scalar with gradient."""
        if variant == "ttd":
            return self.ttd(self.images, self.captions, self.tags).loss
        if variant == "ttd_alone":
            return self.ttd_alone(self.images, self.captions, self.tags).loss
        if variant == "unshared":
            return unshared_baseline.unshared_losses(self.adapter, self.images, self.captions, self.tags)["loss"]
        image = self._library_image()
        if variant == "contrastive":
            text = unshared_baseline.full_context_texts(self.adapter, self.captions)
        else:
            text, _ = encode_texts(self.adapter, self.captions)
        with torch.autocast(self.device.type, enabled=False):
            return unshared_baseline.contrastive_term(self.adapter, image, text)

    # Measuring -----------------------------------------------------------------------------------------------------

    def seconds(self, function: Callable[[], Any], calls: int = 1) -> float:
        """Return the wall-clock seconds per call over ``calls`` calls, including the device's work."""
        self._synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        self._synchronize()
        return (time.perf_counter() - start) / calls

    @property
    def in_a_row(self) -> int:
        """Number of calls that are timed together: several on a GPU, where host and device overlap between steps."""
        return 5 if self.device.type == "cuda" else 1

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def warm_up(self, variants: Sequence[str]) -> None:
        """Call variants once if blocks are compiled, since compilation happens in the first call in each mode."""
        for variant in variants if self.options.compile else ():
            self.call(variant)

    def free_memory(self) -> None:
        """Free gradients and cached memory, for instance after a step that ran out of memory."""
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def count(self, variant: str) -> int:
        """Count the floating-point operations of a variant: matrix products and convolutions, with backward pass.

        Recomputation by activation checkpointing is not counted, since the count is a lower limit.
        """
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        # The counter supports fused attention on GPUs only.
        attention = nullcontext() if self.device.type == "cuda" else sdpa_kernel(SDPBackend.MATH)
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        engines = (self.ttd, self.ttd_alone)
        choices = [engine.options for engine in engines]
        for engine in engines:
            engine.options = replace(engine.options, text_activation_checkpointing=False)
        try:
            with attention, uncompiled(self.adapter.model), FlopCounterMode(display=False) as counter:
                # The counter fails for views of parameters without gradients; the operations are the same.
                self.call(variant) if variant in STEPS else self._encode(variant)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for engine, chosen in zip(engines, choices, strict=True):
                engine.options = chosen
        return int(counter.get_total_flops())

    def peak(self) -> float:
        """Return peak operations per second: from the options, or measured with a large matrix product."""
        if self.options.peak_tflops is not None:
            return self.options.peak_tflops * 1e12
        side = 8192 if self.device.type == "cuda" else 2048
        dtype = PRECISIONS[self.options.precision] or torch.float32
        one, other = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
        return 2 * side**3 / min(self.seconds(lambda: one @ other) for _ in range(10))

    def parts(self) -> dict[str, float]:
        """Return the seconds of each part of a TTD step with the contrastive term, in order of execution."""
        found: dict[str, float] = {}
        adapter, ttd = self.adapter, self.ttd
        adapter.train(True)

        def timed(name: str, function: Callable[[], Any]) -> Any:
            results: list[Any] = []
            found[name] = self.seconds(lambda: results.append(function()))
            return results[0]

        with self.autocast():
            candidates = timed("tags", lambda: ttd.candidates(self.images, self.captions))
            texts = [*self.captions, *candidates.distinct]
            timed("tokens", lambda: text_tokens(adapter, list(dict.fromkeys(texts))))
            timed("images", lambda: image_features(adapter, self.images))
            timed("texts", lambda: encode_texts(adapter, texts))
            output = timed("maps and losses", lambda: ttd(self.images, self.captions, self.tags))
        timed("backward", output.loss.backward)
        timed("optimizer", self.optimizer.step)
        self.optimizer.zero_grad(set_to_none=True)
        found["texts"] = max(found["texts"] - found["tokens"], 0.0)
        forward = found["tokens"] + found["images"] + found["texts"]
        found["maps and losses"] = max(found["maps and losses"] - forward, 0.0)
        return found

    def describe(self) -> dict[str, Any]:
        """Return a description of the setup for a report."""
        tokens = text_tokens(self.adapter, self.captions).lengths.float()
        return {
            "backbone": self.options.name,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "precision": self.options.precision,
            "compiled": self.options.compile,
            "trained": f"LoRA of rank {self.options.lora}" if self.options.lora else "all weights",
            "trainable_parameters": sum(p.numel() for p in self.parameters),
            "batch_size": len(self.captions),
            "image_size": list(self.images.shape[-2:]),
            "patches": self.grid[0] * self.grid[1],
            "image_encoding": "the library's own" if self.own_size else "the adapter's, at another size",
            "data": self.options.data or "built-in captions",
            "tokenizer": "the backbone's own" if self.own_tokenizer else "a substitute",
            "tokens_per_caption": float(tokens.mean()),
            "tags_per_caption": sum(map(len, self.tags)) / len(self.tags),
            "distinct_tags": self.distinct,
        }
