/** The picture: one generator on the left, and a line to the dot of each watcher, which lights up when it gets a tick. */

const GLOW_MS = 700;
const still = matchMedia("(prefers-reduced-motion: reduce)");

export class Crowd {
  #canvas;
  #lit = []; // by dot: when it got its last tick
  #sent = 0;
  #drawing = false;

  constructor(canvas) {
    this.#canvas = canvas;
    new ResizeObserver(() => this.#draw()).observe(canvas);
  }

  set size(count) {
    while (this.#lit.length < count) this.#lit.push(0);
    this.#lit.length = count;
    this.#draw();
  }

  /** The dot `index` has got a tick. */
  light(index) {
    const now = performance.now();
    this.#lit[index] = now;
    this.#sent = now;
    this.#draw();
  }

  #draw() {
    if (this.#drawing) return;
    this.#drawing = true;
    requestAnimationFrame((now) => {
      this.#drawing = false;
      if (this.#paint(now) && !still.matches) this.#draw();
    });
  }

  /** Returns whether anything still glows. */
  #paint(now) {
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    const scale = devicePixelRatio;
    this.#canvas.width = width * scale;
    this.#canvas.height = height * scale;
    const context = this.#canvas.getContext("2d");
    context.scale(scale, scale);
    const style = getComputedStyle(document.documentElement);
    const accent = style.getPropertyValue("--accent");
    const glow = (at) => (still.matches ? 0.6 : Math.max(0, 1 - (now - at) / GLOW_MS));
    const from = { x: 26, y: height / 2 };
    const dots = this.#places(width, height);
    context.strokeStyle = context.fillStyle = accent;
    context.lineWidth = 1;
    const thin = Math.min(1, 30 / (dots.length + 1));
    dots.forEach(({ x, y }, index) => {
      context.globalAlpha = (0.12 + 0.5 * glow(this.#lit[index])) * (0.3 + 0.7 * thin);
      context.beginPath();
      context.moveTo(from.x, from.y);
      const middle = from.x + (x - from.x) * 0.4;
      context.bezierCurveTo(middle, from.y, middle, y, x, y);
      context.stroke();
    });
    dots.forEach(({ x, y, radius }, index) => {
      context.globalAlpha = 0.35 + 0.65 * glow(this.#lit[index]);
      context.beginPath();
      context.arc(x, y, radius, 0, 2 * Math.PI);
      context.fill();
    });
    context.globalAlpha = 0.16 + 0.2 * glow(this.#sent);
    context.beginPath();
    context.arc(from.x, from.y, 24, 0, 2 * Math.PI);
    context.fill();
    context.globalAlpha = 1;
    context.beginPath();
    context.arc(from.x, from.y, 15, 0, 2 * Math.PI);
    context.fill();
    return this.#lit.some((at) => now - at < GLOW_MS);
  }

  #places(width, height) {
    const count = this.#lit.length;
    if (count === 0) return [];
    const left = width * 0.36;
    const room = { width: width - left - 12, height: height - 16 };
    const columns = Math.max(1, Math.ceil(Math.sqrt((count * room.width) / room.height)));
    const rows = Math.ceil(count / columns);
    const step = Math.min(room.width / columns, room.height / rows, 26);
    const radius = Math.max(1.5, Math.min(6, step * 0.3));
    const top = (height - step * (rows - 1)) / 2;
    return this.#lit.map((_, index) => ({
      x: left + step / 2 + step * Math.floor(index / rows),
      y: top + step * (index % rows),
      radius,
    }));
  }
}
