// One job: its state and what can be done about it, curves, memory, checkpoints, events.

import { call, pause } from "./api.js";
import { Chart } from "./chart.js";
import { checkpoints, results } from "./checkpoints.js";
import { el, failure, table, text } from "./dom.js";
import { bytes, count, duration, ended, number, several, state, when } from "./format.js";
import { ledger } from "./ledger.js";
import { preview } from "./preview.js";
import { Steering } from "./steering.js";
import { Story } from "./story.js";
import { follow, history } from "./stream.js";

const LOOK = 2000;
const MOST_MESSAGES = 300;
const TABLE_ROWS = 50;

export function job({ signal, say }, id) {
  const view = new View(id, signal, say);
  view.run();
  return view.elements;
}

class View {
  #id;
  #signal;
  #say;
  #story = new Story();
  #status = null;
  #loss = new Chart("Loss", "");
  #speed = new Chart("Throughput", " tokens/s");
  #trouble = el("div", {});
  #badge = el("span", { class: "state" });
  #bar = el("progress", { max: 1, value: 0, "aria-label": "Steps done" });
  #facts = el("p", { class: "facts" });
  #error = el("div", {});
  #settings = el("dl", { class: "pairs" });
  #memory = el("div", {}, el("p", {}, "The plan is made when the training starts."));
  #data = el("div", {}, el("p", {}, "The files have not been read yet."));
  #files = el("div", {});
  #numbers = el("div", {});
  #messages = el("ol", { class: "events", reversed: true });
  #told = 0;
  #steering;
  #drawn = false;

  constructor(id, signal, say) {
    this.#id = id;
    this.#signal = signal;
    this.#say = say;
    this.#steering = new Steering(id, { say, changed: (job) => this.#show(job), signal });
    const part = (title, ...children) => el("section", { "aria-label": title }, el("h2", {}, title), ...children);
    this.elements = [
      el("p", {}, el("a", { href: "#/" }, "All jobs")),
      el("h1", {}, "Job ", el("span", { class: "id" }, id)),
      this.#trouble,
      el("div", { class: "head" }, this.#badge, this.#bar, this.#facts, this.#error, this.#steering.element),
      part("Loss", this.#loss.element),
      part("Throughput", this.#speed.element),
      el("details", { class: "numbers" }, el("summary", {}, "The last steps as a table"), this.#numbers),
      part("Memory", this.#memory),
      part("Checkpoints", this.#files),
      part("Data", this.#data),
      part("Settings", this.#settings),
      part("Events", this.#messages),
    ];
  }

  async run() {
    this.#keepCurrent();
    try {
      const { events, cut } = await history(this.#id, this.#signal);
      this.#tell(events);
      if (cut) this.#say("The job has more steps than are shown here; these are the newest.");
    } catch (error) {
      if (this.#signal.aborted) return;
      this.#troubled(error);
    }
    const heard = { told: (events) => this.#tell(events), troubled: (error) => this.#troubled(error), signal: this.#signal };
    await follow(this.#id, this.#story.last, heard);
    if (!this.#signal.aborted) await this.#look().catch((error) => this.#troubled(error));
  }

  /** The job's own state, which events do not tell in full. */
  async #keepCurrent() {
    while (!this.#signal.aborted) {
      try {
        if (!document.hidden || this.#status === null) await this.#look();
      } catch (error) {
        if (this.#signal.aborted) return;
        this.#troubled(error);
        if (error.status === 404) return;
      }
      if (ended(this.#status)) return;
      await pause(LOOK, this.#signal);
    }
  }

  async #look() {
    const job = await call(`v1/fine_tuning/jobs/${this.#id}`, { signal: this.#signal });
    this.#troubled(null);
    this.#show(job);
  }

  #troubled(error) {
    if (this.#trouble.textContent === (error?.message ?? "")) return;
    this.#trouble.replaceChildren(...(error ? [failure(error.message)] : []));
  }

  #show(job) {
    const before = this.#status;
    this.#status = job.status;
    text(this.#badge, state(job.status));
    this.#badge.className = `state ${job.status}`;
    this.#steering.show(job);
    const at = job.progress;
    this.#bar.hidden = !at;
    if (at) {
      this.#bar.max = at.total_steps || 1;
      this.#bar.value = at.step;
    }
    text(this.#facts, facts(job));
    if (before === job.status) return;
    this.#error.replaceChildren(...(job.error ? [failure(job.error.message)] : []));
    this.#settings.replaceChildren(...settings(job));
    if (before !== null) this.#say(`The job is now: ${state(job.status)}.`);
    this.#refreshFiles(job);
  }

  #tell(events) {
    this.#story.add(events);
    // Steps may come faster than a screen shows them.
    if (this.#drawn) return;
    this.#drawn = true;
    requestAnimationFrame(() => {
      this.#drawn = false;
      this.#draw();
    });
  }

  #draw() {
    const story = this.#story;
    this.#loss.draw([
      { name: "training loss", points: story.points("train_loss") },
      { name: "validation loss", points: story.validation(), dots: true },
    ]);
    this.#speed.draw([{ name: "throughput", points: story.points("tokens_per_second") }]);
    this.#numbers.replaceChildren(lastSteps(story));
    const fresh = story.messages.slice(this.#told);
    if (fresh.length === 0) return;
    this.#told = story.messages.length;
    this.#messages.prepend(...fresh.slice(-MOST_MESSAGES).reverse().map(message));
    while (this.#messages.children.length > MOST_MESSAGES) this.#messages.lastChild.remove();
    if (story.plan) this.#memory.replaceChildren(...memory(story.plan));
    if (story.data) this.#data.replaceChildren(...data(story.data));
    this.#refreshFiles();
  }

  async #refreshFiles(job) {
    try {
      this.#files.replaceChildren(...(await checkpoints(this.#id, this.#signal, this.#say)));
      const csv = job?.result_files ?? [];
      if (csv.length > 0) this.#files.append(...results(csv, this.#say));
    } catch (error) {
      if (!this.#signal.aborted) this.#troubled(error);
    }
  }
}

function facts(job) {
  const at = job.progress;
  const said = [`base model ${job.model}`];
  if (at) {
    said.push(`step ${count(at.step)} of ${count(at.total_steps)}`, `${count(at.tokens_seen)} tokens seen`);
    said.push(`peak memory ${bytes(at.device_peak_bytes)}`);
    if (job.status === "running") said.push(`about ${duration(at.estimated_seconds_left)} left`);
  }
  if (job.finished_at) said.push(`ended ${when(job.finished_at)}`);
  if (job.fine_tuned_model) said.push(`result ${job.fine_tuned_model}`);
  return said.join(" · ");
}

function settings(job) {
  const fields = { seed: job.seed, training_file: job.training_file, validation_file: job.validation_file, ...job.training };
  const shown = ([, value]) => value !== null && !(Array.isArray(value) && value.length === 0);
  return Object.entries(fields).filter(shown).flatMap(([name, value]) =>
    [el("dt", {}, name.replaceAll("_", " ")), el("dd", {}, String(value))]);
}

function memory(plan) {
  return [
    el("p", {}, `The planner expects ${bytes(plan.predicted_peak_bytes)} at the peak on each device.`),
    ledger("On the device", plan.ledger),
  ].filter(Boolean);
}

function data(found) {
  const line = `${several(found.documents, "document")} with ${several(found.tokens, "token")}, of which ${count(found.valid_labels)} ` +
    `count in the loss; the longest has ${count(found.longest_document)}. ${several(found.sequences, "sequence")} of up to ` +
    `${several(found.sequence_length, "token")}, ${several(found.total_steps, "step")}.`;
  return [el("p", {}, line), ...preview(found.preview ?? [])];
}

function message(event) {
  const loud = event.level === "info" ? "" : `${event.level === "warn" ? "Warning" : "Error"}: `;
  return el("li", { class: event.level }, el("time", {}, when(event.created_at)), " ", `${loud}${event.message}`);
}

function lastSteps(story) {
  const rows = [...story.steps.values()].slice(-TABLE_ROWS).reverse();
  const head = ["Step", "Loss", "Gradient norm", "Learning rate", "Tokens/s"];
  const cells = (row) => [row.step, row.train_loss, row.grad_norm, row.learning_rate, row.tokens_per_second].map(number);
  return el("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "The last steps" },
    table(`The last ${rows.length} steps`, head, rows.map(cells)));
}
