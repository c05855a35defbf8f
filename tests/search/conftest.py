"""A loss table of a realistic kind, for tests that need no special one."""

from __future__ import annotations

import pytest

from moa_lab.records import LossTable
from moa_lab.search import loss_table
from tests.search.instances import skewed_profile


@pytest.fixture(scope="module")
def table() -> LossTable:
    return loss_table(skewed_profile(6, 4, 2, (512, 1024)))
