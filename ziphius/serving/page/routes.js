// The routes of the description, one by one.

import { fieldsOf, resolve } from "./schema.js";

const METHODS = ["get", "post", "put", "patch", "delete", "head", "options"];
// What a person means as a method; "options" is more often part of a field's name.
const NAMED = METHODS.slice(0, 5);

/**
 * The routes in the order of the description: {id, method, path, tag, title, lead, rest, parameters,
 * media, responses, keyed, words}. `words` is what the filter looks through, in lower case.
 */
export function routesOf(told) {
  return Object.entries(told.paths ?? {}).flatMap(([path, methods]) =>
    METHODS.filter((method) => methods[method]).map((method) => route(told, path, method, methods)));
}

function route(told, path, method, methods) {
  const own = methods[method];
  const media = resolve(told, own.requestBody).content?.["application/json"] ?? null;
  const parameters = [...(methods.parameters ?? []), ...(own.parameters ?? [])].map((one) => resolve(told, one));
  const [lead, ...rest] = String(own.description ?? "").split(/\n\s*\n/);
  const tag = String(own.tags?.[0] ?? "other");
  const names = [...(media ? fieldsOf(told, media.schema) : []), ...parameters].map(({ name }) => name);
  return {
    id: `${method}${path}`, method, path, tag, lead, rest, parameters, media,
    title: String(own.summary ?? ""),
    keyed: Boolean((own.security ?? told.security)?.length),
    responses: Object.entries(own.responses ?? {}).map(([status, one]) => ({ status, ...resolve(told, one) })),
    words: [method, path, tag, own.summary, own.description, ...names].join(" ").toLowerCase(),
  };
}

/** The routes by tag: [[tag, routes], …]. */
export function byTag(routes) {
  const groups = new Map();
  for (const one of routes) groups.set(one.tag, [...(groups.get(one.tag) ?? []), one]);
  return [...groups];
}

/** Whether every word of `asked` is somewhere in the route; "get" and its like mean the method alone. */
export function matches(route, asked) {
  return asked.toLowerCase().split(/\s+/).every((word) => (NAMED.includes(word) ? route.method === word : route.words.includes(word)));
}

/** The address of `path` on this server, wherever it is mounted: never another host. */
export function address(path, values, query) {
  const root = new URL(".", document.baseURI).href.replace(/\/$/, "");
  const filled = path.replace(/\{([^}]+)\}/g, (all, name) => (values[name] ? encodeURIComponent(values[name]) : all));
  const asked = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== "")).toString();
  return `${root}/${filled.replace(/^\/+/, "")}${asked ? `?${asked}` : ""}`;
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The same request for a shell; a key is named there, never written out. */
export function curl({ method, url, body, keyed, streams }) {
  const parts = [`curl${streams ? " -N" : ""}${method === (body === null ? "get" : "post") ? "" : ` -X ${method.toUpperCase()}`} ${quoted(url)}`];
  if (keyed) parts.push('-H "Authorization: Bearer $API_KEY"');
  if (body !== null) parts.push("-H 'Content-Type: application/json'", `-d ${quoted(body)}`);
  return parts.join(" \\\n  ");
}
