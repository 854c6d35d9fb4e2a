// Building elements. Text always becomes a text node: nothing in this page parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/**
 * Make an element.
 *
 * `props`: `class`, `text`, `on` (an object of listeners), `data` (an object), any DOM property that
 * exists on the element, else an attribute. `false` and `null` leave an attribute out.
 */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name === "on") {
      for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    } else if (name === "data") Object.assign(node.dataset, value);
    else if (name.includes("-") || name === "role" || !(name in node)) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** One of the pictures in index.html, hidden from screen readers: the button around it carries the name. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("focusable", "false");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button with a picture; its name is read aloud and shown as a tip, or beside the picture. */
export function button(name, label, onClick, { shown = false, kind = "quiet", ...props } = {}) {
  const more = shown ? {} : { "aria-label": label, title: props.title || label };
  return el(
    "button",
    { type: "button", class: `button ${kind}${shown ? "" : " only"}`, on: { click: onClick }, ...more, ...props },
    name ? icon(name) : null,
    shown ? el("span", { text: label }) : null,
  );
}

/** Call `draw` at most once a frame, and less often when one drawing takes long. */
export function batched(draw) {
  let asked = 0;
  let idleUntil = 0;
  const frame = (now) => {
    if (now < idleUntil) {
      asked = requestAnimationFrame(frame);
      return;
    }
    asked = 0;
    const began = performance.now();
    draw();
    const took = performance.now() - began;
    // Drawing may take a quarter of the time at most; the rest belongs to reading and scrolling.
    if (took > 4) idleUntil = performance.now() + 3 * took;
  };
  const ask = () => {
    if (!asked) asked = requestAnimationFrame(frame);
  };
  ask.cancel = () => {
    cancelAnimationFrame(asked);
    asked = 0;
  };
  return ask;
}

/** Copy `text`; false where the browser refuses (no secure origin, no permission). */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyByHand(text);
  }
}

// Over plain HTTP on another machine there is no clipboard interface: the old command still works.
function copyByHand(text) {
  const area = el("textarea", { value: text, class: "out-of-sight", "aria-hidden": "true" });
  const focused = document.activeElement;
  (document.querySelector("dialog[open]") || document.body).append(area);
  area.select();
  let done = false;
  try {
    done = document.execCommand("copy");
  } catch {
    done = false;
  }
  area.remove();
  focused?.focus?.();
  return done;
}

/** A button that copies what `read` returns and says so for a moment. */
export function copyButton(label, read, options = {}) {
  const made = button("copy", label, async () => {
    const done = await copy(read());
    made.replaceChildren(icon(done ? "check" : "warn"), ...(options.shown ? [el("span", { text: done ? "Copied" : "Not copied" })] : []));
    made.setAttribute("aria-label", done ? "Copied" : "The browser refused to copy");
    clearTimeout(made.timer);
    made.timer = setTimeout(() => {
      made.replaceChildren(icon("copy"), ...(options.shown ? [el("span", { text: label })] : []));
      made.setAttribute("aria-label", label);
    }, 1600);
  }, options);
  return made;
}

/** Offer `value` as a JSON file called `name`. */
export function download(name, value) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(value, null, 2)], { type: "application/json" }));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
