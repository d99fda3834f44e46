// English and Chinese: `t` looks a sentence up, `apply` fills elements that name theirs, the choice is remembered.

import { STRINGS } from "./strings.js";

const KEY = "formary.language";
let current = localStorage.getItem(KEY) ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
if (!(current in STRINGS)) current = "en";
const listeners = new Set();

export const language = () => current;

export function t(name, values = {}) {
  const sentence = STRINGS[current][name] ?? STRINGS.en[name] ?? name;
  return sentence.replace(/\{(\w+)\}/g, (whole, key) => (key in values ? String(values[key]) : whole));
}

export function setLanguage(chosen) {
  current = chosen;
  localStorage.setItem(KEY, chosen);
  apply(document);
  for (const listener of listeners) listener();
}

export function onLanguage(listener) {
  listeners.add(listener);
}

export function apply(root) {
  document.documentElement.lang = current === "zh" ? "zh-CN" : "en";
  for (const element of root.querySelectorAll("[data-text]")) element.textContent = t(element.dataset.text);
  for (const [key, attribute] of [["label", "aria-label"], ["title", "title"], ["ghost", "placeholder"]]) {
    for (const element of root.querySelectorAll(`[data-${key}]`)) element.setAttribute(attribute, t(element.dataset[key]));
  }
}

export function number(value, digits = 0) {
  return Number(value).toLocaleString(current === "zh" ? "zh-CN" : "en", { maximumFractionDigits: digits });
}
