// Requests that are under way. One conversation has one at most.

import { ApiError, stream } from "./api.js";

/** All requests under way, by the id of their conversation. */
export class Runs {
  #running = new Map();
  #changed;
  #leaving = false;

  /** `changed(id)` is called when a request of conversation `id` begins or ends. */
  constructor(changed) {
    this.#changed = changed;
  }

  has(id) {
    return this.#running.has(id);
  }

  /** Say whether the page is going away: requests that end meanwhile were interrupted, not broken. */
  set leaving(yes) {
    this.#leaving = yes;
  }

  /** Abort the request of `id`; the server stops computing when the connection closes. */
  stop(id) {
    this.#running.get(id)?.abort();
  }

  /**
   * Stream an answer. `onChunk(chunk, now)` gets each piece with the milliseconds since the request
   * was sent; `onEnd(state, error)` gets "done", "stopped", "interrupted", "cut" or "failed", once.
   */
  async start(id, { path, body, key, onChunk, onEnd }) {
    this.stop(id);
    const control = new AbortController();
    this.#running.set(id, control);
    this.#changed(id);
    const sent = performance.now();
    let state = "done";
    let problem = null;
    try {
      for await (const chunk of stream(path, body, { key, signal: control.signal })) {
        onChunk(chunk, performance.now() - sent);
      }
    } catch (error) {
      if (control.signal.aborted) state = "stopped";
      else if (this.#leaving) state = "interrupted";
      else {
        const known = error instanceof ApiError ? error : new ApiError(`The page stumbled: ${error.message}`);
        state = known.kind === "cut" ? "cut" : "failed";
        problem = known.plain();
      }
    }
    if (this.#running.get(id) === control) this.#running.delete(id);
    onEnd(state, problem);
    this.#changed(id);
  }
}
