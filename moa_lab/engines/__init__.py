"""What serving engines can hold of a plan: their limits, and what they allocate for it."""

from moa_lab.engines.holding import Held, allocated_density, check_stored, fits, held, meets, padded_plan
from moa_lab.engines.known import ENGINES, Engine, engine_of
from moa_lab.engines.limits import EngineLimits
from moa_lab.engines.table import engine_table

__all__ = [
    "ENGINES",
    "Engine",
    "EngineLimits",
    "Held",
    "allocated_density",
    "check_stored",
    "engine_of",
    "engine_table",
    "fits",
    "held",
    "meets",
    "padded_plan",
]
