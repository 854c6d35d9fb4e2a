// A document that the model goes on with. The field holds the text; a mirror underneath, with the
// same measures, shows who wrote what and how sure the model was.

import { speed, tick } from "./answer.js";
import { newId, titleOf } from "./conversation.js";
import { batched, button, copyButton, el } from "./dom.js";
import { faultView, trouble } from "./fault.js";
import { stats } from "./message.js";
import { edit, ofChunk, textOf, without } from "./pieces.js";
import { doubt, tokenSpan } from "./tokens.js";
import { welcome } from "./welcome.js";

const SAVE_EVERY = 2000;
const LENGTH = 256;
const UNDO = 50;

export class Document {
  #app;
  #shown = [];
  #undo = new Map();
  #draw;

  constructor(app) {
    this.#app = app;
    this.field = el("textarea", {
      class: "paper", "aria-label": "Document", placeholder: "Write a beginning…", spellcheck: false, autocomplete: "off",
      autocapitalize: "off",
    });
    this.mirror = el("div", { class: "mirror", "aria-hidden": "true" });
    this.start = el("div");
    this.root = el("div", { class: "document" }, this.start, el("div", { class: "sheet" }, this.mirror, this.field));
    this.status = el("div", { class: "stats" });
    this.fault = el("div");
    this.bar = el("div", { class: "toolbar" });
    this.dock = el("div", { class: "composer tools" }, this.fault, this.bar);
    this.#draw = batched(() => {
      this.#drawText();
      this.status.textContent = this.#stats();
      app.follow.grown();
    });
    this.#listen();
  }

  get conversation() {
    return this.#app.current;
  }

  #listen() {
    const { field } = this;
    field.addEventListener("input", () => {
      this.#app.card.hide();
      this.conversation.pieces = edit(this.conversation.pieces, field.value);
      this.#touched();
      this.#drawText();
      this.#drawTools();
      this.#welcome();
    });
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
        event.preventDefault();
        this.goOn();
      } else if (event.altKey && /^Digit[1-9]$/.test(event.code) && this.#app.card.open) {
        event.preventDefault();
        this.#app.card.pick(Number(event.code.at(-1)));
      }
    });
    field.addEventListener("pointermove", (event) => event.pointerType !== "touch" && this.#point(event));
    field.addEventListener("pointerleave", () => this.#app.card.hideSoon());
    field.addEventListener("click", (event) => this.#point(event));
    // The caret points too, so that the keyboard reaches the card.
    field.addEventListener("keyup", (event) => event.key.startsWith("Arrow") && this.#pointAtCaret());
  }

  /** Show the document that is open. */
  render() {
    const { pieces } = this.conversation;
    this.#shown = [];
    this.mirror.replaceChildren();
    this.mirror.classList.toggle("probable", Boolean(this.#app.settings.get("probabilities")));
    this.field.readOnly = this.#busy;
    if (this.field.value !== textOf(pieces)) this.field.value = textOf(pieces);
    this.#drawText();
    this.#drawTools();
    this.#welcome();
    this.#app.follow.grown();
  }

  get #busy() {
    return this.#app.runs.has(this.conversation.id);
  }

  #welcome() {
    const empty = !this.conversation.pieces.length && !this.#busy;
    if (empty === Boolean(this.start.firstChild)) return;
    this.start.replaceChildren(...(empty ? [welcome("document", this.#app.model, (text) => this.#use(text))] : []));
    this.root.classList.toggle("empty", empty);
  }

  #use(text) {
    this.#replace(edit(this.conversation.pieces, text));
    this.goOn(false);
  }

  #replace(pieces) {
    const stack = this.#undo.get(this.conversation.id) ?? [];
    this.#undo.set(this.conversation.id, [...stack, this.conversation.pieces].slice(-UNDO));
    this.conversation.pieces = pieces;
    this.#touched();
    this.render();
  }

  #touched() {
    const { conversation } = this;
    conversation.title = titleOf(textOf(conversation.pieces.slice(0, 40)).trimStart());
    conversation.changed = Date.now();
    clearTimeout(this.saving);
    this.saving = setTimeout(() => {
      if (conversation.pieces.length || this.#app.store.get(conversation.id)) this.#app.store.save(conversation);
      this.#app.sidebar.update();
    }, 400);
  }

  #drawText() {
    const { pieces } = this.conversation;
    let same = 0;
    while (same < this.#shown.length && same < pieces.length && this.#shown[same] === pieces[same]) same += 1;
    while (this.mirror.children.length > same) this.mirror.lastElementChild.remove();
    this.mirror.append(...pieces.slice(same).map(pieceSpan));
    // The field's own last line break needs a line of its own in the mirror too.
    this.mirror.append(el("span", { text: "\u200b" }));
    if (this.#shown.length !== pieces.length || same < pieces.length) {
      const text = textOf(pieces);
      if (this.field.value !== text) this.field.value = text;
    }
    this.#shown = pieces.slice();
  }

  // The field lies above the mirror: what is under the pointer is looked for through it.
  #point(event) {
    const { card, settings } = this.#app;
    if (!settings.get("probabilities")) return;
    const span = document.elementsFromPoint(event.clientX, event.clientY).find((e) => e.token && this.mirror.contains(e));
    if (span) card.show(span, { x: event.clientX, y: event.clientY, pick: this.#busy ? null : (text) => this.#pick(span, text) });
    else card.hideSoon();
  }

  #pointAtCaret() {
    if (!this.#app.settings.get("probabilities")) return;
    let at = 0;
    const caret = this.field.selectionStart;
    const span = [...this.mirror.children].find((child) => {
      at += child.textContent.length;
      return at > caret;
    });
    if (span?.token) this.#app.card.show(span, { pick: this.#busy ? null : (text) => this.#pick(span, text) });
    else this.#app.card.hide();
  }

  // Another token in its place, and on from there.
  #pick(span, text) {
    const at = [...this.mirror.children].indexOf(span);
    const old = this.conversation.pieces[at];
    const chosen = old.token[2].find(([t]) => t === text);
    this.#app.card.hide();
    this.#replace([
      ...this.conversation.pieces.slice(0, at),
      { text, by: "model", run: old.run, token: [text, chosen[1], old.token[2]] },
    ]);
    this.goOn(false);
  }

  #drawTools() {
    const { pieces, last } = this.conversation;
    const busy = this.#busy;
    const undo = (this.#undo.get(this.conversation.id) ?? []).length > 0;
    const key = JSON.stringify([this.conversation.id, busy, pieces.length > 0, undo, last?.state, last?.run, Boolean(last && without(pieces, last.run)), this.#app.model?.id]);
    this.status.textContent = this.#stats();
    if (key === this.toolsKey) return;
    this.toolsKey = key;
    const again = !busy && last && without(pieces, last.run);
    this.bar.replaceChildren(
      ...[
        busy
          ? button("stop", "Stop", () => this.#app.stop(), { shown: true, kind: "primary", title: "Esc" })
          : button("goon", "Go on", () => this.goOn(), { shown: true, kind: "primary", title: "Ctrl+Enter", disabled: !this.#app.model }),
        again ? button("again", "Again", () => this.again(), { shown: true, title: "Take the last continuation back and write another" }) : null,
        undo && !busy ? button("undo", "Undo", () => this.undo(), { shown: true }) : null,
        pieces.length && !busy ? copyButton("Copy", () => textOf(this.conversation.pieces), { shown: true }) : null,
        this.status,
      ].filter(Boolean),
    );
    const what = !busy && last ? trouble(last) : null;
    const act = { retry: () => this.goOn(), goOn: null, settings: () => this.#app.sheet.open() };
    this.fault.replaceChildren(...(what && !what.quiet ? [faultView(what, act)] : []));
  }

  #stats() {
    const { last } = this.conversation;
    if (!last || speed(last).first === null) return this.#busy ? "Waiting for the first token…" : "Ctrl+Enter goes on";
    const note = { stopped: "stopped · ", interrupted: "interrupted · ", cut: "cut off · " }[last.state] ?? "";
    return note + stats(last, this.#busy);
  }

  undo() {
    const stack = this.#undo.get(this.conversation.id) ?? [];
    if (!stack.length || this.#busy) return;
    this.conversation.pieces = stack.pop();
    this.#touched();
    this.render();
  }

  /** Another continuation in place of the last one. */
  again() {
    const pieces = without(this.conversation.pieces, this.conversation.last?.run);
    if (!pieces || this.#busy) return;
    this.#replace(pieces);
    this.goOn(false);
  }

  /** Have the model go on at the end; `undoable` false where the step before can already be undone. */
  goOn(undoable = true) {
    const { conversation } = this;
    const app = this.#app;
    if (this.#busy || !app.model) return;
    if (undoable) this.#replace(conversation.pieces.slice());
    const last = { run: newId(), state: "running", finish: null, error: null, usage: null, count: 0, head: 0, times: {} };
    conversation.last = last;
    app.store.save(conversation);
    const { defaults } = app.model.ziphius ?? {};
    const body = {
      model: app.model.id, prompt: textOf(conversation.pieces), stream: true, stream_options: { include_usage: true },
      logprobs: 5, max_tokens: defaults?.max_tokens ?? LENGTH, ...app.settings.sampling(),
    };
    let saved = 0;
    app.follow.toEnd();
    app.runs.start(conversation.id, {
      path: "completions", body, key: app.settings.key,
      onChunk: (chunk, now) => {
        this.#take(conversation, last, chunk, now);
        if (now - saved > SAVE_EVERY) {
          saved = now;
          app.store.save(conversation);
        }
        if (conversation === this.conversation) this.#draw();
      },
      onEnd: (state, error) => {
        Object.assign(last, { state, error: error && { ...error, until: error.wait ? Date.now() + 1000 * error.wait : null } });
        conversation.changed = Date.now();
        if (app.store.get(conversation.id)) app.store.save(conversation);
        app.notices.say(state === "done" ? "The model paused." : "The continuation stopped.");
      },
    });
  }

  #take(conversation, last, chunk, now) {
    if (chunk.usage) last.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const pieces = ofChunk(choice, last.run);
    if (pieces.length) tick(last, choice.logprobs?.tokens?.length || 1, now);
    conversation.pieces.push(...pieces);
    if (choice.finish_reason) last.finish = choice.finish_reason;
  }
}

function pieceSpan(piece) {
  if (!piece.token) return el("span", { class: piece.by, text: piece.text });
  const span = tokenSpan(piece.token, piece.text);
  span.classList.add("model", `doubt-${doubt(piece.token[1])}`);
  span.removeAttribute("tabindex");
  return span;
}
