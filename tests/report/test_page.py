"""The page as a browser gets it: whole, safe, self-contained, of bounded size, repeatable."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report.synthetic import Plan, write_lines, write_run
from ziphius.config.errors import BadInput
from ziphius.report.page import write_report

VOID = {"meta", "img", "br", "hr", "link", "input"}
PANELS = [
    "bits", "loss", "close-up", "lr", "gradient", "balance-loss", "agreement", "violation",
    "layers", "bias", "speed",
]  # fmt: skip


class Page(HTMLParser):
    """Elements with their attributes and text; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.stack: list[int] = []
        self.feed(text)
        self.close()
        assert not self.stack, [self.elements[i][0] for i in self.stack]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.stack.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        opened = self.elements[self.stack.pop()][0]
        assert opened == tag, f"<{opened}> closed by </{tag}>"

    def handle_data(self, data: str) -> None:
        for i in self.stack:
            self.elements[i][2].append(data)

    def all(self, tag: str, **attributes: str) -> list[str]:
        """Texts of the elements with this tag and these attributes."""
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [
            " ".join("".join(text).split())
            for name, attrs, text in self.elements
            if name == tag and wanted.items() <= attrs.items()
        ]

    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs, _ in self.elements if "id" in attrs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "good", Plan(steps=400, validate_every=100))


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    assert write_report(folder) == folder / "report.html"
    return (folder / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("report.html"))
    return target


def report(folder: Path) -> tuple[str, Page]:
    text = write_report(folder).read_text("utf-8")
    return text, Page(text)


def test_every_part_is_there_in_order(page: Page) -> None:
    assert page.all("h1") == ["good"]
    assert page.all("title") == ["good: training report"]
    assert page.all("h2") == [
        "Loss and schedules", "Experts", "Health of the run", "What it writes",
        "Text and machine", "Configuration",
    ]  # fmt: skip
    assert [name for name in page.ids() if name in PANELS] == PANELS
    tags = [(tag, attrs.get("class")) for tag, attrs, _ in page.elements]
    order = [
        tags.index(("dl", "headlines")), tags.index(("section", "findings")),
        tags.index(("section", "hero")), tags.index(("div", "maps")),
        tags.index(("div", "formula")), tags.index(("div", "samples")),
        tags.index(("div", "settings")),
    ]  # fmt: skip
    assert order == sorted(order)
    assert len(page.all("figure", class_="map")) == 4


def test_the_figures_of_the_page_are_those_of_the_files(folder: Path, page: Page) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    values = [float(attrs["value"] or "") for tag, attrs, _ in page.elements if tag == "data"]
    assert values == [
        summary[key]
        for key in (
            "heldout_bpb_after", "final_loss", "tokens_per_s", "mfu", "final_max_violation",
            "steps",
        )
    ]  # fmt: skip
    everything = " ".join(page.all("body"))
    for figure in (
        summary["corpus_sha256"], "12,079,736", "exact duplicate", "402.1 kB", "1.183 GiB",
        "attention=sdpa grouped=loop", "2.13.0+cpu", "21.4 MFLOP", "1.05 TFLOP/s",
        summary["flops_formula"], summary["peak_source"],
        f"n-gram model {summary['ngram_bpb']:.3f}", f"xz {summary['xz_bpb']:.3f}",
    ):  # fmt: skip
        assert figure in everything


def test_the_table_of_layers_has_the_files_figures(folder: Path, page: Page) -> None:
    last = json.loads((folder / "balance.jsonl").read_text().splitlines()[-1])
    (table,) = page.all("details", class_="layer-table")
    for layer in last["layers"].values():
        violation = max(layer["loads"]) * 32 / sum(layer["loads"]) - 1
        assert f"{violation:.2f}" in table
        assert f"{layer['bias_min']:.3g} / {layer['bias_mean']:.3g}" in table


def test_the_page_needs_nothing_from_outside(text: str, page: Page) -> None:
    assert "script" not in {tag for tag, _, _ in page.elements}
    assert not {"link", "iframe", "object", "embed", "base"} & {t for t, _, _ in page.elements}
    for _, attributes, _ in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert value is not None
                assert value.startswith(("data:image/png;base64,", "#")), value
    assert not re.search(r"@import|url\((?!#)", text)
    assert "http://" not in text
    assert "https://" not in text


def test_identifiers_occur_once(page: Page) -> None:
    assert len(page.ids()) == len(set(page.ids()))


def test_pictures_have_a_text_for_those_who_do_not_see_them(page: Page) -> None:
    images = [attrs for tag, attrs, _ in page.elements if tag == "img"]
    assert images
    assert all(attrs.get("alt") for attrs in images)
    drawings = [attrs for _, attrs, _ in page.elements if attrs.get("role") == "img"]
    assert len(drawings) == len(PANELS) + 1  # bits per byte in two shapes
    assert all(attrs.get("aria-label") for attrs in drawings)


def test_every_colour_has_a_value_on_both_screens(text: str) -> None:
    used = set(re.findall(r"var\(--([a-z]+)\)", text))
    light, dark = re.findall(r":root \{(.*?)\}", text, re.S)
    for values in (light, dark):
        assert used <= set(re.findall(r"--([a-z]+):", values))


def test_the_same_files_give_the_same_bytes(folder: Path, text: str, tmp_path: Path) -> None:
    other = write_report(copy(folder, tmp_path / "good"), tmp_path / "elsewhere" / "page.html")
    assert other == tmp_path / "elsewhere" / "page.html"
    assert other.read_text("utf-8") == text
    assert [path.name for path in other.parent.iterdir()] == ["page.html"]


def test_what_a_model_or_a_corpus_says_stays_text(folder: Path, tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}&amp;"
    new = copy(folder, tmp_path / "<b>name")
    summary = json.loads((new / "summary.json").read_text())
    summary |= {
        "samples": [{"prompt": evil, "text": evil, "note": evil}],
        "corpus": evil, "removed": {evil: {"documents": 1, "bytes": 2}}, evil: evil,
        "peak_source": evil, "heldout_packages": [evil],
    }  # fmt: skip
    (new / "summary.json").write_text(json.dumps(summary))
    (new / "recipe.toml").write_text(f"[data]\nsource = '{evil}'\n")
    lines = [json.loads(line) for line in (new / "metrics.jsonl").read_text().splitlines()]
    lines[7]["skipped"] = evil
    write_lines(new / "metrics.jsonl", lines)
    text, page = report(new)
    assert "<script" not in text
    assert "onerror=alert(2)>" not in text
    assert "<b>name" not in text
    assert page.all("h1") == ["<b>name"]
    assert page.all("pre") == [evil + evil]
    assert " ".join(page.all("body")).count(evil) >= 9


def test_an_unfinished_run_says_so_and_shows_what_there_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "half", Plan(steps=250, planned=900, finished=False))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 251, "tokens": 20')
    text, page = report(folder)
    assert "A training run that has not finished" in text
    (warning,) = page.all("ul", class_="warnings")
    assert "Its last step is step 250 of 900." in warning
    assert page.all("p", class_="file-note") == [
        "metrics.jsonl: the last line, 251, is cut off and left out."
    ]
    assert [name for name in page.ids() if name in PANELS] == PANELS
    assert "mfu-formula" not in page.ids()
    assert "What it writes" not in page.all("h2")
    assert "summary.json" not in page.all("footer")[0]


def test_a_run_of_an_older_form_has_a_report(tmp_path: Path) -> None:
    lines = [
        {"step": s, "tokens": 8 * s, "loss": 8 - s / 50, "mtp_loss": 8 - s / 60, "bpb": 4 - s / 99,
         "lr": 1e-3, "tokens_per_s": 5000.0, "grad_norm": 1.0, "max_violation": 0.3}
        for s in range(1, 120)
    ]  # fmt: skip
    write_lines(tmp_path / "metrics.jsonl", lines)
    summary = {"steps": 119, "generated": "def f():\n    return 1", "generated_seed": 0}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    _, page = report(tmp_path)
    names = ["bits", "loss", "close-up", "lr", "gradient", "violation", "speed"]
    assert [name for name in page.ids() if name in PANELS] == names
    assert page.all("pre") == ["def f(): return 1"]
    assert page.all("figure", class_="map") == []


def test_a_run_of_one_line_has_a_report(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1}])
    _, page = report(tmp_path)
    assert page.all("h2") == ["Health of the run"]


def test_a_bad_run_is_told_at_the_top(tmp_path: Path) -> None:
    plan = Plan(
        steps=300, dead={2: [1, 2, 3]}, dead_from=100, spike_at=200, rollback=(209, 181),
        skipped={200: "loss 2.40 nats above the median", 201: "loss not finite"},
    )  # fmt: skip
    _, page = report(write_run(tmp_path / "bad", plan))
    (warnings,) = page.all("ul", class_="warnings")
    assert "3 of 32 in layer 2" in warnings
    assert "went back to a checkpoint once" in warnings
    (events,) = page.all("div", id="events")
    assert "loss 2.40 nats above the median" in events
    assert "209 back to 181" in events
    assert "dead" in page.ids()


def test_a_refused_folder_leaves_the_old_report(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(BadInput, match="so it is no run"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"


def test_a_place_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"cannot be written: .*name another file with --out"):
        write_report(folder, tmp_path / "file" / "report.html")


def test_a_long_run_has_a_small_report(tmp_path: Path) -> None:
    """200,000 steps; the lines are made by text, because the formulas would take longer."""
    template = json.dumps(
        {"step": 0, "tokens": 1, "loss": 5.25, "mtp_loss": 5.5, "balance_loss": 0.25, "bpb": 2.25,
         "mtp_bpb": 2.5, "lr": 0.5, "tokens_per_s": 5000.5, "mfu": 0.125, "grad_norm": 0.75,
         "max_violation": 0.375, "skipped": None, "rollbacks": 0}
    )  # fmt: skip
    pieces = template.replace('"step": 0, "tokens": 1, "loss": 5.25', "%s").split("%s")
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 200_001):
            loss = 3 + 5 / (1 + step / 900) + (step * 7919 % 1000) / 9000
            file.write(f'{pieces[0]}"step": {step}, "tokens": {step}, "loss": {loss}{pieces[1]}\n')
    assert write_report(tmp_path).stat().st_size < 1_000_000


def test_a_large_network_has_a_report_below_three_megabytes(tmp_path: Path) -> None:
    plan = Plan(steps=80, layers=58, experts=256, log_every=1, tokens=10**6)
    folder = write_run(tmp_path / "large", plan)
    text, page = report(folder)
    assert len(text) < 3_000_000
    assert len(page.all("figure", class_="map")) == 58
    (folded,) = page.all("details", class_="more-maps")
    assert folded.startswith("The other 50 layers")
    assert "layer 58 (MTP)" in page.all("details", class_="layer-table")[0]
