import { TEMPORARY, terminal } from "./trunkline.js";

/** Sockets that do nothing but watch a topic: each is a client of its own, as another browser would be. */

const SUBSCRIBE = JSON.stringify({ action: "$subscribe", id: 1, topic: "market.main" });
const AT_ONCE = 10;
const PAUSE_MS = 40;
const AGAIN_MS = 500; // doubled with each attempt, half of it at random
const ATTEMPTS = 6;

export class Watchers extends EventTarget {
  #url;
  #open = new Set();
  #wanted = 0;
  #opening = false;

  /** Emits "change" when one comes or goes, and "tick" with `{watcher, data}` for all that one is told. */
  constructor(url) {
    super();
    this.#url = url;
  }

  /** Those that are subscribed. */
  get open() {
    return this.#open;
  }

  /** Those that are, or are about to be. */
  get wanted() {
    return this.#wanted;
  }

  async add(count) {
    this.#wanted += count;
    if (this.#opening) return;
    this.#opening = true;
    for (let started = this.#open.size; started < this.#wanted; started += 1) {
      this.#watch();
      if (started % AT_ONCE === AT_ONCE - 1) await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
    }
    this.#opening = false;
  }

  clear() {
    this.#wanted = 0;
    for (const socket of this.#open) socket.close(1000);
  }

  #watch(attempt = 0) {
    let again = attempt < ATTEMPTS; // a server that has too much to do says so, to the socket or to the subscription
    let surplus = false;
    const socket = new WebSocket(this.#url);
    socket.onopen = () => socket.send(SUBSCRIBE);
    socket.onmessage = ({ data: text }) => {
      const { action, data, error } = JSON.parse(text);
      if (error) {
        again &&= TEMPORARY.has(error.code);
        socket.close(1000);
      } else if (action === "$subscribe") {
        if (this.#open.size >= this.#wanted) {
          surplus = true; // "Close them" was quicker
          socket.close(1000);
          return;
        }
        this.#open.add(socket);
        this.#changed();
      } else if (data) {
        this.dispatchEvent(new CustomEvent("tick", { detail: { watcher: socket, data } }));
      }
    };
    socket.onclose = ({ code }) => {
      if (surplus) return;
      if (!this.#open.delete(socket) && again && !terminal(code)) {
        const waitMs = AGAIN_MS * 2 ** attempt * (0.5 + Math.random() / 2);
        setTimeout(() => this.#open.size < this.#wanted && this.#watch(attempt + 1), waitMs);
      } else {
        this.#wanted = Math.max(0, this.#wanted - 1); // it has ended, or could not be opened
      }
      this.#changed();
    };
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}
