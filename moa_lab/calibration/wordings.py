"""Facts to plant and the questions that need them. Calibration, validation and test never share a wording or a list of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from moa_lab.calibration.documents import Split


@dataclass(frozen=True)
class Fact:
    """A planted sentence, the question about it, the words that introduce the answer, and the answer itself."""

    wording: str
    key: str
    sentence: str
    question: str
    lead: str
    answer: str


@dataclass(frozen=True)
class Wording:
    """How a kind of fact is stated and asked for; `{key}` and `{value}` are filled in."""

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

_TOOLS = ("lathe", "boiler", "crane", "kettle", "printer", "tractor", "furnace", "pump", "loom", "anvil")
_SUBJECTS = ("geology", "astronomy", "poetry", "botany", "algebra", "sculpture", "chemistry", "rhetoric", "optics", "statistics")
_SERVICES = ("payroll", "archive", "mailing", "backup", "billing", "ticketing", "inventory", "weather", "parking", "survey")
_GIVEN = ("Olga", "Tobias", "Yusuf", "Marguerite", "Desmond", "Priya", "Anselm", "Beatrix", "Cormac", "Leonora", "Wilfred", "Zelda")
_FAMILY = ("Vance", "Whitlock", "Yardley", "Zimmer", "Okafor", "Petrov", "Larsen", "Moreau", "Tanaka", "Calloway", "Dunn", "Everett")
_GOODS = ("lantern", "carpet", "saddle", "violin", "telescope", "hammock", "compass", "teapot", "mirror", "bicycle")
_SHADES = ("green", "yellow", "purple", "orange", "grey", "pink", "turquoise", "beige")
_STREETS = ("Chestnut", "Willow", "Juniper", "Hawthorn", "Magnolia", "Sycamore", "Poplar", "Laurel", "Hazel", "Rowan")
_WAYS = ("Street", "Avenue", "Lane", "Square")
_CODENAMES = ("Thunder", "Lighthouse", "Pendulum", "Mosaic", "Harvest", "Cascade", "Lantern", "Meridian", "Obsidian", "Sparrow")
_CITIES = ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Dublin", "Ankara", "Havana", "Vienna", "Manila", "Tunis", "Bergen")
_WORDS = ("tulip", "marble", "ribbon", "candle", "pepper", "anchor", "velvet", "thistle", "copper", "meadow", "walnut", "feather")
_MONTHS = ("January", "March", "April", "June", "July", "August", "October", "November")
_TEAMS = ("Comets", "Wolves", "Rangers", "Pirates", "Giants", "Hornets", "Sailors", "Miners")
_REGIONS = ("Eastern", "Western", "Coastal", "Central", "Mountain", "Valley")
_METALS = ("iron", "tin", "brass", "nickel", "pewter", "steel")
_SOUPS = ("lentil", "onion", "pumpkin", "mushroom", "barley", "celery", "leek", "carrot")
_KEEPSAKES = ("medal", "coin", "bell", "ring", "button", "thimble", "buckle", "spoon")

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

LESSONS: tuple[Wording, ...] = (
    *WORDINGS["calibration"],
    Wording(
        "serial", "Serial number {value} is stamped on the {key}.", "Which serial number is stamped on the {key}?",
        "The serial number stamped on the {key} is", (_SHADES, _TOOLS), _digits(7),
    ),
    Wording(
        "room", "The {key} seminar takes place in room {value}.", "In which room does the {key} seminar take place?",
        "The {key} seminar takes place in room", (_SUBJECTS,), _digits(4),
    ),
    Wording(
        "password", "Please note that the password of the {key} server has been changed to {value}.",
        "What has the password of the {key} server been changed to?",
        "The password of the {key} server has been changed to", (_SERVICES,), lambda r: f"{r.choice(_WORDS)}{r.randrange(1000, 10000)}",
    ),
    Wording(
        "born", "{key} was born in the year {value}.", "In which year was {key} born?",
        "{key} was born in the year", (_GIVEN, _FAMILY), lambda r: str(r.randrange(1700, 2000)),
    ),
    Wording(
        "price", "At the auction, the {key} went for {value} dollars.", "For how many dollars did the {key} go at the auction?",
        "At the auction, the {key} went for", (_SHADES, _GOODS), _digits(5),
    ),
    Wording(
        "city", "After the war, {key} moved to {value}.", "Where did {key} move after the war?",
        "After the war, {key} moved to", (_GIVEN, _FAMILY), lambda r: r.choice(_CITIES),
    ),
    Wording(
        "code_word", "The code word for Operation {key} is {value}.", "What is the code word for Operation {key}?",
        "The code word for Operation {key} is", (_CODENAMES,), lambda r: f"{r.choice(_WORDS)}-{r.choice(_WORDS)}",
    ),
    Wording(
        "parcel", "Parcel {value} was delivered to {key} this morning.", "Which parcel was delivered to {key}?",
        "The parcel delivered to {key} was parcel", (_STREETS, _WAYS), _code,
    ),
    Wording(
        "bus", "To get to {key}, take bus number {value}.", "Which bus do you take to get to {key}?",
        "To get to {key}, take bus number", (_STREETS, _WAYS), _digits(3),
    ),
    Wording(
        "birthday", "The birthday of {key} falls on {value}.", "On which day does the birthday of {key} fall?",
        "The birthday of {key} falls on", (_GIVEN, _FAMILY), lambda r: f"{r.choice(_MONTHS)} {r.randrange(1, 29)}",
    ),
    Wording(
        "score", "In the final, the {key} scored {value} points.", "How many points did the {key} score in the final?",
        "In the final, the {key} scored", (_REGIONS, _TEAMS), _digits(6),
    ),
    Wording(
        "docket", "The case against {key} was filed as docket {value}.", "As which docket was the case against {key} filed?",
        "The case against {key} was filed as docket", (_GIVEN, _FAMILY), _digits(8),
    ),
    Wording(
        "tag", "A tag with the number {value} hangs on the {key}.", "Which number is on the tag of the {key}?",
        "The number on the tag of the {key} is", (_METALS, _KEEPSAKES), _digits(7),
    ),
    Wording(
        "odometer", "When {key} sold the car, its odometer stood at {value}.", "At what did the odometer stand when {key} sold the car?",
        "When {key} sold the car, its odometer stood at", (_GIVEN, _FAMILY), _digits(6),
    ),
    Wording(
        "page", "The recipe for {key} soup is on page {value}.", "On which page is the recipe for {key} soup?",
        "The recipe for {key} soup is on page", (_SOUPS,), _digits(3),
    ),
)  # fmt: skip
"""Wordings for learning spans: many, since spans learned from five kinds of sentence would serve those five best."""
