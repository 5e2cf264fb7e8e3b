// Where a plan puts every byte: a bar for each kind, and the same as numbers.

import { el } from "./dom.js";
import { bytes } from "./format.js";

/** What the planner's words mean. */
const KINDS = {
  weights: "Weights",
  gradients: "Gradients",
  optimizer: "Optimizer’s state",
  sequence: "The layer at hand, over the whole sequence",
  checkpoints: "Inputs of layers, kept",
  kept: "Results inside layers, kept",
  work: "Work space",
  batch: "Tokens and labels",
};

/** The ledger `{ kind: bytes }`, the largest first. */
export function ledger(title, entries) {
  const rows = Object.entries(entries).filter(([, n]) => n > 0).sort((a, b) => b[1] - a[1]);
  if (rows.length === 0) return null;
  const most = rows[0][1];
  const total = rows.reduce((sum, [, n]) => sum + n, 0);
  return el(
    "table",
    { class: "ledger" },
    el("caption", {}, `${title}: ${bytes(total)}`),
    el("thead", { class: "unseen" }, el("tr", {},
      el("th", { scope: "col" }, "What"), el("th", { scope: "col" }, "Bytes"), el("th", { scope: "col" }, "Share"))),
    el("tbody", {}, ...rows.map(([kind, n]) =>
      el("tr", {},
        el("th", { scope: "row" }, KINDS[kind] ?? kind),
        el("td", { class: "amount" }, bytes(n)),
        el("td", { class: "share" }, el("meter", { min: 0, max: most, value: n, "aria-label": `${KINDS[kind] ?? kind}, share` },
          `${Math.round((100 * n) / total)} %`))))),
  );
}
