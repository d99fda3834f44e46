// The tab of models that recommend: a history of items, found by name or text, and what may come next with its score.

import { get, sentence } from "./api.js";
import { bar, make, percent, say } from "./elements.js";
import { t } from "./language.js";
import { asking } from "./tasks.js";
import { predicted } from "./write.js";

const PAUSE = 150; // milliseconds after a key until the server is asked

export function recommendPanel(model) {
  const history = []; // {item, text}, the oldest first
  const listed = make("ol", { class: "plain history", label: "history" });
  const field = make("input", { type: "search", id: "field-item", ghost: "item_ghost", autocomplete: "off", spellcheck: "false", "aria-controls": "found-items" });
  const found = make("ul", { class: "plain found", id: "found-items", label: "item_found" });
  let waiting = null;
  let asked = 0;

  function show() {
    listed.replaceChildren(...history.map((one, place) => make(
      "li", { class: "item" }, named(one),
      make("button", { type: "button", class: "quiet small", label: "item_remove", text: "×", onclick: () => { history.splice(place, 1); show(); field.focus(); } }),
    )));
    if (history.length === 0) listed.append(make("li", { class: "faint", say: "history_empty" }));
  }

  function add(one) {
    history.push(one);
    show();
    say(t("item_added", { item: one.text || one.item }));
  }

  async function look() {
    const mine = ++asked;
    try {
      const said = await items(model, { find: field.value.trim() });
      if (mine !== asked) return;
      found.replaceChildren(...said.items.map((one) => make("li", {}, make("button", { type: "button", class: "item", onclick: () => { add(one); field.value = ""; look(); field.focus(); } }, named(one)))));
      if (said.items.length === 0) found.append(make("li", { class: "faint", say: "item_none" }));
    } catch (error) {
      found.replaceChildren(make("li", { class: "wrong", text: sentence(error) ?? "" }));
    }
  }

  field.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(look, PAUSE);
  });
  field.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.isComposing) return;
    if (event.key === "ArrowDown") found.querySelector("button")?.focus();
    else if (event.key === "Enter") found.querySelector("button")?.click();
    else return;
    event.preventDefault();
  });
  found.addEventListener("keydown", (event) => {
    const buttons = [...found.querySelectorAll("button")];
    const next = buttons.indexOf(document.activeElement) + { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (Number.isNaN(next)) return;
    event.preventDefault();
    (buttons[next] ?? field).focus();
  });
  show();
  look();
  const search = make("div", { class: "labelled" }, make("label", { for: "field-item", say: "item_add" }), field, found);
  const taken = make("div", { class: "labelled" }, make("h3", { say: "history" }), listed);
  return asking(model, "recommend", [taken, search], () => {}, () => true, async () => {
    const [answer] = await predicted(model, [{ history: history.map((one) => one.item) }]);
    const texts = new Map((await items(model, { item: answer.items.map((one) => one.item) })).items.map((one) => [one.item, one]));
    const rows = answer.items.map((one) => make(
      "li", { class: "item" }, named(texts.get(one.item) ?? one), bar(one.score / (answer.items[0].score || 1)), make("span", { class: "share", hint: "score", text: percent(one.score) }),
      make("button", { type: "button", class: "quiet small", label: "item_take", text: "+", onclick: () => add(texts.get(one.item) ?? one) }),
    ));
    const unknown = answer.unknown?.length ? make("p", { class: "faint", text: t("item_unknown", { items: answer.unknown.join(", ") }) }) : null;
    return make("div", { class: "stack" }, make("p", { class: "faint", say: "recommended" }), make("ol", { class: "plain recommended" }, ...rows), unknown);
  });
}

// An item by its text, with its name beside it where it has one.
function named(one) {
  return make("span", { class: "what" }, make("span", { text: one.text || one.item }), one.text ? make("small", { class: "faint", text: one.item }) : null);
}

function items(model, asked) {
  const query = new URLSearchParams({ model: model.id });
  for (const [name, values] of Object.entries(asked)) for (const value of [values].flat()) query.append(name, value);
  return get(`/playground/items?${query}`);
}
