// Colours for code: a short list of token shapes a language, no grammar.

const words = (text) => new Set(text.split(" "));

const HASH = "#[^\\n]*";
// The end of the text; "$" would be the end of a line.
const END = "(?![\\s\\S])";
const SLASHES = `\\/\\/[^\\n]*|\\/\\*[\\s\\S]*?(?:\\*\\/|${END})`;
const DOUBLE = '"(?:[^"\\\\\\n]|\\\\[\\s\\S])*"?';
const SINGLE = "'(?:[^'\\\\\\n]|\\\\[\\s\\S])*'?";
const BACKTICK = "`(?:[^`\\\\]|\\\\[\\s\\S])*`?";
const TRIPLE = `[rRbBfFuU]{0,2}(?:"""[\\s\\S]*?(?:"""|${END})|'''[\\s\\S]*?(?:'''|${END}))`;
const NUMBER = "\\b(?:0[xX][\\da-fA-F_]+|0[bB][01_]+|0[oO][0-7_]+|\\d[\\d_]*(?:\\.[\\d_]+)?(?:[eE][+-]?\\d+)?)[a-zA-Z]{0,3}\\b";
const NAME = "[A-Za-z_$][\\w$]*";

const LANGUAGES = {
  python: {
    label: "Python", comment: HASH, string: `${TRIPLE}|[rRbBfFuU]{0,2}(?:${DOUBLE}|${SINGLE})`, meta: "@[\\w.]+",
    keywords: words("and as assert async await break case class continue def del elif else except finally for from global if import in is lambda match nonlocal not or pass raise return try while with yield"),
    literals: words("True False None self cls Ellipsis NotImplemented"),
  },
  javascript: {
    label: "JavaScript", comment: SLASHES, string: `${DOUBLE}|${SINGLE}|${BACKTICK}`, meta: "@\\w+",
    keywords: words("abstract as async await break case catch class const continue debugger declare default delete do else enum export extends finally for from function get if implements import in instanceof interface keyof let namespace new of private protected public readonly return satisfies set static super switch throw try type typeof var void while with yield"),
    literals: words("true false null undefined this NaN Infinity string number boolean any unknown never"),
  },
  c: {
    label: "C", comment: SLASHES, string: `(?:u8|[uUL])?R?${DOUBLE}|${SINGLE}`, meta: "^[ \\t]*#[ \\t]*\\w+",
    keywords: words("alignas alignof asm auto break case catch class concept const consteval constexpr constinit const_cast continue co_await co_return co_yield decltype default delete do dynamic_cast else enum explicit export extern final for friend goto if inline mutable namespace new noexcept operator override private protected public register reinterpret_cast requires restrict return sizeof static static_assert static_cast struct switch template thread_local throw try typedef typeid typename union using virtual volatile while __global__ __device__ __shared__"),
    literals: words("true false nullptr NULL this bool char double float int long short signed unsigned void size_t int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t"),
  },
  json: { label: "JSON", comment: null, string: DOUBLE, keys: true, keywords: words(""), literals: words("true false null") },
  bash: {
    label: "Shell", comment: "(?<![^\\s;])#[^\\n]*", string: `"(?:[^"\\\\]|\\\\[\\s\\S])*"?|'[^']*'?`, meta: "\\$\\{[^}\\n]*\\}|\\$[\\w@#?*!-]+",
    keywords: words("case do done elif else esac export fi for function if in local return select set then time until while"),
    literals: words("alias awk bash cat cd chmod cp curl docker echo exit find git grep kill ls make mkdir mv npm pip python python3 rm sed ssh sudo tar test touch uv wget"),
  },
  generic: {
    label: "", comment: `${SLASHES}|(?<![^\\s])#[ !][^\\n]*|(?<![^\\s])-- [^\\n]*`, string: `${DOUBLE}|(?<![\\w])'(?:[^'\\\\\\n]|\\\\.)*'`,
    keywords: words("and as begin break case catch class const continue def do else elsif end enum export extends fn for foreach from func function if impl import in interface is let match mod module mut namespace new not of or package private protected pub public return select static struct switch then throw trait try type use using val var when where while with yield SELECT FROM WHERE INSERT UPDATE DELETE CREATE TABLE JOIN ON GROUP ORDER BY AND OR NOT AS"),
    literals: words("true false null nil none None True False self this NULL"),
  },
  text: { label: "Text", none: true },
};

const ALIASES = {
  py: "python", python3: "python", pycon: "python", ipython: "python",
  js: "javascript", jsx: "javascript", mjs: "javascript", node: "javascript", ts: "javascript", tsx: "javascript", typescript: "javascript",
  h: "c", cpp: "c", "c++": "c", cc: "c", cxx: "c", hpp: "c", cuda: "c", cu: "c", objc: "c",
  jsonc: "json", json5: "json", jsonl: "json",
  sh: "bash", shell: "bash", zsh: "bash", console: "bash", "shell-session": "bash",
  txt: "text", plaintext: "text", plain: "text", none: "text",
};
const LABELS = {
  ts: "TypeScript", typescript: "TypeScript", tsx: "TSX", jsx: "JSX", cpp: "C++", "c++": "C++", cc: "C++", cxx: "C++", hpp: "C++",
  cu: "CUDA", cuda: "CUDA", html: "HTML", css: "CSS", sql: "SQL", yaml: "YAML", yml: "YAML", toml: "TOML", xml: "XML", rs: "Rust",
  rust: "Rust", go: "Go", java: "Java", ruby: "Ruby", rb: "Ruby", php: "PHP", diff: "Diff", latex: "LaTeX", tex: "LaTeX",
};
// Longer code is shown in one colour: colouring it would make the page stutter.
const LIMIT = 120_000;

function family(name) {
  const key = Object.hasOwn(ALIASES, name) ? ALIASES[name] : name;
  return Object.hasOwn(LANGUAGES, key) ? key : "generic";
}

/** What to call the language that a fence names `lang`. */
export function label(lang) {
  if (!lang) return "Code";
  if (Object.hasOwn(LABELS, lang)) return LABELS[lang];
  return LANGUAGES[family(lang)].label || lang.slice(0, 24);
}

const compiled = new Map();

function matcher(name) {
  if (!compiled.has(name)) {
    const { comment, string, meta } = LANGUAGES[name];
    const shapes = [
      ["comment", comment], ["string", string], ["meta", meta], ["number", NUMBER], ["name", NAME],
    ].filter(([, source]) => source);
    compiled.set(name, new RegExp(shapes.map(([kind, source]) => `(?<${kind}>${source})`).join("|"), "gm"));
  }
  return compiled.get(name);
}

/** Split `code` into lines, each a list of [kind or null, text]; the texts joined are the code again. */
export function highlight(code, lang) {
  const name = family(lang);
  const language = LANGUAGES[name];
  if (language.none || code.length > LIMIT) return code.split("\n").map((line) => [[null, line]]);
  const lines = [[]];
  const put = (kind, text) => {
    text.split("\n").forEach((part, i) => {
      if (i > 0) lines.push([]);
      if (part) lines.at(-1).push([kind, part]);
    });
  };
  let at = 0;
  for (const found of code.matchAll(matcher(name))) {
    if (found.index > at) put(null, code.slice(at, found.index));
    at = found.index + found[0].length;
    put(kindOf(found, language, code, at), found[0]);
  }
  if (at < code.length) put(null, code.slice(at));
  return lines;
}

function kindOf({ groups }, language, code, end) {
  if (groups.name === undefined) {
    const key = language.keys && groups.string && /^\s*:/.test(code.slice(end, end + 40));
    return key ? "key" : Object.keys(groups).find((kind) => groups[kind] !== undefined);
  }
  if (language.keywords.has(groups.name)) return "keyword";
  if (language.literals.has(groups.name)) return "literal";
  if (code[end] === "(") return "call";
  return /^[A-Z]\w*[a-z]/.test(groups.name) ? "type" : null;
}
