"""Profiling: how much the loss would change if one attention value were masked, for every head."""

from moa_lab.profiling.estimate import Estimate, estimate_cost
from moa_lab.profiling.profiler import profile, profiling_examiner

__all__ = ["Estimate", "estimate_cost", "profile", "profiling_examiner"]
