"""Arithmetic word problems with worked solutions: long documents that are unlike speeches and unlike source code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from moa_lab.calibration.documents import JOINT, Document

# No name of `wordings.WORDINGS` is among these, so that documents do not mention the planted facts.
NAMES = (
    "Anna", "Boris", "Cecily", "Daniel", "Elena", "Farid", "Gloria", "Henrik", "Irene", "Jakub", "Katya", "Leon", "Maria", "Nadia",
    "Oscar", "Paula", "Rafael", "Sofia", "Tomas", "Ursula", "Viktor", "Wanda", "Xavier", "Yusuf", "Zoe", "Anton", "Bettina", "Carlos",
)  # fmt: skip
GOODS = (
    "pencils", "notebooks", "candles", "buttons", "marbles", "postcards", "stamps", "cushions", "baskets", "lamps", "bricks", "tiles",
    "ropes", "spoons", "plates", "kites", "hammers", "ribbons", "mugs", "carpets", "seeds", "shirts", "hats", "chairs",
)  # fmt: skip
WHERE = ("at the market", "in a shop", "at the fair", "in the village", "at school", "in the warehouse", "on the farm", "by the river")

_SIGNS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
}


@dataclass(frozen=True)
class Step:
    """One line of a solution: `words: left sign right = result.` A division must come out even (ValueError)."""

    words: str
    left: int
    sign: str
    right: int

    def __post_init__(self) -> None:
        if self.sign == "/" and self.left % self.right:
            raise ValueError(f"{self.left} / {self.right} leaves a remainder")

    @property
    def result(self) -> int:
        """The result of the line."""
        return _SIGNS[self.sign](self.left, self.right)

    def __str__(self) -> str:
        return f"{self.words}: {self.left} {self.sign} {self.right} = {self.result}."


@dataclass(frozen=True)
class Problem:
    """A story that ends with a question, and the steps that answer it; the last step's result is the answer."""

    story: str
    steps: tuple[Step, ...]
    unit: str

    def __str__(self) -> str:
        lines = [self.story, *map(str, self.steps), f"The answer is {self.steps[-1].result} {self.unit}."]
        return "\n".join(lines)


def arithmetic_documents(count: int = 24, characters: int = 30_000, seed: int = 0) -> tuple[Document, ...]:
    """`count` documents of at least `characters` characters (and at most one problem more); no problem is repeated, in any of them."""
    random = Random(seed)
    seen: set[str] = set()
    documents = []
    for index in range(count):
        parts: list[str] = []
        size = 0
        while size - len(JOINT) < characters:
            problem = str(random.choice(KINDS)(random))
            if problem not in seen:
                seen.add(problem)
                parts.append(f"Problem {len(parts) + 1}. {problem}")
                size += len(parts[-1]) + len(JOINT)
        documents.append(Document(f"arithmetic {index + 1}", JOINT.join(parts)))
    return tuple(documents)


def _purchase(random: Random) -> Problem:
    name, where = random.choice(NAMES), random.choice(WHERE)
    first, second = random.sample(GOODS, 2)
    a, b, p, q = (random.randrange(2, 60) for _ in range(4))
    steps = (Step(f"The {first} cost", a, "*", p), Step(f"The {second} cost", b, "*", q), Step("Together", a * p, "+", b * q))
    story = f"{where.capitalize()}, {name} buys {a} {first} at {p} coins each and {b} {second} at {q} coins each. How much does {name} pay?"
    return Problem(story, steps, "coins")


def _change(random: Random) -> Problem:
    name, goods = random.choice(NAMES), random.choice(GOODS)
    count, price = random.randrange(2, 30), random.randrange(2, 40)
    given = 50 * (count * price // 50 + random.randrange(1, 4))
    steps = (Step(f"The {goods} cost", count, "*", price), Step("What comes back", given, "-", count * price))
    return Problem(f"{name} pays for {count} {goods}, {price} coins each, with {given} coins. How many coins come back?", steps, "coins")


def _sharing(random: Random) -> Problem:
    name, goods = random.choice(NAMES), random.choice(GOODS)
    friends, each, kept = random.randrange(3, 25), random.randrange(3, 60), random.randrange(2, 40)
    total = friends * each + kept
    story = f"{name} has {total} {goods}, keeps {kept} of them and shares the rest equally among {friends} friends. "
    steps = (Step("To be shared", total, "-", kept), Step("For each friend", total - kept, "/", friends))
    return Problem(story + "How many does every friend get?", steps, goods)


def _journey(random: Random) -> Problem:
    name = random.choice(NAMES)
    fast, slow, first, second = random.randrange(40, 120), random.randrange(10, 39), random.randrange(2, 9), random.randrange(2, 9)
    vehicle, other = random.sample(("train", "bus", "boat", "lorry", "tram", "bicycle"), 2)
    steps = (
        Step(f"By {vehicle}", fast, "*", first),
        Step(f"By {other}", slow, "*", second),
        Step("All the way", fast * first, "+", slow * second),
    )
    story = (
        f"{name} rides a {vehicle} for {first} hours at {fast} km an hour, then a {other} for {second} hours at {slow} km an hour. "
        f"How far does {name} travel?"
    )
    return Problem(story, steps, "km")


def _factory(random: Random) -> Problem:
    goods = random.choice(GOODS)
    rate, hours, days, broken = random.randrange(12, 90), random.randrange(4, 12), random.randrange(3, 29), random.randrange(5, 100)
    made = rate * hours
    steps = (
        Step("In a day", rate, "*", hours),
        Step("In all days", made, "*", days),
        Step("Without the broken ones", made * days, "-", broken),
    )
    story = (
        f"A workshop makes {rate} {goods} an hour and works {hours} hours a day. In {days} days {broken} of them break. How many are left?"
    )
    return Problem(story, steps, goods)


def _savings(random: Random) -> Problem:
    name, goods = random.choice(NAMES), random.choice(GOODS)
    start, weekly, weeks = random.randrange(20, 400), random.randrange(5, 60), random.randrange(3, 40)
    spent = random.randrange(10, start + weekly * weeks)
    story = f"{name} has {start} coins, saves {weekly} coins a week for {weeks} weeks and then spends {spent} coins on {goods}. "
    saved = weekly * weeks
    steps = (Step("Saved", weekly, "*", weeks), Step("Before the purchase", start, "+", saved), Step("After it", start + saved, "-", spent))
    return Problem(story + f"How many coins does {name} have now?", steps, "coins")


def _packing(random: Random) -> Problem:
    name, goods, where = random.choice(NAMES), random.choice(GOODS), random.choice(WHERE)
    boxes, each, loose = random.randrange(4, 60), random.randrange(6, 48), random.randrange(1, 30)
    story = f"{where.capitalize()}, {name} counts {boxes} boxes with {each} {goods} in each, and {loose} loose ones. How many are there?"
    return Problem(story, (Step("In the boxes", boxes, "*", each), Step("With the loose ones", boxes * each, "+", loose)), goods)


def _ages(random: Random) -> Problem:
    younger, older = random.sample(NAMES, 2)
    age, gap, later = random.randrange(3, 50), random.randrange(2, 30), random.randrange(2, 25)
    steps = (
        Step(f"{older} is", age, "+", gap), Step(f"{younger} will be", age, "+", later),
        Step(f"{older} will be", age + gap, "+", later), Step("The sum", age + later, "+", age + gap + later),
    )  # fmt: skip
    story = f"{younger} is {age} years old and {older} is {gap} years older. How old will both be together in {later} years?"
    return Problem(story, steps, "years")


def _times_as_many(random: Random) -> Problem:
    first, second = random.sample(NAMES, 2)
    goods = random.choice(GOODS)
    few, times = random.randrange(7, 120), random.randrange(2, 13)
    many = few * times
    steps = (Step(f"{second} has", few, "*", times), Step("The difference", many, "-", few))
    story = f"{first} collected {few} {goods}; {second} collected {times} times as many. How many more does {second} have?"
    return Problem(story, steps, goods)


def _garden(random: Random) -> Problem:
    name = random.choice(NAMES)
    long, price = random.randrange(12, 90), random.randrange(2, 15)
    wide = random.randrange(4, long)
    half = long + wide
    steps = (Step("Half the way around", long, "+", wide), Step("The fence is", half, "*", 2), Step("It costs", half * 2, "*", price))
    story = (
        f"{name} fences a garden {long} metres long and {wide} metres wide. A metre of fence costs {price} coins. What does all of it cost?"
    )
    return Problem(story, steps, "coins")


def _stops(random: Random) -> Problem:
    start, off, on, later = random.randrange(30, 90), random.randrange(3, 15), random.randrange(3, 20), random.randrange(3, 15)
    vehicle, name = random.choice(("bus", "train", "ferry", "tram")), random.choice(NAMES)
    steps = (
        Step("After the first stop", start, "-", off), Step("With the new passengers", start - off, "+", on),
        Step("After the second stop", start - off + on, "-", later),
    )  # fmt: skip
    story = (
        f"{name} drives a {vehicle} with {start} passengers. At the first stop {off} get off and {on} get on; at the second {later} get "
        "off. How many are left?"
    )
    return Problem(story, steps, "passengers")


def _average(random: Random) -> Problem:
    name, goods = random.choice(NAMES), random.choice(GOODS)
    mean, up, down = random.randrange(40, 200), random.randrange(1, 30), random.randrange(1, 30)
    counts = (mean + up, mean - down, mean - up + down)
    steps = (
        Step("The first two days", counts[0], "+", counts[1]), Step("All three days", counts[0] + counts[1], "+", counts[2]),
        Step("A day", sum(counts), "/", 3),
    )  # fmt: skip
    story = f"{name} sells {counts[0]} {goods} on Monday, {counts[1]} on Tuesday and {counts[2]} on Wednesday. How many is that on average?"
    return Problem(story, steps, f"{goods} a day")


def _reading(random: Random) -> Problem:
    name = random.choice(NAMES)
    daily, days, read = random.randrange(8, 60), random.randrange(3, 40), random.randrange(10, 200)
    pages = daily * days + read
    steps = (Step("Still to read", pages, "-", read), Step("It takes", pages - read, "/", daily))
    story = f"A book has {pages} pages. {name} has read {read} of them and reads {daily} pages a day. How many days are left?"
    return Problem(story, steps, "days")


KINDS: tuple[Callable[[Random], Problem], ...] = (
    _purchase, _change, _sharing, _journey, _factory, _savings, _packing, _ages, _times_as_many, _garden, _stops, _average, _reading,
)  # fmt: skip
"""The kinds of problems, each a function that draws one."""
