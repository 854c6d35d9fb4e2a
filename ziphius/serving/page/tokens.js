// Tokens one by one, tinted by how sure the model was.

import { el } from "./dom.js";

/** How sure the model was of a token: 0 (all but certain) to 5 (a surprise). */
export function doubt(logprob) {
  const p = Math.exp(logprob ?? 0);
  return [0.9, 0.7, 0.45, 0.2, 0.05].findIndex((least) => p >= least) === -1
    ? 5
    : [0.9, 0.7, 0.45, 0.2, 0.05].findIndex((least) => p >= least);
}

/** The element of one token; `token` is [text, logprob, alternatives]. */
export function tokenSpan(token, text = token[0]) {
  const span = el("span", { class: `token doubt-${doubt(token[1])}`, text, tabIndex: -1 });
  span.token = token;
  if (text.includes("\n")) span.classList.add("breaks");
  return span;
}

/** Show `tokens` in `container`; those already shown stay. */
export function showTokens(container, tokens) {
  if (container.children.length > tokens.length) container.replaceChildren();
  const fresh = tokens.slice(container.children.length).map((token) => tokenSpan(token));
  container.append(...fresh);
  const first = container.firstElementChild;
  if (first && !container.querySelector('[tabindex="0"]')) first.tabIndex = 0;
}

/** An empty container for tokens; the arrow keys walk through it. */
export function tokenBox(label) {
  return el("div", { class: "tokens", role: "group", "aria-label": `${label}, token by token: arrow keys walk`, on: { keydown: walk } });
}

const STEPS = { ArrowLeft: -1, ArrowRight: 1 };

function walk(event) {
  const here = event.target.closest(".token");
  if (!here || event.ctrlKey || event.metaKey || event.altKey) return;
  const all = [...event.currentTarget.children];
  const at = all.indexOf(here);
  const to = event.key === "Home" ? 0 : event.key === "End" ? all.length - 1 : at + (STEPS[event.key] ?? NaN);
  const next = all[to];
  if (!next) return;
  event.preventDefault();
  here.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}
