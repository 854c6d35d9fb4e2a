// The page of the routes: the list, the filter, and what each route takes and gives.

import { button, el, icon } from "./dom.js";
import { count } from "./numbers.js";
import { byTag, matches, routesOf } from "./routes.js";
import { boundsOf, fieldsOf, isRefused, objectsIn, typeOf } from "./schema.js";
import { Settings } from "./settings.js";
import { Trial } from "./trial.js";

const $ = (selector) => document.querySelector(selector);
const typing = (node) => node?.matches?.("input, textarea, select");

class Docs {
  constructor(told) {
    this.told = told;
    this.settings = new Settings();
    this.routes = routesOf(told);
    this.rows = new Map();
    this.links = new Map();
    this.trials = [];
    this.groups = byTag(this.routes).map(([tag, routes]) => this.#group(tag, routes));
    this.#head();
    $("#content").append(...this.groups.map(({ section }) => section), el("p", { id: "none", class: "fine", text: "No route has that.", hidden: true }));
    $("#talks").append(...this.groups.map(({ nav }) => nav));
    this.#wire();
    this.#filter();
    this.#toAddress();
  }

  #head() {
    const { info = {} } = this.told;
    $("#title").textContent = `${info.title ?? "The server"}’s routes`;
    $("#about").textContent = [info.description, info.version ? `Version ${info.version}.` : null].filter(Boolean).join(" ");
    if (this.told["x-chat-page"]) $("#foot").append(el("a", { class: "button quiet", href: "." }, icon("chat"), "Chat"));
    $("#foot").prepend(button("moon", "Light or dark", () => this.#toggleTheme(), { id: "theme" }));
    this.#showTheme();
  }

  #group(tag, routes) {
    const title = tag[0].toUpperCase() + tag.slice(1);
    const section = el("section", { "aria-label": title }, el("h2", { text: title }), ...routes.map((route) => this.#row(route)));
    const nav = el("div", {}, el("h2", { text: title }), el("ul", {}, ...routes.map((route) => this.#link(route))));
    return { section, nav, routes };
  }

  #link(route) {
    const link = el("a", { class: "open", href: `#${route.id}`, title: `${route.method.toUpperCase()} ${route.path}` }, el("span", { class: "mono", text: route.path }), method(route));
    const item = el("li", {}, link);
    this.links.set(route, item);
    // The address may be the same as before: it is followed all the same.
    link.addEventListener("click", () => this.#show(route));
    return item;
  }

  // The inside of a route is made when it is first opened.
  #row(route) {
    const inside = el("div", { class: "inside" });
    const row = el(
      "details", { class: "route", id: route.id },
      el(
        "summary", {}, method(route), el("span", { class: "path mono" }, ...breakable(route.path)), el("span", { class: "lead", text: route.lead || route.title }),
        icon("chevron"),
      ),
      inside,
    );
    row.addEventListener("toggle", () => {
      if (row.open && !inside.childElementCount) this.#fill(inside, route);
    });
    this.rows.set(route, row);
    return row;
  }

  #fill(inside, route) {
    const trial = new Trial(this.told, route, this.settings);
    this.trials.push(trial);
    inside.append(
      el(
        "div", { class: "told" }, el("h3", { text: route.title }),
        ...route.rest.map((text) => el("p", { text })),
        route.keyed ? el("p", { class: "fine", text: "Needs a key." }) : null,
        ...this.#parameters(route), ...this.#body(route), el("h4", { text: "Responses" }), ...route.responses.map((one) => this.#response(one)),
      ),
      trial.node,
    );
  }

  #parameters({ parameters }) {
    if (!parameters.length) return [];
    const fields = parameters.map(({ name, required, schema, description, in: where }) => ({ name, required, schema, description, where }));
    return [el("h4", { text: "Parameters" }), this.#list(fields)];
  }

  #body({ media }) {
    return media ? [el("h4", { text: "Body" }), ...this.#object(media.schema)] : [];
  }

  // Required fields first; those that are known only to be refused come last, folded.
  #object(schema) {
    const fields = fieldsOf(this.told, schema);
    const refused = fields.filter((one) => isRefused(this.told, one.schema));
    const taken = fields.filter((one) => !refused.includes(one)).sort((a, b) => b.required - a.required);
    return [
      taken.length ? this.#list(taken) : null,
      refused.length ? this.#folded(`${count(refused.length, "field")} not supported`, () => [this.#list(refused)]) : null,
      !fields.length ? el("p", { class: "fine", text: typeOf(this.told, schema) }) : null,
    ];
  }

  #list(fields) {
    return el("ul", { class: "fields" }, ...fields.map((one) => this.#field(one)));
  }

  #field({ name, schema, required, description, where }) {
    const words = description ?? schema?.description;
    const inner = objectsIn(this.told, schema);
    return el(
      "li", {},
      el("code", { class: "name", text: name }), " ", kind(typeOf(this.told, schema)),
      where ? el("span", { class: "bound", text: `in the ${where}` }) : null,
      ...boundsOf(this.told, schema).map((text) => el("span", { class: "bound", text })),
      required ? el("span", { class: "required", text: "required" }) : null,
      words ? el("p", { text: words }) : null,
      ...inner.map((one) => this.#folded(`Fields${one.label ? ` of ${one.label}` : ""}`, () => this.#object(one.schema))),
    );
  }

  #folded(label, make) {
    const inside = el("div", { class: "nested" });
    const box = el("details", { class: "fold" }, el("summary", {}, icon("chevron"), el("span", { text: label })), inside);
    box.addEventListener("toggle", () => {
      if (box.open && !inside.childElementCount) inside.append(...make().filter(Boolean));
    });
    return box;
  }

  #response({ status, description, content, headers }) {
    const code = el("span", { class: `code ${status.startsWith("2") ? "good" : "bad"}`, text: status });
    const kinds = Object.entries(content ?? {});
    const parts = () => [
      ...Object.entries(headers ?? {}).map(([name, one]) => el("p", { class: "fine" }, el("code", { text: name }), ` ${one.description ?? ""}`)),
      ...kinds.flatMap(([kind, media]) => [
        el("p", { class: "fine mono", text: kind }), media.schema?.description ? el("p", { class: "fine", text: media.schema.description }) : null,
        ...(objectsIn(this.told, media.schema).length ? this.#object(media.schema) : []),
      ]),
    ];
    const words = el("span", { text: description ?? "" });
    if (!kinds.length && !headers) return el("p", { class: "response" }, code, words);
    const box = this.#folded("", parts);
    box.classList.add("response");
    box.querySelector("summary").append(code, words);
    return box;
  }

  #wire() {
    $("#filter").addEventListener("input", () => this.#filter());
    $("#filter").addEventListener("keydown", (event) => this.#inFilter(event));
    $("#key").value = this.settings.key;
    $("#key").addEventListener("input", () => {
      this.settings.key = $("#key").value.trim();
      for (const trial of this.trials) trial.update();
    });
    addEventListener("hashchange", () => this.#toAddress());
    document.addEventListener("keydown", (event) => {
      if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
      event.preventDefault();
      $("#filter").focus();
    });
  }

  #inFilter(event) {
    if (event.isComposing) return;
    if (event.key === "Escape") {
      $("#filter").value = "";
      this.#filter();
    } else if (event.key === "Enter") {
      event.preventDefault(); // else the route's heading, which has the focus by then, takes the key too
      const first = this.routes.find((route) => !this.rows.get(route).hidden);
      if (first) this.#show(first);
    }
  }

  #filter() {
    const asked = $("#filter").value.trim();
    let found = 0;
    for (const { section, nav, routes } of this.groups) {
      const kept = routes.filter((route) => matches(route, asked));
      for (const route of routes) {
        this.rows.get(route).hidden = this.links.get(route).hidden = !kept.includes(route);
      }
      section.hidden = nav.hidden = !kept.length;
      found += kept.length;
    }
    $("#none").hidden = found > 0;
    $("#found").textContent = asked ? `${found} of ${count(this.routes.length, "route")}` : count(this.routes.length, "route");
  }

  #toAddress() {
    const route = this.routes.find((one) => `#${one.id}` === decoded(location.hash));
    if (route) this.#show(route);
  }

  #show(route) {
    const row = this.rows.get(route);
    row.open = true;
    row.querySelector("summary").focus({ preventScroll: true });
    row.scrollIntoView({ block: "start" });
  }

  #dark() {
    const chosen = this.settings.get("theme");
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }

  #toggleTheme() {
    this.settings.set("theme", this.#dark() ? "light" : "dark");
    document.documentElement.dataset.theme = this.settings.get("theme");
    this.#showTheme();
  }

  #showTheme() {
    $("#theme").replaceChildren(icon(this.#dark() ? "sun" : "moon"));
  }
}

const method = (route) => el("span", { class: `method ${route.method}`, text: route.method.toUpperCase() });

// That null is taken as well is said, but not loudly: nearly every field does.
function kind(words) {
  const [, own, rest] = /^(.+?)( \| null)?$/.exec(words) ?? [words, words];
  return el("span", { class: "type mono" }, own, rest ? el("span", { class: "or-null", text: rest }) : null);
}

// A long path may go on in the next line after each of its parts.
const breakable = (path) => path.split(/(?<=\/)/).flatMap((part) => [part, el("wbr")]);

// An address that a person wrote may be spelt in any way.
function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

async function begin() {
  try {
    const response = await fetch(new URL("openapi.json", document.baseURI), { cache: "no-cache" });
    if (!response.ok) throw new Error(`it answered ${response.status}`);
    new Docs(await response.json());
  } catch (error) {
    $("#about").textContent = `The description of the routes, openapi.json, cannot be read: ${error.message}.`;
    $("#about").setAttribute("role", "alert");
  }
}

begin();
