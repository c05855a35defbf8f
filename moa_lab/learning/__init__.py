"""Learned spans: every head's rule is drawn from a distribution, and the distributions are trained under the budget."""

from moa_lab.learning.descent import learn_spans
from moa_lab.learning.slopes import mean_slopes

__all__ = ["learn_spans", "mean_slopes"]
