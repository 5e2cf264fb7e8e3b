// Checkpoints of a job, with what can be downloaded of each.

import { call } from "./api.js";
import { el } from "./dom.js";
import { download } from "./download.js";
import { bytes, number } from "./format.js";

/** The list, newest first. */
export async function checkpoints(job, signal, say) {
  const page = await call(`v1/fine_tuning/jobs/${job}/checkpoints?limit=100`, { signal });
  if (page.data.length === 0) return [el("p", {}, "There is no checkpoint yet.")];
  return [el("ul", { class: "checkpoints" }, ...page.data.map((checkpoint) => one(job, checkpoint, signal, say)))];
}

/** Links to the job's numbers as CSV. */
export function results(ids, say) {
  return ids.map((id) => el("p", {}, download(`v1/files/${id}/content`, "steps.csv", "Numbers of all steps (CSV)", say)));
}

function one(job, checkpoint, signal, say) {
  const path = `v1/fine_tuning/jobs/${job}/checkpoints/${checkpoint.id}`;
  const { metrics, hub } = checkpoint;
  const loss = metrics.full_valid_loss ?? metrics.valid_loss;
  const measured = [
    metrics.train_loss === undefined ? null : `loss ${number(metrics.train_loss)}`,
    loss === undefined ? null : `validation loss ${number(loss)}`,
  ].filter(Boolean).join(", ");
  const files = el("div", {});
  const details = el("details", {}, el("summary", {}, `Files of step ${checkpoint.step_number}`), files);
  details.addEventListener("toggle", () => {
    if (details.open && files.children.length === 0) list(path, files, signal, say);
  });
  return el("li", {},
    el("p", {}, el("strong", {}, `Step ${checkpoint.step_number}`), measured && ` · ${measured}`, " · ",
      download(`${path}/archive`, `${checkpoint.id}.tar`, `Download step ${checkpoint.step_number} (tar)`, say)),
    el("p", { class: "facts" }, `As from a Hub: ${hub.repository}, revision ${hub.revision}`),
    details);
}

async function list(path, into, signal, say) {
  try {
    const manifest = await call(`${path}/files`, { signal });
    const link = (file) => {
      const place = file.path.split("/").map(encodeURIComponent).join("/");
      return el("li", {}, download(`${path}/files/${place}`, file.path.split("/").at(-1), file.path, say), ` ${bytes(file.bytes)}`);
    };
    into.replaceChildren(el("ul", { class: "files" }, ...manifest.data.map(link)));
  } catch (error) {
    if (!signal.aborted) say(error.message);
  }
}
