// Short words at the edge of the page, and words for screen readers only.

import { el } from "./dom.js";

const STAY = 7000;

export class Notices {
  #box = document.querySelector("#notices");
  #spoken = document.querySelector("#spoken");

  /** Show `text` for a while, with one thing to do about it if `action` is {label, run}. */
  show(text, action = null) {
    const note = el("div", { class: "notice" }, el("span", { text }));
    const close = () => note.remove();
    if (action) {
      const act = () => {
        close();
        action.run();
      };
      note.append(el("button", { type: "button", class: "button plain", text: action.label, on: { click: act } }));
    }
    this.#box.append(note);
    while (this.#box.children.length > 3) this.#box.firstElementChild.remove();
    // Nobody loses the button while pointing at it or standing on it.
    const later = () => (note.matches(":hover, :focus-within") ? setTimeout(later, 1500) : close());
    setTimeout(later, STAY);
  }

  /** Have a screen reader say `text`. */
  say(text) {
    this.#spoken.textContent = text;
  }
}
