// A conversation is a tree: editing a question or asking again grows a new branch, nothing is lost.

import { fresh } from "./answer.js";

let made = 0;

/** A name that no other conversation or message of this browser has. */
export function newId() {
  made += 1;
  return `${Date.now().toString(36)}${made.toString(36)}${Math.random().toString(36).slice(2, 8)}`;
}

/** An empty conversation; `kind` is "chat" or "document". */
export function create(kind, system = "") {
  const now = Date.now();
  const own = kind === "chat" ? { system, nodes: {}, leaf: null } : { pieces: [], last: null };
  return { version: 1, id: newId(), kind, title: "", made: now, changed: now, ...own };
}

/** Whether there is nothing in it that anybody would miss. */
export function isEmpty(conversation) {
  return conversation.kind === "chat"
    ? Object.keys(conversation.nodes).length === 0
    : conversation.pieces.every((piece) => !piece.text);
}

/** Add a message below `parent` (an id or null) and make it the end of the path shown. */
export function add(conversation, parent, fields) {
  const node = { id: newId(), parent, ...fields };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  conversation.changed = Date.now();
  if (!conversation.title && node.role === "user") conversation.title = titleOf(node.content);
  return node;
}

/** Add an empty answer below `parent`. */
export function addAnswer(conversation, parent, model) {
  return add(conversation, parent, { role: "assistant", model, answer: fresh() });
}

/** The messages from the root to the leaf. */
export function path(conversation, leaf = conversation.leaf) {
  const found = [];
  const seen = new Set();
  for (let id = leaf; id && !seen.has(id); id = conversation.nodes[id]?.parent) {
    seen.add(id);
    if (conversation.nodes[id]) found.unshift(conversation.nodes[id]);
  }
  return found;
}

/** The versions of `node`, oldest first: all messages of its kind with the same parent. */
export function versions(conversation, node) {
  return Object.values(conversation.nodes).filter((n) => n.parent === node.parent && n.role === node.role);
}

/** Show `node` and, below it, the newest branch. */
export function show(conversation, node) {
  const nodes = Object.values(conversation.nodes);
  let end = node;
  for (let below = node; below; below = nodes.findLast((n) => n.parent === end.id)) end = below;
  conversation.leaf = end.id;
}

/** The messages to send for an answer below the last of `nodes`. */
export function messages(conversation, nodes) {
  const sent = nodes.map(message);
  return conversation.system?.trim() ? [{ role: "system", content: conversation.system }, ...sent] : sent;
}

function message(node) {
  if (node.role === "tool") return { role: "tool", tool_call_id: node.call, content: node.content };
  if (node.role !== "assistant") return { role: node.role, content: node.content };
  const { content, calls } = node.answer;
  if (!calls.length) return { role: "assistant", content };
  const asked = calls.map((c) => ({ id: c.id, type: "function", function: { name: c.name, arguments: c.arguments } }));
  return { role: "assistant", content: content || null, tool_calls: asked };
}

/** The first line of a text, short enough for the side list. */
export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].replace(/\s+/g, " ");
  return line.length > 64 ? `${line.slice(0, 63)}…` : line;
}

/** After a reload nothing is under way any more: what was is marked as cut. Returns the argument. */
export function settle(conversation) {
  for (const node of Object.values(conversation.nodes ?? {})) {
    if (node.answer?.state === "running") node.answer.state = "interrupted";
  }
  if (conversation.last?.state === "running") conversation.last.state = "interrupted";
  return conversation;
}

/** Forget the token probabilities, which take most of the room. True if there were any. */
export function slim(conversation) {
  let had = false;
  for (const node of Object.values(conversation.nodes ?? {})) {
    const tokens = node.answer?.tokens;
    if (tokens?.content.length || tokens?.reasoning.length) {
      node.answer.tokens = { reasoning: [], content: [] };
      had = true;
    }
  }
  for (const piece of conversation.pieces ?? []) {
    if (piece.token) {
      delete piece.token;
      had = true;
    }
  }
  return had;
}
