// The tabs in which a model writes: chat, going on from a text, and translation.

import { Answer } from "./answer.js";
import { post, sentence } from "./api.js";
import { make } from "./elements.js";
import { t } from "./language.js";
import { settingsForm } from "./settings.js";

export function completePanel(model) {
  const field = promptField("prompt", "prompt_ghost", 5);
  const shownPrompt = make("span", { class: "given" });
  const state = { prompt: null };
  const ids = async () => (state.prompt ??= (await post("/tokenize", { model: model.id, prompt: field.value })).tokens);
  let answer = fresh();

  function fresh() {
    return new Answer({ model, prompt: () => ids(), changed: () => run.refresh() });
  }

  const output = make("section", { class: "output card", hidden: true, label: "answer" });
  const run = runButton("go_on", () => answer, async () => {
    output.hidden = false;
    if (shownPrompt.textContent !== field.value || answer.versions.length === 0) {
      answer = fresh();
      state.prompt = null;
      shownPrompt.textContent = field.value;
      output.replaceChildren(answer.element);
      answer.element.prepend(shownPrompt);
    }
    run.refresh(true);
    try {
      await answer.write("/v1/completions", { model: model.id, prompt: await ids() });
    } catch (error) {
      answer.wrong.textContent = sentence(error) ?? "";
      answer.wrong.hidden = false;
    }
    run.refresh();
  });
  sendsOnEnter(field, run, true);
  return twoColumns(
    make("div", { class: "stack" }, labelled("prompt", field), examples(model, "complete", (one) => { field.value = one.text; field.focus(); }), make("div", { class: "row" }, run, keys("keys_write")), output),
    settingsForm(model),
  );
}

export function chatPanel(model) {
  const system = make("textarea", { id: "system", rows: "2", ghost: "system_ghost" });
  const field = promptField("message", "message_ghost", 2);
  const log = make("div", { class: "log", role: "log", "aria-live": "off", label: "conversation" });
  const turns = []; // {question, element, answer}

  function messages(until) {
    const said = system.value.trim() ? [{ role: "system", content: system.value }] : [];
    turns.slice(0, until).forEach((turn) => said.push({ role: "user", content: turn.question }, { role: "assistant", content: turn.answer.written }));
    return said;
  }

  function turnOf(question) {
    const place = turns.length;
    const before = [...messages(place), { role: "user", content: question }];
    let ids = null;
    const answer = new Answer({
      model,
      prompt: async () => (ids ??= (await post("/tokenize", { model: model.id, messages: before })).tokens),
      changed: (what) => {
        if (what === "branch") turns.splice(place + 1).forEach((later) => { later.answer.stop(); later.element.remove(); });
        run.refresh();
      },
    });
    const again = make("button", { type: "button", class: "quiet small", say: "try_again", onclick: () => { turns.splice(place + 1).forEach((later) => later.element.remove()); write(answer, before); } });
    answer.element.querySelector(".below").append(again);
    const element = make("article", { class: "turn" }, make("p", { class: "question", text: question }), answer.element);
    turns.push({ question, element, answer });
    log.append(element);
    return { answer, before };
  }

  async function write(answer, before) {
    run.refresh(true);
    await answer.write("/v1/chat/completions", { model: model.id, messages: before });
    run.refresh();
  }

  const run = runButton("send", () => turns.at(-1)?.answer, async () => {
    if (!field.value.trim()) return field.focus();
    const { answer, before } = turnOf(field.value.trim());
    field.value = "";
    start.hidden = true;
    answer.element.scrollIntoView({ block: "nearest" });
    await write(answer, before);
  });
  const clear = make("button", { type: "button", class: "quiet", say: "clear", onclick: () => {
    turns.splice(0).forEach((turn) => turn.answer.stop());
    log.replaceChildren();
    start.hidden = false;
    run.refresh();
    field.focus();
  } });
  const start = make("div", { class: "start" }, make("p", { class: "faint", say: "chat_start" }), examples(model, "chat", (one) => { field.value = one.text; field.focus(); }));
  sendsOnEnter(field, run, false);
  return twoColumns(
    make(
      "div", { class: "stack" }, log, start,
      make("div", { class: "composer card" }, labelled("message", field, true), make("div", { class: "row" }, run, clear, keys("keys_chat"))),
      make("details", { class: "system" }, make("summary", { say: "system" }), labelled("system", system, true)),
    ),
    settingsForm(model),
  );
}

// An encoder-decoder that was trained to translate answers by its task; it says what it writes as a whole.
export function translatePanel(model) {
  const field = promptField("source", "source_ghost", 5);
  const output = make("section", { class: "output card", hidden: true, label: "answer", "aria-live": "polite" });
  const run = runButton("translate_it", () => null, async () => {
    if (!field.value.trim()) return field.focus();
    output.hidden = false;
    output.classList.add("writing");
    run.disabled = true;
    try {
      const [answer] = await predicted(model, [{ source: field.value }]);
      output.replaceChildren(make("p", { class: "written", text: answer.text }));
    } catch (error) {
      output.replaceChildren(make("p", { class: "notice", role: "alert", text: sentence(error) ?? "" }));
    } finally {
      run.disabled = false;
      output.classList.remove("writing");
    }
  });
  return asking(model, "translate", field, run, output, "narrow");
}

// Any other encoder-decoder: it answers a text through the completion route, token by token.
export function rewritePanel(model) {
  const field = promptField("source", "rewrite_ghost", 5);
  const output = make("section", { class: "output card", hidden: true, label: "answer" });
  let answer = new Answer({ model });
  const run = runButton("rewrite_it", () => answer, async () => {
    if (!field.value.trim()) return field.focus();
    output.hidden = false;
    answer = new Answer({ model, changed: () => run.refresh() });
    output.replaceChildren(answer.element);
    run.refresh(true);
    await answer.write("/v1/completions", { model: model.id, prompt: field.value });
    run.refresh();
  });
  return twoColumns(asking(model, "rewrite", field, run, output), settingsForm(model));
}

function asking(model, tab, field, run, output, width = "") {
  sendsOnEnter(field, run, true);
  return make(
    "div", { class: `stack ${width}` }, labelled("source", field), examples(model, tab, (one) => { field.value = one.text; field.focus(); }),
    make("div", { class: "row" }, run, keys("keys_write")), output,
  );
}

export async function predicted(model, inputs) {
  const said = await post(`/v1/predict/${encodeURIComponent(model.id)}`, { inputs });
  return said.answers;
}

export function examples(model, tab, use) {
  const listed = model.examples[tab] ?? [];
  return make(
    "div", { class: "examples", role: "group", label: "examples" },
    ...listed.map((one) => make("button", { type: "button", class: "chip", text: one.text ?? one.question ?? one.texts?.[0] ?? "", onclick: () => use(one) })),
  );
}

export function labelled(name, field, hidden = false) {
  return make("div", { class: "labelled" }, make("label", { for: field.id, class: hidden ? "unseen" : null, say: name }), field);
}

export function promptField(name, ghost, rows) {
  return make("textarea", { id: `field-${name}`, rows: String(rows), ghost, spellcheck: "false" });
}

function keys(name) {
  return make("span", { class: "faint keys", say: name });
}

// One button that starts, and stops while something is written.
function runButton(name, answer, start) {
  const button = make("button", { type: "button", class: "main", say: name, onclick: () => (answer()?.busy ? answer().stop() : start()) });
  button.refresh = (busy = answer()?.busy) => {
    button.dataset.text = busy ? "stop" : name;
    button.classList.toggle("stops", Boolean(busy));
    button.textContent = t(button.dataset.text);
  };
  return button;
}

function sendsOnEnter(field, button, withControl) {
  field.addEventListener("keydown", (event) => {
    const wanted = withControl ? event.ctrlKey || event.metaKey : !event.shiftKey;
    if (event.key === "Enter" && wanted && !event.isComposing) {
      event.preventDefault();
      button.click();
    }
  });
}

function twoColumns(main, aside) {
  return make("div", { class: "columns" }, main, aside);
}
