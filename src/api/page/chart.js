// A line chart in SVG, drawn again at its real width whenever that or the numbers change.

import { el, svg, text } from "./dom.js";
import { number } from "./format.js";

const HEIGHT = 220;
const MARGIN = { left: 58, right: 12, top: 10, bottom: 30 };
const TICKS = 4;

/** A figure under a title. `draw` takes series of `{ name, points: [[x, y]], dots }`. */
export class Chart {
  #title;
  #unit;
  #series = [];
  #plot;
  #summary;
  #scale = null;
  #cursor;

  constructor(title, unit) {
    this.#title = title;
    this.#unit = unit;
    this.#plot = svg("svg", { class: "plot", role: "img", height: HEIGHT });
    this.#summary = el("figcaption", {}, "No step has been done yet.");
    this.element = el("figure", { class: "chart" }, this.#plot, this.#summary);
    this.#cursor = svg("line", { class: "cursor", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" });
    this.#plot.addEventListener("pointermove", (event) => this.#point(event));
    this.#plot.addEventListener("pointerleave", () => this.#leave());
    new ResizeObserver(() => this.#render()).observe(this.element);
  }

  draw(series) {
    this.#series = series.filter(({ points }) => points.length > 0);
    this.#render();
  }

  #render() {
    const width = Math.max(this.element.clientWidth, 240);
    this.#plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.#plot.setAttribute("aria-label", this.#told());
    text(this.#summary, this.#told());
    this.#scale = this.#series.length > 0 ? scale(this.#series, width) : null;
    this.#plot.replaceChildren(...(this.#scale ? this.#marks(this.#scale, width) : []), this.#cursor);
  }

  #marks({ x, y, xs, ys }, width) {
    const bottom = HEIGHT - MARGIN.bottom;
    const marks = ys.flatMap((value) => [
      svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }),
      svg("text", { class: "tick", x: MARGIN.left - 6, y: y(value) + 4, "text-anchor": "end" }, number(value)),
    ]);
    marks.push(...xs.map((value) =>
      svg("text", { class: "tick", x: x(value), y: bottom + 18, "text-anchor": "middle" }, number(value))));
    this.#series.forEach(({ points, dots }, at) => {
      const shown = thinned(points, width);
      const path = shown.map(([px, py], n) => `${n ? "L" : "M"}${x(px).toFixed(1)} ${y(py).toFixed(1)}`).join("");
      marks.push(svg("path", { class: `series series-${at}`, d: path }));
      if (dots || shown.length === 1) {
        marks.push(...shown.map(([px, py]) => svg("circle", { class: `dot dot-${at}`, cx: x(px), cy: y(py), r: 3.5 })));
      }
    });
    return marks;
  }

  /** The chart in a sentence. */
  #told() {
    if (this.#series.length === 0) return "No step has been done yet.";
    const one = ({ name, points }) => {
      const [[first, from], [last, to]] = [points[0], points.at(-1)];
      const least = points.reduce((low, [, y]) => Math.min(low, y), Infinity);
      if (points.length === 1) return `${name}: ${number(to)}${this.#unit} at step ${last}`;
      return `${name}: ${number(from)} at step ${first}, ${number(to)}${this.#unit} at step ${last}; lowest ${number(least)}`;
    };
    return `${this.#series.map(one).join(". ")}.`;
  }

  /** The numbers under the pointer. */
  #point(event) {
    if (!this.#scale) return;
    const wanted = this.#scale.step(event.offsetX);
    const near = (points) => points.reduce((a, b) => (Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a));
    const found = this.#series.map(({ name, points }) => [name, near(points)]);
    const x = this.#scale.x(found[0][1][0]);
    for (const [name, value] of Object.entries({ x1: x, x2: x, visibility: "visible" })) {
      this.#cursor.setAttribute(name, value);
    }
    const words = found.map(([name, [step, y]]) => `step ${step}: ${name} ${number(y)}${this.#unit}`);
    text(this.#summary, words.join(", "));
  }

  #leave() {
    this.#cursor.setAttribute("visibility", "hidden");
    text(this.#summary, this.#told());
  }
}

/** From numbers to places, and the numbers that the axes show. */
function scale(series, width) {
  const all = series.flatMap(({ points }) => points);
  const range = (at) => all.reduce(([low, high], p) => [Math.min(low, p[at]), Math.max(high, p[at])], [Infinity, -Infinity]);
  const [left, right] = range(0);
  const [low, high] = range(1);
  const ys = ticks(low, high);
  const [bottom, top] = [Math.min(low, ys[0]), Math.max(high, ys.at(-1))];
  const span = (a, b) => (b > a ? b - a : 1);
  const wide = width - MARGIN.left - MARGIN.right;
  const tall = HEIGHT - MARGIN.top - MARGIN.bottom;
  return {
    x: (value) => MARGIN.left + ((value - left) / span(left, right)) * wide,
    y: (value) => MARGIN.top + (1 - (value - bottom) / span(bottom, top)) * tall,
    step: (place) => left + ((place - MARGIN.left) / wide) * span(left, right),
    xs: ticks(left, right).filter((value) => value >= left && value <= right && Number.isInteger(value)),
    ys,
  };
}

/** Round numbers from about `low` to about `high`. */
function ticks(low, high) {
  if (!(high > low)) return [low];
  const rough = (high - low) / TICKS;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const first = Math.floor(low / step);
  const found = [];
  for (let n = first; found.length === 0 || found.at(-1) < high; n += 1) found.push(Number((n * step).toPrecision(12)));
  return found;
}

/** At most two points for each pixel: the lowest and the highest of those that share one, so that no spike is lost. */
function thinned(points, width) {
  const most = Math.max(2, Math.floor(width));
  if (points.length <= 2 * most) return points;
  const size = Math.ceil(points.length / most);
  const kept = [];
  for (let start = 0; start < points.length; start += size) {
    const bucket = points.slice(start, start + size);
    const pick = (better) => bucket.reduce((a, b) => (better(b[1], a[1]) ? b : a));
    const pair = [pick((a, b) => a < b), pick((a, b) => a > b)].sort((a, b) => a[0] - b[0]);
    kept.push(...(pair[0] === pair[1] ? [pair[0]] : pair));
  }
  return kept;
}
