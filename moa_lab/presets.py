"""The settings of a run, and its presets: named sizes such as quick, standard and full."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moa_lab.engines import check_stored, engine_of
from moa_lab.plan import MIN_SPAN, SINK_TOKENS, check_density, read_mixes

SETTINGS_SCHEMA = "moa-lab/run/1"
QUESTIONS_PER_LESSON = 2
"""Questions about one text of the lessons (training samples): more slopes for the same tokens, but only the first is asked as in a test."""


NEEDLES, WORDS = "needles", "words"
KINDS = (NEEDLES, WORDS)
DEFAULT_PREFERENCE = "both"
PREFERENCES: Mapping[str, Mapping[str, float]] = {
    NEEDLES: {NEEDLES: 1.0},
    WORDS: {WORDS: 1.0},
    DEFAULT_PREFERENCE: {NEEDLES: 1.0, WORDS: 1.0},
}
TIE = 1e-3
"""Weight of the kind that is not preferred."""


@dataclass(frozen=True)
class Preference:
    """Weights of the two kinds of loss: of facts from the far past (needles) and of running text (words)."""

    needles: float
    words: float

    @classmethod
    def parse(cls, text: str) -> Preference:
        """`needles`, `words`, `both`, or weights such as `needles=2,words=1`. Raises ValueError for anything else, and for a kind
        that is named twice."""
        if text in PREFERENCES:
            weights = dict(PREFERENCES[text])
        else:
            weights = {}
            for part in text.split(","):
                name, _, number = (word.strip() for word in part.partition("="))
                if name in weights:
                    raise ValueError(f"prefer: {name!r} is named twice in {text!r}; name it once")
                try:
                    weights[name] = float(number)
                except ValueError:
                    weights = {"": math.nan}
                    break
        total = sum(weights.values())
        if not set(weights) <= set(KINDS) or not all(w >= 0 for w in weights.values()) or not 0 < total < math.inf:
            raise ValueError(f"prefer must be {', '.join(PREFERENCES)} or weights such as needles=2,words=1, got {text!r}")
        # Shares: weights that are tiny or huge say no more than their ratio.
        return cls(weights.get(NEEDLES, 0.0) / total, weights.get(WORDS, 0.0) / total)

    def weight(self, kind: str) -> float:
        """Weight of a kind; never 0, so that of plans that lose the same of what is preferred, the one that loses less is taken."""
        return max({NEEDLES: self.needles, WORDS: self.words}[kind], TIE)


@dataclass(frozen=True)
class Preset:
    """Sizes of a run. Counts are per length.

    questions (questions_per_sample in one text), summaries, texts: calibration samples; answer_tokens: tokens of a summary.
    validation_*: samples at a length beyond the profiled ones, and at these too if validate_profiled. candidates: plans of
    the search that are measured there. learning_steps: of the descent that learns more candidates (0: none), with most weight on
    questions, from learning_questions and learning_others of each other task; a second descent, with most weight on text, takes half
    as many. refine_rounds: rounds of refinement of the best candidate (0: none), each on refine_heads heads. needles (needles_per_text
    in one text), own_answers, lines, documents: test samples at every tested length. baselines: plans measured beside dense, uniform
    and the chosen one.
    """

    lengths: tuple[int, ...]
    questions: int
    questions_per_sample: int
    summaries: int
    texts: int
    answer_tokens: int
    candidates: int
    learning_steps: int
    learning_questions: int
    learning_others: int
    refine_rounds: int
    refine_heads: int
    validation_questions: int
    validation_summaries: int
    validation_texts: int
    validate_profiled: bool
    test_lengths: tuple[int, ...]
    needles: int
    needles_per_text: int
    own_answers: int
    lines: int
    documents: int
    baselines: tuple[str, ...]
    search_seconds: float

    @property
    def turns(self) -> int:
        """The most questions that are asked about one text."""
        lesson = min(QUESTIONS_PER_LESSON, self.learning_questions) if self.learning_steps else 1
        return max(self.questions_per_sample, self.needles_per_text, lesson)


PRESETS: Mapping[str, Preset] = {
    # A laptop's two cores: eight minutes with the embedded model.
    "quick": Preset(
        lengths=(1024, 1536), questions=8, questions_per_sample=2, summaries=2, texts=0, answer_tokens=48,
        candidates=4, learning_steps=0, learning_questions=0, learning_others=0, refine_rounds=0, refine_heads=0,
        validation_questions=4, validation_summaries=2, validation_texts=0, validate_profiled=False,
        test_lengths=(2048,), needles=16, needles_per_text=1, own_answers=4, lines=0, documents=0,
        baselines=(), search_seconds=10.0,
    ),
    # One GPU: minutes with half a billion weights, half an hour with eight.
    "standard": Preset(
        lengths=(2048, 4096), questions=32, questions_per_sample=1, summaries=8, texts=0, answer_tokens=128,
        candidates=8, learning_steps=200, learning_questions=96, learning_others=16, refine_rounds=0, refine_heads=0,
        validation_questions=48, validation_summaries=8, validation_texts=8, validate_profiled=True,
        test_lengths=(2048, 4096), needles=256, needles_per_text=1, own_answers=64, lines=32, documents=32,
        baselines=("paper",), search_seconds=30.0,
    ),
    # Many densities and many plans from one profile: less time for each, plain text as a task, more test samples.
    "study": Preset(
        lengths=(2048, 4096), questions=32, questions_per_sample=2, summaries=12, texts=12, answer_tokens=128,
        candidates=8, learning_steps=640, learning_questions=128, learning_others=24, refine_rounds=0, refine_heads=0,
        validation_questions=48, validation_summaries=8, validation_texts=8, validate_profiled=True,
        test_lengths=(1024, 2048, 4096, 8192), needles=512, needles_per_text=1, own_answers=64, lines=64, documents=32,
        baselines=(), search_seconds=15.0,
    ),
    # The same on a laptop's two cores, in minutes: to see every study run, with intervals too wide to decide anything.
    "sketch": Preset(
        lengths=(512,), questions=2, questions_per_sample=2, summaries=1, texts=1, answer_tokens=16,
        candidates=3, learning_steps=3, learning_questions=1, learning_others=1, refine_rounds=0, refine_heads=0,
        validation_questions=2, validation_summaries=1, validation_texts=1, validate_profiled=False,
        test_lengths=(640,), needles=2, needles_per_text=1, own_answers=1, lines=1, documents=2,
        baselines=(), search_seconds=3.0,
    ),
    "full": Preset(
        lengths=(1024, 2048, 4096), questions=96, questions_per_sample=1, summaries=32, texts=0, answer_tokens=192,
        candidates=32, learning_steps=1000, learning_questions=192, learning_others=48, refine_rounds=4, refine_heads=256,
        validation_questions=192, validation_summaries=48, validation_texts=0, validate_profiled=True,
        test_lengths=(1024, 2048, 4096, 8192), needles=256, needles_per_text=1, own_answers=64, lines=64, documents=32,
        baselines=("ranked", "paper"), search_seconds=300.0,
    ),
}  # fmt: skip
"""Presets by name. Their lengths beyond a model's maximum are left out; lengths that the user names are refused instead."""


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides a run's numbers. source: documents (see `load_documents`); None takes the embedded texts.

    test_seed: of the test samples alone, so that what was developed on one draw can be tested on another. plain_prompts: questions
    and answers are plain text, whatever chat template the tokenizer has. min_span: the floor, tokens that every head keeps at least,
    its sink of `sink_tokens` among them. use_lengths: where the plan will be used, beside the profiled and the tested lengths (None: up
    to twice the longest profiled one). prefer: what the plan is chosen by (see `Preference.parse`). bits: in how many keys and values may
    be stored (see `moa_lab.plan.read_mixes`), of several each head in its own; the density is one of bytes. engine: what plans must be
    held by (see `moa_lab.engines.engine_of`), the density being one of what it allocates.
    """

    model: str = "smollm2"
    density: float = 0.5
    lengths: tuple[int, ...] | None = None
    test_lengths: tuple[int, ...] | None = None
    preset: str = "quick"
    seed: int = 0
    test_seed: int = 0
    supervision: str = "model"
    source: str | None = None
    columns: str | None = None
    plain_prompts: bool = False
    max_rules_per_layer: int | None = None
    min_span: int = MIN_SPAN
    sink_tokens: int = SINK_TOKENS
    bits: str = "16"
    use_lengths: tuple[int, ...] | None = None
    prefer: str = DEFAULT_PREFERENCE
    engine: str | None = None

    def __post_init__(self) -> None:
        check_density(self.density)
        Preference.parse(self.prefer)
        mixes = read_mixes(self.bits)
        if self.engine is not None:
            for mix in mixes:
                check_stored(engine_of(self.engine), mix)
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.sink_tokens < 0:
            raise ValueError(f"the sink must have 0 tokens or more, got {self.sink_tokens}")
        if self.min_span <= self.sink_tokens:
            raise ValueError(f"min_span must exceed the sink of {self.sink_tokens} tokens, got {self.min_span}")
        if self.max_rules_per_layer is not None and self.max_rules_per_layer < 1:
            raise ValueError(f"max_rules_per_layer must be at least 1 or None, got {self.max_rules_per_layer}")
