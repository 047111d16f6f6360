// The hints: what is said now, with confidence and age; silence, with its reason, in place of what is not known.

import { ageMs } from "./clock.js";
import { name, reason, say, seconds, current } from "./words.js";

const list = document.getElementById("hints");
const rows = new Map(); // hint → {hint, held, parts}
let held = false;

export function show(hint) {
  if (!rows.has(hint.hint)) rows.set(hint.hint, { parts: makeRow() });
  rows.get(hint.hint).hint = hint;
}

// While frozen, what was said about the frozen picture stays, and says so; what is said about newer ones waits.
export function hold(frozen) {
  held = frozen;
  for (const row of rows.values()) row.held = frozen && row.hint !== undefined && fresh(row.hint) ? row.hint : undefined;
}

// In the order of the schema.
export function showNames(names) {
  for (const [key, { parts }] of rows) {
    if (names.includes(key)) continue;
    parts.row.remove(); // another model had it
    rows.delete(key);
  }
  for (const one of names) {
    if (!rows.has(one)) rows.set(one, { parts: makeRow() });
    list.append(rows.get(one).parts.row);
  }
}

export function fresh(hint) {
  return ageMs(hint.captured_ms) <= hint.valid_ms;
}

export function words(text) {
  return text[current()];
}

// Ages and ends what is said; `trusted` is false when nothing on the page is live.
export function tick(trusted) {
  const someFresh = [...rows.values()].some((row) => row.hint !== undefined && fresh(row.hint));
  for (const [key, row] of rows) {
    const { parts } = row;
    const hint = held ? row.held : row.hint;
    const stands = hint !== undefined && trusted && (held || fresh(hint));
    const speaks = stands && hint.text !== null;
    parts.name.textContent = name("hint", key);
    parts.row.className = !speaks ? "silent" : held ? "says held" : "says";
    parts.answer.textContent = speaks ? words(hint.text) : "—";
    parts.why.textContent = speaks ? aside(hint) : whySilent(hint, stands, someFresh, trusted);
    parts.meter.hidden = !speaks;
    parts.percent.textContent = speaks ? percent(hint.probability) : "";
    parts.bar.style.width = speaks ? `${hint.probability * 100}%` : "0";
    parts.age.textContent = stands ? seconds(ageMs(hint.captured_ms)) : "";
  }
}

function whySilent(hint, stands, someFresh, trusted) {
  if (stands) return [reason(hint.reason ?? ""), aside(hint)].filter((part) => part !== "").join(" · ");
  if (!trusted) return say("notLive");
  if (held) return reason("not asked");
  if (hint === undefined) return someFresh ? reason("not asked") : say("nothingYet");
  return someFresh ? reason("not asked") : say("expired", seconds(ageMs(hint.captured_ms)));
}

function aside(hint) {
  return [held ? `${say("frame")} ${hint.frame}` : "", setOf(hint)].filter((part) => part !== "").join(" · ");
}

function setOf(hint) {
  if (hint.set.length === 0) return "";
  return say("oneOf", percent(hint.coverage), hint.set.map(words).join(say("or")));
}

function percent(share) {
  return `${Math.floor(share * 100 + 1e-6)} %`; // never 100 for less
}

function makeRow() {
  const row = list.appendChild(document.createElement("li"));
  const parts = { row };
  for (const part of ["name", "answer", "percent", "age", "meter", "why"]) {
    parts[part] = row.appendChild(document.createElement("span"));
    parts[part].className = part;
  }
  parts.bar = parts.meter.appendChild(document.createElement("span"));
  return parts;
}
