// Reading JSON Schema: what a field may be, in words, and the fields inside it.

import { count } from "./numbers.js";

const SCHEMAS = "#/components/schemas/";
const DEEP = 32;

/** What `part` of the description `told` stands for; a reference to nothing is an empty schema. */
export function resolve(told, part) {
  let found = part ?? {};
  for (let steps = 0; typeof found.$ref === "string" && steps < DEEP; steps += 1) {
    let place = told;
    for (const name of found.$ref.replace(/^#\//, "").split("/")) {
      place = Object.hasOwn(place ?? {}, name) ? place[name] : undefined;
    }
    found = place ?? {};
  }
  return found;
}

const branches = (schema) => schema.anyOf ?? schema.oneOf ?? null;

/** The type in a few words, such as `(string | integer[])[]`. */
export function typeOf(told, schema, depth = 0) {
  if (schema === undefined || schema === true || depth > DEEP) return "anything";
  if (schema.$ref?.startsWith(SCHEMAS) && resolve(told, schema).type === "object") return schema.$ref.slice(SCHEMAS.length);
  const own = resolve(told, schema);
  if (branches(own)) return [...new Set(branches(own).map((one) => typeOf(told, one, depth + 1)))].join(" | ");
  if ("const" in own) return JSON.stringify(own.const);
  if (own.enum) return own.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (own.type === "array") {
    const item = typeOf(told, own.items, depth + 1);
    return item.includes(" | ") ? `(${item})[]` : `${item}[]`;
  }
  if (own.type === "object" && typeof own.additionalProperties === "object" && !own.properties) {
    return `object of ${typeOf(told, own.additionalProperties, depth + 1)}`;
  }
  return String(own.type ?? "anything");
}

/** Whether nothing but null may be given: a field that is known and not supported. */
export const isRefused = (told, schema) => resolve(told, schema).type === "null";

/** The bounds in words, such as "0 – 2" or "1 – 256 characters"; each once. */
export function boundsOf(told, schema, depth = 0) {
  const own = resolve(told, schema);
  if (depth > 3) return [];
  const found = [
    range(own.minimum, own.maximum, own.exclusiveMinimum, own.exclusiveMaximum),
    counted(own.minLength, own.maxLength, "character"),
    counted(own.minItems, own.maxItems, "item"),
    own.pattern ? `matches ${own.pattern}` : null,
    own.format ?? null,
    own.default === undefined || own.default === null ? null : `by default ${JSON.stringify(own.default)}`,
  ].filter(Boolean);
  const items = own.items ? boundsOf(told, own.items, depth + 1).map((words) => `each ${words}`) : [];
  const values = typeof own.additionalProperties === "object" ? boundsOf(told, own.additionalProperties, depth + 1).map((words) => `each ${words}`) : [];
  const inside = (branches(own) ?? []).flatMap((one) => boundsOf(told, one, depth + 1));
  return [...new Set([...found, ...items, ...values, ...inside])];
}

function range(least, most, above, below) {
  if (least !== undefined && most !== undefined) return `${least} – ${most}`;
  const words = [];
  if (least !== undefined) words.push(`≥ ${least}`);
  if (above !== undefined) words.push(`> ${above}`);
  if (most !== undefined) words.push(`≤ ${most}`);
  if (below !== undefined) words.push(`< ${below}`);
  return words.join(", ") || null;
}

function counted(least, most, thing) {
  if (most === undefined) return least === undefined ? null : `at least ${count(least, thing)}`;
  return least === undefined ? `at most ${count(most, thing)}` : `${least} – ${count(most, thing)}`;
}

/** The fields of an object as [{name, schema, required}], in the order of the description. */
export function fieldsOf(told, schema) {
  const own = resolve(told, schema);
  const required = new Set(own.required ?? []);
  return Object.entries(own.properties ?? {}).map(([name, part]) => ({ name, schema: part, required: required.has(name) }));
}

/** The objects with fields of their own that a value may be or hold, as [{label, schema}]. */
export function objectsIn(told, schema, depth = 0) {
  const own = resolve(told, schema);
  if (depth > 4) return [];
  if (own.properties) return [{ label: labelOf(told, schema, own), schema: own }];
  const parts = branches(own) ?? [own.items, own.additionalProperties].filter((part) => part && typeof part === "object");
  return parts.flatMap((part) => objectsIn(told, part, depth + 1));
}

// Objects of one list are told apart by their type, if it says which, else by their name.
function labelOf(told, schema, own) {
  const kind = own.properties.type;
  if (kind && ["const", "enum"].some((word) => word in resolve(told, kind))) return `type ${typeOf(told, kind)}`;
  return schema.$ref?.startsWith(SCHEMAS) ? schema.$ref.slice(SCHEMAS.length) : own.title ?? "";
}

/** The example bodies of a media type. */
export function examplesOf(told, media) {
  const own = resolve(told, media?.schema);
  const named = Object.values(media?.examples ?? {}).map((one) => resolve(told, one).value);
  const all = [media?.example, ...named, own.example, ...(own.examples ?? [])];
  return all.filter((one) => one !== undefined);
}
