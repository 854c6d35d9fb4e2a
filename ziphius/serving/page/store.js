// Conversations in the browser's storage: bounded, and never a reason to fail.

import { settle, slim } from "./conversation.js";

const PREFIX = "ziphius.talk.";
// Browsers keep about 5 million characters per origin; a part stays free for the settings.
const CHARACTERS = 3_500_000;
const CONVERSATIONS = 300;

/** Read a value from `storage` ("localStorage" or "sessionStorage"); null if it cannot be had. */
export function recall(storage, key) {
  try {
    return window[storage].getItem(key);
  } catch {
    return null;
  }
}

/** Keep a value (null removes it). False where storage is off or full. */
export function keep(storage, key, value) {
  try {
    if (value === null) window[storage].removeItem(key);
    else window[storage].setItem(key, value);
    return true;
  } catch {
    return false;
  }
}

/** All conversations of this browser: in memory, mirrored in localStorage as far as it goes. */
export class Store {
  #all = new Map();
  #sizes = new Map();
  #warn;

  /** `warn(text)` is called, once, when something could not be kept. */
  constructor(warn) {
    this.#warn = warn;
    for (const key of storedKeys()) this.#read(key);
  }

  /** Newest first. */
  list() {
    return [...this.#all.values()].sort((a, b) => b.changed - a.changed);
  }

  get(id) {
    return this.#all.get(id);
  }

  /** Keep `conversation` as it is now, making room among the oldest if needed. */
  save(conversation) {
    const { id } = conversation;
    this.#all.set(id, conversation);
    let text = JSON.stringify(conversation);
    if (text.length > CHARACTERS / 2) text = JSON.stringify(slimmed(conversation));
    this.#sizes.set(id, text.length);
    this.#makeRoom(id, (total) => total > CHARACTERS || this.#all.size > CONVERSATIONS);
    if (keep("localStorage", PREFIX + id, text)) return;
    this.#makeRoom(id, () => !keep("localStorage", PREFIX + id, text));
    if (recall("localStorage", PREFIX + id) !== text) {
      this.#sizes.delete(id);
      this.#complain("This browser's storage is full or off: conversations last until the page is closed.");
    }
  }

  remove(id) {
    this.#all.delete(id);
    this.#sizes.delete(id);
    keep("localStorage", PREFIX + id, null);
  }

  /** Take over what another tab wrote. Returns the id, or null where the event is not ours. */
  follow(event, busy) {
    if (!event.key?.startsWith(PREFIX)) return null;
    const id = event.key.slice(PREFIX.length);
    if (busy(id)) return null;
    if (event.newValue === null) {
      this.#all.delete(id);
      this.#sizes.delete(id);
    } else this.#read(event.key, false);
    return id;
  }

  #read(key, alone = true) {
    try {
      const text = recall("localStorage", key);
      const conversation = JSON.parse(text);
      if (conversation?.version !== 1 || key !== PREFIX + conversation.id) return;
      this.#all.set(conversation.id, alone ? settle(conversation) : conversation);
      this.#sizes.set(conversation.id, text.length);
    } catch {
      // Not ours or damaged: left where it is, and not shown.
    }
  }

  // First the probabilities of old conversations go, then old conversations, until `tight` is false.
  #makeRoom(spared, tight) {
    const total = () => [...this.#sizes.values()].reduce((sum, n) => sum + n, 0);
    const oldest = this.list().reverse().filter((c) => c.id !== spared);
    for (const conversation of oldest) {
      if (!tight(total())) return;
      if (!slim(conversation)) continue;
      const text = JSON.stringify(conversation);
      if (keep("localStorage", PREFIX + conversation.id, text)) this.#sizes.set(conversation.id, text.length);
    }
    for (const conversation of oldest) {
      if (!tight(total())) return;
      this.remove(conversation.id);
      this.#complain("The oldest conversations made room for new ones: this browser keeps a bounded number.");
    }
  }

  #complain(text) {
    this.#warn?.(text);
    this.#warn = null;
  }
}

function slimmed(conversation) {
  const own = structuredClone(conversation);
  slim(own);
  return own;
}

function storedKeys() {
  try {
    return Object.keys(window.localStorage).filter((key) => key.startsWith(PREFIX));
  } catch {
    return [];
  }
}
