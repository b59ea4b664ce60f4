"use strict";

/* The last panel: what a model of a size that the reader chooses takes in memory, by the planner's numbers. */

const PLAN = DATA.plan;
const PARTS = { weights: "weights", cache: "cache", rest: "while it computes" };

function sizeWords(count) {
  if (count >= 1e9) return `${Number((count / 1e9).toPrecision(3))} billion`;
  return `${Number((count / 1e6).toPrecision(3))} million`;
}

/** The attention that stands beside softmax: that of this page's model where the planner was asked for it. */
function planned() {
  const own = DATA.models.map((model) => model.attention).find((name) => name !== "softmax" && name in PLAN.rows[0].equal);
  return own ?? "diff_v2";
}

function bar(label, most, parts) {
  const total = Object.values(parts).reduce((sum, part) => sum + part, 0);
  const line = document.createElement("div");
  line.className = "bar";
  const name = document.createElement("span");
  name.textContent = label;
  const track = document.createElement("span");
  track.className = "track";
  track.setAttribute("aria-hidden", "true");
  for (const [kind, part] of Object.entries(parts)) {
    const piece = document.createElement("i");
    piece.className = kind;
    piece.style.width = `${(100 * part) / most}%`;
    track.append(piece);
  }
  const value = document.createElement("b");
  value.textContent = bytes(total);
  line.append(name, track, value);
  return line;
}

function showCost() {
  const row = PLAN.rows[Number($("size").value)];
  const [ordinary, differential, smaller] = [row.equal.softmax, row.equal[planned()], row.smaller];
  const words = `${sizeWords(row.size)} weights`;
  $("size").setAttribute("aria-valuetext", words);
  $("size-words").textContent = words;
  const ratio = (name) => differential[name] / ordinary[name];
  const times = (name) => `${ratio(name).toFixed(2)} times`;
  const verdict = Math.max(ratio("decoding"), ratio("training")) < 1.2 ? "No." : "Not twice, but more.";
  const strong = document.createElement("b");
  strong.textContent = verdict;
  $("verdict").replaceChildren(strong, ` Using it takes ${times("decoding")} the memory of an ordinary Transformer of this size, and training it ${times("training")}. Its cache is ${ratio("cache") === 1 ? "exactly as large" : `${times("cache")} as large`}.`);
  const share = `${Math.round(100 * PLAN.share)}%`;
  const each = [["Ordinary", ordinary], ["Differential, same size", differential], [`Differential with ${share} of the weights`, smaller]];
  for (const [id, name] of [["using", "decoding"], ["training", "training"], ["written", "written"]]) {
    const shown = id === "using" ? each : each.slice(0, 2);
    const most = Math.max(...shown.map(([, model]) => model[name]));
    $(id).replaceChildren(...shown.map(([label, model]) => {
      const parts = name === "decoding" ? { weights: model.weights, cache: model.cache, rest: model.decoding - model.weights - model.cache } : { rest: model[name] };
      return bar(label, most, parts);
    }));
  }
}

if (PLAN) {
  $("size").max = PLAN.rows.length - 1;
  // A size that people have heard of.
  $("size").value = PLAN.rows.findIndex((row) => row.size >= 7e9);
  for (const place of document.querySelectorAll(".context")) place.textContent = PLAN.context.toLocaleString("en");
  $("claim").textContent = `${Math.round(100 * PLAN.share)}%`;
  $("source").textContent = PLAN.source;
  $("size").addEventListener("input", showCost);
  showCost();
}
