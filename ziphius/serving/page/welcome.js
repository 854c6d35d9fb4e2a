// What an empty conversation says, and what it offers to try.

import { el, icon } from "./dom.js";

const QUESTIONS = [
  ["Why is the sky dark at night?", "a paradox with a name"],
  ["Explain multi-head latent attention to a programmer.", "how this model reads"],
  ["Write a Python function that merges two sorted lists.", "code, highlighted"],
  ["How deep does a Cuvier's beaked whale dive?", "ask the namesake"],
];
const BEGINNINGS = [
  ["def fibonacci(n):\n", "a function"],
  ["class Stack:\n    def __init__(self):\n", "a class"],
  ["import os\n\n\ndef read_lines(path):\n    ", "a helper"],
  ["def test_sorted_is_stable():\n    ", "a test"],
];

/** The empty state of `mode` ("chat" or "document"); `use(text)` takes a sample. */
export function welcome(mode, model, use) {
  const samples = mode === "chat" ? QUESTIONS : BEGINNINGS;
  const base = model?.ziphius?.chat === false;
  const lead = {
    chat: base ? "This model only learned to go on with a text; as a talker it is a guesser." : "Ask anything. Nothing leaves this machine and its server.",
    document: "Write a beginning; the model goes on from there.",
  }[mode];
  const cards = samples.map(([text, note]) => el(
    "button", { type: "button", class: "sample", on: { click: () => use(text) } },
    el("span", { class: mode === "chat" ? "" : "mono", text: text.trimEnd().replace(/\n{2,}/g, "\n") }), el("small", { text: note }),
  ));
  return el(
    "section", { class: "welcome", "aria-label": "Welcome" },
    el("div", { class: "mark" }, icon("whale")),
    el("h1", { text: mode === "chat" ? "What shall we dive into?" : "Begin, and let it dive." }),
    el("p", { text: lead }),
    el("div", { class: "samples" }, ...cards),
  );
}
