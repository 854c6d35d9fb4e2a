// One message on the page: a question, a function's result, or an answer as it grows.

import { speed } from "./answer.js";
import { callsView } from "./calls.js";
import { button, copyButton, el, icon } from "./dom.js";
import { faultView, trouble } from "./fault.js";
import { count, percent, rate, seconds } from "./numbers.js";
import { showProse } from "./prose.js";
import { showTokens, tokenBox } from "./tokens.js";

/**
 * What a message can do; every view gets one:
 * edit(text), again(), retry(), goOn() or null, results(list), show(step), settings().
 * `context()` says {versions, place, last, busy, probabilities}.
 */
export function messageView(node, act, context) {
  return node.role === "assistant" ? new Answer(node, act, context) : new Said(node, act, context);
}

function switcher(context, act) {
  const { versions, place, busy } = context();
  if (versions < 2) return null;
  const step = (name, label, by, off) => button(name, label, () => act.show(by), { disabled: off || busy, kind: "quiet small" });
  return el(
    "span", { class: "switcher" },
    step("left", "Earlier version", -1, place === 0),
    el("span", { text: `${place + 1} / ${versions}`, "aria-label": `Version ${place + 1} of ${versions}` }),
    step("right", "Later version", 1, place === versions - 1),
  );
}

/** What a person said, or what a function returned. */
class Said {
  constructor(node, act, context) {
    Object.assign(this, { node, act, context });
    this.root = el("article", { class: `message ${node.role}`, "aria-label": node.role === "tool" ? "Result of a function" : "You" });
    this.update();
  }

  update() {
    if (this.editing) return;
    const { node } = this;
    const body = el("div", { class: "bubble", text: node.content });
    const edit = node.role === "user" && !this.context().busy
      ? button("pencil", "Edit and ask again", () => this.edit(), { kind: "quiet small" }) : null;
    const copy = copyButton("Copy message", () => node.content, { kind: "quiet small" });
    this.root.replaceChildren(body, el("footer", { class: "actions" }, switcher(this.context, this.act), copy, edit));
  }

  /** Turn the message into a field; Enter asks again, Escape leaves everything as it was. */
  edit() {
    this.editing = true;
    const field = el("textarea", { class: "field", value: this.node.content, "aria-label": "Edit your message" });
    const fit = () => {
      field.style.height = "auto";
      field.style.height = `${field.scrollHeight + 2}px`;
    };
    const done = (send) => {
      this.editing = false;
      const text = field.value.trim();
      if (send && text) this.act.edit(text);
      else {
        this.update();
        this.root.querySelector("button")?.focus();
      }
    };
    field.addEventListener("input", fit);
    field.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") done(false);
      else if (event.key === "Enter" && !event.shiftKey) done(true);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.root.replaceChildren(
      el("div", { class: "editor" }, field, el(
        "div", { class: "deeds" },
        button(null, "Cancel", () => done(false), { shown: true }),
        button(null, "Ask again", () => done(true), { shown: true, kind: "primary" }),
      )),
    );
    fit();
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}

/** What the model said. */
class Answer {
  constructor(node, act, context) {
    Object.assign(this, { node, act, context });
    this.summary = el("span");
    this.thoughts = el("div", { class: "thoughts" });
    this.thinking = el("details", { class: "thinking" }, el("summary", {}, icon("ripple"), this.summary, icon("chevron")), this.thoughts);
    this.thinking.addEventListener("toggle", () => this.drawThinking());
    this.body = el("div", { class: "body" });
    this.calls = el("div");
    this.end = el("div");
    this.root = el("article", { class: "message assistant", "aria-label": "Answer" }, this.thinking, this.body, this.calls, this.end);
    this.update();
  }

  /** Bring the page up to date with the answer; cheap enough for every frame. */
  update() {
    const { answer } = this.node;
    const running = answer.state === "running";
    this.root.classList.toggle("running", running);
    this.root.setAttribute("aria-busy", String(running));
    this.drawThinking();
    const waiting = running && !answer.content && !answer.reasoning && !answer.calls.length;
    if (waiting) this.body.replaceChildren(el("span", { class: "sonar", role: "img", "aria-label": "Waiting for the first token" }));
    else {
      this.body.querySelector(".sonar")?.remove();
      this.drawText(this.body, "content", answer.content, "Answer");
    }
    this.drawCalls(running);
    this.drawEnd(running);
  }

  drawThinking() {
    const { answer } = this.node;
    this.thinking.hidden = !answer.reasoning;
    if (!answer.reasoning) return;
    const { thinking, thought } = answer.times;
    const still = answer.state === "running" && !answer.content && !answer.calls.length;
    const lasted = thought === undefined ? "" : seconds(thought - thinking);
    this.summary.textContent = still ? `Thinking · ${lasted}` : lasted ? `Thought for ${lasted}` : "Thoughts";
    this.thinking.classList.toggle("still", still);
    if (this.thinking.open) this.drawText(this.thoughts, "reasoning", answer.reasoning, "Thoughts");
  }

  // As prose, or token by token where that is wanted and known.
  drawText(box, part, text, label) {
    const tokens = this.node.answer.tokens[part];
    const kind = this.context().probabilities && tokens.length ? "tokens" : "prose";
    if (!text && kind === "prose" && !box.firstChild) return;
    if (box.firstElementChild?.dataset.kind !== kind) {
      const inner = kind === "tokens" ? tokenBox(label) : el("div", { class: "prose" });
      inner.dataset.kind = kind;
      box.replaceChildren(inner);
    }
    if (kind === "tokens") showTokens(box.firstElementChild, tokens);
    else showProse(box.firstElementChild, text);
  }

  drawCalls(running) {
    const { calls } = this.node.answer;
    const usable = !running && this.context().last && calls.length > 0;
    const key = JSON.stringify([calls, usable]);
    if (this.callsKey === key) return;
    this.callsKey = key;
    this.calls.replaceChildren(...(calls.length ? [callsView(calls, usable ? this.act.results : null)] : []));
  }

  drawEnd(running) {
    const { answer } = this.node;
    if (running) {
      this.endKey = null;
      this.end.replaceChildren(el("footer", { class: "actions live" }, el("span", { class: "stats", text: stats(answer, true) })));
      return;
    }
    const { versions, place, busy, last } = this.context();
    const key = JSON.stringify([answer.state, answer.finish, answer.error, versions, place, busy, last]);
    if (this.endKey === key) return;
    this.endKey = key;
    const what = trouble(answer);
    const goOn = last && !busy && answer.content && !answer.calls.length ? this.act.goOn : null;
    this.end.replaceChildren(
      ...(what ? [faultView(what, { ...this.act, goOn })] : []),
      el(
        "footer", { class: "actions" },
        switcher(this.context, this.act),
        answer.content ? copyButton("Copy answer", () => answer.content, { kind: "quiet small" }) : null,
        busy || (what && !what.quiet) ? null : button("again", "Answer again", this.act.again, { kind: "quiet small" }),
        el("span", { class: "stats", text: stats(answer, false) }),
      ),
    );
  }
}

/** Speed in words: "142 tokens · 38 tokens/s · first after 0.21 s · 71 % of drafts accepted". */
export function stats(answer, running) {
  const { tokens, perSecond, first, accepted, cached, prompt } = speed(answer);
  if (first === null) return "";
  const parts = [count(tokens, "token")];
  if (perSecond !== null) parts.push(`${rate(perSecond)} tokens/s`);
  if (!running) parts.push(`first after ${seconds(first)}`);
  if (accepted !== null) parts.push(`${percent(Math.log(accepted))} of drafts accepted`);
  if (cached > 0) parts.push(`${percent(Math.log(cached / prompt))} of the prompt from cache`);
  return parts.join(" · ");
}
