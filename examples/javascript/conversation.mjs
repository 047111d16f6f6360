// One conversation with a running server: node conversation.mjs ENDPOINT HINTS_ENDPOINT
// Prints what was said, as one line of JSON.

import { Client, Refusal, listen } from "./client.mjs";

const CHOICES = ["cyst", "oval solid mass", "no lesion"];

const [endpoint, hintsEndpoint] = process.argv.slice(2);
if (!hintsEndpoint) {
  console.error("usage: node conversation.mjs ENDPOINT HINTS_ENDPOINT");
  process.exit(2);
}

async function whole(replies) {
  let streamed = "";
  for await (const reply of replies) {
    if (reply.type === "answer") return { ...reply, streamed };
    streamed += reply.text;
  }
}

async function refusal(action) {
  try {
    await action();
  } catch (error) {
    if (error instanceof Refusal) return error.message;
    throw error;
  }
}

const said = {};

for await (const message of listen(hintsEndpoint)) {
  if (message.type !== "hint") continue;
  said.hint = { hint: message.hint, answer: message.answer, model: message.model, use: message.intended_use };
  break;
}

const client = new Client(endpoint, { timeoutMs: 20_000 });
const { schema, messages } = await client.schema();
said.hints = schema.hint.map(({ name }) => name);
said.title = messages.title;

const frozen = await client.freeze("before");
said.frozen = (await client.status()).frozen.map(({ name }) => name);
said.again = await refusal(() => client.freeze("live"));

const picture = await client.picture("before");
said.picture = [picture.width, picture.height, picture.jpeg[0], picture.jpeg[1], picture.frame === frozen.frame];

const first = await whole(client.ask("这是什么?", { frames: ["before"] }));
said.first = [first.answer, first.streamed === first.answer, first.frame === frozen.frame, first.finish];
const turns = [{ question: "这是什么?", answer: first.answer }];
said.second = (await whole(client.ask("And now?", { frames: ["before"], turns }))).answer;
said.both = (await whole(client.ask("Which?", { frames: ["before", "live"] }))).frames.map(({ name }) => name);

const { answer, candidates, abstain } = await whole(client.ask("What is the finding?", { choices: CHOICES }));
said.choice = [answer, Object.keys(candidates), Object.values(candidates).map((share) => share.toFixed(4)), abstain];
said.reports = [(await whole(client.report("en"))).answer, (await whole(client.report("zh"))).answer];

for await (const reply of client.ask("A long question. ".repeat(10))) {
  said.left = reply.type;
  break; // cancels it
}
said.after = (await whole(client.ask("Still there?", { max_tokens: 3 }))).finish;
said.released = (await client.release("before")).released;
said.gone = await refusal(() => client.picture("before"));
client.close();

console.log(JSON.stringify(said));
