import { Crowd } from "./crowd.js";
import { Trunkline } from "./trunkline.js";
import { Watchers } from "./watchers.js";

const TOPIC = "market.main";
const KEPT = 120;
const MORE = 100;
const MOST = 200; // a browser opens 255 sockets to one host
const RATE_MS = 2000;
const GENERATOR_MS = 1500;
const STATES = { connecting: "Connecting", online: "Live", offline: "Offline, connects again", closed: "Closed" };

const find = (id) => document.getElementById(id);
const url = `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws/prices`;
const format = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const count = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

// ------------------------------------------------------------------ the market

const ticks = new Map(); // number → prices, the last ones
const rows = new Map(); // symbol → elements
let companies = {};

function row(symbol) {
  let found = rows.get(symbol);
  if (!found) {
    const element = find("row").content.firstElementChild.cloneNode(true);
    found = {
      element,
      name: element.querySelector("th span"),
      line: element.querySelector("polyline"),
      price: element.querySelector(".price"),
      change: element.querySelector(".change"),
    };
    element.querySelector("th b").textContent = symbol;
    rows.set(symbol, found);
    find("rows").append(element);
  }
  found.name.textContent = companies[symbol] ?? "";
  return found;
}

function show() {
  const numbers = [...ticks.keys()].sort((left, right) => left - right);
  for (const old of numbers.splice(0, Math.max(0, numbers.length - KEPT))) ticks.delete(old);
  const last = ticks.get(numbers.at(-1));
  const before = ticks.get(numbers.at(-2)) ?? last;
  if (!last) return;
  find("waiting").hidden = true;
  find("tick").textContent = count.format(numbers.at(-1));
  for (const [symbol, price] of Object.entries(last)) {
    const { element, line, price: cell, change } = row(symbol);
    const series = numbers.map((number) => ticks.get(number)[symbol]);
    const moved = price > before[symbol] ? "up" : price < before[symbol] ? "down" : "same";
    const since = (price / series[0] - 1) * 100;
    element.dataset.change = since < 0 ? "down" : "up";
    const text = document.createElement("span");
    text.textContent = format.format(price);
    text.className = moved;
    cell.replaceChildren(text);
    change.textContent = `${since < 0 ? "−" : "+"}${format.format(Math.abs(since))} %`;
    line.setAttribute("points", points(series));
  }
}

function points(series) {
  const low = Math.min(...series);
  const spread = Math.max(...series) - low || 1;
  const step = 120 / Math.max(1, KEPT - 1);
  const start = 120 - step * (series.length - 1);
  return series.map((price, index) => `${start + step * index},${30 - (28 * (price - low)) / spread}`).join(" ");
}

// ------------------------------------------------------------------ the crowd

const crowd = new Crowd(find("dots"));
const watchers = new Watchers(url);
const deliveries = []; // when ticks arrived, of all watchers together
const runs = new Map(); // generator → when its last tick arrived
let dots = []; // the watchers in the order of their dots; the page itself is the first one

function delivered(watcher, data) {
  const now = performance.now();
  deliveries.push(now);
  if (!runs.has(data.run)) find("run").textContent = data.run;
  runs.set(data.run, now);
  const index = dots.indexOf(watcher);
  if (index >= 0) crowd.light(index);
}

function showFigures() {
  const now = performance.now();
  while (deliveries.length && deliveries[0] < now - RATE_MS) deliveries.shift();
  for (const [run, at] of runs) if (at < now - GENERATOR_MS) runs.delete(run);
  const all = dots.length;
  find("generators").textContent = runs.size;
  find("generators-label").textContent = runs.size === 1 ? "generator" : "generators";
  find("watchers").textContent = count.format(all);
  find("watchers-label").textContent = all === 1 ? "watcher" : "watchers";
  find("rate").textContent = count.format((deliveries.length * 1000) / RATE_MS);
}

function changed() {
  dots = [...(client.state.name === "online" ? [client] : []), ...watchers.open];
  crowd.size = dots.length;
  find("more").disabled = watchers.wanted + MORE > MOST;
  find("fewer").disabled = watchers.open.size === 0;
  if (find("more").disabled) {
    find("hint").textContent =
      "A browser has no room for more sockets. For thousands: python examples/prices/watchers.py 5000";
  }
  showFigures();
}

find("more").addEventListener("click", () => {
  watchers.add(MORE);
  changed();
});
find("fewer").addEventListener("click", () => watchers.clear());
watchers.addEventListener("change", changed);
watchers.addEventListener("tick", ({ detail: { watcher, data } }) => delivered(watcher, data));
setInterval(showFigures, 250);

// ------------------------------------------------------------------ the page's own subscription

const client = new Trunkline(url);

client.subscribe(TOPIC, {
  async onSubscribed() {
    const [names, history] = await Promise.all([
      client.call("companies"),
      client.call("$history", { topic: TOPIC, limit: KEPT }),
    ]);
    companies = names;
    for (const { data } of history.messages) ticks.set(data.number, data.prices);
    show();
  },
  onMessage(data) {
    ticks.set(data.number, data.prices);
    delivered(client, data);
    show();
  },
  onError(error) {
    find("waiting").hidden = false;
    find("waiting").textContent = `${TOPIC}: ${error.message}`;
  },
});

client.addEventListener("state", ({ detail: { name, code, reason } }) => {
  find("status").dataset.state = name;
  find("status-text").textContent = name === "closed" && code !== 1000 ? `${STATES[name]}: ${reason || code}` : STATES[name];
  changed();
});
addEventListener("online", () => client.wake());
client.connect();
