"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const TOKENS = DATA.tokens;
const T = TOKENS.length;
const NAMES = { pos: "softmax(Q₁K₁ᵀ)", neg: "λ · softmax(Q₂K₂ᵀ)", diff: "difference: what is used" };

/* Numbers. */

function bytesOf(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes.buffer;
}

function halfToFloat(half) {
  const sign = half & 0x8000 ? -1 : 1;
  const exponent = (half >> 10) & 31;
  const fraction = half & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -14 * (fraction / 1024);
}

/** The float32 numbers of a base64 text of float32 or float16. */
function numbersOf(text, dtype) {
  const buffer = bytesOf(text);
  if (dtype === "float32") return new Float32Array(buffer);
  return Float32Array.from(new Uint16Array(buffer), halfToFloat);
}

/**
 * softmax(scale · Q Kᵀ) of one map and head, causal; q of (T, heads, width) and behind it (T, noise_heads, width), k of
 * (maps, T, groups, width). The head is one of the output heads, or of the noise heads.
 */
function softmaxMap(model, q, k, map, head) {
  const { groups, width, scale } = model;
  const heads = map ? model.noise_heads : model.heads;
  const first = map ? T * model.heads * width : 0;
  const keys = k.length / (T * groups * width);
  const group = Math.floor((head * groups) / heads);
  const weights = new Float32Array(T * T);
  const key = new Float32Array(T * width);
  for (let t = 0; t < T; t++) {
    const from = (((keys > 1 ? map : 0) * T + t) * groups + group) * width;
    key.set(k.subarray(from, from + width), t * width);
  }
  for (let t = 0; t < T; t++) {
    const from = first + (t * heads + head) * width;
    softmaxRow(q.subarray(from, from + width), key, t + 1, scale, weights.subarray(t * T, t * T + t + 1));
  }
  return weights;
}

/** The signal heads that share a noise head. */
function sharing(model) {
  return model.noise_heads ? model.heads / model.noise_heads : 1;
}

/**
 * pos, and for a differential model neg (times λ), diff and λ per token; where several heads share a noise head, the
 * first map of each as signal0, signal1, …; of the last few heads kept.
 */
const kept = new Map();
function mapsOf(index, layerIndex, head) {
  const name = `${index} ${layerIndex} ${head}`;
  if (kept.has(name)) return kept.get(name);
  const model = DATA.models[index];
  const layer = model.layers[layerIndex];
  layer.numbers ??= { q: numbersOf(layer.queries, model.dtype), k: numbersOf(layer.keys, model.dtype) };
  const { q, k } = layer.numbers;
  const found = { pos: softmaxMap(model, q, k, 0, head) };
  if (layer.lam !== null) {
    const lam = numbersOf(layer.lam, "float32");
    const perToken = lam.length > model.heads;
    found.lam = Float32Array.from({ length: perToken ? T : 1 }, (_, t) => lam[t * model.heads + head]);
    const shared = sharing(model);
    const group = Math.floor(head / shared);
    const neg = softmaxMap(model, q, k, 1, group);
    for (let i = 0; shared > 1 && i < shared; i++) {
      const other = group * shared + i;
      found[`signal${i}`] = other === head ? found.pos : softmaxMap(model, q, k, 0, other);
    }
    found.diff = new Float32Array(T * T);
    for (let t = 0; t < T; t++) {
      const factor = found.lam[perToken ? t : 0];
      for (let s = 0; s <= t; s++) {
        neg[t * T + s] *= factor;
        found.diff[t * T + s] = found.pos[t * T + s] - neg[t * T + s];
      }
    }
    found.neg = neg;
  } else {
    found.diff = found.pos;
  }
  found.limit = limitOf([found.pos, found.neg, found.diff].filter(Boolean), T, T);
  kept.set(name, found);
  if (kept.size > 6) kept.delete(kept.keys().next().value);
  return found;
}

/** The share of a row on the text before and behind the answer, the first token left out; null where it is not seen. */
function noiseOf(row, query) {
  if (!DATA.answer || query < DATA.answer[1]) return null;
  let total = 0, noise = 0, answer = 0;
  row.forEach((value, s) => {
    total += value;
    if (s >= DATA.answer[0] && s < DATA.answer[1]) answer += value;
    else if (s > 0 && s < query) noise += value;
  });
  return { noise: noise / total, answer: answer / total };
}

/* The page. */

const state = { layer: 0, head: 0, query: T - 1, key: T - 1, tone: 0.5, shown: "diff" };
const controls = Object.fromEntries(["layer", "head", "tone", "shown", "query"].map((id) => [id, document.getElementById(id)]));
const views = [...document.querySelectorAll("section[data-model]")].map((section, index) => ({ section, index, canvases: {} }));

function headOf(index) {
  return Math.floor((state.head * DATA.models[index].heads) / DATA.models[0].heads);
}

function layerOf(index) {
  const layers = DATA.models[index].layers;
  return Math.min(state.layer, layers.length - 1);
}

function number(value) {
  return Math.abs(value) >= 0.001 || value === 0 ? value.toFixed(4) : value.toExponential(1);
}

function build(view) {
  const model = DATA.models[view.index];
  const differential = model.layers[0].lam !== null;
  const grid = view.section.querySelector(".maps");
  grid.classList.toggle("one", !differential);
  // The noise map that several heads share is there once, behind the first maps of all of them.
  const shared = sharing(model);
  const signals = shared > 1 ? Array.from({ length: shared }, (_, i) => `signal${i}`) : ["pos"];
  for (const name of differential ? [...signals, "neg", "diff"] : ["diff"]) {
    const figure = document.createElement("figure");
    const title = document.createElement("h3");
    title.textContent = differential ? NAMES[name] ?? NAMES.pos : "softmax(QKᵀ)";
    title.dataset.map = name;
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = Math.max(T, 420);
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${title.textContent} of ${model.name}; arrow keys move in it`);
    canvas.addEventListener("pointermove", (event) => point(canvas, event));
    canvas.addEventListener("pointerdown", (event) => point(canvas, event));
    canvas.addEventListener("keydown", move);
    figure.append(title, canvas);
    grid.append(figure);
    view.canvases[name] = canvas;
  }
  const text = view.section.querySelector(".text");
  view.words = TOKENS.map((token, index) => {
    const word = document.createElement("span");
    // A break after a space or a line's end lets the text wrap.
    word.textContent = token;
    if (DATA.answer && index >= DATA.answer[0] && index < DATA.answer[1]) word.classList.add("answer");
    word.addEventListener("click", () => choose(index, state.key));
    text.append(word, /[·↵]$/.test(token) || /^·/.test(TOKENS[index + 1] ?? "") ? document.createElement("wbr") : "");
    return word;
  });
}

function point(canvas, event) {
  const box = canvas.getBoundingClientRect();
  const at = (offset, size) => Math.max(0, Math.min(T - 1, Math.floor((offset / size) * T)));
  const query = at(event.clientY - box.top, box.height);
  choose(query, Math.min(query, at(event.clientX - box.left, box.width)));
}

function move(event) {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step) return;
  event.preventDefault();
  const far = event.shiftKey ? 10 : 1;
  const query = Math.max(0, Math.min(T - 1, state.query + far * step[0]));
  choose(query, Math.max(0, Math.min(query, state.key + far * step[1])));
}

let waiting = false;
function choose(query, key) {
  state.query = query;
  state.key = key;
  controls.query.value = query;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    for (const view of views) drawRow(view);
    say();
  });
}

function drawMaps(view) {
  const maps = mapsOf(view.index, layerOf(view.index), headOf(view.index));
  view.maps = maps;
  view.pictures = {};
  nameGroup(view);
  for (const [name, canvas] of Object.entries(view.canvases)) {
    view.pictures[name] = pictureOf(maps[name], T, T, maps.limit, state.tone, LIGHT);
    canvas.style.imageRendering = T < 400 ? "pixelated" : "auto";
  }
  const bar = view.section.querySelector(".scale canvas");
  const brush = bar.getContext("2d");
  for (let x = 0; x < bar.width; x++) {
    const value = ((x + 0.5) / bar.width) * 2 - 1;
    brush.fillStyle = `rgb(${colourOf(value, 1, state.tone, LIGHT)})`;
    brush.fillRect(x, 0, 1, bar.height);
  }
  view.section.querySelector(".low").textContent = `−${maps.limit.toPrecision(2)}`;
  view.section.querySelector(".high").textContent = `+${maps.limit.toPrecision(2)}`;
  const lambda = view.section.querySelector(".lambda");
  lambda.hidden = !(maps.lam && maps.lam.length > 1);
  if (!lambda.hidden) drawLambda(lambda, maps.lam);
}

/** Says above each map whose it is, where several heads share a noise head. */
function nameGroup(view) {
  const model = DATA.models[view.index];
  const shared = sharing(model);
  if (shared === 1) return;
  const head = headOf(view.index);
  const first = Math.floor(head / shared) * shared;
  for (const title of view.section.querySelectorAll("h3[data-map]")) {
    const map = title.dataset.map;
    if (map === "neg") title.textContent = `${NAMES.neg}, shared by heads ${first} to ${first + shared - 1}`;
    else if (map === "diff") title.textContent = `head ${head}: ${NAMES.diff}`;
    else title.textContent = `head ${first + Number(map.slice("signal".length))}: ${NAMES.pos}`;
  }
}

function drawLambda(place, lam) {
  const canvas = place.querySelector("canvas");
  canvas.width = Math.max(T, 600);
  const brush = canvas.getContext("2d");
  brush.clearRect(0, 0, canvas.width, canvas.height);
  brush.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
  const step = canvas.width / T;
  lam.forEach((value, t) => brush.fillRect(t * step, canvas.height * (1 - value), Math.max(1, step - 1), canvas.height * value));
  const [least, most] = [Math.min(...lam), Math.max(...lam)];
  canvas.setAttribute("aria-label", `λ from ${least.toFixed(3)} to ${most.toFixed(3)}`);
  place.querySelector(".caption").textContent = `From 0, the lower edge, to 1; least ${least.toFixed(3)}, most ${most.toFixed(3)}.`;
}

function drawRow(view) {
  const { query, key } = state;
  const maps = view.maps;
  for (const [name, canvas] of Object.entries(view.canvases)) {
    const brush = canvas.getContext("2d");
    const size = canvas.width / T;
    brush.imageSmoothingEnabled = T >= 400;
    brush.drawImage(view.pictures[name], 0, 0, canvas.width, canvas.height);
    brush.strokeStyle = "#1b1f24";
    brush.lineWidth = Math.max(1, canvas.width / 600);
    brush.strokeRect(0, query * size, canvas.width, Math.max(size, 1));
    brush.strokeRect(key * size, 0, Math.max(size, 1), canvas.height);
  }
  const row = (name) => maps[name].subarray(query * T, query * T + query + 1);
  const shown = maps[state.shown] ? state.shown : "diff";
  const bars = row(shown);
  // The colours of the reader's scheme, looked up once: a word has its own bar, and there are many words.
  const scheme = getComputedStyle(document.documentElement);
  const below = scheme.getPropertyValue("--c0072B2"), above = scheme.getPropertyValue("--cD55E00");
  let most = 0;
  for (const value of bars) most = Math.max(most, Math.abs(value));
  view.words.forEach((word, s) => {
    const value = s <= query ? bars[s] : 0;
    word.style.setProperty("--bar", most ? (Math.abs(value) / most) ** state.tone : 0);
    word.style.setProperty("--bar-colour", value < 0 ? below : above);
    word.style.opacity = s <= query ? 1 : 0.35;
    word.classList.toggle("query", s === query);
    word.title = s <= query ? number(value) : "";
  });
  const facts = [`Layer ${DATA.models[view.index].layers[layerOf(view.index)].layer}, head ${headOf(view.index)}.`];
  if (maps.lam) facts.push(`λ = ${maps.lam[maps.lam.length > 1 ? query : 0].toFixed(4)}.`);
  const score = (name) => {
    const noise = noiseOf(row(name), query);
    return `spread over ${spreadOf(row(name)).toFixed(1)} tokens` + (noise ? `, noise ${noise.noise.toFixed(3)}, answer ${noise.answer.toFixed(3)}` : "");
  };
  if (maps.lam) facts.push(`First map: ${score("pos")}. What is used: ${score("diff")}.`);
  else facts.push(`This row: ${score("diff")}.`);
  view.section.querySelector(".facts").textContent = facts.join(" ");
}

function say() {
  const { query, key } = state;
  const readout = document.getElementById("readout");
  readout.replaceChildren();
  readout.append(`“${TOKENS[query]}” (${query}) looks at “${TOKENS[key]}” (${key}): `);
  for (const view of views) {
    const at = query * T + key;
    const maps = view.maps;
    const part = document.createElement("span");
    part.dataset.model = view.index;
    part.dataset.pos = maps.pos[at];
    part.dataset.diff = maps.diff[at];
    let words = `${views.length > 1 ? `${DATA.models[view.index].name} ` : ""}${number(maps.pos[at])}`;
    if (maps.neg) {
      part.dataset.neg = maps.neg[at];
      words += ` − ${number(maps.neg[at])} = ${number(maps.diff[at])}`;
    }
    part.textContent = `${words}${view.index < views.length - 1 ? "; " : ""}`;
    readout.append(part);
  }
  document.getElementById("query-name").textContent = `“${TOKENS[query]}”`;
  const address = new URLSearchParams(state).toString();
  history.replaceState(null, "", `#${address}`);
}

function redraw() {
  for (const view of views) {
    drawMaps(view);
    drawRow(view);
  }
  say();
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const whole = (name, count) => {
    const value = Number(given.get(name));
    return given.has(name) && Number.isInteger(value) && value >= 0 && value < count ? value : state[name];
  };
  state.layer = whole("layer", DATA.models[0].layers.length);
  state.head = whole("head", DATA.models[0].heads);
  state.query = whole("query", T);
  state.key = Math.min(state.query, whole("key", T));
  if (["0.5", "1"].includes(given.get("tone"))) state.tone = Number(given.get("tone"));
  if (["pos", "neg", "diff"].includes(given.get("shown"))) state.shown = given.get("shown");
}

readAddress();
controls.layer.selectedIndex = state.layer;
controls.head.selectedIndex = state.head;
controls.tone.value = String(state.tone);
controls.shown.value = state.shown;
controls.query.value = state.query;
controls.layer.addEventListener("change", () => { state.layer = controls.layer.selectedIndex; redraw(); });
controls.head.addEventListener("change", () => { state.head = controls.head.selectedIndex; redraw(); });
controls.tone.addEventListener("change", () => { state.tone = Number(controls.tone.value); redraw(); });
controls.shown.addEventListener("change", () => { state.shown = controls.shown.value; redraw(); });
controls.query.addEventListener("input", () => choose(Number(controls.query.value), Math.min(state.key, Number(controls.query.value))));
for (const view of views) build(view);
redraw();
