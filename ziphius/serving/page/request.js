// One request of the page of routes, and what comes back, as it comes.

import { button, el } from "./dom.js";
import { seconds } from "./numbers.js";

// More than anyone reads; a browser that lays out all of a long stream would stand still.
const SHOWN = 200_000;

/** The place where an answer is shown; one request at a time. */
export class Exchange {
  #controller = null;
  #head = el("div", { class: "status" });
  #body = el("pre", { class: "body", tabIndex: 0, "aria-label": "Body of the answer" });
  #onChange;

  constructor(onChange) {
    this.#onChange = onChange;
    this.node = el("div", { class: "answer", role: "region", "aria-label": "Answer", hidden: true }, this.#head, this.#body);
  }

  get running() {
    return this.#controller !== null;
  }

  stop() {
    this.#controller?.abort();
  }

  /** Send it and show what comes; throws nothing. `key` may be empty, `body` null. */
  async send({ method, url, key, body }) {
    this.stop();
    const controller = new AbortController();
    this.#controller = controller;
    this.node.hidden = false;
    this.#body.textContent = "";
    this.#tell([["state", "Waiting for the answer…"]]);
    this.#onChange();
    const began = performance.now();
    let told = [];
    try {
      const headers = { ...(body === null ? {} : { "Content-Type": "application/json" }), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
      const response = await fetch(url, {
        method: method.toUpperCase(), headers, body: body ?? undefined, signal: controller.signal, cache: "no-store", credentials: "same-origin",
      });
      told = facts(response);
      this.#tell([...told, ["state", "…"]]);
      await this.#read(response);
      this.#tell([...told, ["time", seconds(performance.now() - began)]]);
    } catch (error) {
      // A request that was stopped for a newer one has nothing more to say.
      if (this.#controller !== controller) return;
      const words = error.name === "AbortError" ? "Stopped." : told.length ? "The connection broke before the end." : `Not sent, or not answered: ${error.message}`;
      this.#tell([...told, ["fault", words]]);
    } finally {
      if (this.#controller === controller) this.#controller = null;
      this.#onChange();
    }
  }

  #tell(parts) {
    this.#head.replaceChildren(...parts.map(([kind, text]) => el("span", { class: kind, text })));
  }

  // Events are shown as they come; one JSON value is set out in lines once it is whole.
  async #read(response) {
    const decoder = new TextDecoder();
    const json = /\bjson\b/.test(response.headers.get("content-type") ?? "");
    let whole = "";
    let size = 0;
    for (const reader = response.body?.getReader(); reader;) {
      const { value, done } = await reader.read();
      const text = decoder.decode(value, { stream: !done });
      if (json && size <= SHOWN) whole += text;
      if (!json || size + text.length > SHOWN) this.#add(json ? whole : text, size);
      size += text.length;
      if (done) break;
    }
    if (json && size <= SHOWN) this.#body.textContent = laidOut(whole);
  }

  #add(text, before) {
    if (before > SHOWN) return;
    const low = this.#body.scrollTop + this.#body.clientHeight > this.#body.scrollHeight - 8;
    this.#body.append(before + text.length > SHOWN ? `${text}\n… the rest is received and not shown` : text);
    if (low) this.#body.scrollTop = this.#body.scrollHeight;
  }

  /** The button that stops what runs. */
  stopButton() {
    return button("stop", "Stop", () => this.stop(), { shown: true, kind: "plain stop" });
  }
}

function facts(response) {
  const id = response.headers.get("x-request-id");
  const kind = response.ok ? "code good" : "code bad";
  return [[kind, `${response.status} ${response.statusText}`.trim()], ...(id ? [["mono", `x-request-id: ${id}`]] : [])];
}

function laidOut(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
