"""report.html: one file that needs no network and runs no script."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ziphius.report import balancing, curves, headline, health, heat, tables
from ziphius.report.checks import check
from ziphius.report.experts import layer_figures
from ziphius.report.files import write_whole
from ziphius.report.needle import NEEDLE, needle_panels
from ziphius.report.read import BALANCE, METRICS, RECIPE, SUMMARY, Run, read_run
from ziphius.report.rewards import reward_panels
from ziphius.report.stages import length_panel, stage_table
from ziphius.report.style import Key, Panel, drawing
from ziphius.report.svg import inline

REPORT = "report.html"
# With more MoE layers than this the page opens with the most alarming ones and folds the rest.
OPEN_MAPS = 8
_TEMPLATE = "page.html.j2"


@dataclass(frozen=True)
class Drawn:
    """A panel as the template needs it: its figures are SVG."""

    name: str
    title: str
    unit: str
    svg: Markup
    narrow: Markup | None
    keys: tuple[Key, ...]
    bare_keys: tuple[Key, ...]
    note: str
    by: str


def write_report(run: Path, output: Path | None = None) -> Path:
    """Draw a run's report from the files of its folder; return where it was written.

    ``output`` is ``report.html`` in the folder by default; it is replaced in one step. The same
    files give the same bytes. A run that has not finished gets a report too, of what is there.
    Raises BadInput, one line, for a folder that holds no run and for a file that cannot be read
    or written.
    """
    page = render(read_run(run))
    target = output or run / REPORT
    write_whole(target, page.encode())
    return target


def render(run: Run) -> str:
    """Return the page."""
    environment = Environment(
        loader=PackageLoader("ziphius.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with drawing():
        content = _content(run)
    return environment.get_template(_TEMPLATE).render(content)


def _content(run: Run) -> dict[str, Any]:
    layers = layer_figures(run.balance) if run.balance is not None else ()
    findings = check(run, layers)
    maps = balancing.maps(run, layers) if layers else ()
    alarming = sorted(maps, key=lambda one: -one.alarming)[:OPEN_MAPS]
    few = len(maps) <= OPEN_MAPS
    return {
        "name": run.name,
        "subtitle": headline.subtitle(run),
        "headlines": headline.headlines(run),
        "warnings": findings.warnings,
        "passed": findings.passed,
        "notes": run.notes,
        "bits": next(_draw([curves.bits_panel(run)]), None),
        "stages": stage_table(run),
        "stage_panels": list(_draw([length_panel(run)])),
        "reward_panels": list(_draw(reward_panels(run))),
        "curve_panels": list(_draw(curve_panels(run))),
        "expert_panels": list(_draw(expert_panels(run, layers))),
        "needle_panels": list(_draw(needle_panels(run.needles))),
        "health_panels": list(_draw(health_panels(run))),
        "open_maps": [one for one in maps if few or one in alarming],
        "folded_maps": [one for one in maps if not few and one not in alarming],
        "heat": {"scale": heat.scale(), "steps": _span(run)},
        "layer_rows": balancing.layer_rows(run, layers) if layers else [],
        "formula": headline.mfu_formula(run),
        "events": tables.event_rows(run),
        "skips": tables.skip_rows(run),
        "samples": tables.samples(run),
        "corpus": tables.corpus_rows(run),
        "removed": tables.removed_rows(run),
        "machine": tables.machine_rows(run),
        "other": tables.other_rows(run),
        "settings": tables.settings(run),
        "sources": [METRICS]
        + [BALANCE] * (run.balance is not None)
        + [SUMMARY] * (run.summary is not None)
        + [NEEDLE] * (run.needles is not None)
        + [RECIPE] * (run.recipe is not None),
    }


def curve_panels(run: Run) -> Iterable[Panel | None]:
    """Return the small pictures of losses and schedules."""
    return (
        curves.loss_panel(run),
        curves.close_up_panel(run),
        *health.schedule_panels(run),
        health.gradient_panel(run),
        health.balance_loss_panel(run),
        health.agreement_panel(run),
    )


def expert_panels(run: Run, layers: tuple[Any, ...]) -> Iterable[Panel | None]:
    """Return the small pictures of balance."""
    panels = [health.violation_panel(run)]
    if layers:
        panels += [
            balancing.layers_panel(run, layers),
            balancing.bias_panel(run, layers),
            balancing.dead_panel(run, layers),
        ]
    return panels


def health_panels(run: Run) -> Iterable[Panel | None]:
    """Return the small pictures of speed."""
    return health.speed_panel(run), health.mfu_panel(run)


def _draw(panels: Iterable[Panel | None]) -> Iterator[Drawn]:
    for panel in panels:
        if panel is not None:
            yield Drawn(
                name=panel.name,
                title=panel.title,
                unit=panel.unit,
                # The one place where text becomes markup: matplotlib has escaped what it writes.
                svg=Markup(inline(panel.figure, panel.name)),
                narrow=(
                    Markup(inline(panel.narrow, f"{panel.name}-narrow")) if panel.narrow else None
                ),
                keys=panel.keys,
                bare_keys=panel.bare_keys,
                note=panel.note,
                by=panel.by,
            )


def _span(run: Run) -> tuple[int, int]:
    steps = run.metrics.steps if run.balance is None else run.balance.steps
    return int(steps[0]), int(steps[-1])
