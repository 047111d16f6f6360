// The hints of the last minutes: one lane each, a bar while something was said, a thin line while it was silent.

import { ageMs } from "./clock.js";
import { current, name, say } from "./words.js";

const SPAN_MS = 180_000;
const GAP_MS = 1500; // hints nearer than this belong together
const COLORS = ["#5fd4ff", "#ffd166", "#7ee081", "#ff9f7a", "#c9a7ff", "#ff8fc7", "#c7e05f"];
const LEFT = 68;
const AXIS = 16;

const canvas = document.getElementById("timeline");
const lanes = new Map(); // hint → [{from, to, key, text}], oldest first
const outages = []; // {from, to}: the source gave no pictures
const colors = new Map(); // hint → answers so far, each with the colour of its place

// `key` is what was said (null: silent), `text` its words.
export function add(hint, capturedMs, key, text) {
  if (!lanes.has(hint)) lanes.set(hint, []);
  const lane = lanes.get(hint);
  const last = lane.at(-1);
  if (last !== undefined && last.key === key && capturedMs - last.to < GAP_MS) {
    last.to = Math.max(last.to, capturedMs);
    return;
  }
  // What was said before holds until now, unless there was a gap.
  if (last !== undefined && capturedMs - last.to < GAP_MS) last.to = Math.max(last.to, capturedMs);
  lane.push({ from: capturedMs, to: capturedMs, key, text });
  while (lane.length > 0 && ageMs(lane[0].to) > SPAN_MS) lane.shift();
}

// In the order of the schema; what another model had goes.
export function addNames(names) {
  for (const one of [...lanes.keys()]) if (!names.includes(one)) lanes.delete(one);
  for (const one of names) {
    const lane = lanes.get(one) ?? [];
    lanes.delete(one);
    lanes.set(one, lane);
  }
}

export function addState(state, sinceMs) {
  const open = outages.at(-1);
  if (open !== undefined && open.to === null) open.to = sinceMs;
  if (state !== "live") outages.push({ from: sinceMs, to: null });
  while (outages.length > 0 && outages[0].to !== null && ageMs(outages[0].to) > SPAN_MS) outages.shift();
}

export function clear() {
  for (const lane of lanes.values()) lane.length = 0;
  outages.length = 0;
}

export function draw() {
  const scale = window.devicePixelRatio;
  const { clientWidth: width, clientHeight: height } = canvas;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = "14px system-ui, sans-serif";
  context.textBaseline = "middle";
  const x = (ms) => LEFT + (width - LEFT) * (1 - Math.min(1, ageMs(ms) / SPAN_MS));
  const bottom = height - AXIS;
  context.fillStyle = "#5a1620";
  for (const { from, to } of outages) {
    const start = x(from);
    context.fillRect(start, 0, (to === null ? width : x(to)) - start, bottom);
  }
  drawAxis(context, width, bottom);
  const step = bottom / Math.max(1, lanes.size);
  [...lanes].forEach(([hint, lane], index) => drawLane(context, hint, lane, x, index * step, step));
}

function drawAxis(context, width, bottom) {
  context.fillStyle = "#9fb0bf";
  context.strokeStyle = "#2a3743";
  for (const minutes of [0, 1, 2]) {
    const at = LEFT + (width - LEFT) * (1 - (minutes * 60_000) / SPAN_MS);
    context.beginPath();
    context.moveTo(at, 0);
    context.lineTo(at, bottom);
    context.stroke();
    context.textAlign = minutes === 0 ? "right" : "center";
    context.fillText(minutes === 0 ? say("now") : say("minutesAgo", minutes), at, bottom + AXIS / 2 + 1);
  }
  context.textAlign = "left";
}

function drawLane(context, hint, lane, x, top, step) {
  context.fillStyle = "#c6d2dc";
  context.fillText(name("hint", hint), 2, top + step / 2, LEFT - 6);
  const thick = Math.max(4, step - 4);
  for (const { from, to, key, text } of lane) {
    if (ageMs(to) > SPAN_MS) continue;
    const start = x(from);
    const wide = Math.max(1, x(to) - start);
    if (key === null) {
      context.fillStyle = "#9fb0bf";
      context.fillRect(start, top + step / 2 - 1, wide, 2);
      continue;
    }
    context.fillStyle = color(hint, key);
    context.fillRect(start, top + (step - thick) / 2, wide, thick);
    const label = text[current()];
    if (context.measureText(label).width < wide - 6) {
      context.fillStyle = "#000";
      context.fillText(label, start + 3, top + step / 2 + 1);
    }
  }
}

function color(hint, key) {
  if (!colors.has(hint)) colors.set(hint, []);
  const seen = colors.get(hint);
  if (!seen.includes(key)) seen.push(key);
  return COLORS[seen.indexOf(key) % COLORS.length];
}
