/**
 * A small Trunkline client: one WebSocket that reconnects, calls that are answered, topics that remember their
 * position. No dependencies; copy this file into your own page.
 *
 *   const client = new Trunkline(() => `wss://example.org/ws/chat?name=${name}`);
 *   client.addEventListener("state", ({ detail }) => show(detail));       // connecting | online | offline | closed
 *   client.subscribe("room.1", { onMessage: (data) => render(data) });
 *   client.connect();
 *   const { offset } = await client.call("say", { room: "1", text: "hi" });
 *
 * Other events: "error" (a TrunklineError that belongs to no call) and "push" (a frame that a handler sent).
 *
 * A server that refuses this page closes the socket with a code, too: 3500 to 3999 and 4500 to 4999 are final (log in again, ask for
 * something else), after every other one it connects again, later each time, and no sooner than the server asks for.
 */

/** Why a call or a subscription failed. `code` is the server's name for it, or "offline", "disconnected", "timeout". */
export class TrunklineError extends Error {
  constructor({ code = "unknown", message = "Unknown error", detail, retry_after: retryAfterS }) {
    super(message);
    Object.assign(this, { name: "TrunklineError", code, detail, retryAfterS });
  }
}

/** Codes of errors after which the same may succeed, and whether a close code says not to come back. */
export const TEMPORARY = new Set(["internal", "overloaded", "no_worker", "rate_limited", "timeout", "unavailable"]);
export const terminal = (code) => (code >= 3500 && code <= 3999) || (code >= 4500 && code <= 4999);
const retryAfterS = (reason) => Number(/ \(retry after (\d+) s\)$/.exec(reason)?.[1] ?? 0);

export class Trunkline extends EventTarget {
  #url;
  #options;
  #socket = null;
  #state = { name: "closed" };
  #calls = new Map(); // id → { resolve, reject, timer }
  #subscriptions = new Map(); // topic → { topic, handlers, position }
  #lastId = 0;
  #attempt = 0;
  #changedAt = 0; // when the state changed, when the last frame came, when an unanswered ping left
  #heardAt = 0;
  #pingedAt = 0;
  #watchTimer;
  #retryTimer;

  /** `url` is a string or a function that returns one, asked before every connect (for a fresh token). Seconds. */
  constructor(url, { pingS = 25, pongS = 10, timeoutS = 10, minRetryS = 0.5, maxRetryS = 20 } = {}) {
    super();
    this.#url = url;
    this.#options = { pingS, pongS, timeoutS, minRetryS, maxRetryS };
  }

  /** `{name}`; offline and closed add `code` and `reason` ("forbidden: …"), offline also `retryAt` (by performance.now()). */
  get state() {
    return this.#state;
  }

  /** Opens the socket and keeps it open until close(). Harmless when it is open already. */
  connect() {
    if (this.#socket) return;
    clearTimeout(this.#retryTimer);
    const socket = new WebSocket(typeof this.#url === "function" ? this.#url() : this.#url);
    this.#socket = socket;
    this.#enter({ name: "connecting" });
    socket.onopen = () => {
      this.#heardAt = performance.now();
      this.#enter({ name: "online" });
      for (const subscription of this.#subscriptions.values()) this.#subscribe(subscription);
    };
    socket.onmessage = ({ data }) => this.#received(data);
    socket.onclose = ({ code, reason }) => this.#lost(code, reason);
    clearInterval(this.#watchTimer);
    this.#watchTimer = setInterval(() => this.#watch(), 1000);
  }

  /** Closes the socket for good; connect() opens it again, and positions are still known then. */
  close() {
    clearTimeout(this.#retryTimer);
    this.#socket?.close(1000);
    this.#lost(1000, "", true);
  }

  /** The page is back (from sleep, from no network): retries now, or asks a silent line whether it is alive. */
  wake() {
    if (this.#state.name === "offline") this.connect();
    else if (this.#state.name === "online" && !this.#pingedAt) this.#ping();
  }

  /** Sends `{action, id, ...payload}` and resolves with the reply; rejects with a TrunklineError. Never sent twice. */
  call(action, payload = {}, timeoutS = this.#options.timeoutS) {
    return new Promise((resolve, reject) => {
      if (this.#state.name !== "online") {
        reject(new TrunklineError({ code: "offline", message: "Not connected" }));
        return;
      }
      const id = ++this.#lastId;
      const timer = setTimeout(() => {
        this.#calls.delete(id);
        reject(new TrunklineError({ code: "timeout", message: `no answer within ${timeoutS} s` }));
      }, timeoutS * 1000);
      this.#calls.set(id, { resolve, reject, timer });
      this.#socket.send(JSON.stringify({ ...payload, action, id }));
    });
  }

  /**
   * Follows a topic through every reconnect; returns the function that ends it. Handlers, all optional:
   * onSubscribed(reply), onMessage(data, offset) in order and once each, onLost() when some may be missing,
   * onError(error) when the server refuses, onMembers(members) whenever other ones are subscribed than before.
   */
  subscribe(topic, handlers) {
    if (this.#subscriptions.has(topic)) throw new Error(`already subscribed to ${topic}`);
    const subscription = { topic, handlers, position: null, members: null };
    if (handlers.onMembers) {
      const read = (cursor) => this.call("$presence", { topic, limit: 1000, cursor });
      subscription.members = new Members(read, handlers.onMembers);
    }
    this.#subscriptions.set(topic, subscription);
    if (this.#state.name === "online") this.#subscribe(subscription);
    return () => {
      if (this.#subscriptions.get(topic) !== subscription) return;
      this.#subscriptions.delete(topic);
      this.call("$unsubscribe", { topic }).catch(() => {}); // offline: the server has forgotten it anyway
    };
  }

  /** Subscribes anew, from where it was: the server asks again who this is and what others see of it. */
  async renew(topic) {
    const subscription = this.#subscriptions.get(topic);
    if (!subscription || this.#state.name !== "online") return;
    await this.call("$unsubscribe", { topic }).catch(() => {}); // what comes next tells
    if (this.#subscriptions.get(topic) === subscription) await this.#subscribe(subscription);
  }

  async #subscribe(subscription, attempt = 0) {
    const { topic, handlers, position } = subscription;
    const socket = this.#socket;
    const current = () => this.#socket === socket && this.#subscriptions.get(topic) === subscription;
    let reply;
    try {
      const presence = subscription.members ? true : undefined;
      reply = await this.call("$subscribe", { topic, ...position, presence });
    } catch (error) {
      if (current()) this.#refused(subscription, error, attempt);
      return; // a new connection subscribes again
    }
    if (!current()) return;
    const { offset, epoch, recovered, messages = [] } = reply;
    const complete = recovered || (offset === position?.offset && epoch === position?.epoch);
    if (position && !complete) {
      subscription.position = null;
      handlers.onLost?.();
    }
    for (const message of messages) this.#deliver(subscription, message);
    subscription.position = { offset, epoch };
    handlers.onSubscribed?.(reply);
    subscription.members?.reload();
  }

  #refused(subscription, error, attempt) {
    const { topic, handlers } = subscription;
    if (!TEMPORARY.has(error.code)) {
      handlers.onError?.(error);
      return;
    }
    const socket = this.#socket;
    const again = () => {
      if (this.#socket !== socket || this.#subscriptions.get(topic) !== subscription) return;
      this.call("$unsubscribe", { topic }).catch(() => {}); // it may have come about after the answer was given up
      this.#subscribe(subscription, attempt + 1);
    };
    setTimeout(again, Math.max(error.retryAfterS ?? 0, this.#backoffS(attempt)) * 1000);
  }

  #deliver(subscription, { offset, data }) {
    const { position, handlers } = subscription;
    if (position && offset <= position.offset) return;
    subscription.position = { ...position, offset };
    handlers.onMessage?.(data, offset);
  }

  #received(text) {
    this.#heardAt = performance.now();
    this.#pingedAt = 0;
    const { action, id, error, ...rest } = JSON.parse(text);
    const call = this.#calls.get(id);
    if (call) {
      this.#calls.delete(id);
      clearTimeout(call.timer);
      if (error) call.reject(new TrunklineError(error));
      else call.resolve(rest);
    } else if (action === undefined && this.#subscriptions.has(rest.topic)) {
      this.#told(this.#subscriptions.get(rest.topic), rest, error);
    } else if (id === undefined) {
      if (error) this.#emit("error", new TrunklineError(error));
      else this.#emit("push", rest);
    } // else it answers a call that was given up
  }

  #told(subscription, what, error) {
    const { offset, epoch, lost, subscribed, unsubscribed, presence } = what;
    if (presence) subscription.members?.change(presence);
    else if (unsubscribed) this.#refused(subscription, new TrunklineError(error), 0);
    else if (lost || subscribed) subscription.position = { offset, epoch };
    else this.#deliver(subscription, what);
    if (lost) subscription.handlers.onLost?.();
  }

  #lost(code, reason, wanted = false) {
    const socket = this.#socket;
    this.#socket = null;
    if (socket) socket.onopen = socket.onmessage = socket.onclose = null;
    clearInterval(this.#watchTimer);
    this.#pingedAt = 0;
    const stable = this.#state.name === "online" && performance.now() - this.#changedAt > 5000;
    this.#attempt = stable ? 0 : this.#attempt + 1;
    if (wanted || terminal(code)) {
      this.#enter({ name: "closed", code, reason });
    } else {
      const asked = retryAfterS(reason) * (1 + Math.random() / 2); // a crowd is told the same
      const delayMs = Math.max(asked, this.#backoffS(this.#attempt)) * 1000;
      this.#retryTimer = setTimeout(() => this.connect(), delayMs);
      this.#enter({ name: "offline", code, reason, retryAt: performance.now() + delayMs });
    }
    for (const { reject, timer } of this.#calls.values()) {
      clearTimeout(timer);
      reject(new TrunklineError({ code: "disconnected", message: "the connection was lost before the answer came" }));
    }
    this.#calls.clear();
  }

  /** Full jitter: anything between the least delay and a bound that doubles, so that a crowd does not come back at once. */
  #backoffS(attempt) {
    const { minRetryS, maxRetryS } = this.#options;
    return Math.max(minRetryS, Math.random() * Math.min(maxRetryS, minRetryS * 2 ** (attempt + 1)));
  }

  // A dead peer sends no close frame: whoever stays silent after a ping, or never answers the handshake, is lost.
  #watch() {
    const { pingS, pongS, timeoutS } = this.#options;
    const now = performance.now();
    const connecting = this.#state.name === "connecting";
    const waiting = connecting || this.#pingedAt > 0;
    const deadline = connecting ? this.#changedAt + timeoutS * 1000 : this.#pingedAt + pongS * 1000;
    if (waiting && now > deadline) {
      this.#socket.close();
      this.#lost(1006, "no answer");
    } else if (!waiting && now > this.#heardAt + pingS * 1000) this.#ping();
  }

  #ping() {
    this.#pingedAt = performance.now();
    this.call("$ping").catch(() => {}); // #watch() sees the missing answer
  }

  #enter(state) {
    this.#state = state;
    this.#changedAt = performance.now();
    this.#emit("state", state);
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

/** The members of a topic: pages of them, and what has changed since. A change that does not follow means to read again. */
class Members {
  #read;
  #tell;
  #members = new Map(); // connection id → member
  #epoch = null;
  #version = 0;
  #reading = 0; // which reading is under way; 0: none
  #readings = 0;
  #meanwhile = [];

  constructor(read, tell) {
    this.#read = read;
    this.#tell = tell;
  }

  /** Reads all pages. */
  async reload(waitMs = 0) {
    const reading = ++this.#readings;
    this.#reading = reading;
    this.#meanwhile = [];
    if (waitMs) await new Promise((resolve) => setTimeout(resolve, waitMs));
    const found = new Map();
    let first = null;
    try {
      for (let cursor; first === null || cursor !== undefined; ) {
        if (this.#reading !== reading) return;
        const page = await this.#read(cursor);
        first ??= page;
        for (const member of page.members) found.set(member.connection_id, member);
        cursor = page.next;
      }
    } catch (error) {
      if (this.#reading !== reading) return;
      this.#reading = 0;
      this.#epoch = null; // without a connection, the next subscription reads again
      if (TEMPORARY.has(error.code)) this.reload(1000 + Math.random() * 2000);
      return;
    }
    if (this.#reading !== reading) return;
    this.#reading = 0;
    this.#epoch = first.epoch;
    this.#version = first.version;
    this.#members = found;
    for (const change of this.#meanwhile.splice(0)) this.change(change);
    this.#tell([...this.#members.values()]);
  }

  change(change) {
    const { epoch, since, version, reload, joined, left } = change;
    if (this.#reading) this.#meanwhile.push(change);
    else if (epoch === this.#epoch && version <= this.#version) return;
    else if (epoch !== this.#epoch || since > this.#version || reload) {
      this.reload(Math.random() * 1000); // not all watchers at once
    } else {
      this.#version = version;
      for (const { connection_id: id } of left) this.#members.delete(id);
      for (const member of joined) this.#members.set(member.connection_id, member);
      this.#tell([...this.#members.values()]);
    }
  }
}
