"""Spans that are learned: every head's rule is drawn from a distribution, and the distributions are trained under the budget."""

from moa_lab.learning.descent import learn_spans

__all__ = ["learn_spans"]
