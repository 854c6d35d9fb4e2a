// The field at the foot of a chat.

import { button, el, icon } from "./dom.js";
import { keep, recall } from "./store.js";

const DRAFT = "ziphius.draft";

export class Composer {
  #app;
  #send;
  #think;

  constructor(app, { onSend, onStop, onEditLast }) {
    this.#app = app;
    this.field = el("textarea", {
      id: "input", rows: 1, placeholder: "Message", "aria-label": "Message", enterKeyHint: "send",
      value: recall("sessionStorage", DRAFT) ?? "", autocomplete: "off",
    });
    this.#think = el("button", { type: "button", class: "chip", on: { click: () => app.think(!app.thinks()) } }, icon("ripple"), el("span", { text: "Think first" }));
    this.#send = button("send", "Send", () => (this.#busy ? onStop() : this.#submit(onSend)), { kind: "primary round" });
    this.root = el("form", { class: "composer", on: { submit: (e) => e.preventDefault() } }, this.field, el("div", { class: "row" }, this.#think, el("span", { class: "hint" }), this.#send));
    this.root.addEventListener("click", (event) => event.target === this.root && this.field.focus());
    this.field.addEventListener("input", () => {
      keep("sessionStorage", DRAFT, this.field.value || null);
      this.fit();
      this.update();
    });
    this.field.addEventListener("keydown", (event) => {
      // While an input method composes, Enter chooses a word.
      if (event.isComposing || event.keyCode === 229) return;
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        if (!this.#busy) this.#submit(onSend);
      } else if (event.key === "ArrowUp" && !this.field.value) {
        event.preventDefault();
        onEditLast();
      }
    });
  }

  get #busy() {
    return this.#app.runs.has(this.#app.current.id);
  }

  #submit(onSend) {
    const text = this.field.value.trim();
    if (!text) return;
    this.field.value = "";
    keep("sessionStorage", DRAFT, null);
    this.fit();
    onSend(text);
    this.field.focus();
  }

  /** As high as its text, within bounds that the style sheet sets. */
  fit() {
    this.field.style.height = "auto";
    this.field.style.height = `${this.field.scrollHeight}px`;
  }

  /** Show whether an answer is under way and whether the model may think. */
  update() {
    const busy = this.#busy;
    const name = busy ? "Stop" : "Send";
    if (this.#send.dataset.does !== name) {
      this.#send.replaceChildren(icon(busy ? "stop" : "send"));
      this.#send.dataset.does = name;
      this.#send.setAttribute("aria-label", name);
      this.#send.title = busy ? "Stop (Esc)" : "Send (Enter)";
    }
    this.#send.classList.toggle("idle", !busy && !this.field.value.trim());
    this.#think.hidden = this.#app.model?.ziphius?.thinking !== "optional";
    this.#think.setAttribute("aria-pressed", String(this.#app.thinks()));
    this.root.querySelector(".hint").textContent = busy ? "Esc stops" : "";
  }
}
