"""Labels at the right edge of a picture, beside what they name and never over each other."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes


@dataclass(frozen=True)
class Label:
    """A text at height ``y`` of the data."""

    y: float
    text: str
    colour: str
    weight: str = "normal"


def write_labels(
    axes: Axes, labels: list[Label], *, gap: float, size: float, at: float = 1.045
) -> None:
    """Write labels beside the right edge, at least ``gap`` of the axis' height apart.

    A thin line leads from the height that a label names to the label; ``at`` is where the text
    begins, in widths of the axes.
    """
    bottom, top = axes.get_ylim()
    labels = sorted(labels, key=lambda label: label.y)
    wanted = [(label.y - bottom) / (top - bottom) for label in labels]
    for label, place in zip(labels, spread(wanted, gap), strict=True):
        axes.annotate(
            label.text, (1.0, label.y), xytext=(at, place),
            xycoords=axes.get_yaxis_transform(),
            textcoords="axes fraction", va="center", color=label.colour, fontsize=size,
            fontweight=label.weight, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.8,
                        "shrinkA": 1, "shrinkB": 0, "relpos": (0.0, 0.5)},
        )  # fmt: skip


def spread(wanted: list[float], gap: float) -> list[float]:
    """Return places near the sorted ``wanted`` ones, none nearer to the next than ``gap``.

    Labels that are too near form a group that is centred on the mean of their wishes.
    """
    groups: list[tuple[float, int]] = []  # (centre, size)
    for wish in wanted:
        groups.append((wish, 1))
        while len(groups) > 1:
            (low, below), (high, above) = groups[-2:]
            if high - low >= gap * (below + above) / 2:
                break
            size = below + above
            groups[-2:] = [((low * below + high * above) / size, size)]
    return [centre + gap * (i - (size - 1) / 2) for centre, size in groups for i in range(size)]
