"""The adapter for open_clip's vision transformers that pool with learned queries, as CoCa does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ttd_open_clip.adapter import OpenCLIPAdapter
from ttd_open_clip.open_clip_blocks import run_last_block
from ttd_plugins.adapter import ImageFeatures


class OpenCLIPAttentionPooledAdapter(OpenCLIPAdapter):
    """``open_clip.CoCa``, or another CLIP model of open_clip whose vision transformer has an attentional pooler.

    The queries of the pooler attend to the class token and all patches, and the first query is the pooled embedding. A
    patch feature is the output of the pooler for a patch that a query attends to alone: the patch's value through the
    output projection, the final norm and the projection. The dense mode says how the last block computes the patches
    before that; by default as trained.
    """

    image_tower = "attention_pooled"
    default_mode = "plain"

    def _encode_last_block(self, x: Tensor, grid: tuple[int, int], pooled: bool) -> ImageFeatures:
        call: Callable[..., Any] = self._call_checkpointed
        last = self._blocks[-1]
        if self.dense.is_block_unchanged:
            trained = call(_run_block, last, x)
            patches = trained[:, 1:]
        else:
            patches = call(run_last_block, last, x, self.dense, grid)[1]
            # The queries attend to every token as trained, which needs a second pass of the block.
            trained = call(_run_block, last, x) if pooled else None
        dense = self._finish_pool(call(_pool_each, self._visual.attn_pool, patches)).unflatten(1, grid)
        return ImageFeatures(dense, self._pool_tokens(trained) if pooled else None)

    def _pool_tokens(self, tokens: Tensor) -> Tensor:
        """The library's pooled embedding ``[B, D]`` of class token and patches ``[B, 1 + P, W]``."""
        visual = self._visual
        queries = visual.attn_pool(tokens)
        if getattr(visual, "pool_type", "tok") == "tok":
            return self._finish_pool(queries[:, 0])
        # The library leaves out the first query, as if it were a class token.
        return self._project(visual.ln_post(queries)[:, 1:].mean(dim=1))

    def _finish_pool(self, pooled: Tensor) -> Tensor:
        return self._project(self._visual.ln_post(pooled))


def _run_block(block: Any, x: Tensor) -> Tensor:
    return block(x)


def _pool_each(pool: Any, patches: Tensor) -> Tensor:
    """Output ``[B, P, D]`` of an attentional pooler for patches ``[B, P, W]`` that a query attends to one by one.

    The softmax over one key is one, whichever the query is. The pooler's attention is called as a module, so that
    wrappers around it are included.
    """
    keys = pool.ln_k(patches).flatten(0, 1)[:, None]
    query = pool.ln_q(pool.query[:1]).expand(len(keys), 1, -1)
    return pool.attn(query, keys, keys, need_weights=False)[0].unflatten(0, patches.shape[:2])[:, :, 0]
