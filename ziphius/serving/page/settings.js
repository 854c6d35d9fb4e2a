// What a person chose. An absent value means: as the server does by default.

import { keep, recall } from "./store.js";

const KEY = "ziphius.settings";
const SECRET = "ziphius.key";

/** The sampling settings, in the order shown: name in the request, label, bounds, what it does. */
export const SAMPLING = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: "any", hint: "0 takes the likeliest token every time" },
  { name: "top_p", label: "Top-p", min: 0, max: 1, step: "any", hint: "The likeliest tokens up to this share" },
  { name: "top_k", label: "Top-k", min: -1, max: 1_000_000, step: 1, hint: "At most this many tokens; −1 for all" },
  { name: "max_tokens", label: "Max tokens", min: 1, max: 10_000_000, step: 1, hint: "The longest answer" },
  { name: "seed", label: "Seed", min: 0, max: 2 ** 53 - 1, step: 1, hint: "The same seed repeats an answer" },
];

export class Settings {
  #kept;
  #key;
  #listeners = [];

  constructor() {
    let kept = {};
    try {
      kept = JSON.parse(recall("localStorage", KEY) ?? "{}") ?? {};
    } catch {
      // Damaged settings are as good as none.
    }
    this.#kept = typeof kept === "object" && !Array.isArray(kept) ? kept : {};
    this.#key = recall("sessionStorage", SECRET) ?? "";
  }

  get(name) {
    return this.#kept[name];
  }

  /** `undefined` goes back to the default. */
  set(name, value) {
    if (value === undefined) delete this.#kept[name];
    else this.#kept[name] = value;
    keep("localStorage", KEY, JSON.stringify(this.#kept));
    for (const listener of this.#listeners) listener(name);
  }

  onChange(listener) {
    this.#listeners.push(listener);
  }

  /** The API key: for this tab only, never in localStorage. */
  get key() {
    return this.#key;
  }

  set key(value) {
    this.#key = value;
    keep("sessionStorage", SECRET, value || null);
  }

  /** The sampling fields of a request: only what was chosen. */
  sampling() {
    const chosen = SAMPLING.map(({ name }) => [name, this.#kept[name]]);
    return Object.fromEntries(chosen.filter(([, value]) => typeof value === "number"));
  }

  /** The functions the model may call, or null. Throws SyntaxError on text that is not JSON. */
  tools() {
    const text = this.#kept.tools?.trim();
    if (!text) return null;
    const list = JSON.parse(text);
    if (!Array.isArray(list)) throw new SyntaxError("a list is needed");
    return list.map((f) => (f.type === "function" ? f : { type: "function", function: f }));
  }
}
