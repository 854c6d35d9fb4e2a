"""Tasks by their names."""

from __future__ import annotations

from ziphius.alignment.tasks.arithmetic import Products, Sums
from ziphius.alignment.tasks.brackets import Brackets
from ziphius.alignment.tasks.countdown import Countdown
from ziphius.alignment.tasks.files import PREFIX as FILE
from ziphius.alignment.tasks.files import FileTask
from ziphius.alignment.tasks.gym import PREFIX as GYM
from ziphius.alignment.tasks.gym import GymTask
from ziphius.alignment.tasks.integers import Bases, Gcd, Remainders
from ziphius.alignment.tasks.level import LEVELS, LeveledTask
from ziphius.alignment.tasks.lists import Sorting
from ziphius.alignment.tasks.problem import Task
from ziphius.alignment.tasks.sequences import Sequences
from ziphius.alignment.tasks.units import Units
from ziphius.alignment.tasks.weekdays import Weekdays
from ziphius.alignment.tasks.words import Letters, Reversal
from ziphius.config.errors import BadInput
from ziphius.config.table import nearest

OUR_TASKS: tuple[type[LeveledTask], ...] = (
    Sums, Products, Gcd, Remainders, Bases, Sequences, Countdown, Reversal, Letters, Sorting,
    Brackets, Units, Weekdays,
)  # fmt: skip


def find_task(name: str) -> Task:
    """Return the task of a name: ``sums``, ``sums:3`` (its level), ``gym:NAME``, ``file:PATH``.

    Raises BadInput that names the nearest for a name nobody has.
    """
    if name.startswith(GYM):
        return GymTask(name.removeprefix(GYM))
    if name.startswith(FILE):
        return FileTask(name.removeprefix(FILE))
    kinds = {task.kind: task for task in OUR_TASKS}
    kind, colon, level = name.partition(":")
    if kind not in kinds:
        raise BadInput(
            f"task {name}: is unknown{nearest(kind, kinds)}; others are {GYM}NAME and {FILE}PATH"
        )
    if not colon:
        return kinds[kind]()
    if level not in {str(number) for number in range(1, LEVELS + 1)}:
        raise BadInput(f"task {name}: there is no level {level!r}: give 1 to {LEVELS}")
    return kinds[kind](int(level))
