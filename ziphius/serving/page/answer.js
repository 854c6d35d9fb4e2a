// One answer of the model, as it grows. Plain data: it goes into storage as it is.

/**
 * A fresh answer.
 *
 * `tokens` holds [text, logprob, [[text, logprob], …]] of the thinking and of the rest; `times` are
 * milliseconds since the request was sent; `count` counts the tokens of the newest request.
 */
export function fresh() {
  return {
    reasoning: "", content: "", calls: [], tokens: { reasoning: [], content: [] },
    state: "running", finish: null, error: null, usage: null, count: 0, head: 0, times: {},
  };
}

/** Make `answer` ready to be gone on with: what is there stays, the clock starts anew. */
export function resume(answer) {
  Object.assign(answer, { state: "running", finish: null, error: null, usage: null, count: 0, head: 0 });
  // The duration of the thinking belongs to the first request, which alone thought.
  answer.times = { thinking: answer.times.thinking, thought: answer.times.thought };
}

/** Add one chat chunk that came `now` milliseconds after the request. */
export function take(answer, chunk, now) {
  if (chunk.usage) answer.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const delta = choice.delta ?? {};
  const thinking = delta.reasoning_content ?? delta.reasoning ?? "";
  const content = delta.content ?? "";
  const calls = delta.tool_calls ?? [];
  const tokens = choice.logprobs?.content ?? [];
  if (thinking || content || calls.length || tokens.length) tick(answer, tokens.length || 1, now);
  if (thinking) {
    answer.times.thinking ??= now;
    answer.times.thought = now;
    answer.reasoning += thinking;
  }
  if (content) {
    if (answer.reasoning && !answer.content) answer.times.thought = now;
    answer.content += content;
  }
  calls.forEach((piece) => addCall(answer.calls, piece));
  share(answer, tokens, thinking, content || calls.length > 0);
  if (choice.finish_reason) answer.finish = choice.finish_reason;
}

/** Note that `n` tokens came at `now`. The first arrival is kept apart: speed is measured after it. */
export function tick(answer, n, now) {
  if (answer.times.first === undefined) {
    answer.times.first = now;
    answer.head = n;
  }
  answer.times.last = now;
  answer.count += n;
}

function addCall(calls, piece) {
  const at = piece.index ?? calls.length;
  const call = (calls[at] ??= { id: "", name: "", arguments: "" });
  if (piece.id) call.id = piece.id;
  if (piece.function?.name) call.name += piece.function.name;
  if (piece.function?.arguments) call.arguments += piece.function.arguments;
}

// A chunk may close the thinking and open the answer: the tokens are dealt out by their length.
function share(answer, tokens, thinking, rest) {
  let open = thinking.length;
  const thinkingOnly = thinking && !rest;
  for (const token of tokens) {
    const kept = [text(token), token.logprob, (token.top_logprobs ?? []).map((t) => [text(t), t.logprob])];
    const part = thinkingOnly || open > 0 || (!rest && answer.reasoning && !answer.content);
    answer.tokens[part ? "reasoning" : "content"].push(kept);
    open -= kept[0].length;
  }
}

/** The text of a token, or its bytes in hexadecimal where they are only part of a character. */
export function text(token) {
  if (!token.bytes || !token.token?.includes("\ufffd")) return token.token ?? "";
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(token.bytes));
  } catch {
    return token.bytes.map((b) => `⟨${b.toString(16).padStart(2, "0")}⟩`).join("");
  }
}

/** What can be said about the speed: {tokens, perSecond, first, accepted, cached}, null where unknown. */
export function speed(answer) {
  const { first, last } = answer.times;
  const tokens = answer.usage?.completion_tokens ?? answer.count;
  const after = tokens - answer.head;
  const lasted = last - first;
  const details = answer.usage?.completion_tokens_details ?? {};
  const accepted = details.accepted_prediction_tokens ?? 0;
  const drafts = accepted + (details.rejected_prediction_tokens ?? 0);
  return {
    tokens,
    perSecond: after > 0 && lasted > 0 ? (1000 * after) / lasted : null,
    first: first ?? null,
    accepted: drafts > 0 ? accepted / drafts : null,
    drafts,
    cached: answer.usage?.prompt_tokens_details?.cached_tokens ?? 0,
    prompt: answer.usage?.prompt_tokens ?? null,
  };
}
