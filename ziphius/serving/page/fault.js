// What is shown where an answer did not end well, and what can be done about it.

import { button, el, icon } from "./dom.js";

const QUIET = {
  stopped: "Stopped.",
  interrupted: "The page was closed while this was being written.",
};

/**
 * What to say about `answer`: null, or {head, more, quiet, until, settings}.
 *
 * Before the moment `until` the server wants no further request; `settings` that those may help.
 */
export function trouble(answer) {
  if (QUIET[answer.state]) return { head: QUIET[answer.state], quiet: true };
  if (answer.state === "done" && answer.finish === "length") return { head: "The limit on tokens ended this answer.", quiet: true };
  const error = answer.error;
  if (!error) return null;
  if (error.kind === "network") return { head: "The server cannot be reached.", more: "Is “ziphius serve” still running?" };
  if (error.kind === "cut") return { head: error.message, more: "What came so far is kept." };
  if (error.status === 401 || error.status === 403) return { head: "The server asks for an API key.", more: error.message, settings: true };
  if (error.status === 429 || error.status === 503) return { head: "The server is busy.", more: error.message, until: error.until };
  if (error.kind === "stream") return { head: "The answer broke off.", more: error.message };
  return { head: error.status >= 500 ? "Something went wrong in the server." : "The server did not accept this.", more: error.message };
}

/** The element for `what`, a result of `trouble`; `act` has retry, goOn (or null) and settings. */
export function faultView(what, act) {
  const retry = button("again", "Try again", act.retry, { shown: true, kind: what.quiet ? "quiet small" : "plain" });
  if (what.until > Date.now()) countDown(retry, what.until);
  const deeds = [
    act.goOn ? button("goon", "Continue", act.goOn, { shown: true, kind: what.quiet ? "quiet small" : "plain" }) : null,
    what.quiet ? null : retry,
    what.settings ? button("sliders", "Open settings", act.settings, { shown: true, kind: "plain" }) : null,
  ];
  return el(
    "div", { class: what.quiet ? "fault mild" : "fault", role: what.quiet ? null : "alert" },
    what.quiet ? null : icon("warn"),
    el("div", {}, el("p", { class: "headline", text: what.head }), what.more ? el("p", { text: what.more }) : null),
    el("div", { class: "deeds" }, ...deeds),
  );
}

// The button counts the seconds the server asked for; asking earlier would only be refused again.
function countDown(retry, until) {
  const words = retry.querySelector("span");
  let shown = false;
  const tick = () => {
    const left = Math.max(0, Math.ceil((until - Date.now()) / 1000));
    retry.setAttribute("aria-disabled", String(left > 0));
    words.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left > 0 && (retry.isConnected || !shown)) setTimeout(tick, 250);
    shown ||= retry.isConnected;
  };
  const hold = (event) => {
    if (until > Date.now()) event.stopImmediatePropagation();
  };
  retry.addEventListener("click", hold, { capture: true });
  tick();
}
