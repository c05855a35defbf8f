"""Plotly figures of records: pure functions that return a figure and neither print nor write."""

from moa_lab.figures.across import fronts_over
from moa_lab.figures.benchmarks import goal_ratios
from moa_lab.figures.capacity import requests_by_density
from moa_lab.figures.comparisons import differences, matrix, predicted_vs_measured
from moa_lab.figures.confidence import percentile_ranks, rank_confidence
from moa_lab.figures.densities import loss_by_density, score_by, score_by_density
from moa_lab.figures.front import front_scatter, parallel_goals, predicted_against_measured
from moa_lab.figures.head_maps import HeadPool, difference_map, influence_map, long_range_influence
from moa_lab.figures.influence import head_blocks, influence_by_distance
from moa_lab.figures.kinds import kind_map, ranks_compared, score_map
from moa_lab.figures.measured import measured_front
from moa_lab.figures.measurements import kv_bytes_bars, pooled, retrieval_heatmap, score_bars
from moa_lab.figures.order import alike_together, largest_first
from moa_lab.figures.plan import mask_preview, rule_curves, span_map
from moa_lab.figures.roofline import kernel_roofline
from moa_lab.figures.search import archive_scatter, hypervolume_curve
from moa_lab.figures.speed import speed_by_accuracy
from moa_lab.figures.speed_and_quality import speed_and_quality
from moa_lab.figures.theme import CONFIG, template, with_theme
from moa_lab.figures.throughput import throughput_by_kv_bytes
from moa_lab.figures.traced import token_map

__all__ = [
    "CONFIG",
    "HeadPool",
    "alike_together",
    "archive_scatter",
    "difference_map",
    "differences",
    "front_scatter",
    "fronts_over",
    "goal_ratios",
    "head_blocks",
    "hypervolume_curve",
    "influence_by_distance",
    "influence_map",
    "kernel_roofline",
    "kind_map",
    "kv_bytes_bars",
    "largest_first",
    "long_range_influence",
    "loss_by_density",
    "mask_preview",
    "matrix",
    "measured_front",
    "parallel_goals",
    "percentile_ranks",
    "pooled",
    "predicted_against_measured",
    "predicted_vs_measured",
    "rank_confidence",
    "ranks_compared",
    "requests_by_density",
    "retrieval_heatmap",
    "rule_curves",
    "score_bars",
    "score_by",
    "score_by_density",
    "score_map",
    "span_map",
    "speed_and_quality",
    "speed_by_accuracy",
    "template",
    "throughput_by_kv_bytes",
    "token_map",
    "with_theme",
]
