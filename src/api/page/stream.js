// A job's events: those that were, page by page, and those that come, as server-sent events.
// Read with fetch, since the browser's own EventSource cannot send a key.

import { call, open, pause } from "./api.js";

const PAGE = 1000;
/** Pages of history that are read: the newest steps of a very long job. */
const MOST_PAGES = 50;
const FIRST_PAUSE = 1000;
const LONGEST_PAUSE = 30000;

/** Events so far, oldest first, and whether older ones were left out. */
export async function history(job, signal) {
  const pages = [];
  let after = "";
  for (let n = 0; n < MOST_PAGES; n += 1) {
    const page = await call(`v1/fine_tuning/jobs/${job}/events?limit=${PAGE}${after}`, { signal });
    pages.push(page.data);
    if (!page.has_more) return { events: pages.flat().reverse(), cut: false };
    after = `&after=${page.data.at(-1).id}`;
  }
  return { events: pages.flat().reverse(), cut: true };
}

/**
 * Tells every event after `last` in batches, as they come, until the job ends or the signal is aborted. A connection that
 * breaks is opened again from the last event seen; `troubled` hears of it, and hears null once it is well again.
 */
export async function follow(job, last, { told, troubled, signal }) {
  let wait = FIRST_PAUSE;
  while (!signal.aborted) {
    try {
      const headers = { accept: "text/event-stream", ...(last ? { "last-event-id": last } : {}) };
      const answer = await open(`v1/fine_tuning/jobs/${job}/events`, { headers, signal });
      troubled(null);
      if (answer.status === 204) return;
      for await (const messages of batches(answer.body)) {
        wait = FIRST_PAUSE;
        const events = messages.filter((message) => message.event === "message").map(({ data }) => JSON.parse(data));
        if (events.length > 0) {
          last = events.at(-1).id;
          told(events);
        }
        if (messages.some((message) => message.event === "done")) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      troubled(error);
      if (error.status && !error.passes) return;
    }
    await pause(wait, signal);
    wait = Math.min(wait * 2, LONGEST_PAUSE);
  }
}

/** The messages of a stream, as many at once as one read completes. */
async function* batches(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      const messages = blocks.map(message).filter((found) => found.data !== "");
      if (messages.length > 0) yield messages;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function message(block) {
  const found = { event: "message", data: "" };
  for (const line of block.split("\n")) {
    const [, name, value] = /^([^:]*):? ?(.*)$/.exec(line);
    if (name === "event") found.event = value;
    if (name === "data") found.data += (found.data && "\n") + value;
  }
  return found;
}
