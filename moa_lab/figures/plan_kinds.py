"""The look and the name of plans by their kind, the same in every figure: uniform, searched, whole heads, learned, refined."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from moa_lab.figures import theme
from moa_lab.records.candidates import KINDS, SEARCHED, origin_text

KIND_ORDER = (KINDS["uniform"], SEARCHED, KINDS["ranked"], KINDS["learned"], KINDS["layers"], KINDS["refined"], KINDS["far"])
_SEARCH_SYMBOLS = ("circle", "circle-open", "hexagon", "hexagon-open", "circle-x", "circle-cross-open", "hourglass", "bowtie")


def kind_styles() -> dict[str, theme.Style]:
    """A style per kind of plan, whichever kinds were measured."""
    uniform, *others, far = KIND_ORDER
    styles = theme.series_styles(("uniform", *others))
    # There are six styles: both kinds of whole heads share a colour, and differ in shape.
    alike = replace(styles[KINDS["ranked"]], symbol="triangle-down")
    return {uniform: styles["uniform"], **{kind: styles[kind] for kind in others}, far: alike}


def origin_styles(origins: Iterable[str]) -> dict[str, theme.Style]:
    """A style per origin of plans, in the order of their kinds: that of its kind; searches share its colour, and differ in shape."""
    styles, known = kind_styles(), set(origins)
    by_kind = {kind: [origin for origin in KINDS if KINDS[origin] == kind and origin in known] for kind in KIND_ORDER}
    # The search without further words has the symbol of its kind.
    searched = sorted(known - set(KINDS), key=lambda origin: (origin_text(origin) != SEARCHED, origin))
    found = {}
    for kind in KIND_ORDER:
        for number, origin in enumerate(searched if kind == SEARCHED else by_kind[kind]):
            symbol = _SEARCH_SYMBOLS[number % len(_SEARCH_SYMBOLS)] if kind == SEARCHED else styles[kind].symbol
            found[origin] = replace(styles[kind], symbol=symbol)
    return found
