// Elements from calls: el("p", { class: "note" }, "text", child). Text is always text, never markup.

const SVG = "http://www.w3.org/2000/svg";

export const el = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);

export const svg = (name, attributes, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

function fill(element, attributes = {}, children = []) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
}

/** Puts text where there is other text, so that nothing is announced or redrawn twice. */
export function text(element, words) {
  if (element.textContent !== words) element.textContent = words;
}

/** A table of rows of cells, under a caption. */
export function table(caption, head, rows) {
  return el(
    "table",
    {},
    el("caption", {}, caption),
    el("thead", {}, el("tr", {}, ...head.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...cells.map((cell) => el("td", {}, cell))))),
  );
}

/** Something that went wrong, in words. */
export const failure = (words) => el("p", { class: "failure", role: "alert" }, words);
