// Links to bytes. Without a key the browser fetches them itself. With one this page must, since a link sends no key: to a
// file that the user names where the browser offers that, so that nothing large is held in memory, and else through memory.

import { open, key, url } from "./api.js";
import { el } from "./dom.js";

/** Largest download that is held in memory. */
const MOST_IN_MEMORY = 2 ** 31;

/** A link that saves `path` as `name`; `told` hears what becomes of it, in words. */
export function download(path, name, words, told) {
  const save = async (event) => {
    if (!key()) return;
    event.preventDefault();
    try {
      await (window.showSaveFilePicker ? toDisk(path, name, told) : throughMemory(path, name, told));
    } catch (error) {
      if (error.name !== "AbortError") told(`${name} was not downloaded: ${error.message}`);
    }
  };
  return el("a", { href: url(path), download: name, onclick: save }, words);
}

async function toDisk(path, name, told) {
  const handle = await window.showSaveFilePicker({ suggestedName: name });
  told(`Downloading ${name}.`);
  const answer = await open(path);
  await answer.body.pipeTo(await handle.createWritable());
  told(`${name} is downloaded.`);
}

async function throughMemory(path, name, told) {
  told(`Downloading ${name}.`);
  const stop = new AbortController();
  const answer = await open(path, { signal: stop.signal });
  if (Number(answer.headers.get("content-length")) > MOST_IN_MEMORY) {
    stop.abort();
    throw new Error("it is too large for this browser to hold; use the longhaul download command");
  }
  const place = URL.createObjectURL(await answer.blob());
  el("a", { href: place, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(place), 60000);
  told(`${name} is downloaded.`);
}
