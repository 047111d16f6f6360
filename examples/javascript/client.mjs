// A client of a sonoedge server: one DEALER socket for requests, one SUB socket for what is published.
// The messages are those of docs/protocol.md.

import { decode, encode } from "@msgpack/msgpack";
import { Dealer, Subscriber } from "zeromq";

const VERSION = 1;
const MAX_BYTES = 1024 * 1024; // no message is larger

export class Refusal extends Error {
  constructor({ message, retry_ms }) {
    super(message);
    this.retryMs = retry_ms;
  }
}

export class Client {
  #socket = new Dealer({ linger: 0, maxMessageSize: MAX_BYTES });
  #count = 0;
  #timeoutMs;

  constructor(endpoint, { timeoutMs = 10_000 } = {}) {
    this.#timeoutMs = timeoutMs;
    this.#socket.receiveTimeout = timeoutMs;
    this.#socket.connect(endpoint);
  }

  // Yields token messages as they come, then the answer. Leaving the loop early cancels the question.
  async *ask(question, options = {}) {
    yield* this.#answers({ type: "ask", question, ...options });
  }

  async *report(language, options = {}) {
    yield* this.#answers({ type: "report", language, ...options });
  }

  status() {
    return this.#one({ type: "status" });
  }

  schema() {
    return this.#one({ type: "schema" });
  }

  picture(name = "live") {
    return this.#one({ type: "picture", name });
  }

  freeze(name) {
    return this.#one({ type: "freeze", name });
  }

  release(name) {
    return this.#one({ type: "freeze", name, release: true });
  }

  cancel(id) {
    return this.#send({ type: "cancel", id });
  }

  close() {
    this.#socket.close();
  }

  async *#answers(request) {
    const id = await this.#send({ id: this.#newId(), ...request });
    let over = false;
    try {
      while (!over) {
        const reply = await this.#receive(id);
        over = reply.type !== "token";
        yield reply;
      }
    } catch (error) {
      over = true;
      throw error;
    } finally {
      if (!over) await this.cancel(id);
    }
  }

  async #one(request) {
    return this.#receive(await this.#send({ id: this.#newId(), ...request }));
  }

  #newId() {
    return `js-${process.pid}-${this.#count++}`;
  }

  async #send(request) {
    await this.#socket.send(encode({ v: VERSION, ...request }, { ignoreUndefined: true }));
    return request.id;
  }

  // The next reply to a request; those to requests that were given up are passed over.
  async #receive(id) {
    for (;;) {
      let payload;
      try {
        [payload] = await this.#socket.receive();
      } catch (error) {
        if (error.code !== "EAGAIN") throw error;
        throw new Error(`the server was silent for ${this.#timeoutMs} ms`);
      }
      const reply = read(payload);
      if (reply.id !== id && !(reply.type === "error" && reply.id === null)) continue;
      if (reply.type === "error") throw new Refusal(reply);
      return reply;
    }
  }
}

// Yields hints, states and telemetry until the loop is left.
export async function* listen(endpoint) {
  const socket = new Subscriber({ maxMessageSize: MAX_BYTES });
  socket.connect(endpoint);
  socket.subscribe();
  try {
    for await (const [payload] of socket) yield read(payload);
  } finally {
    socket.close();
  }
}

function read(payload) {
  const message = decode(payload, { useBigInt64: false });
  if (message.v !== VERSION) throw new Error(`the server speaks version ${message.v}, not ${VERSION}`);
  return message;
}
