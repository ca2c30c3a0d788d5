// What onnxruntime-web does when it is asked, in node and in browsers alike; it judges nothing.
//
// `actions` gives a function for every request of agent.py's messages, which takes its header and
// its payload and gives a header and, where there is one, a payload.

export function actions(web, { version, place, digest }) {
  let session = null;
  let opened = null;
  return {
    hello: () => [{ agent: 1, onnxruntime: version, machine: "wasm", ...place }],
    have: () => [{ have: false }],
    async open({ sha256, optimizations }, payload) {
      if ((await digest(payload)) !== sha256)
        throw new Error("the model is not the one that was announced");
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
      const found = (await session.run({ [session.inputNames[0]]: tensor }))[
        session.outputNames[0]
      ];
      const seconds = (performance.now() - started) / 1000;
      const header = { model: opened, inputs: await digest(payload), shape: found.dims, seconds };
      return [header, new Uint8Array(Float32Array.from(found.data).buffer)];
    },
  };
}

// One line for whatever went wrong.
export const failure = (error) => ({ error: String(error?.message ?? error).split("\n")[0] });
