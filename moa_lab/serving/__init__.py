"""Plans in serving engines: which pages of a paged KV cache every head takes, attention over them, and the plugin for vLLM."""

from moa_lab.serving.answers import Answers, Server
from moa_lab.serving.page_layout import PAGE_TOKENS, PageLayout, RequestPages, bucket_lengths, page_layout, request_pages
from moa_lab.serving.settings import GPU_VARIABLE, PLAN_LENGTH_VARIABLE, PLAN_VARIABLE, ServedPlan, check_device, check_served, served_plan

__all__ = [
    "GPU_VARIABLE",
    "PAGE_TOKENS",
    "PLAN_LENGTH_VARIABLE",
    "PLAN_VARIABLE",
    "Answers",
    "PageLayout",
    "RequestPages",
    "ServedPlan",
    "Server",
    "bucket_lengths",
    "check_device",
    "check_served",
    "page_layout",
    "request_pages",
    "served_plan",
]
