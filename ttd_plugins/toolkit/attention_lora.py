"""LoRA for self-attention with a fused input projection; the base weights are never written. Needs peft.

peft's own wrapper of ``nn.MultiheadAttention`` adds the LoRA weights to the base weights and subtracts them again in
every forward pass, so the base weights drift and dropout has no effect. The layers here compute each projection as the
base product plus the LoRA path (arXiv 2106.09685). Only ``merge`` and ``unmerge`` write a base weight.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ttd_plugins.errors import TTDError, UnsupportedModelError
from ttd_plugins.toolkit.attention import attention_dropout, is_plain_attention, split_heads, split_projection
from ttd_plugins.utils.deprecation import RenamedAttribute

PROJECTIONS = ("q", "k", "v", "out")


class LoRASelfAttention(nn.Module, LoraLayer):
    """LoRA on the query, key, value and output projections, each with its own pair of matrices.

    ``lora_A_q[adapter]`` is ``Linear(E, r)`` and ``lora_B_q[adapter]`` is ``Linear(r, E)``; likewise for ``k``, ``v``
    and ``out``. The names are flat because peft's state-dict helpers need the adapter's name right before ``weight``.
    Subclasses differ in the signature of ``forward``, and in where the base module stores its projections.
    """

    adapter_layer_names = (
        *LoraLayer.adapter_layer_names,
        *(f"lora_{matrix}_{name}" for name in PROJECTIONS for matrix in "AB"),
    )

    base_layer: Any
    lora_dropout: Any

    def __init__(
        self, base_layer: Any, adapter_name: str, *, r: int, lora_alpha: float, config: Any = None, **kwargs: Any
    ) -> None:
        """Wrap ``base_layer``, which stays as it is; called by peft.

        Raises:
            UnsupportedModelError: the module is not plain self-attention, or the configuration selects a variant of
                LoRA that this layer does not implement.
        """
        super().__init__()
        if not self.takes(base_layer):
            raise UnsupportedModelError(
                f"LoRA cannot wrap this {type(base_layer).__name__}: it needs one width for queries, keys and values, "
                "and no extra key, value or norm"
            )
        self._embed_dim = int(self.out_projection(base_layer).in_features)
        LoraLayer.__init__(self, base_layer)
        for name in PROJECTIONS:
            setattr(self, f"lora_A_{name}", nn.ModuleDict())
            setattr(self, f"lora_B_{name}", nn.ModuleDict())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config if config is not None else kwargs["lora_config"])

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether this layer can replace ``module``; subclasses for other attention classes override it."""
        return is_plain_attention(module)

    @staticmethod
    def in_projection(module: Any) -> tuple[Tensor, Tensor | None]:
        """Weight ``[3 E, E]`` and bias ``[3 E]`` of the fused input projection: queries, keys, values."""
        return module.in_proj_weight, module.in_proj_bias

    @staticmethod
    def out_projection(module: Any) -> nn.Linear:
        """The output projection."""
        return module.out_proj

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return self._embed_dim, 3 * self._embed_dim

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        """Add the matrices of ``adapter_name``: A as nn.Linear is initialised, B zero; called by peft."""
        if getattr(config, "use_dora", False) or getattr(config, "lora_bias", False):
            raise UnsupportedModelError(f"{type(self).__name__} computes plain LoRA only: no DoRA and no bias")
        if config.init_lora_weights not in (True, False):
            raise UnsupportedModelError(
                f"{type(self).__name__} does not implement the initialisation {config.init_lora_weights!r}; leave it "
                "at its default"
            )
        weight, _ = self.in_projection(self.base_layer)
        factory: dict[str, Any] = {"bias": False, "device": weight.device, "dtype": weight.dtype}
        width = self._embed_dim
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = self.lora_bias[adapter_name] = False
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.lora_dropout[adapter_name] = dropout
        for name in PROJECTIONS:
            down, up = nn.Linear(width, r, **factory), nn.Linear(r, width, **factory)
            if config.init_lora_weights:
                nn.init.zeros_(up.weight)
            getattr(self, f"lora_A_{name}")[adapter_name] = down
            getattr(self, f"lora_B_{name}")[adapter_name] = up
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # Attributes that blocks of a library read from attention -------------------------------------------------------

    @property
    def embed_dim(self) -> int:
        """Width E of the tokens."""
        return self._embed_dim

    @property
    def num_heads(self) -> int:
        """Number of heads."""
        return int(self.base_layer.num_heads)

    @property
    def batch_first(self) -> bool:
        """Whether inputs are ``[N, L, E]``."""
        return bool(getattr(self.base_layer, "batch_first", True))

    @property
    def dropout(self) -> float:
        """Dropout probability of the attention weights in training mode."""
        own = getattr(self.base_layer, "attn_drop", None)
        return float(self.base_layer.dropout if own is None else own.p)

    # The computation -----------------------------------------------------------------------------------------------

    def _live_adapters(self) -> list[str]:
        """Adapters whose LoRA path is computed: active, and not merged into the base weights."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.r]

    def _matrices(self, adapter: str, name: str) -> tuple[nn.Linear, nn.Linear]:
        return getattr(self, f"lora_A_{name}")[adapter], getattr(self, f"lora_B_{name}")[adapter]

    def _lora_path(self, adapter: str, name: str, dropped: Tensor) -> Tensor:
        down, up = self._matrices(adapter, name)
        return up(down(dropped)) * self.scaling[adapter]

    def _lora_input(self, adapter: str, x: Tensor) -> Tensor:
        return self.lora_dropout[adapter](x.to(self._matrices(adapter, "q")[0].weight.dtype))

    def project_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of ``x`` ``[..., E]``, LoRA included; each ``[..., E]``."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        q, k, v = F.linear(x, *self.in_projection(self.base_layer)).chunk(3, dim=-1)
        for adapter in self._live_adapters():
            dropped = self._lora_input(adapter, x)
            q = q + self._lora_path(adapter, "q", dropped).to(q.dtype)
            k = k + self._lora_path(adapter, "k", dropped).to(k.dtype)
            v = v + self._lora_path(adapter, "v", dropped).to(v.dtype)
        return q, k, v

    def project_with_queries(self, query_tokens: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of ``query_tokens`` ``[..., M, E]``, keys and values of ``x`` ``[..., L, E]``, LoRA included."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        q, k, v = split_projection(*self.in_projection(self.base_layer), query_tokens, x)
        for adapter in self._live_adapters():
            dropped = self._lora_input(adapter, x)
            q = q + self._lora_path(adapter, "q", self._lora_input(adapter, query_tokens)).to(q.dtype)
            k = k + self._lora_path(adapter, "k", dropped).to(k.dtype)
            v = v + self._lora_path(adapter, "v", dropped).to(v.dtype)
        return q, k, v

    project_some = RenamedAttribute("project_with_queries")

    def project_out(self, context: Tensor) -> Tensor:
        """Output projection of the mixed values ``[..., E]``, LoRA included."""
        base = self.out_projection(self.base_layer)
        out = F.linear(context, base.weight, base.bias)
        for adapter in self._live_adapters():
            out = out + self._lora_path(adapter, "out", self._lora_input(adapter, context)).to(out.dtype)
        return out

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Self-attention over ``[N, L, E]``; a mask is ``[L, L]`` or ``[N * heads, L, L]``, boolean or additive."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.project_qkv(x))
        if mask is not None and mask.ndim == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=attention_dropout(self))
        return self.project_out(mixed.transpose(1, 2).flatten(2))

    # Merging and unmerging -----------------------------------------------------------------------------------------

    def _delta(self, adapter: str, name: str) -> Tensor:
        down, up = (matrix.weight for matrix in self._matrices(adapter, name))
        # A half-precision product would lose small updates from training.
        dtype = torch.promote_types(up.dtype, torch.float32)
        return (up.to(dtype) @ down.to(dtype)) * self.scaling[adapter]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update that merging adds to ``in_proj_weight``: ``[3 E, E]``, at least float32."""
        return torch.cat([self._delta(adapter, name) for name in ("q", "k", "v")])

    def get_out_delta_weight(self, adapter: str) -> Tensor:
        """The update that merging adds to ``out_proj.weight``: ``[E, E]``, at least float32."""
        return self._delta(adapter, "out")

    @torch.no_grad()
    def _add(self, adapter: str, sign: int) -> None:
        pairs = (
            (self.in_projection(self.base_layer)[0], self.get_delta_weight(adapter)),
            (self.out_projection(self.base_layer).weight, self.get_out_delta_weight(adapter)),
        )
        for weight, delta in pairs:
            weight.add_(delta.to(weight.dtype), alpha=sign)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add LoRA to the base weights, in place.

        Raises:
            TTDError: ``safe_merge`` is set and LoRA has values that are not finite; nothing is changed then.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.r:
                continue
            if safe_merge and not self._is_finite(adapter):
                raise TTDError(f"LoRA {adapter!r} has values that are not finite and was not merged")
            self._add(adapter, 1)
            self.merged_adapters.append(adapter)

    def _is_finite(self, adapter: str) -> bool:
        deltas = (self.get_delta_weight(adapter), self.get_out_delta_weight(adapter))
        return all(bool(torch.isfinite(delta).all()) for delta in deltas)

    def unmerge(self) -> None:
        """Subtract what :meth:`merge` added."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self._add(self.merged_adapters.pop(), -1)


class LoRAMultiheadAttention(LoRASelfAttention):
    """LoRA for ``nn.MultiheadAttention`` used as self-attention without returned attention weights."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As ``nn.MultiheadAttention`` with ``need_weights=False``: ``(output, None)``.

        Args:
            query, key, value: one and the same tensor, ``[N, L, E]`` (or ``[L, N, E]`` if not batch first).
            attn_mask: additive, or boolean with True where attention is forbidden; ``[L, L]`` or
                ``[N * heads, L, L]``.

        Raises:
            UnsupportedModelError: an argument selects something else.
        """
        reason = None
        if key is not query or value is not query:
            reason = "queries, keys and values must be one tensor (self-attention)"
        elif query.ndim != 3:
            reason = f"inputs must have shape [N, L, E], not {tuple(query.shape)}"
        elif need_weights:
            reason = "attention weights are not returned: pass need_weights=False"
        elif key_padding_mask is not None:
            reason = "key_padding_mask is not supported: put padding into attn_mask"
        elif is_causal and attn_mask is None:
            reason = "is_causal is a hint only: pass the causal mask as attn_mask"
        if reason is not None:
            raise UnsupportedModelError(f"attention under LoRA: {reason}")
        if attn_mask is not None:
            attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(query.dtype)
        x = query if self.batch_first else query.transpose(0, 1)
        out = self.attend(x, attn_mask)
        return (out if self.batch_first else out.transpose(0, 1)), None
