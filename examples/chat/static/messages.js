/** The list on screen: rows, their grouping, and a scroll position that follows new messages only for a reader at the end. */

const NEAR_END_PX = 48;
const SAME_GROUP_MS = 5 * 60 * 1000;

const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
const full = new Intl.DateTimeFormat(undefined, { dateStyle: "full", timeStyle: "medium" });
const day = new Intl.DateTimeFormat(undefined, { weekday: "long", day: "numeric", month: "long" });

const DELIVERY = { waiting: "Waiting for the connection", sending: "Sending…", failed: "Not sent", unknown: "It may not have arrived" };

export class MessageList {
  #scroller;
  #list;
  #newer;
  #empty;
  #template;
  #onRetry;
  #room = null;
  #rows = new WeakMap(); // message → row
  #atEnd = true;
  #unseen = 0;
  #frame = 0;

  constructor({ scroller, list, newer, empty, template, onRetry }) {
    this.#scroller = scroller;
    this.#list = list;
    this.#newer = newer;
    this.#empty = empty;
    this.#template = template;
    this.#onRetry = onRetry;
    scroller.addEventListener("scroll", () => {
      this.#atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END_PX;
      if (this.#atEnd) this.#see();
    });
    newer.addEventListener("click", () => this.toEnd());
    new ResizeObserver(() => this.#atEnd && this.toEnd()).observe(scroller);
  }

  /** Shows another room, at its end. */
  show(room) {
    this.#room = room;
    this.#list.replaceChildren();
    this.#rows = new WeakMap();
    this.#atEnd = true;
    this.refresh();
  }

  /** Draws what has changed in the room, once per frame however many messages came. */
  refresh() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
    });
  }

  toEnd() {
    this.#scroller.scrollTop = this.#scroller.scrollHeight;
    this.#atEnd = true;
    this.#see();
  }

  #draw() {
    const { messages } = this.#room;
    const lastOwn = messages.findLast((message) => message.own);
    let added = 0;
    messages.forEach((message, index) => {
      let row = this.#rows.get(message);
      if (!row) {
        row = message.lost ? this.#divider() : this.#row(message);
        this.#rows.set(message, row);
        if (!message.lost && !message.own) added += 1;
      }
      if (this.#list.children[index] !== row) this.#list.insertBefore(row, this.#list.children[index] ?? null);
      this.#group(row, message, messages[index - 1]);
      if (message.own) this.#deliver(row, message, message === lastOwn);
    });
    while (this.#list.children.length > messages.length) this.#list.lastChild.remove();
    this.#empty.hidden = messages.length > 0;
    if (this.#atEnd) {
      this.toEnd();
    } else if (added) {
      this.#unseen += added;
      this.#newer.textContent = this.#unseen === 1 ? "1 new message" : `${this.#unseen} new messages`;
      this.#newer.hidden = false;
    }
  }

  #row(message) {
    const row = this.#template.content.firstElementChild.cloneNode(true);
    const { author, text, own } = message;
    row.classList.toggle("own", Boolean(own));
    row.classList.toggle("service", author === null);
    row.classList.toggle("jumbo", /^(\p{Extended_Pictographic}|\p{Emoji_Component}){1,8}$/u.test(text) && /\D/.test(text));
    paintAvatar(row.querySelector(".avatar"), author);
    row.querySelector(".author").textContent = author ?? "service";
    row.querySelector(".author").style.setProperty("--hue", hueOf(author));
    row.querySelector(".text").textContent = text;
    row.querySelector("button").addEventListener("click", () => this.#onRetry(message));
    return row;
  }

  #divider() {
    const row = document.createElement("li");
    row.className = "lost";
    row.textContent = "Some messages may be missing here";
    return row;
  }

  #group(row, message, previous) {
    const newDay = message.at.toDateString() !== (previous?.at ?? new Date()).toDateString();
    if (newDay) row.dataset.day = day.format(message.at);
    else delete row.dataset.day;
    if (message.lost) return;
    const continued =
      !newDay &&
      previous !== undefined &&
      !previous.lost &&
      previous.author === message.author &&
      message.at - previous.at < SAME_GROUP_MS;
    row.classList.toggle("continued", continued);
    const time = row.querySelector("time");
    const at = message.at.toISOString();
    if (time.dateTime !== at) {
      time.dateTime = at;
      time.textContent = clock.format(message.at);
    }
    row.title = full.format(message.at) + (message.offset ? `, number ${message.offset} in this room` : "");
  }

  #deliver(row, message, latest) {
    const { delivery, problem, tookMs } = message;
    const [text, retry] = row.querySelector(".delivery").children;
    let shown = DELIVERY[delivery] ?? "";
    if (problem) shown += `: ${problem}`;
    if (delivery === "sent" && latest) shown = tookMs === undefined ? "Sent" : `Sent in ${Math.max(1, Math.round(tookMs))} ms`;
    if (text.textContent !== shown) text.textContent = shown;
    row.dataset.delivery = delivery ?? "";
    retry.hidden = delivery !== "failed" && delivery !== "unknown";
  }

  #see() {
    this.#unseen = 0;
    this.#newer.hidden = true;
  }
}

/** Initials on the author's own colour; a bolt for a service. */
export function paintAvatar(avatar, author) {
  const initials = (author ?? "").split(/\s+/).map((word) => [...word][0] ?? "");
  avatar.textContent = author === null ? "" : (initials[0] + (initials.length > 1 ? initials.at(-1) : "")).toUpperCase();
  avatar.style.setProperty("--hue", hueOf(author));
}

function hueOf(author) {
  let hash = 0;
  for (const character of author ?? "") hash = (Math.imul(hash, 31) + character.codePointAt(0)) >>> 0;
  return Math.round((hash * 137.508) % 360); // the golden angle keeps neighbouring hashes apart
}
