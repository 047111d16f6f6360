// Questions and reports: an answer appears as it is written and says which frame it is about, and how old that is.

import { ageMs, heard } from "./clock.js";
import { name, reason, say, seconds } from "./words.js";

const KEPT = 20; // answers on the page
const PAST_MS = 10_000; // by then the probe may be elsewhere: an answer about such a picture is no longer about this one

const form = document.getElementById("ask");
const box = document.getElementById("question");
const cancelButton = document.getElementById("cancel");
const askButtons = [form.querySelector("[type=submit]"), ...["report-en", "report-zh"].map((id) => document.getElementById(id))];
const log = document.getElementById("answer");

let frozen = null; // name of the picture that questions are about; null: the newest
let open = null; // id of the question that is being answered
const items = new Set(); // {element, text, meta, picture, reply, problem}: `picture` is the frozen one that was asked about

export function wire() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const question = box.value.trim();
    if (question === "") return box.focus();
    box.value = "";
    put({ kind: "ask", question });
  });
  document.getElementById("report-en").addEventListener("click", () => report("en"));
  document.getElementById("report-zh").addEventListener("click", () => report("zh"));
  cancelButton.addEventListener("click", cancel);
}

export function report(language) {
  put({ kind: "report", language });
}

export function choose(name) {
  frozen = name;
}

export function cancel() {
  if (open !== null) void post("cancel", { id: open });
}

export function tick() {
  for (const item of items) {
    const { element, picture, reply } = item;
    const past = reply !== null && (picture === null || picture !== frozen) && ageMs(reply.captured_ms) > PAST_MS;
    element.classList.toggle("past", past);
    item.meta.textContent = meta(item, past);
  }
}

export function post(path, body, options) {
  return fetch(path, { ...options, method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
}

async function put(request) {
  if (open !== null) return;
  const id = crypto.randomUUID();
  const item = add(request.kind === "ask" ? request.question : say(request.language === "zh" ? "reportZh" : "reportEn"));
  busy(id);
  try {
    const response = await post("ask", { id, frozen: item.picture, ...request });
    if (!response.ok) throw new Error(await response.text());
    for await (const line of lines(response.body)) take(line, item);
    if (!item.done) refuse(item, say("broken"));
  } catch (error) {
    refuse(item, error instanceof TypeError ? say("broken") : error.message);
  } finally {
    busy(null);
  }
}

function busy(id) {
  open = id;
  cancelButton.disabled = id === null;
  for (const button of askButtons) button.disabled = id !== null;
}

function take(reply, item) {
  if (reply.captured_ms !== undefined) {
    heard(reply.now_ms);
    item.reply = reply;
  }
  if (reply.type === "token") item.text.append(reply.text);
  if (reply.type === "error") refuse(item, reply.message);
  if (reply.type === "answer") {
    item.done = true;
    item.text.textContent = reply.answer;
    item.meta.title = reply.intended_use;
    if (reply.reason !== null || reply.finish !== "stop") item.element.classList.add("caution");
  }
  tick();
  log.scrollTop = log.scrollHeight;
}

// Of an answer, or of a token: then as far as it is known.
function meta({ reply, problem }, past) {
  const refused = problem === null ? [] : [`${say("refused")}: ${problem}`];
  if (reply === null) return refused.join();
  const parts = [...refused, say("aboutFrame", reply.frame, seconds(ageMs(reply.captured_ms)))];
  if (reply.type === "answer") {
    parts.push(say("took", seconds(reply.ms)));
    if (reply.finish !== "stop") parts.unshift(say("cutShort", name("finish", reply.finish)));
    if (reply.reason !== null) parts.unshift(reason(reply.reason));
  }
  if (past) parts.unshift(say("past"));
  return [...parts, `${say("model")} ${reply.model.slice(0, 12)}`].join(" · ");
}

// Shows what was refused besides questions.
export function refusal(title, message) {
  refuse(add(title), message);
}

function refuse(item, message) {
  item.done = true;
  item.problem = message;
  item.element.classList.add("refused");
  tick();
  log.scrollTop = log.scrollHeight;
}

function add(question) {
  const element = log.appendChild(document.createElement("article"));
  const asked = element.appendChild(document.createElement("h3"));
  asked.textContent = question;
  const item = { element, picture: frozen, reply: null, problem: null, done: false };
  item.text = element.appendChild(document.createElement("p"));
  item.meta = element.appendChild(document.createElement("small"));
  item.meta.ariaLive = "off"; // it ages: nobody wants to hear that
  items.add(item);
  for (const old of [...items].slice(0, -KEPT)) {
    old.element.remove();
    items.delete(old);
  }
  log.scrollTop = log.scrollHeight;
  return item;
}

async function* lines(body) {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const whole = rest.split("\n");
    rest = whole.pop();
    for (const line of whole) yield JSON.parse(line);
  }
}
