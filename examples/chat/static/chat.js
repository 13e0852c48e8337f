/** The page: rooms, name, message field and the state of the line. Whatever comes from others is only ever set as text. */

import { MessageList, paintAvatar } from "./messages.js";
import { Room, isRoom, titleOf } from "./room.js";
import { Trunkline } from "./trunkline.js";

const TEXT_LIMIT = 500;
const ROOM_LIMIT = 20;
const FACES = 4;
const STORE = "trunkline-chat";
const ADJECTIVES = ["Amber", "Brave", "Calm", "Dapper", "Eager", "Fuzzy", "Gentle", "Jolly", "Lucky", "Mellow", "Quiet", "Swift"];
const ANIMALS = ["Badger", "Dolphin", "Falcon", "Gecko", "Heron", "Ibis", "Lynx", "Marten", "Otter", "Puffin", "Robin", "Wombat"];

const $ = (id) => document.getElementById(id);
const pick = (list) => list[Math.floor(Math.random() * list.length)];
const tidy = (name) => name.trim().replace(/\s+/g, " ");
const isName = (name) => /^[^\p{C}]{1,24}$/u.test(name) && name.toLowerCase() !== "service";

// ---------------------------------------------------------------------------------------------- what is remembered

function remembered() {
  try {
    const { name, rooms } = JSON.parse(localStorage.getItem(STORE)) ?? {};
    return { name, rooms: Array.isArray(rooms) ? rooms.filter(isRoom).slice(0, ROOM_LIMIT) : [] };
  } catch {
    return { rooms: [] }; // storage is forbidden, or another page's content sits in it: start afresh
  }
}

function remember() {
  try {
    localStorage.setItem(STORE, JSON.stringify({ name: myName, rooms: [...rooms.keys()] }));
  } catch {
    // Storage is forbidden or full: the page works without, only the next visit begins anew.
  }
}

const before = remembered();
let myName = isName(before.name ?? "") ? before.name : `${pick(ADJECTIVES)} ${pick(ANIMALS)}`;
const rooms = new Map(); // name → Room, in the order of joining
let current = null;

// ---------------------------------------------------------------------------------------------------- the connection

const client = new Trunkline(() => {
  const url = new URL("/ws/chat", location.href);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  url.search = new URLSearchParams({ name: myName });
  url.hash = "";
  return url.href;
});

const list = new MessageList({
  scroller: $("scroller"),
  list: $("messages"),
  newer: $("newer"),
  empty: $("empty"),
  template: $("message"),
  onRetry: (message) => send(current, message),
});

let countdown = 0;

client.addEventListener("state", ({ detail: state }) => {
  const texts = { connecting: "Connecting", online: "Online", offline: "Offline", closed: "Disconnected" };
  $("status").dataset.state = state.name;
  if ($("status-text").textContent !== texts[state.name]) $("status-text").textContent = texts[state.name];
  $("status-retry").hidden = state.name !== "offline";
  clearInterval(countdown);
  $("status-countdown").textContent = "";
  if (state.name === "offline") {
    const tick = () => {
      const seconds = Math.max(0, Math.ceil((state.retryAt - performance.now()) / 1000));
      $("status-countdown").textContent = `${seconds} s`;
    };
    tick();
    countdown = setInterval(tick, 250);
  }
  $("closed").hidden = state.name !== "closed";
  if (state.name === "closed") {
    const reason = state.reason ? `“${state.reason.replace(/^[^\s:]+: /, "")}”` : "no reason given";
    $("closed-text").textContent = `The server closed the connection for good: ${reason} (code ${state.code}).`;
  }
});
client.addEventListener("error", ({ detail }) => toast(detail.message));
$("status-retry").addEventListener("click", () => client.wake());
$("closed-retry").addEventListener("click", () => client.connect());
addEventListener("online", () => client.wake());
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  client.wake();
  if (current) current.unread = 0;
  drawRooms();
});

// -------------------------------------------------------------------------------------------------------- messages

async function send(room, message) {
  message.delivery = "sending";
  message.problem = "";
  list.refresh();
  const started = performance.now();
  try {
    const { offset } = await client.call("say", { room: room.name, text: message.text });
    if (!message.confirmed) message.offset = offset;
    message.tookMs = performance.now() - started;
    message.delivery = "sent";
  } catch (error) {
    if (error.code === "offline") message.delivery = "waiting"; // it never left: goes out with the next connection
    else if (!message.confirmed) {
      const unknown = error.code === "disconnected" || error.code === "timeout";
      message.delivery = unknown ? "unknown" : "failed";
      message.problem = error.message;
      if (!unknown) toast(error.message);
    }
  }
  list.refresh();
}

function received(room, data, offset) {
  const message = room.receive(data, offset, myName);
  if (!message.own && (room !== current || document.hidden)) {
    room.unread += 1;
    drawRooms();
  }
  if (room === current) list.refresh();
}

const length = () => [...$("text").value.trim()].length;

function fitText() {
  const text = $("text");
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
  const left = TEXT_LIMIT - length();
  $("left").textContent = left < 80 ? String(left) : "";
  $("left").classList.toggle("over", left < 0);
  $("say").querySelector("button").disabled = left < 0 || length() === 0;
}

$("text").addEventListener("input", fitText);
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("say").requestSubmit();
});
$("say").addEventListener("submit", (event) => {
  event.preventDefault();
  if (length() === 0 || length() > TEXT_LIMIT) return;
  const message = current.compose(myName, $("text").value.trim());
  $("text").value = "";
  fitText();
  send(current, message);
  list.toEnd();
});

// ----------------------------------------------------------------------------------------------------------- rooms

function join(name) {
  const known = rooms.get(name);
  if (known) return known;
  const room = new Room(name);
  rooms.set(name, room);
  room.leave = client.subscribe(room.topic, {
    onMessage: (data, offset) => received(room, data, offset),
    onLost: () => {
      room.lose();
      if (room === current) list.refresh();
    },
    onSubscribed: () => {
      for (const message of room.messages) if (message.delivery === "waiting") send(room, message);
    },
    onError: (error) => toast(`${titleOf(name)}: ${error.message}`),
    onMembers: (members) => {
      const names = members.map(({ info }) => Object(info).name).filter((name) => typeof name === "string");
      room.people = [...new Set(names)].sort((one, other) => one.localeCompare(other));
      if (room === current) drawPeople();
    },
  });
  return room;
}

function leave(name) {
  rooms.get(name).leave();
  rooms.delete(name);
  remember();
  if (current.name === name) go([...rooms.keys()].at(-1));
  else drawRooms();
}

const go = (name) => {
  location.hash = `room=${name}`;
};

/** The address decides which room is on screen, so that the back button and shared links work. */
function follow() {
  const asked = (new URLSearchParams(location.hash.slice(1)).get("room") ?? "").toLowerCase();
  const name = isRoom(asked) && (rooms.has(asked) || rooms.size < ROOM_LIMIT) ? asked : (current?.name ?? [...rooms.keys()][0] ?? "1");
  current = join(name);
  current.unread = 0;
  remember();
  if (asked !== name) history.replaceState(null, "", `#room=${name}`);
  const title = titleOf(name);
  $("room").textContent = title;
  $("messages").setAttribute("aria-label", `Messages in ${title}`);
  $("text").placeholder = `Message ${title}`;
  $("command").textContent = `nats pub trunkline.publish.room.${name} '{"text":"hi"}'`;
  list.show(current);
  drawPeople();
  drawRooms();
}

/** Who is in the room: some faces, how many there are, and all the names for whoever points at it. */
function drawPeople() {
  const { people } = current;
  const faces = people.slice(0, FACES).map((name) => {
    const face = document.createElement("span");
    face.className = "avatar";
    paintAvatar(face, name);
    return face;
  });
  const count = document.createElement("span");
  count.textContent = `${people.length} here`;
  $("people").replaceChildren(...faces, count);
  $("people").title = people.join("\n");
  $("people").setAttribute("aria-label", `${people.length} here: ${people.join(", ")}`);
  $("people").hidden = people.length === 0;
}

function drawRooms() {
  const items = [...rooms.values()].map((room) => {
    const item = document.createElement("li");
    const link = document.createElement("a");
    link.href = `#room=${room.name}`;
    link.textContent = titleOf(room.name);
    if (room === current) link.setAttribute("aria-current", "page");
    item.append(link);
    if (room.unread) {
      const badge = document.createElement("span");
      badge.className = "badge";
      badge.textContent = room.unread > 99 ? "99+" : room.unread;
      badge.setAttribute("aria-label", `${room.unread} unread`);
      link.append(badge);
    }
    if (rooms.size > 1) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = "×";
      button.setAttribute("aria-label", `Leave ${titleOf(room.name)}`);
      button.addEventListener("click", () => leave(room.name));
      item.append(button);
    }
    return item;
  });
  $("rooms").replaceChildren(...items);
  const unread = [...rooms.values()].reduce((sum, room) => sum + room.unread, 0);
  $("unread-elsewhere").hidden = unread === 0;
  document.title = `${unread ? `(${unread}) ` : ""}${titleOf(current.name)} · Trunkline chat`;
}

$("join").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("join-room").value.trim().toLowerCase().replace(/^#/, "").replace(/\s+/g, "-");
  let problem = "";
  if (!isRoom(name)) problem = "A room is up to 32 letters a–z, digits and dashes, like 7 or coffee-break.";
  else if (!rooms.has(name) && rooms.size >= ROOM_LIMIT) problem = `You are in ${ROOM_LIMIT} rooms. Leave one first.`;
  $("join-problem").textContent = problem;
  if (problem) return;
  $("join-room").value = "";
  go(name);
  closeSidebar();
});
$("join-room").addEventListener("input", () => {
  $("join-problem").textContent = "";
});
$("rooms").addEventListener("click", (event) => event.target.closest("a") && closeSidebar());
addEventListener("hashchange", follow);

/** On a narrow screen the sidebar is a popover; on a wide one it is always there. */
function closeSidebar() {
  if ($("sidebar").matches(":popover-open")) $("sidebar").hidePopover();
  $("text").focus();
}

// ------------------------------------------------------------------------------------------- name, copying, toasts

function drawName() {
  $("name").value = myName;
  paintAvatar($("my-avatar"), myName);
}

async function rename() {
  const name = tidy($("name").value);
  const old = myName;
  if (name === old || !isName(name)) {
    drawName();
    return;
  }
  myName = name;
  try {
    if (client.state.name === "online") await client.call("rename", { name });
    for (const { topic } of rooms.values()) client.renew(topic);
  } catch (error) {
    myName = old;
    toast(error.message);
  }
  drawName();
  remember();
}

$("name").addEventListener("input", () => {
  const name = tidy($("name").value);
  $("name").setCustomValidity(isName(name) ? "" : "A name has 1 to 24 characters, and “service” is taken.");
  if ($("name").checkValidity()) paintAvatar($("my-avatar"), name);
});
$("name").addEventListener("change", rename);
$("me").addEventListener("submit", (event) => {
  event.preventDefault();
  closeSidebar();
});

$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("command").textContent);
    $("copy").textContent = "Copied";
    setTimeout(() => ($("copy").textContent = "Copy"), 2000);
  } catch {
    getSelection().selectAllChildren($("command")); // no clipboard outside HTTPS and localhost
    toast("Press Ctrl+C to copy the marked line.");
  }
});

function toast(text) {
  const box = document.createElement("div");
  const close = document.createElement("button");
  box.className = "toast";
  box.append(document.createElement("p"), close);
  box.firstChild.textContent = text;
  close.type = "button";
  close.textContent = "×";
  close.setAttribute("aria-label", "Dismiss");
  close.addEventListener("click", () => box.remove());
  setTimeout(() => box.remove(), 8000);
  $("toasts").append(box);
  if ($("toasts").children.length > 3) $("toasts").firstChild.remove();
}

// ----------------------------------------------------------------------------------------------------------- begin

before.rooms.forEach(join);
drawName();
follow();
fitText();
client.connect();
if (matchMedia("(hover: hover)").matches) $("text").focus();
