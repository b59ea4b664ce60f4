"use strict";

/* Arithmetic: every quantity is a polynomial in the batch B and the context T, solved for by Python. */

/** [denominator, then the coefficients of 1, B, T, B·T, B·T²] at a batch and a context. */
function poly([denominator, one, b, t, bt, btt], batch, context) {
  return (one + b * batch + t * context + bt * batch * context + btt * batch * context * context) / denominator;
}

/* Numbers for people, as format.py writes them. */

/** Fixed digits; a tie goes to the even digit, as in Python. */
function fixed(value, digits) {
  const shifted = value * 10 ** digits;
  if ((value * 8) % 1 === 0 && Math.abs(shifted % 1) === 0.5) {
    return (2 * Math.round(shifted / 2) / 10 ** digits).toFixed(digits);
  }
  return value.toFixed(digits);
}

function digitsOf(scaled) {
  if (Math.abs(Number(fixed(scaled, 1))) >= 100) return 0;
  return Math.abs(Number(fixed(scaled, 2))) >= 10 ? 1 : 2;
}

function plain(value, scale) {
  const scaled = value / scale;
  if (scaled === Number(fixed(scaled, Math.abs(scaled) >= 100 ? 0 : 1))) return fixed(scaled, 1).replace(/\.0$/, "");
  return fixed(scaled, digitsOf(scaled));
}

function scaledBy(value, base, prefixes) {
  let scale = 1;
  for (const prefix of prefixes.slice(0, -1)) {
    const scaled = Math.abs(value) / scale;
    if (Number(fixed(scaled, digitsOf(scaled))) < base) return `${plain(value, scale)} ${prefix}`.trim();
    scale *= base;
  }
  return `${plain(value, scale)} ${prefixes.at(-1)}`;
}

function seconds(value) {
  if (Math.abs(value) < 1) return scaledBy(value * 1e6, 1000, ["µs", "ms", "s"]);
  if (Number(fixed(value, digitsOf(value))) < 60) return `${plain(value, 1)} s`;
  const whole = Number(fixed(value, 0)), minutes = (whole - (whole % 60)) / 60;
  if (minutes < 60) return `${minutes} min ${String(whole % 60).padStart(2, "0")} s`;
  return `${(minutes - (minutes % 60)) / 60} h ${String(minutes % 60).padStart(2, "0")} min`;
}

function exact(value) {
  if (value === null || value === undefined) return "–";
  return Number.isInteger(value) ? value.toLocaleString("en-US") : String(value);
}

const WRITE = {
  size: (value) => scaledBy(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]),
  count: (value) => scaledBy(value, 1000, ["", "k", "M", "B", "T"]),
  flops: (value) => scaledBy(value, 1000, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"]),
  whole: exact,
  seconds,
};

function written(format, value) {
  if (value === null || value === undefined) return "–";
  return Number.isFinite(value) ? WRITE[format](value) : value > 0 ? "∞" : "not a number";
}

function ratio(value, reference) {
  if (value === null || !reference) return "";
  if (value === reference) return "same";
  const quotient = value / reference;
  return `${fixed(quotient, Math.abs(quotient - 1) >= 0.005 ? 2 : 4)}×`;
}

/* Charts: text that is SVG, drawn at the width it is shown at, so that a font size is the size that is read. */

const INK = "#1b1f24", MUTED = "#57606a", GRID = "#d8dee4";

function escaped(text) {
  return String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
}

function text(x, y, words, { anchor = "start", colour = INK, size = 13, weight = 400 } = {}) {
  return `<text x="${x}" y="${y}" text-anchor="${anchor}" fill="${colour}" font-size="${size}" font-weight="${weight}">${escaped(words)}</text>`;
}

function line(x1, y1, x2, y2, colour, extra = "") {
  return `<line x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}" stroke="${colour}" ${extra}/>`;
}

function svg(width, height, alt, body) {
  return `<svg role="img" aria-label="${escaped(alt)}" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}">${body.join("")}</svg>`;
}

/** Round steps from 0 up to a largest number of bytes. */
function byteTicks(largest, wanted) {
  let step = 2 ** Math.ceil(Math.log2(largest / wanted));
  if (!(step > 0) || !Number.isFinite(step)) step = 1;
  const ticks = [];
  for (let value = 0; value <= largest; value += step) ticks.push(value);
  return ticks;
}

/** One bar for each entry, cut into its parts; beneath it what share of the machine it takes. */
function barChart(width, bars, memory) {
  const rowHeight = 58, bottom = 8 + bars.length * rowHeight;
  if (bars.every((bar) => bar.total === 0)) return svg(width, 40, "nothing to draw", [text(0, 20, "integer weights are not trained", { colour: MUTED })]);
  const largest = Math.max(...bars.map((bar) => bar.total));
  const x = (value) => (value / largest) * (width - 2) + 1;
  const body = [];
  for (const tick of byteTicks(largest, width < 500 ? 3 : 5)) {
    body.push(line(x(tick), 4, x(tick), bottom + 4, GRID));
    const anchor = tick === 0 ? "start" : x(tick) > width - 30 ? "end" : "middle";
    body.push(text(x(tick), bottom + 20, WRITE.size(tick), { anchor, colour: MUTED, size: 12 }));
  }
  bars.forEach((bar, index) => {
    const top = 8 + index * rowHeight;
    const share = memory ? `${percent(bar.total / memory)} of ${WRITE.size(memory)}` : "";
    // White beneath the words, so that the grid does not cross them.
    body.push(`<rect x="0" y="${top - 4}" width="${width}" height="23" fill="#fff"/>`);
    body.push(`<rect x="1" y="${top}" width="5" height="15" fill="${bar.colour}"/>`);
    body.push(`<text x="12" y="${top + 12}" font-size="13" fill="${INK}"><tspan font-weight="600">${escaped(bar.name)}</tspan> ${escaped(bar.label)}</text>`);
    const over = memory && bar.total > memory;
    body.push(text(width - 1, top + 12, `${WRITE.size(bar.total)}${share && `, ${share}`}`, { anchor: "end", weight: over ? 700 : 400 }));
    let sum = 0;
    for (const part of bar.parts) {
      const left = x(sum), right = x((sum += part.value));
      const title = `${part.label}: ${WRITE.size(part.value)}`;
      body.push(`<rect x="${left}" y="${top + 20}" width="${Math.max(0, right - left)}" height="24" fill="${part.colour}" stroke="#fff" stroke-width="0.7"><title>${escaped(title)}</title></rect>`);
    }
  });
  const alt = bars.map((bar) => {
    const parts = bar.parts.filter((part) => part.value > 0);
    return `${bar.name} ${bar.label} ${WRITE.size(bar.total)}: ${parts.map((part) => `${part.label} ${WRITE.size(part.value)}`).join(", ")}.`;
  });
  return svg(width, bottom + 28, alt.join(" "), body);
}

function percent(share) {
  return `${fixed(100 * share, share < 0.1 ? 1 : 0)}%`;
}

/** Ticks of a logarithmic axis: powers of a base, at most `wanted`. */
function logTicks(low, high, base, wanted) {
  const first = Math.ceil(Math.log(low) / Math.log(base) - 1e-9);
  const last = Math.floor(Math.log(high) / Math.log(base) + 1e-9);
  const step = Math.max(1, Math.ceil((last - first + 1) / wanted));
  const ticks = [];
  for (let power = first; power <= last; power += step) ticks.push(base ** power);
  return ticks;
}

function shortCount(value) {
  return value < 1024 ? String(value) : value < 2 ** 20 ? `${value / 1024}k` : `${value / 2 ** 20}M`;
}

/** Lines against context, both axes logarithmic; `at` is the context of the sliders. */
function lineChart(width, { contexts, series, at, format, limit, yLabel, base }) {
  const left = 66, right = 10, top = 26, height = width < 500 ? 270 : 300, bottom = height - 44;
  const values = series.flatMap((one) => one.values).filter((value) => value > 0 && Number.isFinite(value));
  if (!values.length) return svg(width, 40, yLabel, [text(0, 20, "nothing to draw in this setting", { colour: MUTED })]);
  if (limit) values.push(limit.value);
  const low = Math.min(...values) / 1.15, high = Math.max(...values) * 1.15;
  const x = (value) => left + (Math.log(value / contexts[0]) / Math.log(contexts.at(-1) / contexts[0])) * (width - left - right);
  const y = (value) => bottom - (Math.log(value / low) / Math.log(high / low)) * (bottom - top);
  const body = [text(0, 14, yLabel, { colour: INK, size: 13 })];
  let ticks = logTicks(low, high, base, 6);
  if (base === 10 && ticks.length < 3) ticks = ticks.concat(ticks.flatMap((tick) => [tick * 2, tick * 5, tick / 2, tick / 5]));
  for (const tick of ticks.filter((tick) => tick >= low && tick <= high)) {
    body.push(line(left, y(tick), width - right, y(tick), GRID));
    body.push(text(left - 7, y(tick) + 4, WRITE[format](tick), { anchor: "end", colour: MUTED, size: 12 }));
  }
  for (const tick of logTicks(contexts[0], contexts.at(-1), 2, width < 500 ? 6 : 9)) {
    body.push(line(x(tick), bottom, x(tick), bottom + 5, MUTED));
    body.push(text(x(tick), bottom + 19, shortCount(tick), { anchor: x(tick) > width - 24 ? "end" : "middle", colour: MUTED, size: 12 }));
  }
  body.push(line(left, bottom, width - right, bottom, MUTED));
  body.push(text((left + width - right) / 2, height - 6, "context (tokens)", { anchor: "middle", size: 13 }));
  body.push(line(x(at), top, x(at), bottom, MUTED, 'stroke-dasharray="2 3"'));
  if (limit) {
    body.push(line(left, y(limit.value), width - right, y(limit.value), "#b42318", 'stroke-width="1.2"'));
    body.push(text(left + 6, y(limit.value) - 5, limit.label, { colour: "#b42318", size: 12 }));
  }
  for (const one of series) {
    const points = one.values.map((value, index) => `${x(contexts[index]).toFixed(1)},${y(value).toFixed(1)}`);
    body.push(`<polyline points="${points.join(" ")}" fill="none" stroke="${one.colour}" stroke-width="${one.thin ? 1.4 : 2.4}" stroke-dasharray="${one.dash}"><title>${escaped(one.name)}</title></polyline>`);
    body.push(`<circle cx="${x(at)}" cy="${y(one.now)}" r="4" fill="${one.colour}"><title>${escaped(`${one.name}: ${WRITE[format](one.now)}`)}</title></circle>`);
  }
  const alt = `${yLabel} against context, at ${exact(at)} tokens: ${series.map((one) => `${one.name} ${WRITE[format](one.now)}`).join(", ")}.`;
  return svg(width, height, alt, body);
}

/* What Python's estimate says, for any setting. */

function valueAt(data, place, state) {
  return place === undefined ? 0 : poly(data.polynomials[place], state.batch, state.context);
}

/** The parts of memory at the moment at which they are the most, the first of several; and their sum. */
function memoryOf(data, state, index, phase) {
  const choice = `${state.precision} ${state.backend}${phase === "training" ? ` ${state.checkpointing}` : ""}`;
  let peak = null;
  // Integer weights are not trained: no moments there.
  for (const moment of data.costs[index][phase][choice] ?? []) {
    const parts = { total: 0 };
    for (const [part, place] of Object.entries(moment)) parts.total += parts[part] = valueAt(data, place, state);
    if (peak === null || parts.total > peak.total) peak = parts;
  }
  return peak;
}

function roofline(data, state, flops, moved) {
  const machine = data.machines[state.machine], rates = machine.flops;
  if (rates === null || machine.bandwidth === null) return null;
  return Math.max(flops / rates[data.dtypes[state.precision]], moved / machine.bandwidth);
}

/** The numbers of one model in one setting, by the keys of the table's rows; null: unknown. */
function measures(data, state, index) {
  const machine = data.machines[state.machine];
  const places = data.costs[index].work[`${state.precision} ${state.backend} ${state.checkpointing}`];
  const work = (key) => (key in places ? valueAt(data, places[key], state) : null);
  const over = (value, divisor) => (value === null || divisor === null ? null : value / divisor);
  const least = (phase) => (work(`${phase}_flops`) === null ? null : roofline(data, state, work(`${phase}_flops`), work(`${phase}_bytes_moved`)));
  const total = (phase, at = state) => memoryOf(data, at, index, phase)?.total ?? null;
  const decoding = memoryOf(data, state, index, "decoding"), cache = decoding.cache ?? 0;
  const tokens = state.batch * state.context;
  const peak = memoryOf(data, state, index, "training");
  const parts = ["weights", "gradients", "optimizer", "activations", "scores", "workspace"];
  const training = least("training"), prefill = least("prefill"), step = least("decoding");
  const read = over(decoding.weights, machine.disk);
  return {
    ...data.models[index].constants,
    training_bytes: peak?.total ?? null,
    ...Object.fromEntries(parts.map((part) => [`training_${part}`, peak === null ? null : peak[part] ?? 0])),
    training_all_gradients: work("gradient_bytes"),
    training_bytes_checkpointing: total("training", { ...state, checkpointing: "on" }),
    prefill_bytes: total("prefill"),
    decoding_bytes: decoding.total,
    inference_bytes: Math.max(total("prefill"), decoding.total),
    decoding_weights: decoding.weights ?? 0,
    decoding_cache: cache,
    cache_bytes: cache,
    cache_bytes_per_token: cache / tokens,
    score_bytes: work("score_bytes"),
    training_model_flops: work("training_model_flops"),
    training_executed_flops: work("training_executed_flops"),
    training_flops_per_token: work("training_executed_flops"),
    prefill_executed_flops: work("prefill_flops") / tokens,
    decoding_executed_flops: work("decoding_flops") / state.batch,
    training_intensity: over(work("training_flops"), work("training_bytes_moved")),
    decoding_intensity: work("decoding_flops") / work("decoding_bytes_moved"),
    training_seconds: training,
    train_tokens_per_second: over(tokens, training),
    prefill_tokens_per_second: over(tokens, prefill),
    decoding_tokens_per_second: over(state.batch, step),
    read_seconds: read,
    first_token_seconds: read === null || prefill === null ? null : read + prefill,
  };
}

/* The page. */

function start(data) {
  const byId = (id) => document.getElementById(id);
  const form = byId("controls"), keys = Object.keys(data.state);
  let state = { ...data.state };

  /** Values of a hash such as #context=8192&batch=4, where they are possible ones. */
  function fromHash() {
    const found = { ...data.state };
    for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
      if (key in data.limits) found[key] = within(key, Number(value), found[key]);
      else if (keys.includes(key) && [...byId(key).options].some((option) => option.value === value)) found[key] = value;
    }
    return found;
  }

  function within(key, value, otherwise) {
    const [low, high] = data.limits[key];
    return Number.isFinite(value) && value > 0 ? Math.min(high, Math.max(low, Math.round(value))) : otherwise;
  }

  function show() {
    for (const key of keys) byId(key).value = state[key];
    for (const key of Object.keys(data.limits)) {
      byId(`${key}-slider`).value = Math.log2(state[key]);
      byId(`${key}-slider`).setAttribute("aria-valuetext", exact(state[key]));
    }
    byId("setting").textContent = keys.map((key) => {
      const input = byId(key);
      const words = input.options ? input.selectedOptions[0].text : exact(state[key]);
      return `${input.labels[0].textContent.replace(/ \(.*/, "").toLowerCase()} ${words}`;
    }).join(" · ");
    fill();
    draw();
  }

  function set(changes) {
    state = { ...state, ...changes };
    const query = new URLSearchParams(state).toString();
    // A page inside another document may have no address to change.
    try { history.replaceState(null, "", `#${query}`); } catch { /* the numbers change all the same */ }
    show();
  }

  function put(cell, format, value) {
    cell.dataset.value = value === null ? "" : value;
    cell.title = exact(value);
    cell.textContent = written(format, value);
  }

  function fill() {
    const found = data.models.map((_, index) => measures(data, state, index));
    for (const row of document.querySelectorAll("#table tr[data-row]")) {
      const key = row.dataset.row, cells = row.querySelectorAll("td[data-model]");
      found.forEach((values, index) => put(cells[index], data.formats[key], values[key]));
      if (found.length > 1) row.querySelector(".quotient").textContent = ratio(found[0][key], found[1][key]);
    }
    for (const row of document.querySelectorAll("#backends-table tr[data-backend]")) {
      const index = data.models.findIndex((model) => model.side === row.dataset.model);
      const values = measures(data, { ...state, backend: row.dataset.backend }, index);
      for (const cell of row.querySelectorAll("td[data-key]")) {
        put(cell, cell.dataset.key.includes("flops") ? "flops" : "size", values[cell.dataset.key]);
      }
    }
  }

  function bars(phases) {
    return phases.flatMap((phase) => data.models.map((model, index) => {
      const peak = memoryOf(data, state, index, phase) ?? { total: 0 };
      const parts = Object.entries(data.parts).map(([key, part]) => ({ ...part, value: peak[key] ?? 0 }));
      return { name: model.name, colour: model.colour, label: phases.length > 1 ? phase : "", total: peak.total, parts };
    }));
  }

  function draw() {
    const machine = data.machines[state.machine], memory = machine.memory;
    const put = (id, make) => {
      const target = byId(id);
      target.innerHTML = make(Math.max(280, Math.floor(target.clientWidth)));
    };
    put("bars-training", (width) => barChart(width, bars(["training"]), memory));
    put("bars-inference", (width) => barChart(width, bars(["prefill", "decoding"]), memory));
    const contexts = data.contexts;
    const lines = (value) => data.models.map((model, index) => ({
      ...model,
      values: contexts.map((context) => value({ ...state, context }, index)),
      now: value(state, index),
    }));
    const limit = memory ? { value: memory, label: `memory of ${machine.name}` } : null;
    const curve = (id, format, base, yLabel, value, limit) =>
      put(id, (width) => lineChart(width, { contexts, series: lines(value), at: state.context, format, limit, yLabel, base }));
    curve("line-training-memory", "size", 2, "peak bytes of a training step", (at, index) => measures(data, at, index).training_bytes, limit);
    curve("line-inference-memory", "size", 2, "peak bytes of prefill and decoding", (at, index) =>
      measures(data, at, index).inference_bytes, limit);
    curve("line-training-speed", "count", 10, "tokens/s of training", (at, index) => measures(data, at, index).train_tokens_per_second);
    curve("line-decoding-speed", "count", 10, "tokens/s of decoding, all sequences", (at, index) => measures(data, at, index).decoding_tokens_per_second);
  }

  for (const key of keys) byId(key).addEventListener("change", (event) => {
    const value = event.target.value;
    set({ [key]: key in data.limits ? within(key, Number(value), state[key]) : value });
  });
  for (const key of Object.keys(data.limits)) byId(`${key}-slider`).addEventListener("input", (event) => {
    set({ [key]: within(key, 2 ** Number(event.target.value), state[key]) });
  });
  byId("reset").addEventListener("click", () => set(data.state));
  addEventListener("hashchange", () => { state = fromHash(); show(); });
  addEventListener("resize", draw);
  for (const input of form.querySelectorAll("[disabled]")) input.disabled = false;
  state = fromHash();
  show();
}

if (typeof document !== "undefined") start(JSON.parse(document.getElementById("data").textContent));
