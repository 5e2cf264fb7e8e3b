// A file to the server in parts, several at once. Where an upload of the same file broke off, it goes on with the parts that
// are there: the server says which, and their digests (or, where the browser makes none, what this browser remembers) say
// where they belong.

import { Problem, call, headers, pause, problemOf, url } from "./api.js";

const PART = 8 * 2 ** 20;
const AT_ONCE = 3;
const MOST_TRIES = 6;
const FIRST_PAUSE = 500;

/** The file object, once every byte is on the server. `moved` hears bytes sent and bytes in all. */
export async function upload(file, { moved, signal }) {
  if (file.size === 0) throw new Problem(`${file.name} is empty; choose a file with text in it.`);
  const memory = new Memory(file);
  const { id, there } = await begin(file, memory, signal);
  const places = Array.from({ length: Math.ceil(file.size / PART) }, (_, n) => n * PART);
  const parts = new Map();
  const sent = new Map();
  const taken = new Set();
  const size = (place) => Math.min(PART, file.size - place);
  const progress = (place, bytes) => {
    sent.set(place, bytes);
    moved([...sent.values()].reduce((sum, n) => sum + n, 0), file.size);
  };
  const waiting = places.values();
  const worker = async () => {
    for (const place of waiting) {
      const slice = file.slice(place, place + PART);
      const digest = await sha256(slice);
      // Each part counts once, also where two places of the file hold the same bytes.
      let part = there.find((known) => known.bytes === size(place) && !taken.has(known.id) &&
        (digest ? known.sha256 === digest : memory.parts[place] === known.id));
      part ??= await again(() => send(id, slice, digest, (bytes) => progress(place, bytes), signal), signal);
      progress(place, size(place));
      taken.add(part.id);
      parts.set(place, part.id);
      memory.keep(id, place, part.id);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, worker));
  const done = await again(
    () => call(`v1/uploads/${id}/complete`, { json: { part_ids: places.map((place) => parts.get(place)) }, signal }),
    signal,
  );
  memory.forget();
  return done.file;
}

/** The upload to go on with, and the parts that it has; or a new one. */
async function begin(file, memory, signal) {
  if (memory.upload) {
    const known = await call(`v1/uploads/${memory.upload}`, { signal }).catch(() => null);
    if (known?.status === "pending" && known.bytes === file.size) return { id: known.id, there: await partsOf(known.id, signal) };
    memory.forget();
  }
  const json = { filename: file.name, purpose: "fine-tune", bytes: file.size, mime_type: file.type || "text/plain" };
  return { id: (await call("v1/uploads", { json, signal })).id, there: [] };
}

async function partsOf(id, signal) {
  const found = [];
  let after = "";
  for (;;) {
    const page = await call(`v1/uploads/${id}/parts?limit=1000${after}`, { signal });
    found.push(...page.data);
    if (!page.has_more) return found;
    after = `&after=${page.data.at(-1).id}`;
  }
}

/** A part, with the progress that only this older way of sending tells. */
function send(id, slice, digest, moved, signal) {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    form.append("data", slice, "part");
    const request = new XMLHttpRequest();
    request.open("POST", url(`v1/uploads/${id}/parts`));
    for (const [name, value] of Object.entries(headers(digest ? { "x-content-sha256": digest } : {}))) {
      request.setRequestHeader(name, value);
    }
    const stop = () => request.abort();
    signal.addEventListener("abort", stop, { once: true });
    request.upload.onprogress = (event) => moved(Math.min(event.loaded, slice.size));
    request.onload = () => {
      if (request.status === 200) resolve(JSON.parse(request.responseText));
      else reject(problemOf(request.status, request.responseText));
    };
    request.onerror = () => reject(new Problem("The connection to the server broke."));
    request.onabort = () => reject(new DOMException("aborted", "AbortError"));
    request.onloadend = () => signal.removeEventListener("abort", stop);
    request.send(form);
  });
}

/** Tries again what may succeed later. */
async function again(work, signal) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await work();
    } catch (error) {
      if (signal.aborted || !error.passes || tries === MOST_TRIES) throw error;
      await pause(FIRST_PAUSE * 2 ** tries, signal);
    }
  }
}

/** Lower-case hex; null where the page did not come over a safe connection, since browsers offer no digests there. */
async function sha256(slice) {
  if (!crypto.subtle) return null;
  const digest = await crypto.subtle.digest("SHA-256", await slice.arrayBuffer());
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** What this browser remembers of an upload under way, by the file's name, size and time. */
class Memory {
  #name;
  upload = null;
  parts = {};

  constructor(file) {
    this.#name = `longhaul-upload ${file.name} ${file.size} ${file.lastModified}`;
    try {
      Object.assign(this, JSON.parse(localStorage.getItem(this.#name) ?? "{}"));
    } catch {
      // Not of this version's making.
    }
  }

  keep(upload, place, part) {
    this.upload = upload;
    this.parts[place] = part;
    localStorage.setItem(this.#name, JSON.stringify({ upload, parts: this.parts }));
  }

  forget() {
    Object.assign(this, { upload: null, parts: {} });
    localStorage.removeItem(this.#name);
  }
}
