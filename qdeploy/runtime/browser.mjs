// A page in a headless browser that runs ONNX files, and the server on this machine alone that it
// talks to. Nothing else is served, and only to who knows the page's address, which is random.

import { spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { createReadStream, existsSync, mkdtempSync, rmSync } from "node:fs";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";

const LONGEST_START = 120_000; // milliseconds until the page asks for its first request
const TYPES = { mjs: "text/javascript", wasm: "application/wasm", html: "text/html" };
const PAGE = (version) => `<!doctype html><title>onnxruntime-web</title><script type="module">
import { actions, failure } from "./wasm.mjs";
const hex = (bytes) => [...new Uint8Array(bytes)].map((b) => b.toString(16).padStart(2, "0")).join("");
const digest = async (data) => hex(await crypto.subtle.digest("SHA-256", data));
let does;
try {
  const web = await import("./dist/ort.wasm.min.mjs");
  web.env.wasm.numThreads = 1;
  web.env.wasm.wasmPaths = new URL("./dist/", location).href;
  web.env.logLevel = "fatal";
  const place = { browser: navigator.userAgent };
  does = actions(web, { version: ${JSON.stringify(version)}, place, digest });
} catch (error) {
  does = new Proxy({}, { get: () => () => { throw error; } });
}
for (let said = null; ; ) {
  const asked = await fetch("./next", { method: "POST", body: said });
  const header = JSON.parse(asked.headers.get("x-header"));
  const payload = new Uint8Array(await asked.arrayBuffer());
  let found;
  try {
    found = await does[header.do](header, payload);
  } catch (error) {
    found = [failure(error)];
  }
  const text = new TextEncoder().encode(JSON.stringify(found[0]));
  const length = new Uint32Array([text.length]);
  said = new Blob([length, text, found[1] ?? new Uint8Array()]);
}
</script>`;

export class Page {
  #waiting = []; // requests, until the page asks
  #asking = null; // the page, until there is a request
  #answer = null; // who waits for what the page says
  #here = false;

  constructor(command, folder, own, version) {
    this.folder = folder;
    this.own = own;
    this.version = version;
    this.path = `/${randomBytes(16).toString("hex")}/`;
    this.profile = mkdtempSync(join(tmpdir(), "qdeploy-browser-"));
    const server = createServer((request, reply) => this.#serve(request, reply));
    server.listen(0, "127.0.0.1", () => this.#start(command, server.address().port));
    process.on("exit", () => this.#end());
    for (const signal of ["SIGTERM", "SIGINT", "SIGHUP"]) process.on(signal, () => process.exit(1));
  }

  // What the page answers to a request.
  ask(header, payload) {
    return new Promise((resolve, reject) => {
      this.#answer = { resolve, reject };
      this.#waiting.push([header, payload]);
      this.#hand();
    });
  }

  #start(command, port) {
    const flags = ["--headless=new", "--disable-gpu", "--no-first-run", "--mute-audio",
      "--disable-extensions", "--disable-background-networking", "--remote-debugging-pipe", `--user-data-dir=${this.profile}`];
    if (process.getuid?.() === 0) flags.push("--no-sandbox"); // Chromium does not start otherwise
    const url = `http://127.0.0.1:${port}${this.path}`;
    // It ends with the pipe to it, however this process ends.
    const stdio = ["ignore", "ignore", "ignore", "pipe", "pipe"];
    this.browser = spawn(command, [...flags, url], { stdio });
    for (const pipe of this.browser.stdio.slice(3)) pipe.on("error", () => {});
    this.browser.on("error", (error) => this.#lost(`${command}: ${error.code ?? error.message}`));
    this.browser.on("exit", (code, signal) => this.#lost(`the browser ended (${code ?? signal})`));
    setTimeout(() => this.#here || this.#lost("the browser does not open the page"), LONGEST_START).unref();
  }

  #lost(why) {
    console.error(why);
    process.exit(1);
  }

  #end() {
    this.browser?.kill("SIGKILL");
    rmSync(this.profile, { recursive: true, force: true, maxRetries: 3 });
  }

  #serve(request, reply) {
    const name = request.url.startsWith(this.path) ? request.url.slice(this.path.length) : null;
    if (name === "next" && request.method === "POST") return this.#next(request, reply);
    if (name === "") return reply.setHeader("content-type", TYPES.html).end(PAGE(this.version));
    if (name === "wasm.mjs") return this.#file(join(this.own, name), reply);
    const asset = name?.startsWith("dist/") ? basename(name) : null;
    if (asset && name === `dist/${asset}`) return this.#file(join(this.folder, "dist", asset), reply);
    return reply.writeHead(404).end();
  }

  #file(path, reply) {
    if (!existsSync(path)) return reply.writeHead(404).end();
    reply.setHeader("content-type", TYPES[path.split(".").pop()] ?? "application/octet-stream");
    return createReadStream(path).pipe(reply);
  }

  async #next(request, reply) {
    const chunks = [];
    for await (const chunk of request) chunks.push(chunk);
    const said = Buffer.concat(chunks);
    this.#here = true;
    if (said.length) {
      const length = said.readUInt32LE();
      const header = JSON.parse(said.subarray(4, 4 + length));
      this.#answer.resolve([header, said.subarray(4 + length)]);
    }
    this.#asking = reply;
    this.#hand();
  }

  #hand() {
    if (this.#asking === null || !this.#waiting.length) return;
    const [header, payload] = this.#waiting.shift();
    const reply = this.#asking;
    this.#asking = null;
    reply.writeHead(200, { "x-header": JSON.stringify(header), "content-length": payload.length });
    reply.end(payload);
  }
}
