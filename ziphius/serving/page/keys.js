// Shortcuts, and the list of them.

import { button, el } from "./dom.js";

const LIST = [
  ["Enter", "Send"],
  ["Shift + Enter", "New line"],
  ["Ctrl + Enter", "Go on with the document"],
  ["Alt + 1", "Take the first alternative at the caret, 2 the second…"],
  ["Esc", "Stop the answer; leave the field"],
  ["↑", "Edit the last message (empty field)"],
  ["N", "New conversation"],
  ["/", "Write"],
  ["R", "Answer again"],
  ["P", "Token probabilities"],
  ["S", "Settings"],
  ["L", "List of conversations"],
  ["?", "This list"],
];

const typing = (node) => node?.matches?.("input, textarea, select, [contenteditable]");

/**
 * Listen for shortcuts; `acts` has a function for each letter of the list and `escape()`, which says
 * whether it did something. Single letters count only outside fields, and not where they are off.
 */
export function listen(acts, settings) {
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") {
      if (acts.escape()) event.preventDefault();
      else if (typing(event.target)) document.querySelector("#scroll").focus();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
    if (settings.get("letters") === false) return;
    const act = acts[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (act) {
      event.preventDefault();
      act();
    }
  });
}

/** Open the list of shortcuts. */
export function showKeys() {
  const dialog = el("dialog", { class: "small", "aria-labelledby": "keys-title" });
  const rows = LIST.flatMap(([keys, what]) => [
    el("dt", {}, ...keys.split(" + ").flatMap((k, i) => (i ? [" + ", el("kbd", { text: k })] : [el("kbd", { text: k })]))),
    el("dd", { text: what }),
  ]);
  dialog.append(
    el("header", {}, el("h2", { id: "keys-title", text: "Shortcuts" }), button("close", "Close", () => dialog.close())),
    el("dl", { class: "keys" }, ...rows),
    el("p", { class: "fine", text: "Single letters work outside the text fields: Esc leaves a field. With probabilities shown, arrow keys walk from token to token." }),
  );
  open(dialog);
}

/** Show a dialog that is removed when it closes; a click beside it closes it. */
export function open(dialog) {
  document.body.append(dialog);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("pointerdown", (event) => event.target === dialog && dialog.close());
  dialog.showModal();
}
