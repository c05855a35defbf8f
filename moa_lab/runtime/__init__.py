"""Running a model under a plan."""

from moa_lab.runtime.apply import apply_plan, ring_cache
from moa_lab.runtime.generate import Generation, generate
from moa_lab.runtime.hf_cache import RingCache
from moa_lab.runtime.sampling import Sampling

__all__ = ["Generation", "RingCache", "Sampling", "apply_plan", "generate", "ring_cache"]
