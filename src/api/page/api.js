// Requests to the public API, and their failures in words. Knows no page.

const BASE = new URL("../", import.meta.url);
const KEY = "longhaul-key";

/** A request that did not succeed. `param` names the field at fault. */
export class Problem extends Error {
  constructor(message, { status = 0, param = null, code = null } = {}) {
    super(message);
    Object.assign(this, { status, param, code });
  }

  /** True where the same request may succeed a little later. */
  get passes() {
    return this.status === 0 || this.status === 408 || this.status === 429 || this.status >= 500;
  }
}

export const key = () => sessionStorage.getItem(KEY) ?? "";

export function setKey(text) {
  if (text) sessionStorage.setItem(KEY, text);
  else sessionStorage.removeItem(KEY);
}

export const url = (path) => new URL(path, BASE).href;

/** Headers of every request. */
export function headers(more = {}) {
  return key() ? { authorization: `Bearer ${key()}`, ...more } : more;
}

/** The answer of a request; throws a Problem unless it is a success. */
export async function open(path, { method = "GET", body, headers: more, signal } = {}) {
  let answer;
  try {
    answer = await fetch(url(path), { method, body, headers: headers(more), signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem("The server does not answer. It may be restarting; this page tries again by itself.");
  }
  if (!answer.ok) throw problemOf(answer.status, await answer.text().catch(() => ""));
  return answer;
}

/** The JSON of an answer. A `json` is sent as the body. */
export async function call(path, { json, ...options } = {}) {
  if (json !== undefined) {
    options = { method: "POST", ...options, body: JSON.stringify(json) };
    options.headers = { "content-type": "application/json", ...options.headers };
  }
  return (await open(path, options)).json();
}

/** What the server's error envelope says, and where it is none, what the status means. */
export function problemOf(status, text) {
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // A proxy's page, say.
  }
  const { param = null, code = null } = error;
  let message = error.message || `The server answered with the status ${status}.`;
  if (status === 401) message = `${message} Put a key in under “API key” at the top.`;
  return new Problem(message, { status, param, code });
}

/** A key under which a create is made once, however often it is sent. */
export function onceKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Resolves after so long, or at once when the signal is aborted. */
export function pause(ms, signal) {
  return new Promise((done) => {
    const timer = setTimeout(done, ms);
    signal?.addEventListener("abort", () => (clearTimeout(timer), done()), { once: true });
  });
}
