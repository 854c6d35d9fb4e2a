// Blocks of Markdown as elements. Model text only ever becomes text nodes.

import { copyButton, el } from "./dom.js";
import { highlight, label } from "./highlight.js";
import { parseInline } from "./inline.js";
import { parse } from "./markdown.js";

const drawn = new WeakMap();

/**
 * Show Markdown `text` in `container`. Drawn again with longer text, the blocks that did not change
 * stay as they are: an answer of any length streams at the cost of its last block.
 */
export function showProse(container, text) {
  const before = drawn.get(container) ?? [];
  const blocks = parse(text);
  let same = 0;
  while (same < before.length && same < blocks.length && equal(before[same], blocks[same])) same += 1;
  const growing = same < blocks.length && same < before.length && updateCode(container.children[same], before[same], blocks[same]);
  const kept = growing ? same + 1 : same;
  while (container.children.length > kept) container.lastElementChild.remove();
  container.append(...blocks.slice(kept).map(block));
  drawn.set(container, blocks);
}

function equal(a, b) {
  return a.t === b.t && a.raw === b.raw && a.open === b.open;
}

/** The address, or null unless it is http, https or mailto. */
export function safeAddress(href) {
  try {
    const url = new URL(href.trim());
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function block(b) {
  switch (b.t) {
    case "h": return el(`h${Math.min(b.level + 1, 6)}`, { class: `level-${b.level}` }, ...inline(b.text));
    case "code": return codeBlock(b.text, b.lang);
    case "math": return el("pre", { class: "math", text: bare(b.text), tabIndex: 0 });
    case "hr": return el("hr");
    case "quote": return el("blockquote", {}, ...b.blocks.map(block));
    case "list": return list(b);
    case "table": return table(b);
    default: return el("p", {}, ...inline(b.text));
  }
}

// A formula is shown as it was written, without the marks around it.
function bare(text) {
  return text.trim().replace(/^(\$\$|\\\[|\\\()|(\$\$|\\\]|\\\))$/g, "").trim();
}

function list({ start, loose, items }) {
  const props = start === null ? {} : { start };
  return el(start === null ? "ul" : "ol", props, ...items.map((item) => listItem(item, loose)));
}

function listItem({ task, blocks }, loose) {
  const kids = blocks.flatMap((b) => (b.t === "p" && !loose ? inline(b.text) : [block(b)]));
  if (task === null) return el("li", {}, ...kids);
  const box = el("input", { type: "checkbox", checked: task, disabled: true, "aria-label": task ? "done" : "open" });
  return el("li", { class: "task" }, box, ...kids);
}

function table({ align, head, rows }) {
  const cell = (tag) => (text, i) => el(tag, { class: align[i] ?? "" }, ...inline(text));
  return el(
    "div", { class: "table", role: "region", "aria-label": "Table", tabIndex: 0 },
    el(
      "table", {},
      el("thead", {}, el("tr", {}, ...head.map(cell("th")))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map(cell("td"))))),
    ),
  );
}

function inline(text) {
  return parseInline(text).map(leaf);
}

function leaf(node) {
  if (typeof node === "string") return document.createTextNode(node);
  switch (node.t) {
    case "br": return el("br");
    case "code": return el("code", { text: node.text });
    case "math": return el("span", { class: "math", text: bare(node.text) });
    case "link": return link(node);
    default: return el(node.t, {}, ...node.kids.map(leaf));
  }
}

function link({ href, kids }) {
  const address = safeAddress(href);
  // What may not be opened is still shown, so that the reader sees what the model wrote.
  if (!address) return el("span", { class: "dead-link", title: href }, ...kids.map(leaf));
  return el("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow", title: address }, ...kids.map(leaf));
}

/** A block of code with the name of its language and a button that copies it. */
export function codeBlock(text, lang) {
  const code = el("code");
  const figure = el(
    "figure", { class: "code" },
    el("figcaption", {}, el("span", { text: label(lang) }), copyButton("Copy", () => figure.source, { shown: true, kind: "quiet small" })),
    el("pre", { tabIndex: 0 }, code),
  );
  fillCode(figure, code, text, lang);
  return figure;
}

// A line that stays the same keeps its element: a selection in it survives the streaming.
function fillCode(figure, code, text, lang) {
  figure.source = text;
  const lines = highlight(text, lang);
  lines.forEach((pieces, i) => {
    const key = pieces.map(([kind, part]) => `${kind ?? ""}\u0001${part}`).join("\u0002");
    const end = i < lines.length - 1 ? "\n" : "";
    const old = code.children[i];
    if (old && old.key === key + end) return;
    const parts = pieces.map(([kind, part]) => (kind ? el("span", { class: `hl-${kind}`, text: part }) : part));
    const line = el("span", { class: "line" }, ...parts, end);
    line.key = key + end;
    if (old) old.replaceWith(line);
    else code.append(line);
  });
  while (code.children.length > lines.length) code.lastElementChild.remove();
}

function updateCode(figure, before, now) {
  if (before.t !== "code" || now.t !== "code" || before.lang !== now.lang) return false;
  fillCode(figure, figure.querySelector("code"), now.text, now.lang);
  return true;
}
