"""The script of the report: its curves over the steps are moved and zoomed together, their y axes following what is seen.

It is the page's only one, let in by its hash; without it the page lacks nothing but that. It reads the points from the
figures (`figures.curves`), loads nothing and sends nothing.
"""

from __future__ import annotations

SCRIPT = """
(() => {
  const figures = [...document.querySelectorAll("svg[data-curves]")].map((svg, number) => {
    const group = svg.querySelector("g.moves");
    return { svg, group, number, first: [...group.childNodes], ...JSON.parse(svg.dataset.curves) };
  });
  if (!figures.length) return;
  const whole = [Math.min(...figures.map(f => f.x[0])), Math.max(...figures.map(f => f.x[1]))];
  const least = Math.max(2, (whole[1] - whole[0]) / 1000);
  let seen = [...whole], asked = 0;

  function node(name, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function ticks(low, high, about) {
    const raw = (high - low) / about, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map(f => f * power).find(s => s >= raw * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i <= high / step + 1e-9; i++) found.push(+(i * step).toPrecision(12));
    return found;
  }

  function told(value) {
    const size = Math.abs(value);
    if (size >= 2e4) return (+(value / 1e3).toPrecision(4)) + "k";
    if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
    if (size && size < 1e-3) return value.toExponential(1).replace("-", "\\u2212");
    return String(+value.toPrecision(4));
  }

  function between(points) {
    let from = points.findIndex(p => p[0] >= seen[0]), to = points.length;
    if (from < 0) return [];
    while (to > from && points[to - 1][0] > seen[1]) to--;
    return points.slice(Math.max(0, from - 1), to + 1);
  }

  function thinned(points) {
    const size = Math.ceil(points.length / 400), found = [];
    for (let i = 0; i < points.length; i += size) {
      const part = points.slice(i, i + size);
      found.push([0, 1].map(k => part.reduce((sum, p) => sum + p[k], 0) / part.length));
    }
    return size > 1 ? found : points;
  }

  function draw(figure) {
    const [narrow, top, right, bottom] = figure.box;
    const lines = figure.lines.map(line => ({ ...line, points: between(line.points) }));
    const inside = lines.flatMap(line => line.points).filter(p => p[0] >= seen[0] && p[0] <= seen[1]).map(p => p[1]);
    if (!inside.length) return;
    let low = Math.min(...inside), high = Math.max(...inside);
    const log = figure.log && low > 0;
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
    low = log ? low * 0.99 : low - pad;
    high = log ? high * 1.01 : high + pad;
    const marked = ticks(low, high, 4);
    const left = figure.left = Math.max(narrow, 10 + 6.6 * Math.max(...marked.map(y => told(y).length)));
    const xAt = x => left + (x - seen[0]) / (seen[1] - seen[0]) * (right - left);
    const yAt = y => bottom - (log ? Math.log(Math.max(y, 1e-30) / low) / Math.log(high / low) : (y - low) / (high - low)) * (bottom - top);
    const parts = [], id = "seen-" + figure.number;
    const clip = node("clipPath", { id });
    clip.append(node("rect", { x: left, y: top - 4, width: right - left, height: bottom - top + 8 }));
    parts.push(clip);
    for (const y of marked) {
      parts.push(node("line", { class: "grid", x1: left, x2: right, y1: yAt(y), y2: yAt(y) }));
      parts.push(node("text", { x: left - 8, y: yAt(y) + 4, "text-anchor": "end" }, told(y)));
    }
    parts.push(node("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
    for (const x of ticks(seen[0], seen[1], right - left > 450 ? 6 : 4)) {
      parts.push(node("line", { class: "axis", x1: xAt(x), x2: xAt(x), y1: bottom, y2: bottom + 4 }));
      parts.push(node("text", { x: xAt(x), y: bottom + 18, "text-anchor": "middle" }, told(x)));
    }
    const drawn = node("g", { "clip-path": `url(#${id})` });
    for (const line of lines) {
      const points = thinned(line.points);
      drawn.append(node("polyline", { class: "line " + line.look, points: points.map(p => xAt(p[0]).toFixed(1) + "," + yAt(p[1]).toFixed(1)).join(" ") }));
      if (line.marks || points.length < 60) for (const p of points) {
        const dot = node("circle", { class: "mark " + line.look, cx: xAt(p[0]), cy: yAt(p[1]), r: 3 });
        dot.append(node("title", {}, `${line.name}: ${told(p[1])} at ${figure.over} ${p[0].toLocaleString("en")}`));
        drawn.append(dot);
      }
    }
    figure.group.replaceChildren(...parts, drawn);
  }

  function look(from, to) {
    const width = Math.min(Math.max(to - from, least), whole[1] - whole[0]);
    const middle = (from + to) / 2;
    const start = Math.min(Math.max(middle - width / 2, whole[0]), whole[1] - width);
    seen = [start, start + width];
    cancelAnimationFrame(asked);
    asked = requestAnimationFrame(() => {
      const all = width >= whole[1] - whole[0];
      for (const figure of figures) {
        figure.left = figure.box[0];
        all ? figure.group.replaceChildren(...figure.first) : draw(figure);
      }
      document.body.classList.toggle("zoomed", !all);
      reset.disabled = out.disabled = all;
      said.textContent = all ? "" : `steps ${Math.round(seen[0]).toLocaleString("en")} to ${Math.round(seen[1]).toLocaleString("en")}`;
    });
  }

  const zoom = (factor, at = (seen[0] + seen[1]) / 2) => look(at - (at - seen[0]) * factor, at + (seen[1] - at) * factor);
  const move = share => { const by = share * (seen[1] - seen[0]); look(seen[0] + by, seen[1] + by); };

  function button(text, label, work) {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.setAttribute("aria-label", label);
    made.addEventListener("click", work);
    return made;
  }
  const bar = document.createElement("div"), said = document.createElement("span"), hint = document.createElement("span");
  bar.className = "zoom small";
  said.setAttribute("aria-live", "polite");
  hint.className = "hint";
  hint.textContent = "Drag to move, Ctrl and the wheel to zoom; on a chosen figure + \\u2212 \\u2190 \\u2192, and 0 for the whole run.";
  const out = button("\\u2212", "zoom out", () => zoom(2));
  const reset = button("whole run", "show the whole run", () => look(...whole));
  bar.append(out, button("+", "zoom in", () => zoom(0.5)), reset, said, hint);
  figures[0].svg.closest("figure").append(bar);
  look(...whole);

  for (const figure of figures) {
    const { svg, box } = figure;
    svg.tabIndex = 0;
    const stepAt = event => {
      const place = svg.getBoundingClientRect();
      const x = (event.clientX - place.left) / place.width * svg.viewBox.baseVal.width;
      return seen[0] + (x - figure.left) / (box[2] - figure.left) * (seen[1] - seen[0]);
    };
    svg.addEventListener("wheel", event => {
      if (!event.ctrlKey && document.activeElement !== svg) return;
      event.preventDefault();
      zoom(Math.exp(Math.max(-1, Math.min(1, event.deltaY / 200))), stepAt(event));
    }, { passive: false });
    svg.addEventListener("dblclick", event => zoom(event.shiftKey ? 2 : 0.5, stepAt(event)));
    svg.addEventListener("keydown", event => {
      const work = {
        "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), "_": () => zoom(2),
        ArrowLeft: () => move(-0.2), ArrowRight: () => move(0.2),
        "0": () => look(...whole), Escape: () => look(...whole), Home: () => look(...whole),
      }[event.key];
      if (!work || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      work();
    });
    const held = new Map();
    svg.addEventListener("pointerdown", event => {
      held.set(event.pointerId, event);
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointermove", event => {
      const before = held.get(event.pointerId);
      if (!before) return;
      const others = [...held.values()].filter(e => e.pointerId !== event.pointerId);
      if (others.length) {
        const apart = e => Math.max(20, Math.abs(e.clientX - others[0].clientX));
        zoom(apart(before) / apart(event), (stepAt(event) + stepAt(others[0])) / 2);
      } else if (seen[1] - seen[0] < whole[1] - whole[0]) {
        const by = stepAt(before) - stepAt(event);
        look(seen[0] + by, seen[1] + by);
      }
      held.set(event.pointerId, event);
    });
    for (const end of ["pointerup", "pointercancel"]) svg.addEventListener(end, event => held.delete(event.pointerId));
  }
})();
"""
