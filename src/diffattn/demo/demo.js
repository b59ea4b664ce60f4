"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { run: 0, writing: false, prompt: null, query: null, key: null };
document.body.classList.toggle("alone", DATA.models.length === 1);

/* Words. */

function bytes(count) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; count >= 1000 && unit < units.length - 1; unit++) count /= 1000;
  return `${count >= 100 || unit === 0 ? Math.round(count) : count.toPrecision(2)} ${units[unit]}`;
}

function percent(share) {
  return `${(100 * share).toFixed(Math.abs(share) < 0.0995 ? 1 : 0)}%`;
}

function titleOf(model) {
  if (model.noise_heads) return "Differential Transformer";
  return model.attention === "softmax" ? "Ordinary Transformer" : model.attention;
}

function say(text, kind) {
  $("state").textContent = text;
  $("state").dataset.state = kind;
}

/* The views: one of each model. */

const views = DATA.models.map((model, index) => {
  const place = (template, into) => {
    const part = $(template).content.firstElementChild.cloneNode(true);
    part.dataset.model = index;
    part.style.setProperty("--mark", model.noise_heads ? "var(--up)" : "var(--muted)");
    part.querySelector(".title").textContent = titleOf(model);
    $(into).append(part);
    return part;
  };
  const view = { model, index, card: place("card", "cards"), lens: place("lens", "lenses"), words: [], labels: [], total: 0, canvases: {} };
  view.card.querySelector(".name").textContent = `${model.name}, ${(model.parameters / 1e6).toPrecision(3)} million weights`;
  number(view, "weights", bytes(model.weight_bytes));
  buildLens(view);
  return view;
});

function number(view, name, text) {
  view.card.querySelector(`[data-number="${name}"]`).textContent = text;
}

function buildLens(view) {
  const { model, lens } = view;
  const differential = model.noise_heads > 0;
  lens.querySelector(".what").textContent = differential
    ? "The first look is meant to find what matters, and finds noise too; the second is meant to learn the noise, and λ says how much of it is taken away. What is left is used. In small models that we studied, the second look often found the number instead: blue is worth a look too."
    : "One look, and all of it is used: there is no second look to take the noise away.";
  const parts = differential
    ? [["found", "First look", "signal and noise"], ["taken", "λ × second look", "taken away"], ["used", "What is used", "first look − λ × second look"]]
    : [["used", "The only look", "all of it is used"]];
  const sums = lens.querySelector(".sums");
  lens.classList.toggle("single", !differential);
  parts.forEach(([name, title, more], i) => {
    if (i) {
      const sign = document.createElement("div");
      sign.className = "sign";
      sign.textContent = i === 1 ? "−" : "=";
      sums.append(sign);
    }
    const figure = document.createElement("figure");
    const head = document.createElement("h4");
    const small = document.createElement("small");
    small.textContent = more;
    small.dataset.map = name;
    head.append(title, small);
    const canvas = document.createElement("canvas");
    canvas.tabIndex = 0;
    canvas.dataset.map = name;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${title} of the ${titleOf(model)}; arrow keys move in it`);
    for (const kind of ["pointermove", "pointerdown"]) canvas.addEventListener(kind, (event) => point(view, canvas, event));
    canvas.addEventListener("keydown", (event) => move(view, event));
    figure.append(head, canvas);
    sums.append(figure);
    view.canvases[name] = canvas;
  });
  view.layer = lens.querySelector(".layer");
  view.head = lens.querySelector(".head");
  view.layer.append(...model.layers.map((layer, i) => new Option(layer, i)));
  view.head.append(...Array.from({ length: model.heads }, (_, i) => new Option(i, i)));
  for (const control of [view.layer, view.head]) control.addEventListener("change", () => { view.maps = null; draw(view); });
}

/* Choosing a square. */

function point(view, canvas, event) {
  if (!view.maps) return;
  const box = canvas.getBoundingClientRect();
  const side = sideOf(canvas);
  const at = (offset) => Math.max(0, Math.floor((offset / side) * view.total));
  choose(at(event.clientY - box.top), at(event.clientX - box.left), view);
}

function move(view, event) {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step || !view.maps) return;
  event.preventDefault();
  const far = event.shiftKey ? 10 : 1;
  const { query, key } = shown(view);
  choose(query + far * step[0], key + far * step[1], view);
}

/** Looks at one square, in all models alike. */
function choose(query, key, view) {
  state.query = Math.max(0, Math.min(view.room.count - 1, query));
  state.key = Math.max(0, Math.min(state.query, key));
  for (const each of views) draw(each);
}

/** The square that a view shows: what was chosen, or the newest token and the one that it looks at most. */
function shown(view) {
  const last = view.room.count - 1;
  const query = Math.min(last, state.query ?? last);
  if (state.key !== null) return { query, key: Math.min(query, state.key) };
  const row = rowOf(view.maps, "used", query);
  // The first token is where a head looks that has nothing to look at.
  let key = Math.min(1, query);
  for (let s = key; s <= query; s++) if (row[s] > row[key]) key = s;
  return { query, key };
}

/* Drawing. */

const due = new Set();
function draw(view) {
  if (!view.room?.count) return;
  if (!due.size) requestAnimationFrame(() => { for (const each of due) drawNow(each); due.clear(); readOut(); });
  due.add(view);
}

function drawNow(view) {
  const { model, room } = view;
  view.maps ??= emptyMaps(model, room.capacity);
  growMaps(model, room, view.maps, Number(view.layer.value), Number(view.head.value));
  const { query, key } = shown(view);
  for (const [name, canvas] of Object.entries(view.canvases)) drawMap(canvas, view.maps, name, view.labels, view.total, query, state.key === null ? null : key, view.answer);
  drawBars(view, query);
  drawShare(view);
  const spread = (name) => `${spreadOf(rowOf(view.maps, name, query)).toFixed(1)} tokens`;
  view.lens.querySelector(".facts").textContent = view.maps.taken
    ? `From “${view.labels[query]}” the first look is spread over ${spread("found")}, what is used over ${spread("used")}.`
    : `From “${view.labels[query]}” the look is spread over ${spread("used")}.`;
  const lambda = view.lens.querySelector(".lambda");
  const lam = view.maps.lam;
  lambda.hidden = !lam.length;
  if (lambda.hidden) return;
  const [least, most] = [Math.min(...lam), Math.max(...lam)];
  lambda.querySelector("canvas").hidden = least === most;
  lambda.querySelector(".caption").textContent = least === most
    ? `λ = ${least.toFixed(2)} for every token: this model learned one for the whole layer.`
    : `From 0, the lower edge, to 1: least ${least.toFixed(2)}, most ${most.toFixed(2)}; ${lam[query].toFixed(2)} for “${view.labels[query]}”.`;
  if (least !== most) drawLambda(lambda.querySelector("canvas"), lam, view.total);
}

function drawBars(view, query) {
  const row = rowOf(view.maps, "used", query);
  // Many heads rest on the first token, whose bar would make all others small.
  let most = 0;
  for (const value of row.length > 1 ? row.subarray(1) : row) most = Math.max(most, Math.abs(value));
  view.words.forEach((word, s) => {
    const value = row[s] ?? 0;
    word.style.setProperty("--bar", most ? Math.min(1, Math.abs(value) / most) : 0);
    word.style.setProperty("--bar-colour", value < 0 ? "var(--down)" : "var(--up)");
    word.classList.toggle("asks", s === query);
    word.classList.toggle("later", s > query && s < view.room.count);
    word.title = s <= query ? percent(value) : "";
  });
}

/** How much of the look at the end of the given text lies on the answer. */
function drawShare(view) {
  const place = view.card.querySelector(".share");
  place.hidden = !view.answer;
  if (place.hidden) return;
  const row = rowOf(view.maps, "used", view.given - 1);
  const share = shareOf(row, view.answer);
  place.dataset.share = share;
  const strong = document.createElement("b");
  strong.textContent = percent(share);
  const strip = document.createElement("span");
  strip.className = "strip";
  strip.setAttribute("aria-hidden", "true");
  const part = document.createElement("i");
  part.style.width = percent(share);
  strip.append(part);
  place.replaceChildren(strong, ` of the look at the end of the text is on ${state.prompt.answer}; the rest is elsewhere.`, strip);
}

function readOut() {
  // A text that is being written would be read out without end.
  $("readout").setAttribute("aria-live", state.writing ? "off" : "polite");
  $("readout").replaceChildren(...views.filter((view) => view.maps).map((view) => {
    const { query, key } = shown(view);
    const at = query * view.maps.stride + key;
    const part = document.createElement("span");
    Object.assign(part.dataset, { model: view.index, query, key, used: view.maps.used[at] });
    const sum = view.maps.taken ? `${percent(view.maps.found[at])} − ${percent(-view.maps.taken[at])} = ${percent(view.maps.used[at])}` : percent(view.maps.used[at]);
    part.textContent = `${titleOf(view.model)}: “${view.labels[query]}” looks at “${view.labels[key]}”: ${sum}`;
    return part;
  }));
}

/* The text. */

function addWord(view, token, kind) {
  const word = document.createElement("span");
  const s = view.words.length;
  word.textContent = token.replaceAll("\n", "↵\n");
  if (kind) word.classList.add(kind);
  word.addEventListener("click", () => { if (s < view.room.count) { state.query = s; state.key = null; for (const each of views) draw(each); } });
  view.card.querySelector(".text").append(word);
  view.words.push(word);
  view.labels.push(token.replaceAll(" ", "·").replaceAll("\n", "↵"));
}

/** The tokens that hold a part of the text, from the places where tokens end. */
function tokensOf(text, part, ends) {
  const start = part ? text.indexOf(part) : -1;
  if (start < 0) return null;
  const holding = ends.map((end, i) => [i ? ends[i - 1] : 0, end]).map(([from, to]) => from < start + part.length && to > start);
  return [holding.indexOf(true), holding.lastIndexOf(true) + 1];
}

function begin({ tokens, ends, ids, room }) {
  Object.assign(state, { query: null, key: null });
  for (const view of views) {
    Object.assign(view, { words: [], labels: [], maps: null, given: ids.length, total: ids.length + room - 1, first: 0, spent: 0, steps: 0 });
    view.room = roomFor(view.model, view.total);
    view.answer = tokensOf(state.text, state.prompt?.answer, ends);
    view.card.querySelector(".text").replaceChildren();
    tokens.forEach((token, i) => addWord(view, token, view.answer && i >= view.answer[0] && i < view.answer[1] ? "answer" : null));
  }
}

function grow({ index, token, reads, seconds, bytes: cache }) {
  const view = views[index];
  takeIn(view.model, view.room, reads, view.steps ? 1 : view.given);
  addWord(view, token, "new");
  if (view.steps++) view.spent += seconds;
  else view.first = seconds;
  number(view, "first", `${view.first.toFixed(2)} s`);
  if (view.spent) number(view, "speed", `${((view.steps - 1) / view.spent).toFixed(0)} tokens/s`);
  number(view, "cache", bytes(cache));
  draw(view);
}

/* The engine. */

let engine = null, files = null;

async function start(wanted) {
  engine?.terminate();
  engine = new Worker(URL.createObjectURL(new Blob([$("worker").textContent], { type: "text/javascript" })));
  engine.onmessage = ({ data }) => hear(data);
  engine.onerror = (event) => say(`The models cannot be started: ${event.message}.`, "failed");
  engine.postMessage({ kind: "load", files, facts: DATA.models, check: DATA.check, wanted });
  busy(true);
  $("write").disabled = true;
}

function hear(message) {
  if (message.run !== undefined && message.run !== state.run) return;
  ({ ready, failed, read: begin, step: grow, stopped, done })[message.kind](message);
}

const ENGINES = { wasm: "WebAssembly, on one thread of the processor", webgpu: "WebGPU, on the graphics card" };

function ready({ engine: name, webgpu, reason, same }) {
  for (const radio of document.querySelectorAll("[name=engine]")) {
    radio.checked = radio.value === name;
    radio.disabled = radio.value === "webgpu" && !webgpu;
  }
  const notes = [reason && ` WebGPU failed here (${reason}).`, !same && " Unusual letters are cut into other tokens here than where the models were trained."];
  state.idle = `Ready: runs on ${ENGINES[name]}.${notes.filter(Boolean).join("")}`;
  $("state").dataset.engine = name;
  // The maps of the text are there before anybody has pressed a key.
  write(1);
}

function failed({ reason }) {
  say(`The models cannot be started in this browser: ${reason}.`, "failed");
}

function write(most) {
  state.run++;
  state.text = $("text").value;
  engine.postMessage({ kind: "write", run: state.run, text: state.text, most, temperature: Number($("chance").value), context: DATA.context });
  busy(true);
  say("Reading the text …", "busy");
}

function busy(on) {
  state.writing = on;
  $("write").disabled = false;
  $("stop").disabled = !on;
}

function stopped({ reason }) {
  busy(false);
  say(reason, "failed");
}

function done() {
  busy(false);
  say(state.idle, "ready");
  for (const view of views) draw(view);
}

/* The controls. */

function choosePrompt(prompt) {
  state.prompt = prompt;
  $("text").value = prompt.text;
  for (const button of $("prompts").children) button.setAttribute("aria-pressed", button.textContent === prompt.title);
  for (const [i, view] of views.entries()) {
    const { layer, head } = prompt.heads[i];
    view.layer.value = String(view.model.layers.indexOf(layer));
    view.head.value = String(head);
  }
  $("sought").textContent = prompt.answer ?? "what matters";
}

for (const prompt of DATA.prompts) {
  const button = document.createElement("button");
  button.textContent = prompt.title;
  button.addEventListener("click", () => { choosePrompt(prompt); if (files && $("state").dataset.engine) write(1); });
  $("prompts").append(button);
}
$("write").addEventListener("click", () => write(Number($("most").value)));
$("stop").addEventListener("click", () => { engine.postMessage({ kind: "stop", run: null }); });
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("write").disabled) write(Number($("most").value));
});
for (const radio of document.querySelectorAll("[name=engine]")) {
  radio.addEventListener("change", () => { say("Starting the other engine …", "busy"); start(radio.value); });
}
dark.addEventListener("change", () => { for (const view of views) draw(view); });
new ResizeObserver(() => { for (const view of views) draw(view); }).observe($("lenses"));

/* About the page. */

for (const { name, version, licence, blob } of DATA.packages) {
  const part = document.createElement("details");
  const title = document.createElement("summary");
  title.textContent = `${name} ${version}, licence ${licence}`;
  const text = document.createElement("pre");
  part.append(title, text);
  part.addEventListener("toggle", async () => { text.textContent ||= new TextDecoder().decode(await unpack(blob)); });
  $("licences").append(part);
}
$("command").textContent = DATA.command;

/** The bytes of a module that uses one SIMD instruction: a browser without SIMD does not take it for one. */
const SIMD = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];

async function open() {
  if (DATA.prompts.length) choosePrompt(DATA.prompts[0]);
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(new Uint8Array(SIMD)) || typeof DecompressionStream === "undefined") {
    say("This browser cannot run the models: it has no WebAssembly with SIMD. Please open the page in Chrome, Edge or Firefox of 2023 or later, or Safari 16.4 or later.", "failed");
    return;
  }
  const licences = new Set(DATA.packages.map((each) => each.blob));
  const names = [...document.querySelectorAll("script[id^='blob-']")].map((element) => element.id.slice("blob-".length)).filter((name) => !licences.has(name));
  const found = await Promise.all(names.map(unpack));
  files = Object.fromEntries(names.map((name, i) => [name, found[i]]));
  say("Starting the models …", "busy");
  await start("auto");
}

open().catch((error) => failed({ reason: error.message }));
