// The viewer's clock as this page sees it: ages are true even when messages waited on their way here.

const WINDOW_MS = 60_000; // clocks of two machines drift apart: what was learnt longer ago is forgotten

let settled = Infinity; // the smallest difference of the last whole window: the message that waited least
let current = Infinity;
let since = performance.now();
let another = false; // the viewer may be another one, with another clock

export function heard(nowMs) {
  const now = performance.now();
  if (another) [settled, current, another] = [Infinity, Infinity, false];
  if (now - since > WINDOW_MS) {
    [settled, current, since] = [current, Infinity, now];
  }
  current = Math.min(current, now - nowMs);
}

// From the next message on: until then, ages go on as they were.
export function forget() {
  another = true;
}

export function nowMs() {
  return performance.now() - Math.min(settled, current);
}

export function ageMs(capturedMs) {
  return Math.max(0, nowMs() - capturedMs);
}
