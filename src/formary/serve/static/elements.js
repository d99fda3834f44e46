// Makes elements. Text only ever becomes text nodes; there is no way here to pass markup.
// `say`, `label`, `hint` and `ghost` name a sentence, which follows the language: as text, label, tooltip, placeholder.

import { t } from "./language.js";

const SENTENCES = { say: "text", label: "label", hint: "title", ghost: "ghost" };

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name in SENTENCES) {
      element.dataset[SENTENCES[name]] = value;
      if (name === "say") element.textContent = t(value);
      else element.setAttribute({ label: "aria-label", hint: "title", ghost: "placeholder" }[name], t(value));
    } else if (name === "text") element.textContent = value;
    else if (name === "value") element.value = value;
    else if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && !name.includes("-") && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);

// A sentence for screen readers; the same one twice is still said twice.
export function say(sentence) {
  byId("live").textContent = "";
  setTimeout(() => { byId("live").textContent = sentence; }, 30);
}

// A share from 0 to 1 as a bar that is as long.
export function bar(share, name = "bar") {
  const fill = make("span", { class: "fill" });
  fill.style.inlineSize = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return make("span", { class: name, "aria-hidden": "true" }, fill);
}

export function percent(share) {
  if (share >= 0.9995) return "100 %";
  if (share > 0 && share < 0.0005) return "< 0.1 %";
  return `${(share * 100).toFixed(1)} %`;
}

// A token's text so that one sees it: spaces and line ends get signs.
export function visible(text) {
  if (text.startsWith("bytes:\\x")) return text.slice(6).split("\\x").filter(Boolean).map((byte) => `‹${byte.toUpperCase()}›`).join("");
  return text === "" ? "∅" : text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥");
}
