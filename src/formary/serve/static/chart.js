// Curves as SVG: axes with round numbers, one line for each series, and a cross-hair for pointer and arrow keys.

import { draw, make } from "./elements.js";
import { number } from "./language.js";

const held = new Map(); // where people left the cross-hair, by title: curves that grow are drawn anew
const EDGE = { left: 56, right: 22, top: 12, bottom: 28 };

// `width` and `height` are in pixels of the page. series: [{name, kind: "line" | "faint" | "dots", color: 0..3, x: [], y: []}]
export function chart(title, series, width, height, { logarithmic = false } = {}) {
  const points = series.flatMap((one) => one.x.map((x, place) => [x, one.y[place]])).filter(([x, y]) => usable(x, y, logarithmic));
  if (points.length === 0) return null;
  const scale = logarithmic ? Math.log10 : (value) => value;
  let [low, high] = extent(points.map(([, y]) => scale(y)));
  if (high - low < 1e-12) [low, high] = [low - (Math.abs(low) || 1) * 0.05, high + (Math.abs(high) || 1) * 0.05];
  const [first, last] = extent(points.map(([x]) => x));
  const across = (x) => EDGE.left + ((x - first) / (last - first || 1)) * (width - EDGE.left - EDGE.right);
  const up = (y) => height - EDGE.bottom - ((scale(y) - low) / (high - low)) * (height - EDGE.top - EDGE.bottom);
  const grid = draw("g", { class: "grid" });
  for (const value of ticks(low, high, 5)) {
    const y = height - EDGE.bottom - ((value - low) / (high - low)) * (height - EDGE.top - EDGE.bottom);
    grid.append(
      draw("line", { x1: EDGE.left, x2: width - EDGE.right, y1: y, y2: y }),
      draw("text", { x: EDGE.left - 8, y: y + 4, "text-anchor": "end", text: short(logarithmic ? 10 ** value : value) }),
    );
  }
  for (const value of ticks(first, last, Math.max(2, Math.round(width / 120)))) {
    if (value === Math.round(value)) grid.append(draw("text", { x: across(value), y: height - 8, "text-anchor": "middle", text: number(value) }));
  }
  const lines = series.map((one) => {
    const good = one.x.map((x, place) => [x, one.y[place]]).filter(([x, y]) => usable(x, y, logarithmic));
    const path = good.map(([x, y], place) => `${place ? "L" : "M"}${across(x).toFixed(1)} ${up(y).toFixed(1)}`).join("");
    const group = draw("g", { class: `series ${one.kind} c${one.color}` }, draw("path", { d: path }));
    if (one.kind === "dots" && good.length <= 60) for (const [x, y] of good) group.append(draw("circle", { cx: across(x), cy: up(y), r: 3 }));
    return group;
  });
  const cross = draw("line", { class: "cross", y1: EDGE.top, y2: height - EDGE.bottom, x1: -10, x2: -10 });
  const picture = draw(
    "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0", "aria-label": described(title, series) }, grid, ...lines, cross,
  );
  const reading = make("p", { class: "reading", "aria-live": "polite" });
  const steps = [...new Set(points.map(([x]) => x))].sort((one, other) => one - other);
  let place = held.has(title) ? nearest(steps, held.get(title)) : steps.length - 1;
  const hold = () => {
    if (place === steps.length - 1) held.delete(title);
    else held.set(title, steps[place]);
    read();
  };
  const read = () => {
    const x = steps[place];
    cross.setAttribute("x1", across(x));
    cross.setAttribute("x2", across(x));
    const said = series.filter((one) => one.kind !== "faint").map((one) => {
      const at = nearest(one.x, x);
      return at < 0 || one.y[at] === null ? null : make("span", { class: `key ${one.kind} c${one.color}`, text: `${one.name} ${short(one.y[at])}`.trim() });
    }).filter(Boolean);
    reading.replaceChildren(make("span", { class: "faint", text: number(x) }), ...said);
  };
  const follow = (event) => {
    const box = picture.getBoundingClientRect();
    const x = first + ((((event.clientX - box.left) / box.width) * width - EDGE.left) / (width - EDGE.left - EDGE.right)) * (last - first);
    place = nearest(steps, x);
    hold();
  };
  picture.addEventListener("pointermove", follow);
  picture.addEventListener("pointerdown", follow);
  picture.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10, Home: -steps.length, End: steps.length }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    place = Math.max(0, Math.min(steps.length - 1, place + move));
    hold();
  });
  read();
  return make("figure", { class: "chart card" }, make("figcaption", {}, make("h3", { text: title }), reading), picture);
}

// An exponential moving average, corrected for its start.
export function smoothed(values, weight = 0.9) {
  let sum = 0;
  let mass = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return sum / mass;
  });
}

function usable(x, y, logarithmic) {
  return Number.isFinite(x) && Number.isFinite(y) && (!logarithmic || y > 0);
}

function extent(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

function ticks(low, high, many) {
  const rough = (high - low) / many || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(Number(value.toPrecision(12)));
  return found;
}

function short(value) {
  const size = Math.abs(value);
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  return size >= 10000 ? `${number(value / 1000, 0)} k` : number(value, size >= 100 ? 0 : size >= 1 ? 2 : 4);
}

function nearest(values, wanted) {
  let best = -1;
  values.forEach((value, place) => {
    if (best < 0 || Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = place;
  });
  return best;
}

function described(title, series) {
  const said = series.filter((one) => one.kind !== "faint" && one.x.length).map((one) => `${one.name}: ${short(one.y.at(-1) ?? NaN)}`);
  return `${title}. ${said.join("; ")}`;
}
