// The page: which model, which of its tabs, language and theme. Each panel is made once for a model and kept.

import { get, sentence } from "./api.js";
import { byId, make } from "./elements.js";
import { recommendPanel } from "./items.js";
import { apply, language, number, onLanguage, setLanguage, t } from "./language.js";
import { matchPanel, paintPanel, picturePanel } from "./pictures.js";
import { runsPanel } from "./runs.js";
import { forecastPanel, rowPanel } from "./tables.js";
import { choosePanel, classifyPanel, embedPanel, fillPanel, spanPanel, tagPanel } from "./tasks.js";
import { startTheme } from "./theme.js";
import { chatPanel, completePanel, rewritePanel, translatePanel } from "./write.js";

const PANELS = {
  chat: chatPanel, complete: completePanel, translate: translatePanel,
  rewrite: rewritePanel, classify: classifyPanel, tag: tagPanel,
  span: spanPanel, embed: embedPanel, choose: choosePanel, forecast: forecastPanel, row: rowPanel, picture: picturePanel, match: matchPanel, paint: paintPanel, recommend: recommendPanel, fill: fillPanel, runs: runsPanel,
};
const LOADING = 1500; // milliseconds until the server is asked again

let models = [];
let runs = false;
const kept = new Map();

function model() {
  return models.find((one) => one.id === byId("model").value) ?? models[0];
}

function tabs() {
  return [...(model()?.tabs ?? []), ...(runs ? ["runs"] : [])].filter((name) => name in PANELS);
}

function about() {
  const one = model();
  byId("about").textContent = one
    ? [t("parameters", { count: size(one.parameters) }), t("context_of", { count: number(one.context) }), one.family].join(" · ")
    : "";
}

function size(count) {
  const units = language() === "zh" ? [[1e8, " 亿"], [1e4, " 万"]] : [[1e9, " B"], [1e6, " M"]];
  const [unit, sign] = units.find(([least]) => count >= least) ?? [1, ""];
  return number(count / unit, count / unit < 10 && unit > 1 ? 1 : 0) + sign;
}

function showTabs(wanted) {
  const names = tabs();
  const current = names.includes(wanted) ? wanted : names[0];
  const list = byId("tabs");
  list.replaceChildren(...names.map((name) => make("button", {
    type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "panel", say: `tab_${name}`,
    "aria-selected": String(name === current), tabindex: name === current ? "0" : "-1", onclick: () => choose(name),
  })));
  show(current);
}

function choose(name) {
  history.replaceState(null, "", `#${name}`);
  showTabs(name);
  byId(`tab-${name}`).focus();
}

function show(name) {
  const panel = byId("panel");
  if (!name) return panel.replaceChildren(make("p", { class: "faint", say: "nothing" }));
  panel.setAttribute("aria-labelledby", `tab-${name}`);
  const key = name === "runs" ? "runs" : `${model().id}\n${name}`;
  if (!kept.has(key)) kept.set(key, PANELS[name](model()));
  apply(kept.get(key));
  panel.replaceChildren(kept.get(key));
}

byId("tabs").addEventListener("keydown", (event) => {
  const names = tabs();
  const place = names.indexOf(document.activeElement.id.slice(4));
  const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: names.length - 1 }[event.key];
  if (next === undefined || place < 0) return;
  event.preventDefault();
  choose(names[(next + names.length) % names.length]);
});

async function load() {
  const notice = byId("notice");
  try {
    models = (await get("/playground/models")).models;
    runs = (await get("/playground/runs")).shown;
  } catch (error) {
    notice.textContent = sentence(error);
    notice.hidden = false;
    setTimeout(load, LOADING * 2);
    return;
  }
  if (models.length === 0) {
    notice.textContent = t("loading");
    notice.hidden = false;
    setTimeout(load, LOADING);
    if (!runs) return;
  } else notice.hidden = true;
  byId("model").replaceChildren(...models.map((one) => make("option", { value: one.id, text: one.id })));
  byId("model").disabled = models.length < 2;
  about();
  showTabs(location.hash.slice(1));
}

const showTheme = startTheme(byId("theme"));

function showLanguage() {
  const button = byId("language");
  button.textContent = language() === "zh" ? "English" : "中文";
  button.lang = language() === "zh" ? "en" : "zh-CN";
  showTheme();
  about();
}

byId("language").addEventListener("click", () => setLanguage(language() === "zh" ? "en" : "zh"));
byId("model").addEventListener("change", () => { about(); showTabs(location.hash.slice(1)); });
addEventListener("hashchange", () => showTabs(location.hash.slice(1)));
onLanguage(showLanguage);
apply(document);
showLanguage();
load();
