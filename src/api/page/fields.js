// The settings of a new job as form fields, and the form as the body of a request. `path` is where the value stands in the
// body, and how the server names the field when it refuses it.

import { el } from "./dom.js";

const WHOLE = { type: "number", min: 1, step: 1, inputmode: "numeric" };

export const BASIC = [
  { path: "suffix", label: "Name of the result", type: "text", maxlength: 64, note: "Becomes part of the model’s name." },
  { path: "training.sequence_length", label: "Sequence length, tokens", ...WHOLE, min: 2, note: "Empty: the longest document." },
  {
    path: "training.long_documents", label: "Longer documents", note: "What becomes of a document that is longer than the sequence.",
    options: [["", "Refuse the job"], ["split", "Split into pieces"], ["truncate", "Cut off"]],
  },
  { path: "training.max_steps", label: "Steps", ...WHOLE, note: "Empty: as many as the epochs take." },
  { path: "training.n_epochs", label: "Epochs", ...WHOLE, note: "Empty: one. Not together with steps." },
  { path: "training.learning_rate", label: "Learning rate", type: "number", min: 0, step: "any", placeholder: "0.00001" },
];

export const MORE = [
  { path: "training.gradient_accumulation_steps", label: "Sequences a step", ...WHOLE, placeholder: "1" },
  {
    path: "training.schedule", label: "Schedule",
    options: [["", "Cosine"], ["linear", "Linear"], ["constant", "Constant"]],
  },
  { path: "training.warmup_steps", label: "Warm-up steps", ...WHOLE, min: 0, placeholder: "0" },
  { path: "training.checkpoint_interval", label: "Checkpoint every so many steps", ...WHOLE, note: "Empty: at the end only." },
  { path: "training.evaluation_interval", label: "Evaluation every so many steps", ...WHOLE, note: "Needs a validation file." },
  { path: "training.weight_decay", label: "Weight decay", type: "number", min: 0, step: "any", placeholder: "0.1" },
  { path: "training.sequence_parallel_size", label: "Ranks to a sequence", ...WHOLE, note: "Empty: as the server chooses." },
  {
    path: "training.device", label: "Device",
    options: [["", "A GPU where there is one"], ["cuda", "GPU"], ["cpu", "CPU"]],
  },
  { path: "seed", label: "Seed", ...WHOLE, min: 0, note: "Empty: a random one, which the job shows." },
];

/** A labelled field with its note, and with room for what is wrong with it. */
export function field({ path, label, note, options, ...attributes }) {
  const described = `${path}-problem${note ? ` ${path}-note` : ""}`;
  const common = { id: path, name: path, "aria-describedby": described };
  const control = options
    ? el("select", common, ...options.map(([value, words]) => el("option", { value }, words)))
    : el("input", { ...common, autocomplete: "off", ...attributes });
  return el("div", { class: "field" },
    el("label", { for: path }, label), control,
    note && el("p", { class: "facts", id: `${path}-note` }, note),
    el("p", { class: "problem", id: `${path}-problem` }));
}

/** The body of a create request: what is empty is left to the server. */
export function body(form) {
  const made = {};
  for (const control of form.querySelectorAll("input[name], select[name]")) {
    const value = control.type === "number" ? control.valueAsNumber : control.value.trim();
    if (value === "" || Number.isNaN(value)) continue;
    const [name, inner] = control.name.split(".");
    if (inner) (made[name] ??= {})[inner] = value;
    else made[name] = value;
  }
  return made;
}

/** Says at a field what is wrong with it, and goes there. False where the form has no such field. */
export function blame(form, param, words) {
  const control = param && form.querySelector(`[name="${CSS.escape(param)}"]`);
  if (!control) return false;
  control.setAttribute("aria-invalid", "true");
  form.querySelector(`#${CSS.escape(`${param}-problem`)}`).textContent = words;
  const folded = control.closest("details");
  if (folded) folded.open = true;
  control.focus();
  return true;
}

export function forgive(form) {
  for (const control of form.querySelectorAll("[aria-invalid]")) control.removeAttribute("aria-invalid");
  for (const problem of form.querySelectorAll(".problem")) problem.textContent = "";
}
