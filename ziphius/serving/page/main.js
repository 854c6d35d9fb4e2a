// The page: what is open, and how the parts reach each other.

import { model } from "./api.js";
import { Card, watchTokens } from "./card.js";
import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { create, isEmpty } from "./conversation.js";
import { Document } from "./document.js";
import { button, download, el, icon } from "./dom.js";
import { Follow } from "./follow.js";
import { listen, showKeys } from "./keys.js";
import { Notices } from "./notice.js";
import { Runs } from "./run.js";
import { Settings } from "./settings.js";
import { Sheet } from "./sheet.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";

const $ = (selector) => document.querySelector(selector);
const RETRY = 4000;
const narrow = matchMedia("(max-width: 760px)");

class Page {
  constructor() {
    this.model = null;
    this.settings = new Settings();
    this.notices = new Notices();
    this.store = new Store((text) => this.notices.show(text));
    this.runs = new Runs((id) => this.#runChanged(id));
    this.card = new Card();
    this.follow = new Follow($("#scroll"), $("#latest"));
    this.sheet = new Sheet(this);
    this.current = this.#fromAddress() ?? create(this.settings.get("mode") ?? "chat", this.settings.get("system"));
    this.thread = el("div", { class: "thread" });
    this.chat = new Chat(this, this.thread);
    this.document = new Document(this);
    this.composer = new Composer(this, {
      onSend: (text) => this.chat.send(text), onStop: () => this.stop(), onEditLast: () => this.chat.editLast(),
    });
    this.sidebar = new Sidebar(this, {
      open: (id) => this.open(this.store.get(id)),
      export: (talk) => download(`ziphius-${talk.id}.json`, talk),
      remove: (talk) => this.remove(talk),
    });
    this.#bar();
    this.#wire();
    this.render();
    this.connect();
    this.focusField();
  }

  /** Whether the next answer should think first. */
  thinks() {
    return this.settings.get("thinking") ?? this.model?.ziphius?.defaults?.thinking ?? false;
  }

  think(on) {
    this.settings.set("thinking", on);
  }

  stop() {
    this.runs.stop(this.current.id);
  }

  /** Learn what the server serves; tries again until it answers. */
  async connect() {
    clearTimeout(this.again);
    try {
      this.model = await model(this.settings.key);
      $("#banner").hidden = true;
    } catch (error) {
      this.#offline(error);
      return;
    }
    // A model that cannot talk is met as a document, unless a conversation was opened on purpose.
    const natural = this.model.ziphius?.chat === false ? "document" : "chat";
    const mode = this.settings.get("mode") ?? natural;
    if (isEmpty(this.current) && this.current.kind !== mode) this.current = create(mode, this.settings.get("system"));
    this.render();
    this.focusField();
  }

  #offline(error) {
    const banner = $("#banner");
    const locked = error.status === 401 || error.status === 403;
    banner.replaceChildren(
      icon("warn"), el("span", { text: locked ? "The server asks for an API key." : `${error.message} Trying again…` }),
      locked ? button(null, "Enter it", () => this.sheet.open(), { shown: true, kind: "plain" }) : "",
    );
    banner.hidden = false;
    if (!locked) this.again = setTimeout(() => this.connect(), RETRY);
  }

  /** Show `talk`. */
  open(talk) {
    this.card.hide();
    this.current = talk;
    if (narrow.matches) this.#drawer(false);
    history.replaceState(null, "", isEmpty(talk) ? location.pathname + location.search : `#${talk.id}`);
    this.chat.reset();
    this.render();
    if (isEmpty(talk)) this.follow.toStart();
    else this.follow.toEnd();
    this.focusField();
  }

  /** Begin a new conversation of `kind`, by default of the kind that is open. */
  begin(kind = this.current.kind) {
    this.open(create(kind, this.settings.get("system")));
  }

  /** Delete `talk`; for some seconds it can be had back. */
  remove(talk) {
    this.runs.stop(talk.id);
    this.store.remove(talk.id);
    if (talk.id === this.current.id) this.begin();
    this.sidebar.update();
    this.notices.show("Conversation deleted.", { label: "Undo", run: () => {
      this.store.save(talk);
      this.open(talk);
    } });
  }

  removeAll() {
    for (const talk of this.store.list()) {
      this.runs.stop(talk.id);
      this.store.remove(talk.id);
    }
    this.begin();
  }

  /** Bring everything up to date. */
  render() {
    const chat = this.current.kind === "chat";
    const view = chat ? this.thread : this.document.root;
    if ($("#content").firstChild !== view) $("#content").replaceChildren(view);
    const dock = chat ? this.composer.root : this.document.dock;
    if ($("#dock").firstChild !== dock) $("#dock").replaceChildren(dock);
    if (chat) this.chat.render();
    else this.document.render();
    this.composer.update();
    this.composer.fit();
    this.sidebar.update();
    this.#state();
  }

  #runChanged(id) {
    const talk = this.store.get(id);
    if (id !== this.current.id) {
      this.sidebar.update();
      return;
    }
    if (talk && !isEmpty(talk)) history.replaceState(null, "", `#${id}`);
    this.render();
  }

  #fromAddress() {
    const talk = this.store.get(location.hash.slice(1));
    return talk && !isEmpty(talk) ? talk : null;
  }

  focusField() {
    // On a phone the keyboard would cover the page before anything was read.
    if (matchMedia("(pointer: coarse)").matches || document.querySelector("dialog[open]")) return;
    (this.current.kind === "chat" ? this.composer.field : this.document.field).focus({ preventScroll: true });
  }

  #bar() {
    const mode = (kind, label) => el("button", { type: "button", data: { mode: kind }, text: label, on: { click: () => {
      this.settings.set("mode", kind);
      if (this.current.kind !== kind) this.begin(kind);
    } } });
    $("#bar").append(
      button("menu", "Conversations", () => this.#drawer(), { id: "menu" }),
      el("div", { class: "segments", role: "group", "aria-label": "Mode" }, mode("chat", "Chat"), mode("document", "Complete")),
      el("span", { id: "model" }),
      button("bars", "Probabilities", () => this.#toggleProbabilities(), { shown: true, id: "probabilities", title: "Tint tokens by how sure the model was (P)" }),
      button("sliders", "Settings", () => this.sheet.open(), { id: "settings" }),
    );
    $("#foot").append(
      button("moon", "Light or dark", () => this.#toggleTheme(), { id: "theme" }),
      button("keys", "Shortcuts", showKeys, { id: "help", title: "Shortcuts (?)" }),
      el("a", { class: "button quiet", href: "docs", text: "API", title: "The server's routes" }),
    );
    $("#new").addEventListener("click", () => this.begin());
    $(".skip").addEventListener("click", (event) => {
      event.preventDefault();
      $("#dock textarea, #dock button").focus();
    });
    $("#veil").addEventListener("click", () => this.#drawer(false));
  }

  #toggleProbabilities() {
    this.settings.set("probabilities", !this.settings.get("probabilities") || undefined);
    this.notices.say(this.settings.get("probabilities") ? "Token probabilities shown" : "Token probabilities hidden");
  }

  #toggleTheme() {
    this.settings.set("theme", this.#dark() ? "light" : "dark");
  }

  #dark() {
    const chosen = this.settings.get("theme");
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }

  #state() {
    for (const part of document.querySelectorAll("[data-mode]")) part.setAttribute("aria-pressed", String(part.dataset.mode === this.current.kind));
    const name = this.model?.id?.split("/").at(-1) ?? "";
    Object.assign($("#model"), { textContent: name, title: this.model?.id ?? "" });
    $("#probabilities").setAttribute("aria-pressed", String(Boolean(this.settings.get("probabilities"))));
    const theme = this.settings.get("theme");
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    $("#theme").replaceChildren(icon(this.#dark() ? "sun" : "moon"));
    document.title = this.current.title ? `${this.current.title} – Ziphius` : "Ziphius";
  }

  #wire() {
    watchTokens(this.thread, this.card);
    this.settings.onChange((name) => {
      if (["probabilities", "theme", "thinking"].includes(name)) this.render();
    });
    listen({
      escape: () => this.#escape(),
      n: () => this.begin(), "/": () => this.focusField(), p: () => this.#toggleProbabilities(),
      s: () => this.sheet.open(), "?": showKeys, l: () => this.#toList(),
      r: () => (this.current.kind === "chat" ? this.chat.againLast() : this.document.again()),
    }, this.settings);
    // A page that is not seen may be ended without another word, on a phone above all.
    const keepAll = () => {
      for (const talk of this.store.list()) if (this.runs.has(talk.id)) this.store.save(talk);
    };
    // The browser ends requests before it hides the page. A visitor who stays after all is no leaver.
    addEventListener("beforeunload", () => {
      this.runs.leaving = true;
      setTimeout(() => (this.runs.leaving = false), 1000);
    });
    addEventListener("pageshow", () => (this.runs.leaving = false));
    document.addEventListener("visibilitychange", () => document.hidden && keepAll());
    addEventListener("storage", (event) => this.#elsewhere(event));
    addEventListener("hashchange", () => {
      const talk = this.#fromAddress();
      if (talk && talk !== this.current) this.open(talk);
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#state());
    narrow.addEventListener("change", () => this.#resized());
    this.#resized();
  }

  // Another tab changed a conversation.
  #elsewhere(event) {
    const id = this.store.follow(event, (talk) => this.runs.has(talk));
    if (!id) return;
    if (id === this.current.id && this.store.get(id)) {
      this.current = this.store.get(id);
      this.chat.reset();
      this.render();
    } else this.sidebar.update();
  }

  #escape() {
    if (this.card.open) {
      this.card.hide();
      return true;
    }
    if (document.body.classList.contains("drawer")) {
      this.#drawer(false);
      $("#menu").focus();
      return true;
    }
    if (!this.runs.has(this.current.id)) return false;
    this.stop();
    return true;
  }

  #toList() {
    this.#drawer(true);
    ($("#talks .open") ?? $("#new")).focus();
  }

  // On a narrow window the list is a drawer, closed at first; on a wide one it can be folded away.
  #drawer(to) {
    const { classList } = document.body;
    const on = narrow.matches ? classList.toggle("drawer", to) : !classList.toggle("folded", to === undefined ? to : !to);
    $("#menu").setAttribute("aria-expanded", String(on));
    $("#side").inert = !on;
    if (narrow.matches && on) $("#new").focus();
  }

  #resized() {
    document.body.classList.remove("drawer", "folded");
    this.#drawer(!narrow.matches);
  }
}

new Page();
