"use strict";

/* What the pages of attention maps share: a row of a map, how far it is spread, and its colours. */

/** Writes softmax(scale · q kᵀ) of one query over the first `count` of the keys, which stand behind each other. */
function softmaxRow(query, keys, count, scale, row) {
  const width = query.length;
  const scores = new Float64Array(count);
  let most = -Infinity;
  for (let s = 0; s < count; s++) {
    let dot = 0;
    for (let i = 0, at = s * width; i < width; i++, at++) dot += query[i] * keys[at];
    scores[s] = dot * scale;
    if (scores[s] > most) most = scores[s];
  }
  let total = 0;
  for (let s = 0; s < count; s++) total += scores[s] = Math.exp(scores[s] - most);
  for (let s = 0; s < count; s++) row[s] = scores[s] / total;
}

/**
 * Where the scale of colours ends: the 99.5th percentile of the magnitudes from the fourth query on, of a sample of the
 * first `count` rows; a row begins `stride` numbers behind the one before it.
 */
function limitOf(maps, count, stride) {
  const seen = [];
  const step = Math.max(1, Math.round((count * count * maps.length) / 2e5));
  for (const weights of maps) {
    let next = 0;
    for (let t = Math.min(3, count - 1); t < count; t++) {
      for (; next <= t; next += step) seen.push(Math.abs(weights[t * stride + next]));
      next -= t + 1;
    }
  }
  seen.sort((a, b) => a - b);
  return Math.max(seen[Math.floor(0.995 * (seen.length - 1))], 1e-3);
}

/** As many tokens as a row is as evenly spread over: e^entropy of its magnitudes. */
function spreadOf(row) {
  let total = 0;
  for (const value of row) total += Math.abs(value);
  let entropy = 0;
  for (const value of row) {
    const p = Math.abs(value) / total;
    if (p > 0) entropy -= p * Math.log(p);
  }
  return Math.exp(entropy);
}

/* Colours: from the paper to blue below zero, and to orange above. */

const LIGHT = { paper: [255, 255, 255], hidden: [246, 248, 250], below: [0, 114, 178], above: [213, 94, 0] };
const DARK = { paper: [30, 36, 43], hidden: [20, 24, 29], below: [86, 180, 233], above: [255, 158, 74] };

function colourOf(value, limit, tone, palette) {
  const strength = limit ? Math.min(1, Math.abs(value) / limit) ** tone : 0;
  const end = value < 0 ? palette.below : palette.above;
  return end.map((channel, i) => Math.round(palette.paper[i] + (channel - palette.paper[i]) * strength));
}

/** Colours of values from −limit to limit, as the bytes of a pixel; a table, since a map has a million of them. */
const STEPS = 1024;
const tables = new Map();
function tableOf(tone, palette) {
  const name = `${tone} ${palette.paper}`;
  if (!tables.has(name)) {
    const pixels = new Uint8ClampedArray((2 * STEPS + 1) * 4).fill(255);
    for (let i = 0; i <= 2 * STEPS; i++) pixels.set(colourOf(i - STEPS, STEPS, tone, palette), i * 4);
    tables.set(name, new Uint32Array(pixels.buffer));
  }
  return tables.get(name);
}

/** A canvas with a pixel for each weight of the first `count` rows; `hidden` is what a query cannot see. */
function pictureOf(weights, count, stride, limit, tone, palette) {
  const picture = document.createElement("canvas");
  picture.width = picture.height = count;
  const pixels = new ImageData(count, count);
  const words = new Uint32Array(pixels.data.buffer);
  const table = tableOf(tone, palette);
  const factor = limit ? STEPS / limit : 0;
  const hidden = new Uint32Array(new Uint8Array([...palette.hidden, 255]).buffer)[0];
  for (let t = 0; t < count; t++) {
    for (let s = 0; s <= t; s++) {
      const place = Math.round(weights[t * stride + s] * factor);
      words[t * count + s] = table[Math.max(-STEPS, Math.min(STEPS, place)) + STEPS];
    }
    words.fill(hidden, t * count + t + 1, (t + 1) * count);
  }
  picture.getContext("2d").putImageData(pixels, 0, 0);
  return picture;
}
