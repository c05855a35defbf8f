"""Facts to plant and the questions that need them. Calibration, validation and test never share a wording or a list of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from moa_lab.calibration.documents import Split


@dataclass(frozen=True)
class Fact:
    """A planted sentence, the question about it, the words that lead the answer in, and the answer itself."""

    wording: str
    key: str
    sentence: str
    question: str
    lead: str
    answer: str


@dataclass(frozen=True)
class Wording:
    """How a kind of fact is said and asked; `{key}` and `{value}` are filled in."""

    name: str
    sentence: str
    question: str
    lead: str
    keys: tuple[tuple[str, ...], ...]
    value: Callable[[Random], str]

    def draw(self, random: Random, taken: set[str]) -> Fact:
        """A fact whose key is not in `taken` (and is added to it)."""
        for _ in range(1000):
            key = " ".join(random.choice(words) for words in self.keys)
            if key not in taken:
                break
        taken.add(key)
        value = self.value(random)
        return Fact(
            wording=self.name,
            key=key,
            sentence=self.sentence.format(key=key, value=value),
            question=self.question.format(key=key),
            lead=self.lead.format(key=key),
            answer=value,
        )


def _digits(count: int) -> Callable[[Random], str]:
    return lambda random: str(random.randrange(10 ** (count - 1), 10**count))


def _letters(random: Random, count: int) -> str:
    return "".join(random.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(count))


def _code(random: Random) -> str:
    return f"{_letters(random, 3)}-{random.randrange(1000, 10000)}"


def _flight(random: Random) -> str:
    return f"{_letters(random, 2)}{random.randrange(100, 1000)}"


_TOWNS = ("Ashford", "Brenton", "Calder", "Dunmore", "Elmhurst", "Farrow", "Glenrock", "Hartwell", "Ivydale", "Kelso", "Linden", "Marlow")
_PLACES = ("harbor", "mill", "station", "library", "bakery", "quarry", "chapel", "orchard")
_FIRST = ("Amelia", "Bernard", "Clara", "Dmitri", "Esther", "Felix", "Greta", "Hassan", "Ingrid", "Jonah", "Keiko", "Lorenzo")
_LAST = ("Abbott", "Bishop", "Cortez", "Dalton", "Engel", "Foster", "Grimes", "Holt", "Ibarra", "Jensen", "Kramer", "Lund")
_COLORS = ("scarlet", "amber", "violet", "ivory", "indigo", "bronze", "crimson", "silver")
_THINGS = ("locker", "crate", "cabinet", "trunk", "drawer", "satchel", "barrel", "toolbox")
_FRUITS = ("apples", "pears", "melons", "cherries", "plums", "lemons", "grapes", "figs")
_SHIPS = ("Aurora", "Borealis", "Concord", "Dauntless", "Endeavour", "Fortuna", "Galatea", "Halcyon")
_ADJECTIVES = (
    "aggressive", "bright", "careful", "distant", "eager", "fragile", "gentle", "hollow", "jolly", "keen",
    "loud", "mellow", "nimble", "proud", "quiet", "rapid", "stubborn", "tidy", "upbeat", "wicked",
)  # fmt: skip
_ANIMALS = (
    "badger", "beaver", "camel", "dolphin", "falcon", "gecko", "heron", "jaguar", "koala", "lobster",
    "moose", "otter", "panda", "rabbit", "salmon", "tiger", "turtle", "walrus", "wombat", "zebra",
)  # fmt: skip
_COMPANIES = ("Oakwood", "Pinecrest", "Quarrystone", "Redfield", "Stonebridge", "Thornbury", "Underhill", "Westgate")
_TRADES = ("Trading", "Milling", "Shipping", "Printing", "Mining")
_OWNERS = ("Mira", "Nolan", "Odette", "Pavel", "Quincy", "Rosalind", "Stefan", "Tamara")
_SURNAMES = ("Marsh", "Nash", "Oakley", "Pruitt", "Quill", "Rowe", "Sharpe", "Tate")
_SIDES = ("North", "South", "Upper", "Lower", "New")
_VILLAGES = ("Norwood", "Oakdale", "Preston", "Quenby", "Ripley", "Selby", "Tilbury", "Upton")

WORDINGS: Mapping[Split, tuple[Wording, ...]] = {
    "calibration": (
        Wording(
            "pass_key", "Remember this: the pass key of the {key} is {value}.", "What is the pass key of the {key}?",
            "The pass key of the {key} is", (_TOWNS, _PLACES), _digits(6),
        ),
        Wording(
            "combination", "The combination that opens the {key} is {value}.", "What is the combination that opens the {key}?",
            "The combination that opens the {key} is", (_COLORS, _THINGS), _digits(5),
        ),
        Wording(
            "telephone", "You can reach {key} by telephone at {value}.", "What is the telephone number of {key}?",
            "The telephone number of {key} is", (_FIRST, _LAST), _digits(7),
        ),
        Wording(
            "flight", "{key} is booked on flight {value}.", "On which flight is {key} booked?",
            "{key} is booked on flight", (_FIRST, _LAST), _flight,
        ),
        Wording(
            "cargo", "The ship {key} carried {value}.", "What did the ship {key} carry?",
            "The ship {key} carried", (_SHIPS,), lambda r: f"{r.randrange(100, 1000)} boxes of {r.choice(_FRUITS)}",
        ),
    ),
    "validation": (
        Wording(
            "account", "For the record, account number {value} belongs to the {key} company.",
            "Which account number belongs to the {key} company?",
            "The {key} company has account number", (_COMPANIES, _TRADES), _digits(7),
        ),
        Wording(
            "licence", "The vehicle registered to {key} bears the licence plate {value}.",
            "Which licence plate does the vehicle of {key} bear?",
            "The vehicle of {key} bears the licence plate", (_OWNERS, _SURNAMES), _code,
        ),
        Wording(
            "invoice", "The invoice for the town of {key} bears the number {value}.",
            "Which number does the invoice for the town of {key} bear?",
            "The invoice for the town of {key} bears the number", (_SIDES, _VILLAGES), _digits(6),
        ),
    ),
    "test": (
        Wording(
            "magic_number", "One of the special magic numbers for {key} is: {value}.",
            "What is the special magic number for {key} mentioned in the text above?",
            "The special magic number for {key} mentioned in the text above is:", (_ADJECTIVES, _ANIMALS), _digits(7),
        ),
        Wording(
            "secret", "By the way, the secret number of the {key} is {value}.", "What is the secret number of the {key}?",
            "The secret number of the {key} is", (_ADJECTIVES, _ANIMALS), _digits(7),
        ),
        Wording(
            "reference", "Important: the reference number of the {key} is {value}.", "What is the reference number of the {key}?",
            "The reference number of the {key} is", (_ADJECTIVES, _ANIMALS), _digits(7),
        ),
    ),
}  # fmt: skip
"""Wordings per split. The test values are random 7-digit numbers: chance is 1 in 9 million."""
