// "Try it": a request that can be edited, sent, stopped, and copied as a curl line.

import { button, copyButton, el } from "./dom.js";
import { Exchange } from "./request.js";
import { address, curl } from "./routes.js";
import { examplesOf, fieldsOf, typeOf } from "./schema.js";

export class Trial {
  #route;
  #settings;
  #inputs = new Map();
  #body = null;
  #note = el("small", { role: "status" });
  #curl = el("pre", { class: "curl", tabIndex: 0, "aria-label": "The request for a shell" });
  #deeds = el("div", { class: "deeds" });
  #exchange = new Exchange(() => this.#draw());

  constructor(told, route, settings) {
    this.#route = route;
    this.#settings = settings;
    this.node = el(
      "section", { class: "trial", "aria-label": "Try it" }, el("h4", { text: "Try it" }),
      ...this.#parameters(told), ...this.#bodyParts(told), this.#note, this.#deeds, this.#exchange.node,
      el("div", { class: "block" }, el("header", {}, el("span", { text: "curl" }), copyButton("Copy the curl line", () => this.#curl.textContent, { kind: "quiet small" })), this.#curl),
    );
    this.node.addEventListener("input", () => this.#draw());
    this.node.addEventListener("keydown", (event) => this.#pressed(event));
    this.#draw();
  }

  /** Draw anew what depends on things outside, such as whether there is a key. */
  update() {
    this.#draw();
  }

  #parameters(told) {
    return this.#route.parameters.filter((one) => ["path", "query"].includes(one.in)).map((one) => {
      const input = el("input", { id: `${this.#route.id}:${one.name}`, class: "field mono", autocomplete: "off", spellcheck: false, placeholder: typeOf(told, one.schema), required: Boolean(one.required) });
      this.#inputs.set(one, input);
      return el("div", { class: "labelled" }, el("label", { htmlFor: input.id, text: `${one.name} (in the ${one.in})` }), input);
    });
  }

  #bodyParts(told) {
    const { media, id } = this.#route;
    if (!media) return [];
    const examples = examplesOf(told, media);
    this.#body = el("textarea", { id: `${id}:body`, class: "field mono", spellcheck: false, autocomplete: "off", "aria-keyshortcuts": "Control+Enter" });
    const choose = (example) => {
      this.#body.value = JSON.stringify(example ?? {}, null, 2);
      this.#body.rows = Math.min(this.#body.value.split("\n").length + 1, 18);
    };
    choose(examples[0]);
    return [
      el(
        "div", { class: "block" },
        el(
          "header", {}, el("label", { htmlFor: this.#body.id, text: "Body" }),
          examples.length > 1 ? this.#choice(examples, choose) : null,
          fieldsOf(told, media.schema).some(({ name }) => name === "stream") ? this.#streamTick() : null,
          copyButton("Copy the body", () => this.#body.value, { kind: "quiet small" }),
        ),
        this.#body,
      ),
    ];
  }

  #choice(examples, choose) {
    const box = el("div", { class: "segments", role: "group", "aria-label": "Example" });
    const pick = (chosen) => {
      choose(examples[chosen]);
      [...box.children].forEach((one, i) => one.setAttribute("aria-pressed", String(i === chosen)));
    };
    box.append(...examples.map((_, i) => el("button", { type: "button", text: String(i + 1), "aria-label": `Example ${i + 1}`, on: { click: () => {
      pick(i);
      this.#draw();
    } } })));
    pick(0);
    return box;
  }

  #streamTick() {
    this.tick = el("input", { type: "checkbox", on: { input: () => {
      const body = this.#parsed();
      if (!isObject(body)) return;
      if (this.tick.checked) body.stream = true;
      else delete body.stream;
      this.#body.value = JSON.stringify(body, null, 2);
      this.#draw();
    } } });
    return el("label", { class: "tick" }, this.tick, "stream");
  }

  // undefined where the text is no JSON.
  #parsed() {
    try {
      return JSON.parse(this.#body.value);
    } catch {
      return undefined;
    }
  }

  #request() {
    const { method, path } = this.#route;
    const part = (where) => Object.fromEntries([...this.#inputs].filter(([one]) => one.in === where).map(([one, input]) => [one.name, input.value.trim()]));
    return { method, url: address(path, part("path"), part("query")), body: this.#body ? this.#body.value : null };
  }

  #draw() {
    const body = this.#body ? this.#parsed() : null;
    const streams = isObject(body) && body.stream === true;
    if (this.tick) {
      this.tick.checked = streams;
      this.tick.disabled = !isObject(body);
    }
    this.#body?.setAttribute("aria-invalid", String(body === undefined));
    this.#note.textContent = body === undefined ? "This is not JSON: it can be sent, and will be refused." : "";
    this.#curl.textContent = curl({ ...this.#request(), keyed: this.#route.keyed || Boolean(this.#settings.key), streams });
    this.#drawDeeds();
  }

  // Send and Stop take each other's place; whoever stood on one stands on the other.
  #drawDeeds() {
    const { running } = this.#exchange;
    if (this.#deeds.firstChild && this.#deeds.dataset.running === String(running)) return;
    const focused = this.#deeds.contains(document.activeElement);
    this.#deeds.dataset.running = String(running);
    this.#deeds.replaceChildren(
      running ? this.#exchange.stopButton() : button("send", "Send", () => this.#send(), { shown: true, kind: "primary", title: "Send (Ctrl + Enter)" }),
    );
    if (focused) this.#deeds.firstChild.focus();
  }

  #send() {
    const missing = [...this.#inputs].find(([one, input]) => one.required && !input.value.trim());
    for (const input of this.#inputs.values()) input.setAttribute("aria-invalid", String(input === missing?.[1]));
    if (missing) {
      this.#note.textContent = `${missing[0].name} is needed.`;
      missing[1].focus();
      return;
    }
    this.#exchange.send({ ...this.#request(), key: this.#settings.key });
  }

  #pressed(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.#send();
    else if (event.key === "Enter" && event.target.matches("input.field")) this.#send();
    else if (event.key === "Escape" && this.#exchange.running) this.#exchange.stop();
    else return;
    event.preventDefault();
  }
}

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
