// The tabs of models with a task's head: labels, tags, answers in a text, similar texts, choices, masked words.

import { post, sentence } from "./api.js";
import { bar, make, percent, say } from "./elements.js";
import { number, t } from "./language.js";
import { examples, labelled, predicted, promptField } from "./write.js";

export function classifyPanel(model) {
  const field = promptField("text", "classify_ghost", 5);
  return asking(model, "classify", [labelled("text", field)], (one) => { field.value = one.text; }, () => field.value.trim() !== "", async () => {
    const [answer] = await predicted(model, [field.value]);
    return classes(answer);
  });
}

// Labels with how likely each is, or the number that was told.
export function classes(answer) {
  if (answer.value !== undefined) return make("p", { class: "big", text: number(answer.value, 4) });
  const several = new Set(answer.labels ?? [answer.label]);
  const shares = Object.entries(answer.probabilities).sort((one, other) => other[1] - one[1]);
  return ranking(shares.slice(0, 20).map(([label, share]) => [label, share, several.has(label)]));
}

export function tagPanel(model) {
  const field = promptField("text", "tag_ghost", 4);
  return asking(model, "tag", [labelled("text", field)], (one) => { field.value = one.text; }, () => field.value.trim() !== "", async () => {
    const [answer] = await predicted(model, [field.value]);
    const tokens = answer.tokens ?? field.value.split(/\s+/);
    const kinds = new Map();
    const marks = entities(tokens, answer.tags, answer.probabilities).map((one) => {
      if (one.kind === null) return make("span", { class: "plainword", text: one.text });
      if (!kinds.has(one.kind)) kinds.set(one.kind, kinds.size % 8);
      return make("mark", { class: `entity k${kinds.get(one.kind)}`, title: percent(one.probability) }, make("span", { text: one.text }), make("small", { text: one.kind }));
    });
    return make("p", { class: "tagged" }, ...marks);
  });
}

// Words that belong together by the B-/I- scheme become one; tags without a scheme stand for themselves.
export function entities(tokens, tags, probabilities) {
  const found = [];
  tags.forEach((tag, place) => {
    const [, mark, name] = /^([BILUES])-(.+)$/.exec(tag) ?? [null, null, null];
    const kind = tag === "O" ? null : name ?? tag;
    const last = found.at(-1);
    const joins = last && ((mark !== null && "ILE".includes(mark) && last.kind === kind) || (kind === null && last.kind === null));
    const space = /[㐀-鿿]$/.test(tokens[place - 1] ?? "") && /^[㐀-鿿]/.test(tokens[place]) ? "" : " ";
    if (joins) {
      last.text += space + tokens[place];
      last.probability = Math.min(last.probability, probabilities[place]);
    } else found.push({ text: tokens[place], kind, probability: probabilities[place] });
  });
  return found;
}

export function spanPanel(model) {
  const question = promptField("question", "question_ghost", 1);
  const context = promptField("context", "context_ghost", 7);
  const fill = (one) => { question.value = one.question; context.value = one.context; };
  return asking(model, "span", [labelled("context", context), labelled("question", question)], fill, () => question.value.trim() !== "" && context.value.trim() !== "", async () => {
    const [answer] = await predicted(model, [{ question: question.value, context: context.value }]);
    if (!answer.answer) return make("p", { class: "big faint", text: t("no_answer") });
    const letters = Array.from(context.value); // places count characters, not UTF-16 units
    const text = (first, last) => letters.slice(first, last).join("");
    return make(
      "div", { class: "stack" },
      make("p", { class: "big" }, make("span", { text: answer.answer }), make("span", { class: "share", text: percent(answer.probability) })),
      make("p", { class: "written" }, text(0, answer.start), make("mark", { class: "entity k0", text: text(answer.start, answer.end) }), text(answer.end)),
    );
  });
}

export function choosePanel(model) {
  const question = promptField("question", "choose_ghost", 2);
  const choices = promptField("choices", "choices_ghost", 4);
  const lines = () => choices.value.split("\n").map((line) => line.trim()).filter(Boolean);
  const fill = (one) => { question.value = one.question; choices.value = one.choices.join("\n"); };
  return asking(model, "choose", [labelled("question", question), labelled("choices", choices)], fill, () => question.value.trim() !== "" && lines().length > 1, async () => {
    const listed = lines();
    const [answer] = await predicted(model, [{ question: question.value, choices: listed }]);
    return ranking(listed.map((choice, place) => [choice, answer.probabilities[place], place === answer.index]));
  });
}

export function fillPanel(model) {
  const field = promptField("text", "fill_ghost", 3);
  return asking(model, "fill", [labelled("text", field)], (one) => { field.value = one.text; }, () => field.value.trim() !== "", async () => {
    const [answer] = await predicted(model, [field.value]);
    return make("div", { class: "stack" }, ...answer.blanks.map((blank) => ranking(blank.map((one, place) => [one.text, one.probability, place === 0]))));
  });
}

export function embedPanel(model) {
  const field = promptField("texts", "texts_ghost", 6);
  const lines = () => field.value.split("\n").map((line) => line.trim()).filter(Boolean);
  return asking(model, "embed", [labelled("texts", field)], (one) => { field.value = one.texts.join("\n"); }, () => lines().length > 1, async () => {
    const texts = lines().slice(0, 30);
    const said = await post("/v1/embeddings", { model: model.id, input: texts });
    const vectors = said.data.map((entry) => unit(entry.embedding));
    const similar = vectors.map((one) => vectors.map((other) => one.reduce((sum, value, place) => sum + value * other[place], 0)));
    return make("div", { class: "stack" }, pairs(texts, similar), matrix(texts, similar));
  });
}

function unit(vector) {
  const length = Math.hypot(...vector) || 1;
  return vector.map((value) => value / length);
}

function pairs(texts, similar) {
  const found = texts.flatMap((one, row) => texts.slice(row + 1).map((other, offset) => [similar[row][row + 1 + offset], row, row + 1 + offset]));
  found.sort((one, other) => other[0] - one[0]);
  const [share, first, second] = found[0];
  return make("p", { class: "nearest" }, make("span", { text: t("nearest") }), make("q", { text: texts[first] }), make("q", { text: texts[second] }), make("span", { class: "share", text: share.toFixed(3) }));
}

function matrix(texts, similar) {
  const cell = (value) => {
    const element = make("td", { text: value.toFixed(2) });
    const share = Math.max(0, Math.min(1, value));
    element.style.setProperty("--share", String(share ** 2));
    if (share > 0.75) element.classList.add("strong");
    return element;
  };
  return make(
    "div", { class: "scroll", tabindex: "0", role: "region", label: "similarity" },
    make(
      "table", { class: "matrix" },
      make("caption", { class: "unseen", text: t("similarity") }),
      make("thead", {}, make("tr", {}, make("td", {}), ...texts.map((text, place) => make("th", { scope: "col", text: String(place + 1), title: text })))),
      make("tbody", {}, ...similar.map((row, place) => make("tr", {}, make("th", { scope: "row" }, make("b", { text: `${place + 1} ` }), texts[place]), ...row.map(cell)))),
    ),
  );
}

export function ranking(rows) {
  return make("ul", { class: "plain ranking" }, ...rows.map(([label, share, chosen]) => make(
    "li", { class: chosen ? "own" : null }, make("span", { class: "label", text: label }), bar(share), make("span", { class: "share", text: percent(share) }),
  )));
}

// A form, its examples, a button, and where the answer comes; `fill` takes an example, `answer` gives an element.
export function asking(model, tab, fields, fill, complete, answer) {
  const output = make("section", { class: "output card", hidden: true, label: "answer", tabindex: "-1" });
  const ask = async () => {
    if (!complete()) {
      output.hidden = false;
      output.replaceChildren(make("p", { class: "faint", text: t(`${tab}_incomplete`) }));
      return;
    }
    button.disabled = true;
    output.hidden = false;
    output.classList.add("writing");
    try {
      output.replaceChildren(await answer());
      output.scrollIntoView({ block: "nearest" });
      say(output.innerText);
    } catch (error) {
      output.replaceChildren(make("p", { class: "notice", role: "alert", text: sentence(error) ?? "" }));
    } finally {
      button.disabled = false;
      output.classList.remove("writing");
    }
  };
  const button = make("button", { type: "button", class: "main", say: `${tab}_ask`, onclick: ask });
  const form = make(
    "div", { class: "stack narrow" }, make("p", { class: "faint", say: `${tab}_says` }), ...fields,
    examples(model, tab, (one) => { fill(one); ask(); }), make("div", { class: "row" }, button, make("span", { class: "faint keys", say: "keys_write" })), output,
  );
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) ask();
  });
  return form;
}
