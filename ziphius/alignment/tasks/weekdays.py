"""Days of the week: so many days on, and of a date."""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Callable, Hashable
from datetime import date, timedelta
from random import Random

from ziphius.alignment.tasks.level import LeveledTask
from ziphius.alignment.tasks.problem import Problem

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_LATER = (
    "Today is {day}. Which day is it in {n} days?",
    "It is {day}. What day will it be {n} days later?",
    "Which day comes {n} days after {day}?",
)
_EARLIER = (
    "Today is {day}. Which day was it {n} days ago?",
    "It is {day}. What day was it {n} days earlier?",
    "Which day comes {n} days before {day}?",
)
_IN_YEAR = (
    "In {year}, {first} is a {day}. Which day is {second}?",
    "{first} {year} is a {day}. What day of the week is {second} {year}?",
)
_OF_DATE = (
    "Which day of the week is {date}?",
    "What weekday is {date}?",
    "{date}: which day of the week?",
)


class Weekdays(LeveledTask):
    """Days on or back at levels 1 and 2, between dates of one year at 3, of any date at 4 and 5."""

    kind = "weekdays"

    def draw(self, random: Random) -> Problem:
        """Return a question whose answer is a day of the week."""
        if self.level < 3:
            return self._shifted(random)
        return self._within_a_year(random) if self.level == 3 else self._of_a_date(random)

    def read(self, text: str) -> Hashable:
        """Return the day, if the text is one."""
        day = text.capitalize()
        return day if day in DAYS else None

    def _shifted(self, random: Random) -> Problem:
        start = random.randrange(7)
        days = random.randrange(*self.at(((2, 61), (61, 1000), (0, 0), (0, 0), (0, 0))))
        sign = random.choice((1, -1))
        return self.problem(
            random,
            _LATER if sign > 0 else _EARLIER,
            {"day": DAYS[start], "n": self.spell(days)},
            answer=DAYS[(start + sign * days) % 7],
            key=f"{DAYS[start]} {sign * days:+}",
            steps=self._walk(start, days, sign),
        )

    def _walk(self, start: int, days: int, sign: int = 1) -> list[str]:
        """Leave whole weeks out, then name the days one by one."""
        passed = [DAYS[(start + sign * i) % 7] for i in range(days % 7 + 1)]
        return [_without_weeks(days, self.spell), ", ".join(passed)]

    def _within_a_year(self, random: Random) -> Problem:
        year = random.randrange(1900, 2100)
        first, second = sorted(
            random.sample(range(366 if monthrange(year, 2)[1] == 29 else 365), 2)
        )
        a, b = (date(year, 1, 1) + timedelta(days=n) for n in (first, second))
        return self.problem(
            random,
            _IN_YEAR,
            {
                "year": self.spell(year),
                "first": self._day_of(a),
                "second": self._day_of(b),
                "day": DAYS[a.weekday()],
            },
            answer=DAYS[b.weekday()],
            key=f"{a} {b}",
            steps=[*self._between(a, b), *self._walk(a.weekday(), (b - a).days)],
        )

    def _between(self, a: date, b: date) -> list[str]:
        """Count the days to the end of a's month, of the months between, and of b's."""
        if a.month == b.month:
            return [f"{self.spell(b.day)} - {self.spell(a.day)} = {self.spell(b.day - a.day)}"]
        length = monthrange(a.year, a.month)[1]
        total = length - a.day
        lines = [f"{self.spell(length)} - {self.spell(a.day)} = {self.spell(total)}"]
        months = [monthrange(a.year, month)[1] for month in range(a.month + 1, b.month)]
        for days in (*months, b.day):
            lines.append(f"{self.spell(total)} + {self.spell(days)} = {self.spell(total + days)}")
            total += days
        return lines

    def _day_of(self, day: date) -> str:
        return f"{self.spell(day.day)} {_MONTHS[day.month - 1]}"

    def _of_a_date(self, random: Random) -> Problem:
        first, last = (1950, 2050) if self.level == 4 else (1600, 2600)
        begin = date(first, 1, 1)
        day = begin + timedelta(days=random.randrange((date(last, 1, 1) - begin).days))
        written = day.isoformat() if self.level == 5 else f"{self._day_of(day)} {day.year}"
        return self.problem(
            random,
            _OF_DATE,
            {"date": written},
            answer=DAYS[day.weekday()],
            key=day.isoformat(),
            steps=_since_year_one(day),
        )


def _without_weeks(days: int, spell: Callable[[int], str] = str) -> str:
    """Divide by seven place by place, so that no step needs a large table: 45 is 40 and 5."""
    digits = str(days)
    powers = range(len(digits) - 1, 0, -1)
    places = [int(digit) * 10**power for digit, power in zip(digits, powers, strict=False)]
    parts = [*(place % 7 for place in places), int(digits[-1])]
    steps = [f"{spell(place)} mod 7 = {place % 7}" for place in places]
    if places:
        steps.append(f"{' + '.join(map(str, parts))} = {spell(sum(parts))}")
    return ", ".join([*steps, f"{spell(sum(parts))} mod 7 = {days % 7}"])


def _since_year_one(day: date) -> list[str]:
    """Count the days since the calendar's first, a Monday, as the rule of leap years has it."""
    years = day.year - 1
    fourths, centuries, fourth_centuries = years // 4, years // 100, years // 400
    leap = fourths - centuries + fourth_centuries
    before = 365 * years + leap
    months = [monthrange(day.year, month)[1] for month in range(1, day.month)]
    in_year = sum(months) + day.day
    total = before + in_year
    return [
        f"leap days: {fourths} - {centuries} + {fourth_centuries} = {leap}",
        f"365 * {years} + {leap} = {before}",
        f"{' + '.join(map(str, [*months, day.day]))} = {in_year}",
        f"{before} + {in_year} = {total}",
        _without_weeks(total),
        f"1 is {DAYS[0]}",
    ]
