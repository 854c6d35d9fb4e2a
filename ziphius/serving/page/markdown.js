// Markdown as models write it, as a list of blocks. No HTML: tags are text like any other.

const FENCE = /^(\s*)(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^(\s*)([-*+•]|\d{1,9}[.)])(?:(\s+)(.*))?$/;
const QUOTE = /^ {0,3}> ?/;
const MATH = /^\s*(\$\$|\\\[)/;
// Deeper nesting is shown as text: nobody reads it, and it would cost the stack.
const DEPTH = 12;

/**
 * Parse `text` into blocks, each with `raw`, its own lines, by which an unchanged block is known:
 * {t: "p", text}, {t: "h", level, text}, {t: "code", lang, text, open}, {t: "math", text}, {t: "hr"},
 * {t: "quote", blocks}, {t: "list", start, loose, items: [{task, blocks}]} (`start` null: bullets),
 * {t: "table", align, head, rows}.
 */
export function parse(text) {
  return parseLines(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function parseLines(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, end] = blockAt(lines, at, depth);
    block.raw = lines.slice(at, end).join("\n");
    blocks.push(block);
    at = end;
  }
  return blocks;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return code(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [{ t: "h", level: heading[1].length, text: heading[2] ?? "" }, at + 1];
  if (RULE.test(line)) return [{ t: "hr" }, at + 1];
  if (MATH.test(line)) return math(lines, at);
  if (depth < DEPTH) {
    if (QUOTE.test(line)) return quote(lines, at, depth);
    if (ITEM.test(line)) return list(lines, at, depth);
  }
  return table(lines, at) ?? paragraph(lines, at, depth);
}

function code(lines, at, [, indent, fence, info]) {
  const body = [];
  const ends = new RegExp(`^\\s*${fence[0]}{${fence.length},}\\s*$`);
  const margin = new RegExp(`^[ \\t]{0,${indent.length}}`);
  let end = at + 1;
  while (end < lines.length && !ends.test(lines[end])) {
    body.push(lines[end].replace(margin, ""));
    end += 1;
  }
  const open = end === lines.length;
  const lang = info.trim().split(/[\s{,]/, 1)[0].toLowerCase();
  return [{ t: "code", lang, text: body.join("\n"), open }, open ? end : end + 1];
}

function math(lines, at) {
  const close = MATH.exec(lines[at])[1] === "$$" ? "$$" : "\\]";
  const first = lines[at].trim();
  if (first.length > 2 && first.indexOf(close, 2) >= 0) {
    // More text follows on the line: then it is a paragraph that starts with a formula.
    return first.endsWith(close) ? [{ t: "math", text: first }, at + 1] : paragraph(lines, at, DEPTH);
  }
  let end = at + 1;
  while (end < lines.length && !lines[end].includes(close) && lines[end].trim()) end += 1;
  const closed = end < lines.length && lines[end].includes(close);
  const stop = closed ? end + 1 : end;
  return [{ t: "math", text: lines.slice(at, stop).join("\n") }, stop];
}

function quote(lines, at, depth) {
  const inner = [];
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) {
    inner.push(lines[end].replace(QUOTE, ""));
    end += 1;
  }
  return [{ t: "quote", blocks: parseLines(inner, depth + 1) }, end];
}

const width = (space) => [...space].reduce((n, c) => (c === "\t" ? n + 4 - (n % 4) : n + 1), 0);
const indentOf = (line) => width(/^\s*/.exec(line)[0]);
const kindOf = (marker) => (/\d/.test(marker) ? marker.at(-1) : marker);

function list(lines, at, depth) {
  const [, space, marker] = ITEM.exec(lines[at]);
  const margin = width(space);
  const kind = kindOf(marker);
  const result = { t: "list", start: /\d/.test(marker) ? Number.parseInt(marker, 10) : null, loose: false, items: [] };
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || kindOf(item[2]) !== kind || width(item[1]) > margin + 1 || RULE.test(lines[end])) break;
    const [inner, next, blank] = itemLines(lines, end, item);
    result.items.push(itemOf(inner, depth));
    const more = next < lines.length && ITEM.test(lines[next]) && kindOf(ITEM.exec(lines[next])[2]) === kind;
    if (blank && more) result.loose = true;
    end = next;
  }
  return [result, end];
}

// The lines of one item without its indent, where the next block starts, and whether a blank precedes.
function itemLines(lines, at, [, space, marker, gap, text]) {
  const inset = width(space) + marker.length + (gap && gap.length <= 4 ? gap.length : 1);
  const inner = [text ?? ""];
  let fenced = FENCE.test(text ?? "");
  let end = at + 1;
  let blanks = 0;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    if (!line.trim()) {
      blanks += 1;
      continue;
    }
    const indent = indentOf(line);
    const nested = ITEM.test(line) && indent >= Math.min(inset, width(space) + 2);
    const inside = indent >= inset || nested || (fenced && indent > width(space));
    if (!inside && (blanks || fenced || starts(line))) break;
    inner.push(...Array(blanks).fill(""), line.slice(cut(line, inset)));
    if (FENCE.test(line)) fenced = !fenced;
    blanks = 0;
  }
  return [inner, end, blanks > 0];
}

// How many characters of `line` are indent, up to `inset` columns.
function cut(line, inset) {
  let column = 0;
  let i = 0;
  while (i < line.length && column < inset && (line[i] === " " || line[i] === "\t")) {
    column += line[i] === "\t" ? 4 - (column % 4) : 1;
    i += 1;
  }
  return i;
}

function itemOf(inner, depth) {
  const task = /^\[([ xX])\]\s+/.exec(inner[0]);
  if (task) inner[0] = inner[0].slice(task[0].length);
  return { task: task ? task[1] !== " " : null, blocks: parseLines(inner, depth + 1) };
}

// Whether a line can interrupt a paragraph.
function starts(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line) || MATH.test(line);
}

// A number in running text that happens to begin a line is no list, unless it is a first item.
function interrupts(line) {
  const item = ITEM.exec(line);
  if (item) return Boolean(item[4]) && (!/\d/.test(item[2]) || item[2].length === 2);
  return starts(line);
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim()) {
    if (depth < DEPTH ? interrupts(lines[end]) : FENCE.test(lines[end])) break;
    if (isTable(lines, end)) break;
    end += 1;
  }
  const text = lines.slice(at, end).map((line) => line.trimStart()).join("\n");
  return [{ t: "p", text: text.trimEnd() }, end];
}

function isTable(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length || !/^[\s|:-]*-[\s|:-]*$/.test(lines[at + 1])) return false;
  const head = cells(lines[at]);
  const under = cells(lines[at + 1]);
  return head.length === under.length && under.every((cell) => /^:?-+:?$/.test(cell));
}

function table(lines, at) {
  if (!isTable(lines, at)) return null;
  const head = cells(lines[at]);
  const align = cells(lines[at + 1]).map((c) => (c.endsWith(":") ? (c.startsWith(":") ? "center" : "right") : null));
  const rows = [];
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) {
    const row = cells(lines[end]).slice(0, head.length);
    rows.push([...row, ...Array(head.length - row.length).fill("")]);
    end += 1;
  }
  return [{ t: "table", align, head, rows }, end];
}

// The cells of a row: split at bars that are neither escaped nor inside code.
function cells(line) {
  const out = [""];
  let ticks = false;
  const row = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  for (let i = 0; i < row.length; i += 1) {
    const c = row[i];
    if (c === "\\" && row[i + 1] === "|") {
      out[out.length - 1] += "|";
      i += 1;
    } else if (c === "|" && !ticks) out.push("");
    else {
      if (c === "`") ticks = !ticks;
      out[out.length - 1] += c;
    }
  }
  return out.map((cell) => cell.trim());
}
