/** Sockets that do nothing but watch a topic: each is a client of its own, as another browser would be. */

const SUBSCRIBE = JSON.stringify({ action: "$subscribe", id: 1, topic: "market.main" });
const AT_ONCE = 10;
const PAUSE_MS = 40;

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

  #watch() {
    const socket = new WebSocket(this.#url);
    socket.onopen = () => socket.send(SUBSCRIBE);
    socket.onmessage = ({ data: text }) => {
      const { action, data, error } = JSON.parse(text);
      if (error) {
        socket.close(1000);
      } else if (action === "$subscribe") {
        if (this.#open.size >= this.#wanted) {
          socket.close(1000); // "Close them" was quicker
          return;
        }
        this.#open.add(socket);
        this.#changed();
      } else if (data) {
        this.dispatchEvent(new CustomEvent("tick", { detail: { watcher: socket, data } }));
      }
    };
    socket.onclose = () => {
      if (this.#open.delete(socket)) {
        this.#wanted = Math.min(this.#wanted, this.#open.size);
      } else if (this.#wanted > 0) {
        this.#wanted -= 1; // it could not be opened
      }
      this.#changed();
    };
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}
