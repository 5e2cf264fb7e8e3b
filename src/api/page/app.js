// The page: which view is shown, what is said to everybody, the key. A view is a function `(context, ...parts)` that answers
// its elements; `context.signal` is aborted when another takes its place.

import { key, setKey } from "./api.js";
import { el, failure, text } from "./dom.js";
import { job } from "./job.js";
import { jobs } from "./jobs.js";
import { newJob } from "./new_job.js";

const ROUTES = [
  [/^#\/new$/, newJob],
  [/^#\/jobs\/([\w-]+)$/, job],
  [/^(#\/?)?$/, jobs],
];

const main = document.getElementById("main");
let current = new AbortController();

/** Says something that a reader of the screen should hear as well. */
function say(words) {
  text(document.getElementById("said"), words);
}

function show(first) {
  current.abort();
  current = new AbortController();
  const found = ROUTES.map(([pattern, view]) => [pattern.exec(location.hash), view]).find(([match]) => match);
  const context = { signal: current.signal, say };
  say("");
  main.replaceChildren(...(found ? found[1](context, ...found[0].slice(1)) : [
    el("h1", {}, "No such page"),
    failure("There is nothing at this address."),
    el("p", {}, el("a", { href: "#/" }, "To the jobs")),
  ]));
  document.title = `${main.querySelector("h1")?.textContent ?? "Longhaul"} – Longhaul`;
  for (const link of document.querySelectorAll("nav a")) {
    link.toggleAttribute("aria-current", link.getAttribute("href") === (location.hash || "#/"));
    if (link.hasAttribute("aria-current")) link.setAttribute("aria-current", "page");
  }
  // Whoever works without a mouse goes on where the new content begins.
  if (!first) main.focus();
}

document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});

document.getElementById("key").value = key();
document.getElementById("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(document.getElementById("key").value.trim());
  document.querySelector(".key").open = false;
  show(true);
  say(key() ? "The key is used from now on." : "No key is used from now on.");
});

window.addEventListener("hashchange", () => show(false));
show(true);
