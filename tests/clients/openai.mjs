// OpenAI's own package for Node through the life of a file, a job and a model; prints what came as one line of JSON.
//
//     OPENAI_BASE_URL=http://host:port/v1 OPENAI_API_KEY=<key> HF_TOKEN=<key> node openai.mjs <base model> <document>

import assert from "node:assert/strict";
import { File } from "node:buffer";
import { createHash, webcrypto } from "node:crypto";
import { createReadStream, readFileSync } from "node:fs";
import { createServer } from "node:http";

import OpenAI, { toFile } from "openai";

// Node 18 has these and does not show them.
globalThis.File ??= File;
globalThis.crypto ??= webcrypto;

// The package sends an admin key, and only that, to the permissions.
const client = new OpenAI({ adminAPIKey: process.env.OPENAI_API_KEY });
const jobs = client.fineTuning.jobs;
const [baseModel, document] = process.argv.slice(2);
const content = readFileSync(document);

async function until(what, look) {
  for (let n = 0; n < 2400; n++) {
    const found = await look();
    if (found) return found;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  throw new Error(`waited for ${what} in vain`);
}

// A receiver of webhooks.
const got = [];
const listener = createServer((request, answer) => {
  const body = [];
  request.on("data", (bytes) => body.push(bytes));
  request.on("end", () => {
    got.push([request.headers, Buffer.concat(body).toString()]);
    answer.writeHead(204).end();
  });
});
await new Promise((resolve) => listener.listen(0, "127.0.0.1", resolve));
const endpoint = await client.post("/webhook_endpoints", {
  body: {
    name: "journey",
    url: `http://127.0.0.1:${listener.address().port}/hook`,
    event_types: ["fine_tuning.job.succeeded"],
  },
});

// The document, in parts side by side, the last first.
const upload = await client.uploads.create({
  filename: "document.txt",
  purpose: "fine-tune",
  bytes: content.length,
  mime_type: "text/plain",
});
const pieces = [];
for (let at = 0; at < content.length; at += 5000) pieces.push(content.subarray(at, at + 5000));
const sent = await Promise.all(
  [...pieces].reverse().map(async (bytes) => client.uploads.parts.create(upload.id, { data: await toFile(bytes, "part") })),
);
const md5 = createHash("md5").update(content).digest("hex");
const completed = await client.uploads.complete(upload.id, { part_ids: [...sent].reverse().map((part) => part.id), md5 });
assert.equal(completed.status, "completed");
const file = await client.files.retrieve(completed.file.id);
assert.ok(Buffer.from(await (await client.files.content(file.id)).arrayBuffer()).equals(content));
// And in one piece, as a stream of unknown length.
const whole = await client.files.create({ file: createReadStream(document), purpose: "fine-tune" });
assert.equal(whole.sha256, file.sha256);

const create = (suffix, steps) =>
  jobs.create({
    model: baseModel,
    training_file: file.id,
    validation_file: whole.id,
    suffix,
    seed: 7,
    metadata: { suffix },
    training: {
      sequence_length: 512,
      long_documents: "split",
      max_steps: steps,
      checkpoint_interval: 8,
      evaluation_interval: steps,
    },
  });

await assert.rejects(
  jobs.create({ model: baseModel, training_file: file.id, method: { type: "reinforcement" } }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === "method.type" && error.requestID !== null,
);
await until("the model to be published", async () => (await client.models.list()).data.some((m) => m.id === baseModel));
let job = await create("node", 24);
await until("some steps", async () => (await jobs.retrieve(job.id)).progress?.step >= 4);
await jobs.pause(job.id);
await until("the pause", async () => (await jobs.retrieve(job.id)).status === "paused");
await jobs.resume(job.id);

// Its events as they happen, from the first: by the client's own request, as bytes.
const seen = [];
const answer = await client
  .get(`/fine_tuning/jobs/${job.id}/events`, { headers: { accept: "text/event-stream" }, __binaryResponse: true })
  .asResponse();
let text = "";
const decoder = new TextDecoder();
for await (const bytes of answer.body) text += decoder.decode(bytes, { stream: true });
for (const line of text.split("\n")) {
  if (line.startsWith("data:") && line.slice(5).trim().startsWith("{")) seen.push(JSON.parse(line.slice(5)));
}
job = await jobs.retrieve(job.id);
assert.equal(job.status, "succeeded");
const listed = [];
for await (const event of jobs.listEvents(job.id, { limit: 7 })) listed.push(event.id);
assert.deepEqual(seen.map((event) => event.id), [...listed].reverse());
const found = [];
for await (const other of jobs.list({ metadata: { suffix: "node" } })) found.push(other.id);
assert.deepEqual(found, [job.id]);

// Another, cancelled.
const cancelled = await create("cancelled", 100000);
await jobs.cancel(cancelled.id);
await until("the cancellation", async () => (await jobs.retrieve(cancelled.id)).status === "cancelled");
await assert.rejects(jobs.resume(cancelled.id), (error) => error instanceof OpenAI.ConflictError);

// What came of the first.
const csv = await (await client.files.content(job.result_files[0])).text();
const permissions = client.fineTuning.checkpoints.permissions;
const made = await permissions.create(job.fine_tuned_model, { project_ids: ["proj_a"] });
const deletion = { fine_tuned_model_checkpoint: job.fine_tuned_model };
assert.ok((await permissions.delete(made.data[0].id, deletion)).deleted);
const [headers, body] = await until("the webhook", () => got[0]);
const webhook = await client.webhooks.unwrap(body, headers, endpoint.signing_secret);
assert.deepEqual([webhook.type, webhook.data.id], ["fine_tuning.job.succeeded", job.id]);
await assert.rejects(client.webhooks.unwrap(`${body} `, headers, endpoint.signing_secret));
assert.ok((await client.delete(`/webhook_endpoints/${endpoint.id}`)).deleted);

assert.ok((await client.models.delete(job.fine_tuned_model)).deleted);
await assert.rejects(client.models.retrieve(job.fine_tuned_model), (error) => error instanceof OpenAI.NotFoundError);
for (const id of [file.id, whole.id]) assert.ok((await client.files.delete(id)).deleted);

console.log(
  JSON.stringify({ file_sha256: file.sha256, job: job.id, model: job.fine_tuned_model, cancelled: cancelled.id, csv }),
);
listener.close();
