// The page in a real browser, by keyboard alone: sends a document, starts a job, sees its curve grow, pauses, resumes, downloads,
// cancels; in light and dark, wide and narrow; without an error on the console and without a finding of axe.
// Ends with an error where something is not so; prints what the caller compares with the server.
//
//   node page.mjs ADDRESS MODEL DOCUMENT [FOLDER FOR PICTURES]

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";

const [address, model, document, pictures] = process.argv.slice(2);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const STEPS = 2000;
const MOST_TABS = 120;
const PATIENCE = 120_000;

const browser = await chromium.launch({ executablePath: process.env.LONGHAUL_BROWSER, args: ["--no-sandbox"] });
const complaints = [];

async function visit(options) {
  const context = await browser.newContext({ acceptDownloads: true, reducedMotion: "reduce", ...options });
  context.setDefaultTimeout(PATIENCE);
  const page = await context.newPage();
  page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("request", (request) => {
    const place = request.url();
    if (!place.startsWith(address) && !/^(data|blob):/.test(place)) complaints.push(`a request to ${place}`);
  });
  return page;
}

/** Presses Tab until what has the focus is called this, as a screen reader would call it. */
async function tabTo(page, name) {
  for (let n = 0; n < MOST_TABS; n += 1) {
    const found = await page.evaluate(() => {
      const focused = document.activeElement;
      const label = focused.labels?.[0]?.textContent;
      return { called: (focused.getAttribute("aria-label") ?? label ?? focused.textContent).trim(), tag: focused.tagName };
    });
    if (found.tag !== "BODY" && found.tag !== "MAIN" && found.called.startsWith(name)) return;
    await page.keyboard.press("Tab");
  }
  throw new Error(`nothing called ${name} was reached with Tab`);
}

async function press(page, name, key = "Enter") {
  await tabTo(page, name);
  const outline = await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);
  assert.notEqual(outline, "none", `the focus on ${name} is seen`);
  await page.keyboard.press(key);
}

async function fill(page, name, text) {
  await tabTo(page, name);
  await page.keyboard.type(text);
}

async function choose(page, name, file) {
  await tabTo(page, name);
  const [chooser] = await Promise.all([page.waitForEvent("filechooser"), page.keyboard.press("Space")]);
  await chooser.setFiles(file);
}

/** Looks at what is shown: no finding of axe, nothing wider than the window. */
async function inspect(page, name) {
  if (pictures) await page.screenshot({ path: join(pictures, `${name}.png`), fullPage: true });
  await page.evaluate(axe);
  const found = await page.evaluate(() => globalThis.axe.run());
  const told = found.violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.html).join(" ")}`);
  assert.deepEqual(told, [], name);
  const [wide, window] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
  assert.ok(wide <= window, `${name} is ${wide} wide in a window of ${window}`);
}

const said = (page, words) => page.locator("#said", { hasText: words }).waitFor();
const state = (page, words) => page.locator(".head .state", { hasText: words }).waitFor();
const corners = (page) => page.evaluate(() => (document.querySelector(".series-0")?.getAttribute("d") ?? "").split("L").length);

// A large file whose upload breaks off in the middle goes on with the parts that are there.
async function brokenUpload(page) {
  const large = join(tmpdir(), `longhaul-page-${process.pid}.txt`);
  writeFileSync(large, "one line of a long document\n".repeat(900_000));
  const sent = [];
  page.on("request", (request) => request.url().endsWith("/parts") && request.method() === "POST" && sent.push(request));
  let through = 0;
  await page.route("**/parts", (route) => {
    if (route.request().method() !== "POST" || (through += 1) <= 1) return route.continue();
    return route.fulfill({ status: 409, body: '{"error": {"message": "in the way"}}' });
  });
  await choose(page, "Or send one (.txt, .md or .jsonl) as the validation file", large);
  await page.locator(".failure", { hasText: "in the way" }).waitFor();
  await page.unroute("**/parts");
  const first = sent.length;
  await page.waitForTimeout(500);
  await choose(page, "Or send one (.txt, .md or .jsonl) as the validation file", large);
  await said(page, "is on the server and chosen");
  const id = await page.locator("#validation_file").inputValue();
  const content = await (await fetch(`${address}/v1/files/${id}/content`)).arrayBuffer();
  assert.ok(Buffer.from(content).equals(readFileSync(large)), "the file is whole");
  assert.ok(sent.length - first < 4, `of four parts ${sent.length - first} were sent again`);
  complaints.splice(0, complaints.length, ...complaints.filter((line) => !line.includes("409")));
}

async function start(page) {
  await page.goto(`${address}/`);
  await page.getByRole("heading", { name: "Jobs" }).waitFor();
  await press(page, "New job");
  await page.getByRole("heading", { name: "New job" }).waitFor();
  // Refused with words at the field, which has the focus.
  await press(page, "Start the job");
  await page.locator("#model-problem", { hasText: "model" }).waitFor();
  assert.equal(await page.evaluate(() => document.activeElement.id), "model");
  complaints.splice(0, complaints.length, ...complaints.filter((line) => !line.includes("400")));
  await fill(page, "Base model", model);
  await choose(page, "Or send one (.txt, .md or .jsonl) as the training file", document);
  await said(page, "is on the server and chosen");
  await fill(page, "Sequence length", "256");
  await fill(page, "Longer documents", "Split");
  await fill(page, "Steps", String(STEPS));
  await fill(page, "Learning rate", "0.003");
  await press(page, "More settings");
  await fill(page, "Checkpoint every so many steps", "20");
  await press(page, "What would it come to?");
  await page.locator(".outlook .ledger").first().waitFor();
  await inspect(page, "new");
  await page.keyboard.press("Shift+Tab");
  await press(page, "Start the job");
  await page.waitForURL("**/#/jobs/*");
  return page.url().split("/").at(-1);
}

async function steer(page) {
  await page.waitForFunction(() => (document.querySelector(".series-0")?.getAttribute("d") ?? "").split("L").length > 5);
  const before = await corners(page);
  await page.waitForFunction((least) => document.querySelector(".series-0").getAttribute("d").split("L").length > least, before);
  await press(page, "Pause");
  await state(page, "paused");
  await said(page, "paused");
  assert.equal(await page.evaluate(() => document.activeElement.textContent), "Resume", "the focus went on");
  await inspect(page, "paused");
  const paused = await corners(page);
  await press(page, "Resume");
  await state(page, "running");
  await page.waitForFunction((least) => document.querySelector(".series-0").getAttribute("d").split("L").length > least, paused);
}

async function take(page, job) {
  const link = page.locator(".checkpoints a").first();
  await link.waitFor();
  const [download] = await Promise.all([page.waitForEvent("download"), press(page, "Download step")]);
  const bytes = readFileSync(await download.path());
  const archive = await fetch(download.url());
  assert.ok(bytes.includes("model.safetensors") && bytes.includes("config.json"), "the archive holds a model");
  const tag = createHash("sha256").update(Buffer.from(await archive.arrayBuffer())).digest("hex");
  assert.equal(createHash("sha256").update(bytes).digest("hex"), tag);
  assert.ok(download.url().includes(job));
  return bytes.length;
}

async function cancel(page) {
  await press(page, "Cancel the job");
  await press(page, "No, keep it");
  await press(page, "Cancel the job");
  await press(page, "Yes, cancel it");
  await state(page, "cancelled");
  await page.locator(".checkpoints").waitFor();
}

const light = await visit({ colorScheme: "light", viewport: { width: 1200, height: 900 } });
const job = await start(light);
await steer(light);
const archive = await take(light, job);
await inspect(light, "job");
await cancel(light);
await press(light, "Jobs");
await light.locator(".jobs .cancelled").first().waitFor();
await inspect(light, "jobs");

const dark = await visit({ colorScheme: "dark", viewport: { width: 360, height: 740 } });
await dark.goto(`${address}/#/jobs/${job}`);
await dark.locator(".series-0").first().waitFor();
await dark.locator(".checkpoints").waitFor();
await inspect(dark, "job-dark");
await dark.goto(`${address}/#/`);
await dark.locator(".jobs li").first().waitFor();
await inspect(dark, "jobs-dark");
await dark.goto(`${address}/#/new`);
await dark.locator("#model").waitFor();
await brokenUpload(dark);
await inspect(dark, "new-dark");

// A key goes with every request from then on, and nowhere before.
const keys = [];
dark.on("request", (request) => keys.push(request.headers().authorization));
await dark.goto(`${address}/#/`);
await dark.locator(".jobs li").first().waitFor();
assert.ok(keys.every((key) => key === undefined));
await press(dark, "API key");
await fill(dark, "Key, where", "sk-a-test");
await dark.keyboard.press("Enter");
await said(dark, "The key is used");
await dark.waitForRequest((request) => request.headers().authorization === "Bearer sk-a-test");
assert.deepEqual(complaints, []);

// What is not there is said in words. The browser itself puts such an answer on its console.
await dark.goto(`${address}/#/jobs/ftjob-000000000000000000000000`);
await dark.locator(".failure", { hasText: "No such fine-tuning job" }).waitFor();
await dark.goto(`${address}/#/nowhere`);
await dark.locator(".failure", { hasText: "There is nothing at this address" }).waitFor();

console.log(JSON.stringify({ job, archive }));
await browser.close();
