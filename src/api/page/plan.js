// What a job would come to, before it is made: data, steps, and for every host time and memory.

import { call, pause } from "./api.js";
import { el, failure } from "./dom.js";
import { bytes, count, duration, several } from "./format.js";
import { ledger } from "./ledger.js";
import { preview } from "./preview.js";

const LOOK = 1000;

/** Asks for the plan and waits until the data was read. */
export async function planOf(body, signal) {
  let plan = await call("v1/fine_tuning/plans", { json: body, signal });
  while (plan.status === "queued" && !signal.aborted) {
    await pause(LOOK, signal);
    plan = await call(`v1/fine_tuning/plans/${plan.id}`, { signal });
  }
  return plan;
}

/** The plan in words and bars. */
export function shown(plan) {
  if (plan.error) return [failure(`The job would fail: ${plan.error.message}`)];
  const { data, hosts } = plan;
  const line = `${several(data.documents, "document")}, ${several(data.tokens, "token")}, ${count(data.valid_labels)} of them in the loss; ` +
    `${several(data.total_steps, "step")} of sequences up to ${count(data.sequence_length)} tokens.`;
  return [el("p", {}, line), ...preview(data.preview ?? []), ...hosts.map(host)];
}

function host({ hostname, device, fits, problem, longest_sequence: longest, plan }) {
  const longestSaid = longest ? ` The longest sequence that fits is ${count(longest)} tokens.` : "";
  if (!fits) return el("div", { class: "host" }, el("h3", {}, `${hostname}, ${device}`), failure(`${problem}${longestSaid}`));
  const ranks = plan.sequence_parallel_size * plan.data_parallel_size;
  return el("div", { class: "host" },
    el("h3", {}, `${hostname}, ${device}`),
    el("p", {}, `About ${duration(plan.predicted_seconds)} in all, ${duration(plan.predicted_step_seconds)} a step, on ` +
      `${several(ranks, "device")}; ${bytes(plan.predicted_peak_bytes)} at the peak.${longestSaid} ` +
      `Speeds are ${plan.rates}.`),
    ledger("On the device", plan.ledger),
    ledger("In the host’s memory", plan.host_ledger));
}
