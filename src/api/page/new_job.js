// A new job: model, files, settings; what it would come to; and the start.

import { call, onceKey } from "./api.js";
import { el, failure } from "./dom.js";
import { BASIC, MORE, blame, body, field, forgive } from "./fields.js";
import { FileField, trainingFiles } from "./file_field.js";
import { planOf, shown } from "./plan.js";

export function newJob(context) {
  const { signal, say } = context;
  const training = new FileField(context, { name: "training_file", label: "Training file" });
  const validation = new FileField(context, { name: "validation_file", label: "Validation file", optional: true });
  const models = el("datalist", { id: "models" });
  const model = field({ path: "model", label: "Base model", type: "text", list: "models", required: true, spellcheck: "false",
    note: "A model of this server, as the list offers them; or organization/name of one on the server’s hub." });
  const trouble = el("div", {});
  const outlook = el("section", { "aria-label": "What it would come to", class: "outlook" });
  const start = el("button", { type: "submit", class: "main" }, "Start the job");
  const estimate = el("button", { type: "button" }, "What would it come to?");
  const form = el("form", { novalidate: true },
    el("fieldset", {}, el("legend", {}, "Model and data"), model, models, training.element, validation.element),
    el("fieldset", { class: "grid" }, el("legend", {}, "Training"), ...BASIC.map(field)),
    el("details", {}, el("summary", {}, "More settings"), el("div", { class: "grid" }, ...MORE.map(field))),
    trouble, el("div", { class: "line" }, start, estimate));

  let busy = false;
  // The same request keeps its key, so that pressing again after a broken connection makes no second job.
  let once = { body: null, key: null };
  const attempt = async (work) => {
    if (busy) return;
    busy = true;
    forgive(form);
    trouble.replaceChildren();
    try {
      await work(body(form));
    } catch (error) {
      if (signal.aborted) return;
      if (!blame(form, error.param, error.message)) trouble.replaceChildren(failure(error.message));
      say(error.message);
    } finally {
      busy = false;
    }
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(async (json) => {
      const sent = JSON.stringify(json);
      if (once.body !== sent) once = { body: sent, key: onceKey() };
      const job = await call("v1/fine_tuning/jobs", { json, signal, headers: { "idempotency-key": once.key } });
      location.hash = `#/jobs/${job.id}`;
    });
  });
  estimate.addEventListener("click", () => attempt(async (json) => {
    say("The data is being read.");
    const plan = await planOf(json, signal);
    outlook.replaceChildren(el("h2", {}, "What it would come to"), ...shown(plan));
    say("The plan is ready.");
  }));
  offer({ models, training, validation }, signal).catch((error) => {
    if (!signal.aborted) trouble.replaceChildren(failure(error.message));
  });
  return [el("h1", {}, "New job"), form, outlook];
}

/** Fills the form with what the server has. */
async function offer({ models, training, validation }, signal) {
  const [known, files] = await Promise.all([call("v1/models", { signal }), trainingFiles(signal)]);
  const usable = known.data.filter(({ id, problem }) => !problem && !id.startsWith("ft:"));
  models.append(...usable.map(({ id }) => el("option", { value: id })));
  training.offer(files);
  validation.offer(files);
}
