// Runs ONNX files in onnxruntime-web (WASM) for qdeploy: answers, and judges nothing.
//
// The messages are those of agent.py: 8 bytes of length, a header in JSON, and "bytes" bytes of
// payload. `node agent.mjs PACKAGE [BROWSER]`, PACKAGE being the folder of onnxruntime-web. With
// BROWSER, a command that starts one of Chromium's kind, requests are handed on to a page in it.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { dirname, resolve } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { actions, failure } from "./wasm.mjs";

for (const said of ["log", "info", "warn", "debug"]) console[said] = console.error;
const folder = resolve(process.argv[2]);
const { version } = JSON.parse(readFileSync(`${folder}/package.json`));

async function inNode() {
  const web = await import(pathToFileURL(`${folder}/dist/ort.wasm.min.mjs`));
  web.env.wasm.numThreads = 1;
  web.env.wasm.wasmPaths = `${pathToFileURL(`${folder}/dist`)}/`;
  web.env.logLevel = "fatal";
  const digest = (data) => createHash("sha256").update(data).digest("hex");
  const does = actions(web, { version, place: { node: process.version }, digest });
  return async (header, payload) => does[header.do](header, payload);
}

async function inBrowser(command) {
  const { Page } = await import("./browser.mjs");
  const page = new Page(command, folder, dirname(fileURLToPath(import.meta.url)), version);
  return (header, payload) => page.ask(header, payload);
}

function send(header, payload = new Uint8Array()) {
  const text = Buffer.from(JSON.stringify({ ...header, bytes: payload.length }));
  const start = Buffer.alloc(8);
  start.writeBigUInt64BE(BigInt(text.length));
  process.stdout.write(Buffer.concat([start, text, payload]));
}

// What has come in, as chunks: a model may come in many.
let chunks = [];
let held = 0;
const reader = process.stdin[Symbol.asyncIterator]();
async function read(count) {
  while (held < count) {
    const { value, done } = await reader.next();
    if (done) return null;
    chunks.push(value);
    held += value.length;
  }
  const all = chunks.length === 1 ? chunks[0] : Buffer.concat(chunks);
  chunks = all.length > count ? [all.subarray(count)] : [];
  held = all.length - count;
  return all.subarray(0, count);
}

const ask = await (process.argv[3] ? inBrowser(process.argv[3]) : inNode());
for (;;) {
  const start = await read(8);
  if (start === null) break;
  const text = await read(Number(start.readBigUInt64BE()));
  const header = text === null ? null : JSON.parse(text);
  const payload = header === null ? null : await read(header.bytes);
  if (payload === null) break;
  try {
    send(...(await ask(header, payload)));
  } catch (error) {
    send(failure(error));
  }
}
process.exit(0);
