// Puts the page together: what the viewer says comes in as events, ten times a second everything on the page ages.

import * as ask from "./ask.js";
import * as clock from "./clock.js";
import * as hints from "./hints.js";
import * as picture from "./picture.js";
import * as timeline from "./timeline.js";
import { current, reason, say, seconds, switchLanguage, translate } from "./words.js";

const TICK_MS = 100;
const SILENT_MS = 3000; // the viewer says something every second
const RETRY_MS = 1000;
const OLD_MS = 1000; // a picture as old as this is no live picture

const find = (id) => document.getElementById(id);

let source = null; // {state, name, detail}
let server = null; // {heard, model, intended_use}
let counts = null;
let frozen = null; // name of the frozen picture
let freezing = false;
let events = null;
let lastEvent = -Infinity;
let ticks = 0;

// A page that nobody sees does not listen: a browser has six connections for all its pages.
function listen() {
  events?.close();
  if (document.hidden) return;
  const opened = (events = new EventSource("events"));
  lastEvent = performance.now();
  const on = (type, act) =>
    events.addEventListener(type, (event) => {
      lastEvent = performance.now();
      act(JSON.parse(event.data));
    });
  events.addEventListener("open", () => {
    clock.forget();
    timeline.clear();
  });
  events.addEventListener("error", () => {
    if (opened.readyState !== EventSource.CLOSED) return; // it comes back by itself
    setTimeout(() => opened === events && listen(), RETRY_MS);
  });
  on("beat", clock.heard);
  on("server", (data) => (server = data));
  on("schema", ({ hints: names }) => {
    hints.showNames(names);
    timeline.addNames(names);
  });
  on("counts", (data) => (counts = data.telemetry));
  on("source", (data) => {
    source = data;
    timeline.addState(data.state, data.since_ms);
  });
  on("hint", (data) => {
    hints.show(data);
    timeline.add(data.hint, data.captured_ms, data.text?.en ?? null, data.text);
  });
  on("history", (data) => {
    for (const [state, since] of data.states) timeline.addState(state, since);
    for (const [hint, captured, text] of data.hints) timeline.add(hint, captured, text?.en ?? null, text);
  });
}

// What is wrong with taking the picture for the live one: {kind, headline, detail}, or null.
function wrong() {
  if (performance.now() - lastEvent > SILENT_MS) return { kind: "bad", headline: say("viewerSilent"), detail: "" };
  if (server === null) return { kind: "bad", headline: say("connecting"), detail: "" };
  if (!server.heard) return { kind: "bad", headline: say("serverSilent"), detail: server.detail };
  const away = source !== null && source.state !== "live";
  if (frozen !== null) return { kind: "frozen", headline: say("frozen"), detail: away ? say(source.state) : "" };
  if (away) return { kind: "bad", headline: say(source.state), detail: source.detail ?? source.name };
  const age = picture.pictureAgeMs();
  if (age === null) return { kind: "bad", headline: say("noPicture"), detail: picture.pictureProblem() ?? "" };
  if (age > OLD_MS) return { kind: "bad", headline: say("oldPicture"), detail: picture.pictureProblem() ?? "" };
  return null;
}

function tick() {
  const problem = wrong();
  const age = picture.pictureAgeMs();
  document.body.dataset.look = problem?.kind ?? "live";
  const alarm = find("alarm");
  alarm.hidden = problem === null;
  if (problem !== null) {
    const [headline, detail, old] = alarm.children;
    setText(headline, problem.headline);
    setText(detail, problem.detail);
    setText(old, age === null ? "" : say("pictureAge", seconds(age)));
  }
  const badge = find("source-state");
  setText(badge, problem === null ? say("live") : problem.headline);
  setText(find("source-name"), source?.name ?? "");
  setText(find("corner"), age === null ? "" : corner(age));
  find("corner").className = picture.pictureReason() === "" ? "" : "caution";
  setText(find("intended-use"), server?.intended_use ?? say("notKnownYet"));
  setText(find("counters"), counters());
  hints.tick(problem === null || problem.kind === "frozen");
  if (ticks++ % 5 === 0) timeline.draw();
  ask.tick();
}

// Told to a screen reader only when it changes.
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function counters() {
  const parts = server?.model ? [`${say("model")} ${server.model.slice(0, 16)}`] : [];
  if (counts !== null) {
    parts.push(say("received", counts.frames), say("dropped", counts.dropped));
    if (counts.gated) parts.push(say("gated", counts.gated));
    if (counts.failed) parts.push(say("failed", counts.failed));
    const [p50, p95, p99] = [counts.p50_ms, counts.p95_ms, counts.p99_ms].map((ms) => ms?.toFixed(0) ?? "–");
    parts.push(`${say("latency", p50, p95, p99)} ms`);
  }
  parts.push(say("shown", picture.shownFps().toFixed(0)));
  return parts.join(" · ");
}

function corner(age) {
  const parts = [`${say("frame")} ${picture.frame()}`, seconds(age)];
  if (picture.pictureReason() !== "") parts.unshift(reason(picture.pictureReason()));
  return parts.join(" · ");
}

// The server keeps the picture, so that what is shown is what questions are about.
async function freeze() {
  if (freezing) return;
  freezing = true;
  try {
    if (frozen === null) await keep(crypto.randomUUID());
    else letGo();
  } catch (error) {
    ask.refusal(say("freeze"), error.name === "Error" ? error.message : say("viewerSilent"));
  }
  freezing = false;
  const button = find("freeze");
  button.ariaPressed = String(frozen !== null);
  button.firstElementChild.dataset.word = frozen === null ? "freeze" : "unfreeze";
  translate();
  tick();
}

async function keep(name) {
  const response = await ask.post("freeze", { name, release: false });
  if (!response.ok) throw new Error(await response.text());
  try {
    await picture.freeze(name);
  } catch (error) {
    void ask.post("freeze", { name, release: true });
    throw error;
  }
  frozen = name;
  ask.choose(name);
  hints.hold(true);
}

function letGo() {
  void ask.post("freeze", { name: frozen, release: true }, { keepalive: true }); // the page may be leaving
  frozen = null;
  ask.choose(null);
  hints.hold(false);
  picture.release();
}

function key(event) {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || find("shortcuts").open) return;
  const typing = event.target instanceof HTMLInputElement;
  if (event.key === "Escape") {
    ask.cancel();
    if (typing) event.target.blur();
    return;
  }
  if (typing) return;
  const acts = {
    "/": () => find("question").focus(),
    "?": () => find("shortcuts").showModal(),
    f: freeze,
    l: changeLanguage,
    r: () => ask.report(current()),
  };
  const act = acts[event.key.toLowerCase()];
  if (act === undefined) return;
  event.preventDefault();
  void act();
}

function changeLanguage() {
  switchLanguage();
  tick();
}

translate();
ask.wire();
find("freeze").addEventListener("click", freeze);
find("language").addEventListener("click", changeLanguage);
find("help").addEventListener("click", () => find("shortcuts").showModal());
document.addEventListener("keydown", key);
document.addEventListener("visibilitychange", listen);
window.addEventListener("pagehide", () => {
  if (frozen !== null) letGo();
});
listen();
void picture.pull();
setInterval(tick, TICK_MS);
tick();
