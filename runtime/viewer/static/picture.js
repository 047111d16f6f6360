// Pulls the newest picture, one at a time: a slow browser shows fewer pictures, never older ones.

import { ageMs, heard } from "./clock.js";

const PULL_MS = 1000 / 15;
const HIDDEN_MS = 1000; // nobody looks
const PATIENCE_MS = 3000;

const canvas = document.getElementById("picture");
const context = canvas.getContext("2d", { alpha: false });

let shown = null; // {frame, capturedMs, reason}
let held = false;
let problem = null;
let times = []; // when pictures were drawn, in the last two seconds

export async function pull() {
  for (;;) {
    const began = performance.now();
    if (!held) {
      try {
        await next();
      } catch (error) {
        problem = error.name === "Error" ? error.message : "";
      }
    }
    const every = document.hidden ? HIDDEN_MS : PULL_MS;
    await new Promise((done) => setTimeout(done, Math.max(0, began + every - performance.now())));
  }
}

async function next() {
  const got = await get(shown === null ? "" : `after=${shown.frame}`);
  if (got === null) return;
  if (!held) show(got);
  got.bitmap.close();
}

// Null: the page has the newest.
async function get(query) {
  const response = await fetch(`picture?${query}`, { signal: AbortSignal.timeout(PATIENCE_MS) });
  if (response.status === 204) return null;
  if (!response.ok) {
    throw new Error(await response.text());
  }
  const header = (name) => response.headers.get(name);
  heard(Number(header("x-now-ms")));
  return {
    frame: Number(header("x-frame")),
    capturedMs: Number(header("x-captured-ms")),
    reason: decodeURIComponent(header("x-reason")),
    bitmap: await createImageBitmap(await response.blob()),
  };
}

function show(got) {
  draw(got.bitmap);
  shown = got;
  canvas.dataset.frame = got.frame;
  problem = null;
  times.push(performance.now());
}

function draw(bitmap) {
  if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
    [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  }
  context.drawImage(bitmap, 0, 0);
}

// Shows the frozen picture of that name, the one that questions are about, until `release`.
export async function freeze(name) {
  held = true;
  try {
    const got = await get(`frozen=${name}`);
    show(got);
    got.bitmap.close();
  } catch (error) {
    held = false;
    throw error;
  }
}

export function release() {
  held = false;
}

// What the server finds wrong with this picture, or "".
export function pictureReason() {
  return shown?.reason ?? "";
}

export function frame() {
  return shown?.frame ?? null;
}

export function pictureAgeMs() {
  return shown === null ? null : ageMs(shown.capturedMs);
}

export function pictureProblem() {
  return problem;
}

export function shownFps() {
  const now = performance.now();
  times = times.filter((time) => now - time < 2000);
  return times.length / 2;
}
