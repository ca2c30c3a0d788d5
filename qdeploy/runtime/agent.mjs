// Runs ONNX files in onnxruntime-web (WASM) for qdeploy: answers, and judges nothing.
//
// The messages are those of agent.py: 8 bytes of length, a header in JSON, and "bytes" bytes of
// payload. `node agent.mjs PACKAGE`, PACKAGE being the folder of onnxruntime-web.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const VERSION = 1;
for (const said of ["log", "info", "warn", "debug"]) console[said] = console.error;
const folder = resolve(process.argv[2]);
const { version } = JSON.parse(readFileSync(`${folder}/package.json`));
const web = await import(pathToFileURL(`${folder}/dist/ort.wasm.min.mjs`));
web.env.wasm.numThreads = 1;
web.env.wasm.wasmPaths = `${pathToFileURL(`${folder}/dist`)}/`;
web.env.logLevel = "fatal";

const digest = (data) => createHash("sha256").update(data).digest("hex");
let session = null;
let opened = null;

const does = {
  hello: () => [{ agent: VERSION, onnxruntime: version, machine: "wasm", node: process.version }],
  have: () => [{ have: false }],
  async open({ sha256, optimizations }, payload) {
    if (digest(payload) !== sha256) throw new Error("the model is not the one that was announced");
    session = await web.InferenceSession.create(payload, {
      executionProviders: ["wasm"],
      graphOptimizationLevel: optimizations === "off" ? "disabled" : "all",
      logSeverityLevel: 4,
    });
    opened = sha256;
    const inputs = session.inputMetadata.map((one) => ({
      name: one.name,
      shape: one.shape,
      type: `tensor(${one.type === "float32" ? "float" : one.type})`,
    }));
    return [{ inputs, outputs: session.outputNames.length }];
  },
  async run({ model, shape }, payload) {
    if (session === null || opened !== model) throw new Error("that model is not open");
    const end = payload.byteOffset + payload.length;
    const values = new Float32Array(payload.buffer.slice(payload.byteOffset, end));
    const tensor = new web.Tensor("float32", values, shape);
    const started = performance.now();
    const found = (await session.run({ [session.inputNames[0]]: tensor }))[session.outputNames[0]];
    const seconds = (performance.now() - started) / 1000;
    const header = { model: opened, inputs: digest(payload), shape: found.dims, seconds };
    return [header, Buffer.from(Float32Array.from(found.data).buffer)];
  },
};

function send(header, payload = Buffer.alloc(0)) {
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

for (;;) {
  const start = await read(8);
  if (start === null) break;
  const text = await read(Number(start.readBigUInt64BE()));
  const header = text === null ? null : JSON.parse(text);
  const payload = header === null ? null : await read(header.bytes);
  if (payload === null) break;
  try {
    send(...(await does[header.do](header, payload)));
  } catch (error) {
    send({ error: String(error?.message ?? error).split("\n")[0] });
  }
}
