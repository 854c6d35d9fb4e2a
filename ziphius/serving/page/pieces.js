// The text of a document as pieces: what a person wrote, and the model's tokens one by one.
// A piece is {text, by: "you" | "model", run?, token?}; pieces are never changed, only replaced.

export const textOf = (pieces) => pieces.map((piece) => piece.text).join("");

const written = (text) => (text ? [{ text, by: "you" }] : []);

/** The pieces after a person changed the text to `text`: what did not change keeps its tokens. */
export function edit(pieces, text) {
  const before = textOf(pieces);
  const most = Math.min(before.length, text.length);
  let head = 0;
  while (head < most && before[head] === text[head]) head += 1;
  let tail = 0;
  while (tail < most - head && before.at(-1 - tail) === text.at(-1 - tail)) tail += 1;
  const kept = slice(pieces, 0, head);
  const after = slice(pieces, before.length - tail, before.length);
  return join([...kept, ...written(text.slice(head, text.length - tail)), ...after]);
}

// The characters from `from` to `to`; a piece that is cut keeps its author but is no token any more.
function slice(pieces, from, to) {
  const out = [];
  let at = 0;
  for (const piece of pieces) {
    const end = at + piece.text.length;
    if (at >= from && end <= to) out.push(piece);
    else if (end > from && at < to) {
      const part = piece.text.slice(Math.max(0, from - at), to - at);
      if (part) out.push({ text: part, by: piece.by === "you" ? "you" : "model" });
    }
    at = end;
  }
  return out;
}

function join(pieces) {
  const out = [];
  for (const piece of pieces) {
    const last = out.at(-1);
    if (last?.by === "you" && piece.by === "you") out[out.length - 1] = { text: last.text + piece.text, by: "you" };
    else out.push(piece);
  }
  return out;
}

/** The pieces of one completion choice: one a token where the tokens spell the text, else one. */
export function ofChunk(choice, run) {
  const text = choice.text ?? "";
  const tokens = tokensOf(choice.logprobs);
  if (tokens.length && tokens.map(([t]) => t).join("") === text) {
    return tokens.filter(([t]) => t).map((token) => ({ text: token[0], by: "model", run, token }));
  }
  return text ? [{ text, by: "model", run, ...(tokens.length === 1 ? { token: tokens[0] } : {}) }] : [];
}

/** Tokens out of completion logprobs, as [text, logprob, [[text, logprob], …]]. */
export function tokensOf(logprobs) {
  const { tokens = [], token_logprobs: own = [], top_logprobs: top } = logprobs ?? {};
  return tokens.map((text, i) => [
    text, own[i] ?? null, Object.entries(top?.[i] ?? {}).sort((a, b) => b[1] - a[1]),
  ]);
}

/** The pieces without what run `run` wrote, or null where something was written after it. */
export function without(pieces, run) {
  const from = pieces.findIndex((piece) => piece.run === run);
  return from >= 0 && pieces.at(-1).run === run ? pieces.slice(0, from) : null;
}
