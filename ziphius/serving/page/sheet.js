// The sheet of settings.

import { button, download, el } from "./dom.js";
import { open } from "./keys.js";
import { count } from "./numbers.js";
import { SAMPLING } from "./settings.js";

export class Sheet {
  #app;

  constructor(app) {
    this.#app = app;
  }

  open() {
    const dialog = el("dialog", { class: "sheet-right", "aria-labelledby": "sheet-title" });
    dialog.append(
      el("header", {}, el("h2", { id: "sheet-title", text: "Settings" }), button("close", "Close", () => dialog.close())),
      el("div", { class: "sections" }, this.#talk(), this.#sampling(), this.#tools(), this.#look(), this.#server(), this.#data(dialog)),
    );
    open(dialog);
  }

  #talk() {
    const { current, store, settings } = this.#app;
    if (current.kind !== "chat") return null;
    const field = area("system", "System prompt", current.system, 4, "Who the model is, how it should answer…");
    field.addEventListener("input", () => {
      current.system = field.value;
      settings.set("system", field.value || undefined);
      if (store.get(current.id)) store.save(current);
    });
    return section("This conversation", labelled(field, "System prompt", "Holds from the next answer on; new conversations begin with it"));
  }

  #sampling() {
    const { settings, model } = this.#app;
    const defaults = model?.ziphius?.defaults ?? {};
    const fields = SAMPLING.map((spec) => this.#number(spec, defaults[spec.name]));
    const reset = button("undo", "Back to the server's defaults", () => {
      for (const { name } of SAMPLING) settings.set(name, undefined);
      for (const input of box.querySelectorAll("input")) {
        input.value = "";
        input.dispatchEvent(new Event("input"));
      }
    }, { shown: true, kind: "quiet small" });
    const box = section("Sampling", el("div", { class: "grid" }, ...fields), reset);
    return box;
  }

  #number({ name, label, min, max, step, hint }, byDefault) {
    const { settings } = this.#app;
    const shown = byDefault ?? (name === "seed" ? "random" : "server's own");
    const input = el("input", { id: `set-${name}`, class: "field", type: "number", inputMode: "decimal", min, max, step, placeholder: String(shown), value: settings.get(name) ?? "" });
    const note = el("small", { id: `note-${name}`, text: hint });
    input.setAttribute("aria-describedby", note.id);
    input.addEventListener("input", () => {
      const good = input.validity.valid;
      input.setAttribute("aria-invalid", String(!good));
      note.textContent = good ? hint : `${step === 1 ? "A whole number" : "A number"} from ${min} to ${max}`;
      // A wrong value is not kept: the last good one, or the default, goes on to hold.
      if (good) settings.set(name, input.value === "" ? undefined : Number(input.value));
    });
    return el("div", { class: "labelled" }, el("label", { htmlFor: input.id, text: label }), input, note);
  }

  #tools() {
    const { settings, model } = this.#app;
    if (!model?.ziphius?.tools) return null;
    const field = area("tools", "Functions", settings.get("tools") ?? "", 5, '[{"name": "weather", "description": "…", "parameters": {…}}]');
    field.classList.add("mono");
    const note = el("small", { id: "note-tools" });
    field.setAttribute("aria-describedby", note.id);
    const check = () => {
      const before = settings.get("tools");
      settings.set("tools", field.value || undefined);
      try {
        const list = settings.tools();
        note.textContent = list ? `${count(list.length, "function")} offered to the model` : "A JSON list; the model may ask for them, you give the results";
        field.setAttribute("aria-invalid", "false");
      } catch (error) {
        settings.set("tools", before);
        note.textContent = `Not valid JSON: ${error.message}`;
        field.setAttribute("aria-invalid", "true");
      }
    };
    field.addEventListener("input", check);
    check();
    return section("Functions", field, note);
  }

  #look() {
    const { settings } = this.#app;
    const names = [[undefined, "System"], ["light", "Light"], ["dark", "Dark"]];
    const choice = el("div", { class: "segments", role: "group", "aria-label": "Theme" });
    const draw = () => choice.replaceChildren(...names.map(([value, label]) => el("button", {
      type: "button", text: label, "aria-pressed": String(settings.get("theme") === value),
      on: { click: () => {
        settings.set("theme", value);
        draw();
        choice.querySelector('[aria-pressed="true"]').focus();
      } },
    })));
    draw();
    return section("Look and keys", el("div", { class: "pair" }, el("span", { text: "Theme" }), choice), this.#tick("letters", "Single-letter shortcuts", true));
  }

  #tick(name, label, byDefault) {
    const { settings } = this.#app;
    const box = el("input", { type: "checkbox", checked: settings.get(name) ?? byDefault, on: { change: () => settings.set(name, box.checked) } });
    return el("label", { class: "tick" }, box, label);
  }

  #server() {
    const { settings, model } = this.#app;
    const key = el("input", { id: "set-key", class: "field", type: "password", autocomplete: "off", value: settings.key, placeholder: "none" });
    key.addEventListener("change", () => {
      settings.key = key.value.trim();
      this.#app.connect();
    });
    const facts = model ? [
      model.id,
      model.max_model_len ? `${count(model.max_model_len, "token")} of context` : null,
      model.ziphius?.speculation ? "drafts with its MTP module" : null,
    ].filter(Boolean).join(" · ") : "not reached yet";
    return section(
      "Server", el("p", { class: "fine facts", text: facts }),
      labelled(key, "API key", "Kept until this tab is closed"),
    );
  }

  #data(dialog) {
    const { store } = this.#app;
    return section(
      "Conversations",
      el(
        "div", { class: "deeds" },
        button("download", "Export all", () => download("ziphius-conversations.json", store.list()), { shown: true, kind: "plain" }),
        button("bin", "Delete all", (event) => this.#removeAll(event.currentTarget, dialog), { shown: true, kind: "plain" }),
      ),
    );
  }

  // The first press asks, the second deletes.
  #removeAll(pressed, dialog) {
    const words = pressed.querySelector("span");
    if (words.textContent === "Delete all") {
      words.textContent = "Really delete all?";
      pressed.classList.add("danger");
      return;
    }
    dialog.close();
    this.#app.removeAll();
  }
}

const section = (title, ...parts) => el("section", {}, el("h3", { text: title }), ...parts);

function labelled(field, label, hint) {
  const note = el("small", { id: `note-${field.id}`, text: hint });
  field.setAttribute("aria-describedby", note.id);
  return el("div", { class: "labelled" }, el("label", { htmlFor: field.id, text: label }), field, note);
}

function area(name, label, value, rows, placeholder) {
  return el("textarea", { id: `set-${name}`, class: "field", rows, value, placeholder, "aria-label": label, spellcheck: false });
}
