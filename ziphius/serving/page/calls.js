// Functions the model asked for, and the results a person gives it.

import { button, el, icon } from "./dom.js";
import { codeBlock } from "./prose.js";

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    // Still streaming, or the model wrote something else: shown as it is.
    return text;
  }
}

/** Show `calls`; with `answerWith(results)`, a list of texts in the same order, results can be sent. */
export function callsView(calls, answerWith = null) {
  const boxes = [];
  const rows = calls.map((call) => {
    const box = el("textarea", { rows: 2, class: "field", placeholder: "What the function returns", "aria-label": `Result of ${call.name || "the call"}` });
    boxes.push(box);
    return el(
      "section", { class: "call", "aria-label": `Call of ${call.name}` },
      el("p", { class: "headline" }, icon("wrench"), "calls ", el("code", { text: call.name || "…" })),
      call.arguments ? codeBlock(pretty(call.arguments), "json") : null,
      answerWith ? box : null,
    );
  });
  const send = answerWith
    ? button("send", calls.length > 1 ? "Send results" : "Send result", () => answerWith(boxes.map((b) => b.value)), { shown: true, kind: "plain" })
    : null;
  return el("div", { class: "calls" }, ...rows, send);
}
