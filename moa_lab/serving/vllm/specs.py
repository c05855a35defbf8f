"""The KV cache of a plan as vLLM's scheduler sees it: one pool of pages, and a manager that gives requests what the plan says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from moa_lab.serving.page_layout import RequestPages

BUCKET_COLUMNS = 1
"""Columns of a block table before its pages: the bucket of the request, which tells the attention its windows."""


@dataclass(frozen=True, kw_only=True)
class HeadPagesSpec(AttentionSpec):
    """Pages of one KV head each, which all layers take from the pool of the first one.

    shares: the layouts of the heads that each device holds, alike in their numbers of pages; they travel from the worker to the scheduler
    with the spec. num_kv_heads, head_size, dtype: of a page, whose codes are bytes.
    """

    shares: tuple[RequestPages, ...]

    @property
    def pages(self) -> RequestPages:
        """What the scheduler hands out, on all devices alike."""
        return self.shares[0]

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Columns of the block table: as many at least as a dense cache has, since vLLM 0.26 makes a slot mapping that nobody reads."""
        return max(BUCKET_COLUMNS + self.pages.most_pages(max_len), -(-max_len // self.block_size))

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the longest request."""
        return self.pages.most_pages(vllm_config.model_config.max_model_len) * self.page_size_bytes

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

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._buckets: dict[str, int] = {}

    def expect(self, request_id: str, n_tokens: int) -> None:
        """Told before a request gets its first page: it will have up to `n_tokens`."""
        if request_id not in self._buckets:
            self._buckets[request_id] = self.kv_cache_spec.pages.bucket(n_tokens)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *arguments: Any, **settings: Any) -> int:
        """Pages that a request of `num_tokens` lacks."""
        held = len(self.req_to_blocks.get(request_id, ()))
        return max(self._pages(request_id, num_tokens) - max(held - BUCKET_COLUMNS, 0), 0)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        """The pages that a request of `num_tokens` lacks, in the order of its block table, which begins with the request's bucket."""
        held = self.req_to_blocks[request_id]
        new: list[Any] = [] if held else [KVCacheBlock(self._buckets[request_id], is_null=True)]
        lacking = self._pages(request_id, num_tokens) + BUCKET_COLUMNS - len(held) - len(new)
        if lacking > 0:
            new += self.block_pool.get_new_blocks(lacking)
        held.extend(new)
        return new

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """The pages of a request that has ended, or will be computed again."""
        self._buckets.pop(request_id, None)
        found: list[Any] = super().pop_blocks_for_free(request_id)
        return found[BUCKET_COLUMNS:]

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: Sequence[int], *arguments: Any, **settings: Any
    ) -> tuple[tuple[list[Any], ...], int]:
        """Nothing: see `HeadPagesSpec.prefix_cacheable`."""
        return tuple([] for _ in kv_cache_group_ids), 0

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """None: requests share no pages."""
        return 0

    def _pages(self, request_id: str, num_tokens: int) -> int:
        return int(self.kv_cache_spec.pages.layouts[self._buckets[request_id]].pages_for(num_tokens))


def register_specs() -> None:
    """Make the spec and its manager known to vLLM."""
    # Without this first, ours would be taken for all there is, and vLLM's own would never be registered.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(HeadPagesSpec, HeadPagesManager)
