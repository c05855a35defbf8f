"""The KV cache of a plan as vLLM's scheduler sees it: one pool of pages, and a manager that gives requests what the plan says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from moa_lab.serving.page_layout import PageLayout


@dataclass(frozen=True, kw_only=True)
class HeadPagesSpec(AttentionSpec):
    """Pages of one KV head each, which all layers take from the pool of the first one.

    pages: the layout; it travels from the worker to the scheduler with the spec.
    """

    pages: PageLayout

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Columns of the block table."""
        return self.pages.pages_for(max_len)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the longest request."""
        return self.pages.pages_for(vllm_config.model_config.max_model_len) * self.page_size_bytes

    @property
    def block_table_token_alignment(self) -> int | None:
        """None: the columns of a block table are no multiples of tokens."""
        return None

    @property
    def prefix_cacheable(self) -> bool:
        """False: a ring overwrites its pages."""
        return False

    @property
    def uses_slot_mapping(self) -> bool:
        """False: the attention finds the slot of a token in every head by itself."""
        return False


class HeadPagesManager(SingleTypeKVCacheManager):
    """Gives a request the pages of its number of tokens, and takes none back before it ends."""

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *arguments: Any, **settings: Any) -> int:
        """Pages that a request of `num_tokens` lacks."""
        return max(self._pages(num_tokens) - len(self.req_to_blocks.get(request_id, ())), 0)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        """The pages that a request of `num_tokens` lacks, in the order of its block table."""
        held = self.req_to_blocks[request_id]
        lacking = self._pages(num_tokens) - len(held)
        if lacking <= 0:
            return []
        new: list[Any] = self.block_pool.get_new_blocks(lacking)
        held.extend(new)
        return new

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: Sequence[int], *arguments: Any, **settings: Any
    ) -> tuple[tuple[list[Any], ...], int]:
        """Nothing: see `HeadPagesSpec.prefix_cacheable`."""
        return tuple([] for _ in kv_cache_group_ids), 0

    def _pages(self, num_tokens: int) -> int:
        return int(self.kv_cache_spec.pages.pages_for(num_tokens))


def register_specs() -> None:
    """Make the spec and its manager known to vLLM."""
    # Without this first, ours would be taken for all there is, and vLLM's own would never be registered.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(HeadPagesSpec, HeadPagesManager)
