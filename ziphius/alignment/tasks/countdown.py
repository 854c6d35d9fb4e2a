"""The numbers game: combine some of the numbers to a target."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random

from ziphius.alignment.tasks.expression import evaluate
from ziphius.alignment.tasks.extract import bare_answer, whole_number
from ziphius.alignment.tasks.level import LeveledTask
from ziphius.alignment.tasks.problem import Problem

_WORDINGS = (
    "Make {target} from {numbers}.",
    "Use {numbers} to make {target}, each at most once.",
    "Combine {numbers} to get {target}.",
)


@dataclass(frozen=True)
class _Rules:
    """How many numbers up to which, by which signs, make which target at most."""

    count: int
    highest: int
    signs: str
    limit: int


@dataclass(frozen=True)
class _Term:
    """A number that was made: ``rank`` is 0 for a given one, 1 for a product, 2 for a sum."""

    value: int
    text: str
    rank: int = 0

    def within(self, highest: int) -> str:
        return self.text if self.rank <= highest else f"({self.text})"


class Countdown(LeveledTask):
    """Any expression is right that makes the target and uses every number at most once."""

    kind = "countdown"

    def draw(self, random: Random) -> Problem:
        """Return numbers and a target that they make, which is none of them."""
        rules = self.at(
            (
                _Rules(3, 9, "+-", 30),
                _Rules(3, 20, "+-*", 99),
                _Rules(4, 25, "+-*", 199),
                _Rules(5, 50, "+-*/", 499),
                _Rules(6, 100, "+-*/", 999),
            )
        )
        while True:
            numbers = [random.randrange(1, rules.highest + 1) for _ in range(rules.count)]
            made = self._combine(random, numbers, rules)
            if made and made[0].value <= rules.limit and made[0].value not in numbers:
                break
        target, steps = made
        return self.problem(
            random,
            _WORDINGS,
            {
                "target": self.spell(target.value),
                "numbers": ", ".join(map(self.spell, numbers)),
            },
            answer=target.text,
            key=f"{sorted(numbers)} {target.value}",
            steps=steps,
            facts={"numbers": numbers, "target": target.value},
        )

    def right(self, answer: str, problem: Problem) -> bool:
        """Evaluate the expression; ``= target`` after it does no harm."""
        expression, equals, result = bare_answer(answer).partition("=")
        evaluated = evaluate(expression)
        if evaluated is None:
            return False
        value, used = evaluated
        target, given = problem.facts["target"], Counter(problem.facts["numbers"])
        if equals and whole_number(bare_answer(result)) != target:
            return False
        return value == target and Counter(used) <= given

    def _combine(
        self, random: Random, numbers: list[int], rules: _Rules
    ) -> tuple[_Term, list[str]] | None:
        """Make one number of all but at most one: by pairs, in whole numbers above 0."""
        terms = [
            _Term(number, self.spell(number)) for number in random.sample(numbers, rules.count)
        ]
        if rules.count > 3 and random.random() < 0.5:
            terms.pop()
        steps = []
        while len(terms) > 1:
            a, b = (terms.pop(random.randrange(len(terms))) for _ in range(2))
            sign = random.choice(rules.signs)
            term = _join(a, sign, b)
            if term is None:
                return None
            left, right = self.spell(a.value), self.spell(b.value)
            steps.append(f"{left} {sign} {right} = {self.spell(term.value)}")
            terms.append(term)
        return terms[0], steps


def _join(a: _Term, sign: str, b: _Term) -> _Term | None:
    """Return what two numbers make, None where it is no whole number above 0."""
    match sign:
        case "+":
            return _Term(a.value + b.value, f"{a.text} + {b.text}", 2)
        case "-" if a.value > b.value:
            return _Term(a.value - b.value, f"{a.text} - {b.within(1)}", 2)
        case "*":
            return _Term(a.value * b.value, f"{a.within(1)} * {b.within(1)}", 1)
        case "/" if a.value % b.value == 0:
            return _Term(a.value // b.value, f"{a.within(1)} / {b.within(0)}", 1)
    return None
