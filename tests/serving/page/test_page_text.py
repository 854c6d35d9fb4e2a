"""The page's own readers of Markdown, code and events, run in the browser that will run them."""

import json
import random
from typing import Any

import pytest

from tests.serving.page.browser import Visitor

MODULE = "async ([file, name, args]) => (await import(`/page/${file}.js`))[name](...args)"
RENDER = """async (text) => {
  const { showProse } = await import("/page/prose.js");
  const box = document.createElement("div");
  showProse(box, text);
  return box.innerHTML;
}"""


def call(shared: Visitor, file: str, name: str, *args: Any) -> Any:
    """Call a function of one of the page's modules."""
    return shared.page.evaluate(MODULE, [file, name, list(args)])


INLINE = [
    ("plain", "<p>plain</p>"),
    (
        "*a* **b** ***c*** ~~d~~",
        "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <del>d</del></p>",
    ),
    ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    ("snake_case_name and 2*3*4", "<p>snake_case_name and 2<em>3</em>4</p>"),
    ("a * b * c", "<p>a * b * c</p>"),
    ("**open", "<p>**open</p>"),
    ("`a*b*` and ``x`y``", "<p><code>a*b*</code> and <code>x`y</code></p>"),
    (r"\*not\* \_this\_", "<p>*not* _this_</p>"),
    ("one  \ntwo\nthree", "<p>one<br>two\nthree</p>"),
    ("<b>no</b> & <br> yes", "<p>&lt;b&gt;no&lt;/b&gt; &amp; <br> yes</p>"),
    ("[a](/relative)", '<p><span class="dead-link" title="/relative">a</span></p>'),
    ("[a](javascript:x)", '<p><span class="dead-link" title="javascript:x">a</span></p>'),
    ("**日本語。**続き", "<p>**日本語。**続き</p>"),
    ("\\(a_1 * b_2\\)", '<p><span class="math">a_1 * b_2</span></p>'),
]
BLOCKS = [
    ("# A\n## B #", '<h2 class="level-1">A</h2><h3 class="level-2">B</h3>'),
    ("- a\n- b", "<ul><li>a</li><li>b</li></ul>"),
    ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
    ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    (
        "1. a\n   - b\n   - c\n2. d",
        '<ol start="1"><li>a<ul><li>b</li><li>c</li></ul></li><li>d</li></ol>',
    ),
    ("1. a\n  - b", '<ol start="1"><li>a<ul><li>b</li></ul></li></ol>'),
    ("text\n- a", "<p>text</p><ul><li>a</li></ul>"),
    ("in\n1984. it", "<p>in\n1984. it</p>"),
    ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
    ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    ("|", "<p>|</p>"),
]


@pytest.mark.parametrize(("source", "shown"), INLINE + BLOCKS)
def test_markdown_becomes_these_elements(shared: Visitor, source: str, shown: str) -> None:
    assert shared.page.evaluate(RENDER, source) == shown


def test_tables_lists_and_code_nest(shared: Visitor) -> None:
    table = shared.page.evaluate(RENDER, "| a | b |\n|:-:|--:|\n| `x|y` | 1 \\| 2 |\n| c |")
    assert table.count("<tr>") == 3
    assert "<code>x|y</code>" in table
    assert '<td class="right">1 | 2</td>' in table
    code = shared.page.evaluate(RENDER, "1. a\n   ```py\n   x = 1\n\n   y\n   ```\n2. b")
    assert code.count("<li>") == 2
    blocks = call(shared, "markdown", "parse", "1. a\n   ```py\n   x = 1\n\n     y\n   ```\n2. b")
    assert blocks[0]["items"][0]["blocks"][1]["text"] == "x = 1\n\n  y"


def test_links_are_whole_and_safe(shared: Visitor) -> None:
    html = shared.page.evaluate(
        RENDER,
        "see https://a.example/x_(y)_z?q=*1*. And <mailto:a@b.example>, "
        '[t](https://b.example/ "T").',
    )
    assert 'href="https://a.example/x_(y)_z?q=*1"' in html
    assert 'href="mailto:a@b.example"' in html
    assert 'href="https://b.example/"' in html
    assert html.count("noopener noreferrer") == 3
    for bad in [
        "javascript:x",
        " JAVASCRIPT:x",
        "java\nscript:x",
        "data:text/html,x",
        "vbscript:x",
        "file:///etc",
        "//evil.example",
        "x",
    ]:
        assert call(shared, "prose", "safeAddress", bad) is None


def test_streaming_ends_with_what_the_whole_text_shows(shared: Visitor) -> None:
    from tests.serving.page.texts import ATTACK, CODE, SAMPLE

    same = """async (text) => {
      const { showProse } = await import("/page/prose.js");
      const [slow, fast] = [document.createElement("div"), document.createElement("div")];
      for (let i = 1; i <= text.length; i += 7) showProse(slow, text.slice(0, i));
      showProse(slow, text);
      showProse(fast, text);
      return slow.innerHTML === fast.innerHTML;
    }"""
    for text in (SAMPLE, CODE, ATTACK, SAMPLE + CODE):
        assert shared.page.evaluate(same, text)


@pytest.mark.parametrize("lang", ["python", "ts", "cpp", "json", "bash", "haskell", "text", ""])
def test_colours_never_change_the_code(shared: Visitor, lang: str) -> None:
    draw = random.Random(lang)
    alphabet = [
        "'",
        '"',
        "`",
        "\\",
        "\n",
        "#",
        "/*",
        "*/",
        "//",
        '"""',
        "${",
        "}",
        "def f(x):",
        " ",
        "1.5e3",
        "if",
        "é",
        "@a",
        "<",
        "𝄞",
    ]
    for _ in range(60):
        code = "".join(draw.choices(alphabet, k=draw.randrange(60)))
        lines = call(shared, "highlight", "highlight", code, lang)
        assert "\n".join("".join(text for _, text in line) for line in lines) == code


def test_colours_say_what_things_are(shared: Visitor) -> None:
    def kinds(code: str, lang: str) -> dict[str, str]:
        lines = call(shared, "highlight", "highlight", code, lang)
        return {text: kind for line in lines for kind, text in line if kind}

    python = kinds("@wrap\ndef f(x):  # why\n    return f'{x}' + str(None) + 'it\\'s'", "py")
    assert python == {
        "@wrap": "meta", "def": "keyword", "f": "call", "# why": "comment", "return": "keyword",
        "f'{x}'": "string", "str": "call", "None": "literal", "'it\\'s'": "string",
    }  # fmt: skip
    assert kinds('{"a": "b", "c": [1, true]}', "json") == {
        '"a"': "key",
        '"b"': "string",
        '"c"': "key",
        "1": "number",
        "true": "literal",
    }
    assert kinds("#include <x>\nint main() { /* a\nb */ }", "c")["b */"] == "comment"
    assert kinds("echo $HOME # home", "sh") == {
        "echo": "literal",
        "$HOME": "meta",
        "# home": "comment",
    }
    assert call(shared, "highlight", "label", "ts") == "TypeScript"
    assert call(shared, "highlight", "label", "constructor") == "constructor"


HARD = {
    "brackets": "[" * 40_000, "links": "[a](" * 15_000, "stars": "*a **b " * 12_000,
    "quotes": ">" * 20_000, "ticks": "`a``b" * 15_000, "bars": "|" * 30_000,
    "lists": "\n".join("  " * i + "- a" for i in range(300)), "escapes": "\\" * 50_000,
    "tables": "|a" * 5000 + "\n" + "|-" * 5000, "formulas": "\\(" * 20_000 + "$$" * 10_000,
    "address": "https://a.example/" + ")" * 20_000, "spaces": " " * 50_000 + "x",
    "rule": "- " * 20_000 + "x", "heading": "# " + "# " * 20_000 + "x", "lines": "a\n" * 30_000,
    "dots": "https://a.example/" + "." * 20_000, "rules": "* * " * 10_000 + "_",
}  # fmt: skip


@pytest.mark.parametrize("name", HARD)
def test_hostile_texts_do_not_hang_the_page(shared: Visitor, name: str) -> None:
    timed = """async (text) => {
      const { showProse } = await import("/page/prose.js");
      const box = document.createElement("div");
      const began = performance.now();
      showProse(box, text);
      return performance.now() - began;
    }"""
    assert shared.page.evaluate(timed, HARD[name]) < 1500


def test_hostile_code_does_not_hang_the_page(shared: Visitor) -> None:
    timed = """async ([text, lang]) => {
      const { highlight } = await import("/page/highlight.js");
      const began = performance.now();
      highlight(text, lang);
      return performance.now() - began;
    }"""
    for text in (
        '"' * 60_000,
        "'''" * 20_000,
        "/*" * 30_000,
        "\\" * 60_000,
        "`${" * 20_000,
        "1_" * 40_000,
        "a" * 100_000,
        " " * 60_000 + "#",
        "${" * 40_000,
    ):
        for lang in ("python", "js", "c", "json", "bash", "other"):
            assert shared.page.evaluate(timed, [text, lang]) < 1500, (text[:3], lang)


EVENTS = """async ([text, cuts]) => {
  const { events } = await import("/page/sse.js");
  const bytes = new TextEncoder().encode(text);
  const edges = [0, ...cuts.filter((c) => c < bytes.length).sort((a, b) => a - b), bytes.length];
  const body = new ReadableStream({ start(control) {
    const pieces = edges.slice(1).map((end, i) => bytes.slice(edges[i], end));
    pieces.filter((piece) => piece.length).forEach((piece) => control.enqueue(piece));
    control.close();
  } });
  const out = [];
  for await (const data of events(body)) out.push(data);
  return out;
}"""


def test_events_do_not_depend_on_how_bytes_arrive(shared: Visitor) -> None:
    value = json.dumps({"a": "ä🐋\u2028"}, ensure_ascii=False)
    text = f": ping\r\n\r\ndata: {value}\n\nevent: x\rdata:one\rdata: two\r\rid: 3\n\n"
    text += "data: [DONE]\r\n\r\ndata: lost"
    wanted = [value, "one\ntwo", "[DONE]"]
    draw = random.Random(0)
    size = len(text.encode())
    assert shared.page.evaluate(EVENTS, [text, []]) == wanted
    assert shared.page.evaluate(EVENTS, [text, list(range(size))]) == wanted
    for _ in range(30):
        assert shared.page.evaluate(EVENTS, [text, draw.sample(range(size), 9)]) == wanted


def test_the_oldest_conversations_make_room(shared: Visitor) -> None:
    kept = shared.page.evaluate("""async () => {
      localStorage.clear();
      const { Store } = await import("/page/store.js");
      const { create, add } = await import("/page/conversation.js");
      const said = [];
      const store = new Store((text) => said.push(text));
      for (let i = 0; i < 12; i += 1) {
        const talk = create("chat");
        add(talk, null, { role: "user", content: `${i} ${"x".repeat(500_000)}` });
        talk.changed = i;
        store.save(talk);
      }
      const again = new Store(() => {});
      const size = Object.entries(localStorage).reduce((n, [k, v]) => n + k.length + v.length, 0);
      localStorage.clear();
      return { said, size, titles: again.list().map((t) => t.title.split(" ")[0]) };
    }""")
    assert kept["size"] < 4_000_000
    assert kept["titles"][:3] == ["11", "10", "9"]
    assert len(kept["said"]) == 1
