// The list of jobs, newest first, kept current.

import { call, pause } from "./api.js";
import { el, failure, text } from "./dom.js";
import { count, duration, ended, number, state, when } from "./format.js";

const LOOK = 2000;
const MORE = 50;

export function jobs({ signal, say }) {
  const list = el("ul", { class: "jobs", "aria-label": "Jobs" });
  const trouble = el("div", {});
  const empty = el("p", { hidden: true }, "There is no job yet. ", el("a", { href: "#/new" }, "Make the first one"), ".");
  const older = el("button", { type: "button", hidden: true }, "Show older jobs");
  const rows = new Map();
  let shown = MORE;

  const look = async () => {
    const page = await call(`v1/fine_tuning/jobs?limit=${Math.min(shown, 1000)}`, { signal });
    empty.hidden = page.data.length > 0;
    older.hidden = !page.has_more;
    for (const [at, job] of page.data.entries()) {
      const known = rows.get(job.id);
      const row = known ?? new Row(job);
      row.show(job);
      rows.set(job.id, row);
      if (list.children[at] !== row.element) list.insertBefore(row.element, list.children[at] ?? null);
    }
    for (const [id, row] of rows) {
      if (!page.data.some((job) => job.id === id)) {
        row.element.remove();
        rows.delete(id);
      }
    }
  };
  const watch = async () => {
    while (!signal.aborted) {
      try {
        if (!document.hidden) await look();
        trouble.replaceChildren();
      } catch (error) {
        if (signal.aborted) return;
        if (!trouble.textContent.includes(error.message)) trouble.replaceChildren(failure(error.message));
      }
      await pause(LOOK, signal);
    }
  };
  older.addEventListener("click", () => {
    shown += MORE;
    look().then(() => say(`${rows.size} jobs are shown.`), (error) => say(error.message));
  });
  watch();
  return [el("h1", {}, "Jobs"), trouble, empty, list, older];
}

/** One job of the list; stays the same element, so that the focus on it is kept. */
class Row {
  #state = el("span", { class: "state" });
  #bar;
  #facts = el("p", { class: "facts" });

  constructor(job) {
    const name = job.user_provided_suffix ? `${job.model}, ${job.user_provided_suffix}` : job.model;
    this.#bar = el("progress", { max: 1, value: 0, "aria-label": `Progress of ${name}` });
    this.element = el("li", {},
      el("a", { class: "name", href: `#/jobs/${job.id}` }, name, el("span", { class: "id" }, job.id)),
      this.#state, this.#bar, this.#facts);
  }

  show(job) {
    text(this.#state, state(job.status));
    this.#state.className = `state ${job.status}`;
    const at = job.progress;
    this.#bar.hidden = !at;
    if (at) {
      this.#bar.max = at.total_steps || 1;
      this.#bar.value = at.step;
    }
    text(this.#facts, facts(job));
  }
}

function facts(job) {
  const at = job.progress;
  const said = [`made ${when(job.created_at)}`];
  if (job.error) said.unshift(job.error.message);
  else if (at) {
    said.unshift(`step ${count(at.step)} of ${count(at.total_steps)}`, `loss ${number(at.train_loss)}`);
    if (!ended(job.status) && job.status === "running") said.splice(2, 0, `about ${duration(at.estimated_seconds_left)} left`);
  }
  return said.join(" · ");
}
