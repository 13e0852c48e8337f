/** A room and its messages, without any DOM: what was published, and what this page has sent and not yet seen again. */

const KEPT = 500;
const SHOWN_CHARACTERS = 10_000;

/** The same rule as in app.py. */
export const isRoom = (name) => /^[a-z0-9][a-z0-9-]{0,31}$/.test(name);

export const titleOf = (name) => (/^\d+$/.test(name) ? `Room ${name}` : name);

export class Room {
  constructor(name) {
    this.name = name;
    this.messages = []; // as published, then our own that have not come back yet
    this.unread = 0;
    this.people = []; // names of those who are here, each once
    this.leave = null; // ends the subscription
  }

  get topic() {
    return `room.${this.name}`;
  }

  /** Adds a message of ours that is on its way. */
  compose(author, text) {
    const message = { author, text, at: new Date(), own: true, delivery: "waiting", confirmed: false };
    this.#insert(message, this.messages.length);
    return message;
  }

  /** Adds what was published, or confirms the message of ours that it is. Returns the message. */
  receive(data, offset, myName) {
    const { author, text, at } = understand(data);
    // Our own publication may overtake the reply that tells its offset.
    const index = this.messages.findIndex(
      (ours) =>
        ours.confirmed === false && ours.author === author && ours.text === text && (ours.offset ?? offset) === offset,
    );
    const message = index >= 0 ? this.messages.splice(index, 1)[0] : { author, text, own: author === myName };
    Object.assign(message, { at, offset, confirmed: true });
    if (index >= 0) message.delivery = "sent";
    this.#insert(message, this.#published());
    return message;
  }

  /** Marks the place where messages may be missing. */
  lose() {
    const last = this.messages[this.#published() - 1];
    if (last && !last.lost) this.#insert({ lost: true, at: new Date() }, this.#published());
  }

  #published() {
    const index = this.messages.findIndex((message) => message.confirmed === false);
    return index < 0 ? this.messages.length : index;
  }

  #insert(message, index) {
    this.messages.splice(index, 0, message);
    if (this.messages.length > KEPT) this.messages.shift();
  }
}

/** Anybody may publish any JSON: `author` is null when it names none. */
function understand(data) {
  const { name, text, at } = Object(data);
  const shown = [text, data].find((value) => typeof value === "string") ?? JSON.stringify(data, null, 2);
  const time = new Date(typeof at === "number" ? at * 1000 : NaN);
  return {
    author: typeof name === "string" && name.trim() ? [...name.trim()].slice(0, 24).join("") : null,
    text: shown.length > SHOWN_CHARACTERS ? `${shown.slice(0, SHOWN_CHARACTERS)}…` : shown,
    at: Number.isNaN(time.getTime()) ? new Date() : time,
  };
}
