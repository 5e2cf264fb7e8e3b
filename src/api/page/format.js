// Numbers and times as people read them.

const UNITS = ["KiB", "MiB", "GiB", "TiB", "PiB"];
const whole = new Intl.NumberFormat("en");

export const count = (n) => whole.format(Math.round(n));

/** `1 document`, `2 documents`. */
export const several = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;

export function bytes(n) {
  if (n < 1024) return `${n} B`;
  let unit = -1;
  while (n >= 1024 && unit + 1 < UNITS.length) {
    n /= 1024;
    unit += 1;
  }
  return `${n.toFixed(1)} ${UNITS[unit]}`;
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "unknown";
  const s = Math.max(0, Math.round(seconds));
  const two = (n) => String(n).padStart(2, "0");
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${two(s % 60)} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${two(Math.floor((s % 3600) / 60))} min`;
  return `${Math.floor(s / 86400)} d ${two(Math.floor((s % 86400) / 3600))} h`;
}

/** A number for a chart or a sentence: four significant digits, and no more zeros than needed. */
export function number(n) {
  if (!Number.isFinite(n)) return "none";
  if (Math.abs(n) >= 10000) return count(n);
  return String(Number(n.toPrecision(4)));
}

export const when = (seconds) => new Date(seconds * 1000).toLocaleString();

const STATES = {
  validating_files: "reading the files",
  queued: "queued",
  running: "running",
  paused: "paused",
  succeeded: "succeeded",
  failed: "failed",
  cancelled: "cancelled",
};

export const state = (status) => STATES[status] ?? status;

export const ended = (status) => ["succeeded", "failed", "cancelled"].includes(status);
