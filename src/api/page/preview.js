// The first examples of the data; what the loss counts is marked, and said as well.

import { el } from "./dom.js";
import { count } from "./format.js";

export function preview(examples) {
  if (examples.length === 0) return [];
  const shown = examples.map((example) => el("li", {},
    el("p", { class: "facts" },
      `${example.origin}: ${count(example.tokens)} tokens, ${count(example.trained_tokens)} of them trained`),
    el("p", { class: "example" }, ...example.spans.map(span))));
  return [el("details", {}, el("summary", {}, "The first examples"),
    el("p", {}, "Marked text is trained; the rest is only read."), el("ul", { class: "examples" }, ...shown))];
}

function span({ trained, text, end }) {
  const words = end ? `${text} … ${end}` : text;
  return trained ? el("mark", {}, words) : el("span", {}, words);
}
