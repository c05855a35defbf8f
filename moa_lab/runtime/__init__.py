"""Running a model under a plan."""

from moa_lab.runtime.apply import apply_plan, ring_cache
from moa_lab.runtime.ring_cache import RingCache

__all__ = ["RingCache", "apply_plan", "ring_cache"]
