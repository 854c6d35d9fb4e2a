// The list of conversations.

import { isEmpty } from "./conversation.js";
import { button, el, icon } from "./dom.js";
import { day } from "./numbers.js";

export class Sidebar {
  #app;
  #list = document.querySelector("#talks");
  #key = "";

  constructor(app, acts) {
    this.#app = app;
    this.acts = acts;
  }

  /** Draw the list anew if anything in it changed. */
  update() {
    const { store, runs, current } = this.#app;
    const items = store.list().filter((c) => !isEmpty(c));
    const key = JSON.stringify(items.map((c) => [c.id, c.title, day(c.changed), runs.has(c.id)]).concat(current.id));
    if (key === this.#key) return;
    this.#key = key;
    const focused = document.activeElement?.closest?.("[data-talk]")?.dataset.talk;
    const groups = Map.groupBy ? Map.groupBy(items, (c) => day(c.changed)) : grouped(items);
    this.#list.replaceChildren(...[...groups].flatMap(([name, talks]) => [
      el("h2", { text: name }), el("ul", {}, ...talks.map((c) => this.#row(c))),
    ]));
    if (!items.length) this.#list.append(el("p", { class: "empty", text: "Conversations stay in this browser." }));
    if (focused) this.#list.querySelector(`[data-talk="${CSS.escape(focused)}"] .open`)?.focus();
  }

  #row(talk) {
    const current = talk.id === this.#app.current.id;
    const title = talk.title || "Untitled";
    const running = this.#app.runs.has(talk.id);
    return el(
      "li", { data: { talk: talk.id }, class: current ? "current" : "" },
      el(
        "button", { type: "button", class: "open", "aria-current": current ? "true" : null, title, on: { click: () => this.acts.open(talk.id) } },
        icon(talk.kind === "chat" ? "chat" : "page"), el("span", { text: title }),
        running ? el("span", { class: "pulse", role: "img", "aria-label": "being answered" }) : null,
      ),
      button("download", `Export “${title}” as JSON`, () => this.acts.export(talk), { kind: "quiet small" }),
      button("bin", `Delete “${title}”`, () => this.acts.remove(talk), { kind: "quiet small" }),
    );
  }
}

function grouped(items) {
  const groups = new Map();
  for (const item of items) {
    const name = day(item.changed);
    groups.set(name, [...(groups.get(name) ?? []), item]);
  }
  return groups;
}
