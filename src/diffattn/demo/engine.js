/* The worker: holds the models, reads a text with each, and continues it, one token of each model in turn. */

let ort, tokenizer, models, engine;
// The text that is wanted; one that is not any more ends at its next token, and the next begins behind it.
let current = null;
let before = Promise.resolve();

onmessage = ({ data }) => {
  if (data.kind === "load") load(data).catch((error) => postMessage({ kind: "failed", reason: words(error) }));
  else current = data.run;
  if (data.kind !== "write") return;
  before = before.then(() => write(data)).catch((error) => postMessage({ kind: "stopped", run: data.run, reason: words(error) }));
};

function words(error) {
  return String(error?.message ?? error).split("\n")[0].slice(0, 300);
}

function imported(bytes) {
  return import(URL.createObjectURL(new Blob([bytes], { type: "text/javascript" })));
}

async function load({ files, facts, check, wanted }) {
  // The stand-in lets WebAssembly run, but WebGPU has to wait.
  const waits = allowWasmWithoutSuspending();
  ort = await imported(files.ort);
  ort.env.wasm.wasmBinary = files["ort-wasm"];
  // Threads would need headers that a file has not.
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = "error";
  const json = (name) => JSON.parse(new TextDecoder().decode(files[name]));
  const { Tokenizer } = await imported(files.tokenizers);
  tokenizer = new Tokenizer(json("tokenizer"), json("tokenizer-config"));
  const card = waits && (await navigator.gpu?.requestAdapter().catch(() => null));
  // A card that the processor plays is slower than the processor itself.
  engine = card && (wanted === "webgpu" || (wanted === "auto" && !card.info?.isFallbackAdapter)) ? "webgpu" : "wasm";
  let reason = "";
  try {
    models = await opened(files, facts);
  } catch (error) {
    if (engine === "wasm") throw error;
    reason = words(error);
    engine = "wasm";
    models = await opened(files, facts);
  }
  const cut = tokenizer.encode(check.text).ids;
  const same = cut.length === check.ids.length && cut.every((id, i) => id === check.ids[i]);
  postMessage({ kind: "ready", engine, webgpu: Boolean(card), reason, same });
}

async function opened(files, facts) {
  const found = [];
  for (const model of facts) {
    const options = { executionProviders: [engine], logSeverityLevel: 3 };
    if (engine === "webgpu") options.preferredOutputLocation = places(model);
    const session = await ort.InferenceSession.create(files[model.blob], options);
    const past = session.inputMetadata.filter((input) => input.name.startsWith("past_key_values."));
    found.push({ ...model, session, past, extra: session.outputNames.filter((name) => name.startsWith("maps.")) });
  }
  // The first pass prepares what every later one uses; that a card can do it all is seen here.
  for (const model of found) await step(model, { past: null, length: 0 }, [0]);
  return found;
}

/** What stays on the card: the values of the cache, since maps are made of its keys. */
function places(model) {
  return Object.fromEntries(model.layers.map((layer) => [`present.${layer}.value`, "gpu-buffer"]));
}

function whole(numbers) {
  return new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [1, numbers.length]);
}

/** One pass of a model over new tokens; the cache in `text` is replaced by the longer one. */
async function step(model, text, fresh) {
  const total = text.length + fresh.length;
  const feeds = {
    input_ids: whole(fresh),
    attention_mask: whole(new Array(total).fill(1)),
    position_ids: whole(fresh.map((_, i) => text.length + i)),
  };
  for (const { name, shape } of model.past) {
    feeds[name] = text.past?.[name.replace("past_key_values", "present")] ?? new ort.Tensor("float32", [], [1, shape[1], 0, shape[3]]);
  }
  const found = await model.session.run(feeds);
  for (const tensor of Object.values(text.past ?? {})) tensor.dispose();
  text.past = {};
  text.bytes = 0;
  for (const { name } of model.past) {
    const present = name.replace("past_key_values", "present");
    text.past[present] = found[present];
    text.bytes += 4 * found[present].size;
  }
  text.length = total;
  const vocabulary = found.logits.dims[2];
  return { logits: found.logits.data.slice(-vocabulary), reads: reads(model, found, fresh.length, total) };
}

/** The numbers of the new tokens that maps are made of, by layer: queries, λ and keys, as docs/export.md lays them out. */
function reads(model, found, count, total) {
  return model.layers.map((layer) => {
    const keys = found[`present.${layer}.key`];
    const [, groups, , width] = keys.dims;
    const fresh = new Float32Array(groups * count * width);
    for (let group = 0; group < groups; group++) {
      const end = (group + 1) * total * width;
      fresh.set(keys.data.subarray(end - count * width, end), group * count * width);
    }
    return { queries: found[`maps.${layer}.query`].data, lam: found[`maps.${layer}.lambda`]?.data ?? null, keys: fresh };
  });
}

/** The likeliest token, or one drawn where the temperature is above 0. */
function chosen(logits, temperature) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (!temperature) return best;
  const weights = logits.map((value) => Math.exp((value - logits[best]) / temperature));
  let left = Math.random() * weights.reduce((sum, weight) => sum + weight, 0);
  return Math.max(0, weights.findIndex((weight) => (left -= weight) < 0));
}

function decoded(ids) {
  return tokenizer.decode(ids, { skip_special_tokens: false });
}

/** Lets messages in, such as the one to stop: awaiting a pass alone does not. */
function pause() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => { port1.close(); resolve(); };
    port2.postMessage(0);
  });
}

async function write({ run, text, most, temperature, context }) {
  const { ids } = tokenizer.encode(text);
  if (!ids.length || ids.length > context) {
    const reason = ids.length ? `The text has ${ids.length} tokens; these models read at most ${context}. Please shorten it.` : "There is no text yet. Please write a few words first.";
    postMessage({ kind: "stopped", run, reason });
    return;
  }
  const room = Math.min(most, context - ids.length + 1);
  // Where each token ends in the text, in characters; one that ends within a character ends behind it.
  const ends = ids.map((_, i) => decoded(ids.slice(0, i + 1)).length);
  postMessage({ kind: "read", run, ids, tokens: ids.map((id) => decoded([id])), ends, room });
  const texts = models.map(() => ({ past: null, length: 0, written: [], ended: false }));
  for (let i = 0; i < room; i++) {
    for (const [index, model] of models.entries()) {
      const own = texts[index];
      if (own.ended || current !== run) continue;
      const began = performance.now();
      const { logits, reads } = await step(model, own, i ? own.written.slice(-1) : ids);
      const id = chosen(logits, temperature);
      const seconds = (performance.now() - began) / 1000;
      own.written.push(id);
      own.ended = model.stop.includes(id);
      postMessage({ kind: "step", run, index, id, token: decoded([id]), reads, seconds, bytes: own.bytes });
      await pause();
    }
  }
  for (const own of texts) for (const tensor of Object.values(own.past ?? {})) tensor.dispose();
  postMessage({ kind: "done", run, whole: current === run });
}
