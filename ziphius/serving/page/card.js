// The small card beside a token: what else the model could have said.

import { el } from "./dom.js";
import { percent } from "./numbers.js";

const NAMES = { "\n": "↵", "\t": "⇥", " ": "·", "\r": "␍" };

/** A token with its white space made visible. */
export function visible(text) {
  if (text === "") return "(nothing)";
  return text.replace(/[\n\t\r]|^ +| +$/g, (run) => [...run].map((c) => NAMES[c]).join(""));
}

// Part of a character cannot be written into a text.
const usable = (text) => text !== "" && !text.includes("\ufffd");

export class Card {
  #root = el("div", { id: "card", role: "tooltip", hidden: true });
  #anchor = null;
  #closing = 0;
  #picks = [];

  constructor() {
    document.body.append(this.#root);
    this.#root.addEventListener("pointerenter", () => clearTimeout(this.#closing));
    this.#root.addEventListener("pointerleave", () => this.hideSoon());
    addEventListener("scroll", (e) => this.#root.contains(e.target) || this.hide(), { capture: true, passive: true });
    addEventListener("resize", () => this.hide());
  }

  get open() {
    return !this.#root.hidden;
  }

  get anchor() {
    return this.#anchor;
  }

  contains(node) {
    return this.#root.contains(node);
  }

  /** Show the card of `span`, a token; `pick(text)` makes the alternatives buttons. */
  show(span, { x = null, y = null, pick = null } = {}) {
    clearTimeout(this.#closing);
    if (this.#anchor === span && this.open) return;
    this.hide();
    this.#anchor = span;
    span.classList.add("chosen");
    span.setAttribute("aria-describedby", "card");
    this.#root.replaceChildren(...this.#content(span.token, pick));
    this.#root.hidden = false;
    this.#place(span, x, y);
  }

  hide() {
    clearTimeout(this.#closing);
    this.#anchor?.classList.remove("chosen");
    this.#anchor?.removeAttribute("aria-describedby");
    this.#anchor = null;
    this.#picks = [];
    this.#root.hidden = true;
  }

  /** Take the alternative at place `n`, from 1, if it can be taken. */
  pick(n) {
    this.#picks[n - 1]?.();
  }

  hideSoon() {
    clearTimeout(this.#closing);
    this.#closing = setTimeout(() => this.hide(), 160);
  }

  #content([text, logprob, alternatives], pick) {
    const listed = alternatives.some(([t]) => t === text) ? alternatives : [[text, logprob], ...alternatives];
    const rest = 1 - listed.reduce((sum, [, lp]) => sum + Math.exp(lp ?? -Infinity), 0);
    this.#picks = listed.map(([t]) => (pick && t !== text && usable(t) ? () => pick(t) : null));
    const rows = listed.map(([t, lp], i) => this.#row(t, lp, t === text, this.#picks[i]));
    const foot = rest > 0.0005 ? `all others ${percent(Math.log(rest))}` : null;
    const note = [foot, pick ? "choose one to go on from it" : null].filter(Boolean).join(" · ");
    return [
      el("p", { class: "headline" }, el("code", { text: visible(text) }), el("span", { class: "share", text: logprob === null ? "–" : percent(logprob) })),
      el("ul", {}, ...rows),
      note ? el("p", { class: "others", text: note }) : null,
    ].filter(Boolean);
  }

  #row(text, logprob, chosen, pick) {
    const bar = el("span", { class: "bar" });
    bar.style.setProperty("--share", `${(100 * Math.exp(logprob)).toFixed(2)}%`);
    const parts = [bar, el("code", { text: visible(text) }), el("span", { class: "share", text: percent(logprob) })];
    const inner = pick
      ? el("button", { type: "button", class: "row", on: { click: pick } }, ...parts)
      : el("span", { class: "row" }, ...parts);
    return el("li", { class: chosen ? "taken" : "" }, inner);
  }

  // Below the token, or above it where there is no room; never beyond the window.
  #place(span, x, y) {
    const rects = [...span.getClientRects()];
    const under = rects.find((r) => x !== null && x >= r.left && x <= r.right && y >= r.top && y <= r.bottom);
    const at = under ?? rects[0] ?? span.getBoundingClientRect();
    const own = this.#root.getBoundingClientRect();
    const left = Math.min(Math.max(8, at.left - 12), innerWidth - own.width - 8);
    const below = at.bottom + own.height + 12 < innerHeight;
    this.#root.style.left = `${left}px`;
    this.#root.style.top = `${below ? at.bottom + 4 : Math.max(8, at.top - own.height - 4)}px`;
  }
}

/** Open the card for tokens inside `root` by pointing, focusing and tapping. */
export function watchTokens(root, card) {
  root.addEventListener("pointerover", (event) => {
    const span = event.target.closest?.(".token");
    if (span?.token && event.pointerType !== "touch") card.show(span, { x: event.clientX, y: event.clientY });
  });
  root.addEventListener("pointerout", (event) => {
    if (event.target.closest?.(".token") && event.pointerType !== "touch") card.hideSoon();
  });
  root.addEventListener("click", (event) => {
    const span = event.target.closest?.(".token");
    if (span?.token) card.show(span, { x: event.clientX, y: event.clientY });
    else card.hide();
  });
  root.addEventListener("focusin", (event) => {
    if (event.target.token && event.target.matches(":focus-visible")) card.show(event.target);
  });
  root.addEventListener("focusout", (event) => {
    if (event.target === card.anchor) card.hideSoon();
  });
}
