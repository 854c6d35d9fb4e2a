// Talking to the server the page came from; nobody else is ever contacted.

import { events } from "./sse.js";

/** What went wrong, in a form that can be shown and kept: `plain()` survives JSON. */
export class ApiError extends Error {
  constructor(message, { kind = "http", status = null, type = null, code = null, wait = null } = {}) {
    super(message);
    Object.assign(this, { kind, status, type, code, wait });
  }

  /** `kind`: http, network, stream (the server said so mid-answer) or cut; `wait`: seconds or null. */
  plain() {
    const { message, kind, status, type, code, wait } = this;
    return { message, kind, status, type, code, wait };
  }
}

const address = (path) => new URL(`v1/${path}`, document.baseURI);

function headers(key) {
  const own = { "Content-Type": "application/json" };
  if (key) own.Authorization = `Bearer ${key}`;
  return own;
}

/** The first model of the server. Throws ApiError. */
export async function model(key) {
  const response = await reach(address("models"), { headers: headers(key) });
  if (!response.ok) throw await refusal(response);
  const body = await response.json().catch(() => null);
  const first = body?.data?.[0];
  if (!first?.id) throw new ApiError("The server names no model.");
  return first;
}

/**
 * Post `body` to `path` and yield every chunk of the streamed answer, up to `[DONE]`.
 *
 * Throws ApiError; an abort by `signal` throws the browser's AbortError.
 */
export async function* stream(path, body, { key, signal }) {
  const response = await reach(address(path), {
    method: "POST", headers: headers(key), body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw await refusal(response);
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw streamed(chunk.error);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("The connection broke before the answer was complete.", { kind: "cut" });
  }
  throw new ApiError("The connection ended before the answer was complete.", { kind: "cut" });
}

async function reach(url, options) {
  try {
    return await fetch(url, { ...options, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", { kind: "network" });
  }
}

function streamed(error) {
  const message = typeof error === "string" ? error : error.message || "The server could not go on.";
  return new ApiError(message, { kind: "stream", type: error.type ?? null, code: error.code ?? null });
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const error = body?.error ?? {};
  const message = error.message || body?.message || body?.detail || `The server answered ${response.status} ${response.statusText}`.trim();
  return new ApiError(String(message), {
    status: response.status,
    type: error.type ?? null,
    code: error.code ?? null,
    wait: patience(response.headers.get("Retry-After")),
  });
}

// Retry-After is a number of seconds or a date; null where it says nothing usable.
function patience(value) {
  if (!value) return null;
  const s = /^\d+$/.test(value.trim()) ? Number(value) : Math.ceil((Date.parse(value) - Date.now()) / 1000);
  return Number.isFinite(s) ? Math.min(Math.max(s, 1), 3600) : null;
}
