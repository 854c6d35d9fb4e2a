// Markdown inside a paragraph, as a list of nodes. Every step is linear in the text, bar emphasis
// over many unmatched marks, which is bounded.

const SPECIAL = /[\\`*_~[!<$\n]|https?:\/\//g;
const WORD = /[\p{L}\p{N}]/u;
const SPACE = /\s/u;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const TARGET = /\(\s*(<[^<>\n]*>|[^\s()<>]*(?:\([^\s()]*\)[^\s()<>]*)*)(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y;
const BARE = /https?:\/\/[^\s<>"`\u201c\u201d]+/y;
const ANGLED = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const BREAK = /<br\s*\/?>/iy;
const MARKS = 2000;

/**
 * Parse `source`.
 *
 * A node is a string or {t: "code" | "math", text}, {t: "em" | "strong" | "del", kids},
 * {t: "link", href, kids} or {t: "br"}. `href` is as written: whoever draws it decides what is safe.
 */
export function parseInline(source, links = true) {
  const out = [];
  const missing = new Set();
  const pairs = links && source.includes("](") ? brackets(source) : null;
  let at = 0;
  const rule = (regex) => {
    regex.lastIndex = at;
    return regex.exec(source);
  };
  const until = (mark, from) => {
    if (missing.has(mark)) return -1;
    const end = source.indexOf(mark, from);
    if (end < 0) missing.add(mark);
    return end;
  };
  while (at < source.length) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(source);
    if (!next) break;
    if (next.index > at) out.push(source.slice(at, next.index));
    at = next.index;
    const c = source[at];
    const found = special(c);
    if (found) {
      out.push(found.node);
      at = found.end;
    } else {
      out.push(c);
      at += 1;
    }
  }
  if (at < source.length) out.push(source.slice(at));
  return emphasise(out);

  function special(c) {
    if (c === "\\") return escape();
    if (c === "`") return code();
    if (c === "*" || c === "_" || c === "~") return mark(c);
    if (c === "\n") return lineEnd();
    if (c === "$") return source[at + 1] === "$" ? math("$$", "$$") : null;
    if (c === "<") return angle();
    if (c === "h") return links ? bare() : null;
    return pairs ? link(c) : null;
  }

  function escape() {
    const after = source[at + 1];
    if (after === "(") return math("\\(", "\\)");
    if (after === "[") return math("\\[", "\\]");
    if (after === "\n") return { node: { t: "br" }, end: at + 2 };
    return after && after.charCodeAt(0) < 128 && PUNCTUATION.test(after) ? { node: after, end: at + 2 } : null;
  }

  function math(open, close) {
    const end = until(close, at + open.length);
    if (end < 0) return { node: open, end: at + open.length };
    return { node: { t: "math", text: source.slice(at, end + close.length) }, end: end + close.length };
  }

  function code() {
    let run = 1;
    while (source[at + run] === "`") run += 1;
    const fence = "`".repeat(run);
    for (let from = at + run; ; ) {
      const end = until(fence, from);
      if (end < 0) return { node: fence, end: at + run };
      let length = run;
      while (source[end + length] === "`") length += 1;
      if (length === run) {
        const text = source.slice(at + run, end).replace(/\n/g, " ");
        const bare = text.startsWith(" ") && text.endsWith(" ") && text.trim() ? text.slice(1, -1) : text;
        return { node: { t: "code", text: bare }, end: end + run };
      }
      from = end + length;
    }
  }

  function mark(c) {
    let run = 1;
    while (source[at + run] === c) run += 1;
    if (c === "~" && run !== 2) return { node: c.repeat(run), end: at + run };
    const before = at > 0 ? previous(source, at) : " ";
    const after = at + run < source.length ? String.fromCodePoint(source.codePointAt(at + run)) : " ";
    const left = !SPACE.test(after) && (!PUNCTUATION.test(after) || SPACE.test(before) || PUNCTUATION.test(before));
    const right = !SPACE.test(before) && (!PUNCTUATION.test(before) || SPACE.test(after) || PUNCTUATION.test(after));
    const inWord = c === "_";
    return {
      node: {
        mark: c, n: run,
        open: left && (!inWord || !right || PUNCTUATION.test(before)),
        close: right && (!inWord || !left || PUNCTUATION.test(after)),
      },
      end: at + run,
    };
  }

  function lineEnd() {
    const last = out.at(-1);
    if (typeof last === "string" && /(?: {2,})$/.test(last)) {
      out[out.length - 1] = last.trimEnd();
      return { node: { t: "br" }, end: at + 1 };
    }
    return { node: "\n", end: at + 1 };
  }

  function angle() {
    const found = links && rule(ANGLED);
    if (found) return { node: { t: "link", href: found[1], kids: [found[1].replace(/^mailto:/, "")] }, end: at + found[0].length };
    const broken = rule(BREAK);
    return broken && { node: { t: "br" }, end: at + broken[0].length };
  }

  function bare() {
    if (at > 0 && WORD.test(source[at - 1])) return null;
    const found = rule(BARE);
    if (!found) return null;
    const href = trimmed(found[0]);
    return { node: { t: "link", href, kids: [href] }, end: at + href.length };
  }

  // Pictures are links too: nothing is ever fetched because a model named it.
  function link(c) {
    const open = c === "!" ? at + 1 : at;
    if (source[open] !== "[") return null;
    const close = pairs.get(open);
    if (close === undefined || source[close + 1] !== "(") return null;
    TARGET.lastIndex = close + 1;
    const target = TARGET.exec(source);
    if (!target) return null;
    const href = target[1].replace(/^<|>$/g, "");
    const kids = parseInline(source.slice(open + 1, close), false);
    return { node: { t: "link", href, kids: kids.length ? kids : [href] }, end: TARGET.lastIndex };
  }
}

function previous(source, at) {
  const low = source.charCodeAt(at - 1);
  const pair = low >= 0xdc00 && low <= 0xdfff && at > 1;
  return pair ? source.slice(at - 2, at) : source[at - 1];
}

// Where each "[" closes.
function brackets(source) {
  const pairs = new Map();
  const open = [];
  for (let i = 0; i < source.length; i += 1) {
    const c = source[i];
    if (c === "\\") i += 1;
    else if (c === "[") open.push(i);
    else if (c === "]" && open.length) pairs.set(open.pop(), i);
  }
  return pairs;
}

// A full stop after an address ends the sentence, and a bracket that opened before it is not its own.
function trimmed(url) {
  let open = 0;
  for (const c of url) open += c === "(" ? 1 : c === ")" ? -1 : 0;
  let end = url.length;
  for (;;) {
    const c = url[end - 1];
    if (c === ")" && open < 0) open += 1;
    else if (!/[.,:;!?*_~'\]|]/.test(c)) return url.slice(0, end);
    end -= 1;
  }
}

// Pairs the marks of emphasis: each closing mark takes the nearest opening one of its kind.
function emphasise(items) {
  const marks = items.filter((item) => item.mark);
  if (marks.length > MARKS) return plain(items);
  const out = [];
  const open = [];
  for (const item of items) {
    if (!item.mark) {
      out.push(item);
      continue;
    }
    let left = item.n;
    while (item.close && left > 0) {
      const k = open.findLastIndex((o) => o.mark === item.mark && fits(o, item));
      if (k < 0) break;
      const opener = open[k];
      open.length = k + 1;
      const n = Math.min(opener.left, left, 2);
      const kids = plain(out.splice(opener.at + 1));
      opener.left -= n;
      left -= n;
      if (opener.left === 0) {
        open.pop();
        out.pop();
      }
      out.push({ t: item.mark === "~" ? "del" : n === 2 ? "strong" : "em", kids });
    }
    if (left > 0 && item.open) {
      const opener = { mark: item.mark, left, n: item.n, both: item.close, at: out.length };
      open.push(opener);
      out.push(opener);
    } else if (left > 0) out.push(item.mark.repeat(left));
  }
  return plain(out);
}

function fits(opener, closer) {
  const both = opener.both || closer.open;
  return !(both && (opener.n + closer.n) % 3 === 0 && (opener.n % 3 !== 0 || closer.n % 3 !== 0));
}

// Marks that found no partner are text again; neighbouring texts become one.
function plain(items) {
  const out = [];
  for (const item of items) {
    const node = item.mark ? item.mark.repeat(item.left ?? item.n) : item;
    if (typeof node === "string" && typeof out.at(-1) === "string") out[out.length - 1] += node;
    else out.push(node);
  }
  return out;
}
