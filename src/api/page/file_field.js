// Choosing a training file: one that is on the server, or one of this computer, which is sent.

import { call } from "./api.js";
import { el, failure } from "./dom.js";
import { bytes, when } from "./format.js";
import { upload } from "./upload.js";

const KINDS = ".txt,.md,.jsonl";

/** A field; `value()` is the chosen file's id, or empty. */
export class FileField {
  #select;
  #input;
  #bar = el("progress", { max: 1, value: 0, hidden: true, "aria-label": "Upload" });
  #stop = el("button", { type: "button", hidden: true }, "Stop the upload");
  #note = el("p", { class: "facts" });
  #trouble = el("div", {});
  #context;

  constructor(context, { name, label, optional }) {
    this.#context = context;
    this.#select = el("select", { id: name, name, "aria-describedby": `${name}-problem` },
      el("option", { value: "" }, optional ? "None" : "Choose a file"));
    this.#input = el("input", { type: "file", id: `${name}-upload`, accept: KINDS, onchange: () => this.#send() });
    this.element = el("div", { class: "field" },
      el("label", { for: name }, label), this.#select,
      el("label", { for: `${name}-upload`, class: "second" }, `Or send one (.txt, .md or .jsonl) as the ${label.toLowerCase()}`),
      this.#input, el("div", { class: "line" }, this.#bar, this.#stop), this.#note, this.#trouble,
      el("p", { class: "problem", id: `${name}-problem` }));
  }

  value() {
    return this.#select.value;
  }

  /** Adds the files that are on the server. */
  offer(files) {
    const chosen = this.#select.value;
    this.#select.append(...files.map(option));
    this.#select.value = chosen;
  }

  async #send() {
    const [file] = this.#input.files;
    if (!file) return;
    const stop = new AbortController();
    const signal = AbortSignal.any([stop.signal, this.#context.signal]);
    this.#stop.onclick = () => stop.abort();
    this.#trouble.replaceChildren();
    this.#bar.hidden = this.#stop.hidden = false;
    this.#bar.value = 0;
    this.#context.say(`Sending ${file.name}.`);
    const moved = (sent, all) => {
      this.#bar.value = sent / all;
      this.#note.textContent = `${bytes(sent)} of ${bytes(all)}`;
    };
    try {
      const done = await upload(file, { moved, signal });
      this.#select.append(option(done));
      this.#select.value = done.id;
      this.#select.dispatchEvent(new Event("change", { bubbles: true }));
      this.#context.say(`${file.name} is on the server and chosen.`);
    } catch (error) {
      if (this.#context.signal.aborted) return;
      const words = signal.aborted ? "The upload was stopped." : error.message;
      this.#trouble.replaceChildren(failure(`${words} Choose the same file again to go on where it stopped.`));
      this.#input.value = "";
    } finally {
      if (document.activeElement === this.#stop) this.#input.focus();
      this.#bar.hidden = this.#stop.hidden = true;
    }
  }
}

/** Files for training that are on the server, newest first. */
export const trainingFiles = async (signal) => (await call("v1/files?purpose=fine-tune&limit=200", { signal })).data;

const option = (file) =>
  el("option", { value: file.id }, `${file.filename}, ${bytes(file.bytes)}, ${when(file.created_at)}`);
