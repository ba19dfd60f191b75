"""The form of the page: headings, tables, texts for pictures, colors, widths of screens."""

import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.report import curves, pictures
from experiments.report.sentences import opening, plain_rules
from experiments.training.methods import METHODS

VOID = {"meta", "img", "source", "br"}


class Page(HTMLParser):
    """All tags with their attributes, and the tags that they lie in."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        entry = (tag, dict(attrs), [name for name, _ in self.open])
        self.tags.append((*entry, [attributes for _, attributes in self.open]))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def named(self, *names):
        return [entry for entry in self.tags if entry[0] in names]


@pytest.fixture
def text(whole):
    return (whole / "report.html").read_text()


def test_headings_tables_and_pictures_can_be_read_aloud(text):
    page = Page(text)
    assert not page.open
    levels = [int(tag[1]) for tag, *_ in page.named("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert {attrs.get("scope") for _, attrs, *_ in page.named("th")} == {"col", "row", "rowgroup"}
    # Each line of a table has a heading.
    rows, headings = page.named("tr"), page.named("th")
    assert len([h for h in headings if h[1]["scope"] != "col"]) == len(rows) - len(
        page.named("thead")
    )
    tables = page.named("table")
    assert tables
    for _, _, _, around in tables:
        assert around[-1]["class"] == "scroll"
        assert around[-1]["tabindex"] == "0"
        assert around[-1]["aria-label"]
    assert all(len(attrs["alt"]) > 5 for _, attrs, *_ in page.named("img"))


def test_a_method_has_one_color_of_its_own():
    colors = [pictures.color_of(method) for method in METHODS]
    assert len(set(colors)) == len(METHODS)
    assert all(pictures.name_of(method) != method for method in METHODS if "_" in method)


def test_the_curves_of_blocks_have_the_colors_of_their_methods(run, monkeypatch):
    figures = []
    monkeypatch.setattr(curves, "picture", lambda figure, **facts: figures.append(figure))
    curves.draw_block_changes(run)
    lines = figures[0].axes[0].lines
    assert len({line.get_linestyle() for line in lines}) == 2  # one for each pattern
    for line in lines:
        method = "subp_l1" if "L1" in line.get_label() else "subp"
        expected = "one_by_n" if "1xN" in line.get_label() else method
        assert line.get_color() == pictures.color_of(expected)


def test_ste_and_sr_ste_keep_their_colors_over_the_strengths(run, monkeypatch):
    figures = []
    monkeypatch.setattr(curves, "picture", lambda figure, **facts: figures.append(figure))
    curves.draw_sad_over_time(run)
    colors = {line.get_label(): line.get_color() for line in figures[0].axes[1].lines}
    assert colors["λ = 0"] == pictures.color_of("ste")
    assert colors["λ = -0.002"] == pictures.color_of("sr_ste_negative")
    assert len(set(colors.values())) == len(colors)


def test_a_zero_on_a_logarithmic_axis_is_drawn():
    axes = Figure().subplots(1, 2)
    for ax, lowest in zip(axes, (0.0, 0.01), strict=True):
        ax.plot([1, 2, 3], [1.0, 0.1, lowest])
        pictures.log_scale(ax)
    assert axes[0].get_yscale() == "symlog"
    assert axes[0].get_ylim()[0] == 0
    assert 0.0 in axes[0].get_yticks()
    assert axes[1].get_yscale() == "log"


def test_the_page_shows_no_regular_expressions(text):
    assert "^stem" not in text
    assert "These layers stay dense: stem." in " ".join(text.split())
    assert plain_rules(("^stem/", "/flow1/", "(q|k)/kernel$")) == ["stem", "flow1", "q or k/kernel"]


def test_the_page_opens_with_three_sentences(run, text):
    sentences = opening(run)
    assert len(sentences) == 3
    assert "reaches 92." in sentences[0]
    assert "dense training reaches 96." in sentences[0]
    assert sentences[1].startswith("At 2:4, SR-STE is ahead of STE: +")
    assert sentences[2].startswith("With blocks (1x8@0.75), SUBP reaches 8")
    lead = re.search(r'<h1>.*?</h1>\s*<p class="lead">(.*?)</p>', text, re.DOTALL)
    assert lead.group(1) == " ".join(sentences)


def luminance(color):
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    light = np.array(list(bytes.fromhex(digits))) / 255
    linear = np.where(light <= 0.04045, light / 12.92, ((light + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def test_texts_stand_out_in_light_and_in_dark(text):
    """WCAG 2's contrast of at least 4.5."""
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w+);", part))
        for part in text.split("prefers-color-scheme: dark")
    )
    pairs = [("ink", "page"), ("soft", "page"), ("ink", "pale"), ("soft", "pale")]
    pairs += [("seen", "seen-back"), ("opposite", "opposite-back")]
    for colors in (light, dark):
        for letters, ground in pairs:
            bright, dim = sorted((luminance(colors[letters]), luminance(colors[ground])))[::-1]
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (letters, ground)


# Runs in the page, and tells the page around it what it measured.
MEASURE = """<script>addEventListener("load", () => parent.postMessage({
  width: innerWidth,
  content: document.documentElement.scrollWidth,
  charts: [...document.querySelectorAll(".chart img")].map(i => i.width / i.naturalWidth),
  tables: [...document.querySelectorAll(".scroll")].map(s => {
    s.focus(); s.scrollLeft = 1e6;
    const left = cell => cell.getBoundingClientRect().left - s.getBoundingClientRect().left;
    return {focus: document.activeElement === s, right: s.getBoundingClientRect().right,
            first: [...s.querySelectorAll("tr > :first-child:not([colspan])")].map(left)};
  }),
}, "*"))</script></body>"""
# A window cannot be as narrow as a phone, but a frame can.
FRAME = """<iframe src="page.html" style="border:0;width:{}px;height:900px"></iframe><script>
addEventListener("message", event => document.title = JSON.stringify(event.data))</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_screen(text, tmp_path, width):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium (Debian's package of that name)")
    (tmp_path / "page.html").write_text(text.replace("</body>", MEASURE))
    (tmp_path / "frame.html").write_text(FRAME.format(width))
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000")
    home = f"--user-data-dir={tmp_path / 'profile'}"
    command = (browser, *options, home, "--window-size=1300,1000", "--dump-dom")
    done = subprocess.run(
        [*command, f"file://{tmp_path}/frame.html"], capture_output=True, text=True, timeout=120
    )
    found = re.search("<title>(.*)</title>", done.stdout)
    assert found, done.stderr[-2000:]
    measured = json.loads(found.group(1))
    assert measured["width"] == width
    assert measured["content"] <= width  # Only tables scroll, in areas of their own.
    # Letters of 8 and 9 points stay readable.
    assert min(measured["charts"]) > 0.85
    assert all(table["focus"] and table["right"] <= width for table in measured["tables"])
    # Where a table is scrolled to its end, its first column is still there.
    assert all(abs(left) < 2 for table in measured["tables"] for left in table["first"])
