"""Attention under a plan, as a backend of vLLM, over pages of single heads."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)

from moa_lab.kernels.dispatch import HAS_TRITON, MAX_HEAD_DIM
from moa_lab.serving.page_pool import page_shape
from moa_lab.serving.paged import LEAST_TILE, LayerHeads, layer_attention, paged_layers
from moa_lab.serving.settings import ServedPlan
from moa_lab.serving.step import Scoring, Step
from moa_lab.serving.vllm.shares import engine_shares
from moa_lab.serving.vllm.specs import BUCKET_COLUMNS, HeadPagesSpec
from moa_lab.serving.warm_up import warm_up


class PlanBackend(AttentionBackend):
    """Names the parts that vLLM asks for."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """The name that vLLM has for backends of others: a layer takes no name that it does not know."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[PlanAttention]:
        """What attends."""
        return PlanAttention

    @staticmethod
    def get_builder_cls() -> type[PlanStepBuilder]:
        """What prepares a pass."""
        return PlanStepBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """The one in which a page is contiguous. Asked by vLLM 0.32."""
        from vllm.v1.kv_cache_layout import KVCacheLayout

        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, *others: Any, **more: Any
    ) -> tuple[int, ...]:
        """Of the pool, contiguous. Asked by vLLM 0.26."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size


def pool_spec(served: ServedPlan, layer: Any, vllm_config: VllmConfig) -> HeadPagesSpec:
    """The pool of all layers: the KV cache of the layer that owns it, and of no other."""
    page_tokens, longest = vllm_config.cache_config.block_size, vllm_config.model_config.max_model_len
    head_size, dtype = layer.head_size, layer.kv_cache_torch_dtype
    shape = page_shape(served.plan, page_tokens, dtype)
    shares = engine_shares(vllm_config).pages(served.plan, served.lengths(longest, page_tokens), longest, page_tokens, shape.tokens)
    if served.plan.bits:
        # In bytes: of K, as of V.
        head_size, dtype = shape.nbytes // (2 * page_tokens), torch.int8
    return HeadPagesSpec(block_size=page_tokens, num_kv_heads=1, head_size=head_size, dtype=dtype, shares=shares)


class PlanStep:
    """The requests of one pass, and where each layer's heads have their slots."""

    def __init__(self, step: Step, layers: list[list[LayerHeads]]) -> None:
        self.step, self.layers = step, layers


class PlanStepBuilder(AttentionMetadataBuilder[PlanStep]):
    """Makes a `PlanStep` of what vLLM tells of a pass; all layers share it."""

    def __init__(self, kv_cache_spec: HeadPagesSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        shares, devices = kv_cache_spec.shares, vllm_config.parallel_config.tensor_parallel_size
        # With more devices than KV heads, several hold the same ones.
        pages = shares[get_tensor_model_parallel_rank() * len(shares) // devices]
        self._layers = paged_layers(pages, device)
        self._last_bucket = len(pages.lengths) - 1
        # Where they are now a captured graph finds the numbers of its later passes too.
        most = vllm_config.scheduler_config.max_num_seqs
        self._lengths, self._firsts, self._buckets = (
            torch.zeros(size, dtype=torch.int64, device=device) for size in (most, most + 1, most)
        )
        if device.type == "cuda":
            for alike in (alike for kinds in self._layers for alike in kinds):
                # Made before any graph is captured, which copies nothing from the host.
                _ = alike.kernels, alike.heads
            self.warm_up(kv_cache_spec.page_size_bytes, vllm_config, device)

    def warm_up(self, page_bytes: int, vllm_config: VllmConfig, device: torch.device) -> None:
        """Compile what passes launch in all layers."""
        made = vllm_config.compilation_config.static_forward_context
        for name, layer in made.items():
            found = getattr(layer, "impl", None)
            if isinstance(found, PlanAttention):
                heads = found.num_heads, found.num_kv_heads
                kinds = self._layers[extract_layer_index(name)]
                warm_up(kinds, page_bytes, heads, found.head_size, vllm_config.model_config.dtype, found.scoring, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Passes of one token a request, where kernels do them: plain PyTorch waits for the device."""
        by_kernels = HAS_TRITON and kv_cache_spec.block_size % LEAST_TILE == 0 and vllm_config.model_config.get_head_size() <= MAX_HEAD_DIM
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if by_kernels else AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> PlanStep:
        """Of the requests that are scheduled."""
        common, rows = common_attn_metadata, common_attn_metadata.num_reqs
        table = common.block_table_tensor[:rows]
        lengths, firsts, buckets = self._lengths[:rows], self._firsts[: rows + 1], self._buckets[:rows]
        lengths.copy_(common.seq_lens[:rows])
        firsts.copy_(common.query_start_loc[: rows + 1])
        # vLLM warms up over block tables of its own, whose first column is no bucket.
        buckets.copy_(table[:, 0].clamp(0, self._last_bucket))
        told = common.seq_lens_cpu_upper_bound
        # Without speculative decoding the bound is exact, and the host need not wait for the device.
        on_host = None if told is None else (common.query_start_loc_cpu[: rows + 1].tolist(), told[:rows].tolist())
        return PlanStep(Step(table[:, BUCKET_COLUMNS:], buckets, lengths, firsts, on_host), self._layers)


class PlanAttention(AttentionImpl[PlanStep]):
    """The attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ) -> None:
        unknown = [name for name, value in others.items() if value is not None]
        if alibi_slopes is not None or attn_type != AttentionType.DECODER or unknown:
            raise ValueError(f"attention with {', '.join(unknown) or 'ALiBi or without a causal mask'} cannot be served under a plan")
        # The window of a layer is part of the plan's geometry, which was compared with the model's.
        self.num_heads, self.num_kv_heads, self.head_size, self.scale = num_heads, num_kv_heads or num_heads, head_size, scale
        self.kv_cache_dtype, self.kv_sharing_target_layer_name = kv_cache_dtype, kv_sharing_target_layer_name
        self.scoring = Scoring(scale, logits_soft_cap or None, None if sinks is None else sinks[:, None, None])

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PlanStep | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query: (tokens, query_heads, head_dim); key, value: (tokens, kv_heads, head_dim); kv_cache: the pool, a page a
        row; output: as query. Passes that only measure memory have no metadata."""
        if attn_metadata is None:
            return output.zero_()
        step = attn_metadata.step
        tokens = step.told[0][-1]
        kinds = attn_metadata.layers[extract_layer_index(layer.layer_name)]
        output[:tokens] = layer_attention(kinds, kv_cache, query[:tokens], key[:tokens], value[:tokens], step, self.scoring)
        return output
