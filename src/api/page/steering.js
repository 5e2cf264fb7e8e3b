// Pause, resume, cancel. A wish is granted at the next step boundary; until then its button says that it waits.

import { call } from "./api.js";
import { el, text } from "./dom.js";
import { ended } from "./format.js";

export class Steering {
  #id;
  #say;
  #changed;
  #signal;
  #asked = null;
  #status = null;
  #pause = el("button", { type: "button" }, "Pause");
  #resume = el("button", { type: "button" }, "Resume");
  #cancel = el("button", { type: "button", class: "grave" }, "Cancel the job");
  #dialog;

  constructor(id, { say, changed, signal }) {
    this.#id = id;
    this.#say = say;
    this.#changed = changed;
    this.#signal = signal;
    this.#pause.addEventListener("click", () => this.#ask("pause"));
    this.#resume.addEventListener("click", () => this.#ask("resume"));
    this.#cancel.addEventListener("click", () => this.#dialog.showModal());
    const sure = el("button", { type: "button", class: "grave" }, "Yes, cancel it");
    sure.addEventListener("click", () => {
      this.#dialog.close();
      this.#ask("cancel");
    });
    const not = el("button", { type: "button", onclick: () => this.#dialog.close() }, "No, keep it");
    this.#dialog = el("dialog", { "aria-labelledby": "sure" },
      el("p", { id: "sure" }, "Cancel this job? It cannot be resumed. Its checkpoints stay."),
      el("div", { class: "line" }, not, sure));
    this.element = el("div", { class: "line steering", role: "group", "aria-label": "Steering" },
      this.#pause, this.#resume, this.#cancel, this.#dialog);
  }

  show(job) {
    if (job.status !== this.#status) this.#asked = null;
    this.#status = job.status;
    const over = ended(job.status);
    const focused = document.activeElement;
    this.#pause.hidden = over || job.status === "paused";
    this.#resume.hidden = job.status !== "paused";
    this.#cancel.hidden = over;
    this.#mark(this.#pause, "pause", "Pause", "Pausing after this step");
    this.#mark(this.#resume, "resume", "Resume", "Resuming");
    this.#mark(this.#cancel, "cancel", "Cancel the job", "Cancelling after this step");
    // A button that goes away hands the focus to the one that takes its place.
    if (this.element.contains(focused) && focused.hidden) {
      [this.#pause, this.#resume, this.#cancel].find((button) => !button.hidden)?.focus();
    }
  }

  #mark(button, verb, words, waiting) {
    text(button, this.#asked === verb ? waiting : words);
    // Not `disabled`: that would take the focus away.
    button.setAttribute("aria-disabled", this.#asked === null ? "false" : "true");
  }

  async #ask(verb) {
    if (this.#asked !== null) return;
    this.#asked = verb;
    try {
      const job = await call(`v1/fine_tuning/jobs/${this.#id}/${verb}`, { method: "POST", signal: this.#signal });
      if (job.status === this.#status) this.#say(verb === "resume" ? "Resuming." : "That happens after the current step.");
      this.#changed(job);
    } catch (error) {
      this.#asked = null;
      if (!this.#signal.aborted) this.#say(error.message);
    }
  }
}
