"use strict";

/* Where one model looks in a text that grows: its numbers as they come, and the maps of one head made of them. */

/** Room for what a model says of `capacity` tokens, by layer; each head's vectors stand behind each other. */
function roomFor(model, capacity) {
  const arrays = (count) => Array.from({ length: count }, () => new Float32Array(capacity * model.width));
  const layers = model.layers.map(() => ({
    queries: arrays(model.heads + model.noise_heads),
    keys: [arrays(model.groups)],
    lam: [],
  }));
  return { count: 0, capacity, layers };
}

/** Takes in what the engine read of `fresh` more tokens. */
function takeIn(model, room, reads, fresh) {
  const { width, heads, groups } = model;
  reads.forEach(({ queries, keys, lam }, index) => {
    const own = room.layers[index];
    own.queries.forEach((query, i) => query.set(queries.subarray(i * fresh * width, (i + 1) * fresh * width), room.count * width));
    // V1's two maps have keys of their own, side by side.
    if (keys.length > groups * fresh * width && own.keys.length < 2) own.keys.push(own.keys[0].map((first) => new Float32Array(first.length)));
    for (let group = 0; group < groups; group++) {
      for (let t = 0; t < fresh; t++) {
        own.keys.forEach((map, m) => {
          const from = ((group * fresh + t) * own.keys.length + m) * width;
          map[group].set(keys.subarray(from, from + width), (room.count + t) * width);
        });
      }
    }
    // V1 has one λ for all tokens of a layer.
    for (let t = 0; lam && t < fresh; t++) own.lam.push(lam.length === heads ? lam : lam.subarray(t * heads, (t + 1) * heads));
  });
  room.count += fresh;
}

/** Empty maps of one output head: `taken` is −λ · second map, and `used` the sum of both. */
function emptyMaps(model, capacity) {
  const map = () => new Float32Array(capacity * capacity);
  const found = { count: 0, stride: capacity, limit: 0, limited: 0, found: map(), lam: [] };
  if (!model.noise_heads) return { ...found, used: found.found };
  return { ...found, taken: map(), used: map() };
}

/** Adds the rows that are missing. */
function growMaps(model, room, maps, layer, head) {
  const { width, scale, heads, noise_heads: noise, groups } = model;
  const own = room.layers[layer];
  const signals = noise ? heads / noise : 1;
  const sharing = Math.floor(head / signals);
  const first = noise ? sharing * (signals + 1) + (head % signals) : head;
  const second = sharing * (signals + 1) + signals;
  const groupOf = (query) => Math.floor((query * groups) / (heads + noise));
  const window = model.windows[layer] ?? Infinity;
  for (let t = maps.count; t < room.count; t++) {
    const row = (map) => map.subarray(t * maps.stride, t * maps.stride + t + 1);
    const from = Math.max(0, t + 1 - window);
    const look = (query, keys, into) => softmaxRow(own.queries[query].subarray(t * width, (t + 1) * width), keys[groupOf(query)].subarray(from * width), t + 1 - from, scale, into.subarray(from));
    look(first, own.keys[0], row(maps.found));
    if (!noise) continue;
    const [found, taken, used] = [row(maps.found), row(maps.taken), row(maps.used)];
    look(second, own.keys.at(-1), taken);
    maps.lam.push(own.lam[t][head]);
    for (let s = 0; s <= t; s++) {
      taken[s] *= -maps.lam[t];
      used[s] = found[s] + taken[s];
    }
  }
  maps.count = room.count;
  // The scale of colours follows the text in steps, so that colours stay while few tokens come.
  if (maps.count > 1.2 * maps.limited) {
    maps.limited = maps.count;
    maps.limit = limitOf([maps.found, maps.taken, maps.used].filter(Boolean), maps.count, maps.stride);
  }
}

/** The row of a query in a map. */
function rowOf(maps, name, query) {
  return maps[name].subarray(query * maps.stride, query * maps.stride + query + 1);
}

/** The share of a row's sizes that lies on some tokens. */
function shareOf(row, [start, end]) {
  let inside = 0, total = 0;
  row.forEach((value, s) => {
    total += Math.abs(value);
    if (s >= start && s < end) inside += Math.abs(value);
  });
  return total ? inside / total : 0;
}

/* The pictures. */

const dark = matchMedia("(prefers-color-scheme: dark)");
const TONE = 0.5;
const MARGIN = 46;
const LETTERS = 11;

/** The length of a side in pixels of the page, without the margin in which the last labels end. */
function sideOf(canvas) {
  return canvas.clientWidth - MARGIN;
}

/** One map, with the labels of its tokens at its diagonal: each names the row left of it and the column below it. */
function drawMap(canvas, maps, name, labels, total, query, key, answer) {
  const side = sideOf(canvas);
  const sharp = devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * sharp;
  canvas.height = side * sharp;
  canvas.style.aspectRatio = `${canvas.clientWidth} / ${side}`;
  const brush = canvas.getContext("2d");
  brush.scale(sharp, sharp);
  const palette = dark.matches ? DARK : LIGHT;
  const [ink, muted] = ["--ink", "--muted"].map((colour) => getComputedStyle(document.documentElement).getPropertyValue(colour));
  brush.fillStyle = `rgb(${palette.hidden})`;
  brush.fillRect(0, 0, side, side);
  const cell = side / total;
  const picture = pictureOf(maps[name], maps.count, maps.stride, maps.limit, TONE, palette);
  brush.imageSmoothingEnabled = cell < 1;
  brush.drawImage(picture, 0, 0, maps.count * cell, maps.count * cell);
  brush.strokeStyle = ink;
  brush.lineWidth = 1;
  brush.strokeRect(0.5, query * cell, (query + 1) * cell, Math.max(cell, 2));
  if (key !== null) brush.strokeRect(key * cell, key * cell, Math.max(cell, 2), side - key * cell - 0.5);
  // What is pointed at and the answer first; others where they have room.
  const wanted = [query, ...(key === null ? [] : [key]), ...(answer ? [answer[0]] : []), ...Array.from({ length: maps.count }, (_, t) => t)];
  const taken = [];
  wanted.forEach((t, place) => {
    const y = (t + 0.5) * cell;
    if (t >= maps.count || taken.some((other) => Math.abs(other - y) < LETTERS)) return;
    taken.push(y);
    const strong = place < wanted.length - maps.count;
    brush.font = `${strong ? "600 " : ""}10.5px system-ui, sans-serif`;
    brush.fillStyle = strong ? ink : muted;
    brush.textBaseline = "middle";
    brush.fillText(shortened(brush, labels[t], canvas.clientWidth - (t + 1) * cell - 5), (t + 1) * cell + 4, Math.min(Math.max(y, 6), side - 6));
  });
}

function shortened(brush, label, room) {
  let text = label;
  while (text.length > 1 && brush.measureText(text).width > Math.min(room, 90)) text = `${text.replace(/…$/, "").slice(0, -1)}…`;
  return text;
}

/** λ of each token as bars from 0 to 1. */
function drawLambda(canvas, lam, total) {
  const sharp = devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * sharp;
  canvas.height = canvas.clientHeight * sharp;
  const brush = canvas.getContext("2d");
  brush.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--down");
  const step = canvas.width / total;
  lam.forEach((value, t) => {
    const height = canvas.height * Math.max(0, Math.min(1, value));
    brush.fillRect(t * step, canvas.height - height, Math.max(1, step - sharp), height);
  });
  canvas.setAttribute("aria-label", `λ from ${Math.min(...lam).toFixed(2)} to ${Math.max(...lam).toFixed(2)}`);
}
