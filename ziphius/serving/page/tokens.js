// Tokens one by one, tinted by how sure the model was.

import { el } from "./dom.js";

const LEAST = [0.9, 0.7, 0.45, 0.2, 0.05, 0];

/** How sure the model was of a token: 0 (all but certain) to 5 (a surprise). */
export function doubt(logprob) {
  return LEAST.findIndex((least) => Math.exp(logprob ?? 0) >= least);
}

/** The element of one token; `token` is [text, logprob, alternatives]. */
export function tokenSpan(token, text = token[0]) {
  const span = el("span", { class: `token doubt-${doubt(token[1])}`, text, tabIndex: -1 });
  span.token = token;
  if (text.includes("\n")) span.classList.add("breaks");
  return span;
}

/**
 * Show `tokens` in `container`; those already shown stay. Each line is a block of its own, so that
 * the browser lays out one line anew for a token, not the whole answer.
 */
export function showTokens(container, tokens) {
  if ((container.shown ?? 0) > tokens.length) {
    container.replaceChildren();
    container.shown = 0;
  }
  const shown = container.shown ?? 0;
  for (const token of tokens.slice(shown)) {
    const last = container.lastElementChild;
    const line = !last || last.lastElementChild.textContent.endsWith("\n") ? container.appendChild(el("div")) : last;
    line.append(tokenSpan(token));
  }
  container.shown = tokens.length;
  if (shown === 0 && container.firstElementChild) container.firstElementChild.firstElementChild.tabIndex = 0;
}

/** An empty container for tokens; the arrow keys walk through it. */
export function tokenBox(label) {
  return el("div", { class: "tokens", role: "group", "aria-label": `${label}, token by token: arrow keys walk`, on: { keydown: walk } });
}

const STEPS = { ArrowLeft: -1, ArrowRight: 1 };

function walk(event) {
  const here = event.target.closest(".token");
  if (!here || event.ctrlKey || event.metaKey || event.altKey) return;
  const all = [...event.currentTarget.querySelectorAll(".token")];
  const at = all.indexOf(here);
  const to = event.key === "Home" ? 0 : event.key === "End" ? all.length - 1 : at + (STEPS[event.key] ?? NaN);
  const next = all[to];
  if (!next) return;
  event.preventDefault();
  here.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}
