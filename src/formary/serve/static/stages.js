// One token's way through the sampling pipeline, stage by stage, with sliders. The numbers come from the engine's own functions.

import { post, sentence } from "./api.js";
import { bar, byId, make, percent, visible } from "./elements.js";
import { number, t } from "./language.js";

// name, values of the slider; null stands for off.
const range = (first, last, step) => Array.from({ length: Math.round((last - first) / step) + 1 }, (_, place) => Number((first + place * step).toFixed(4)));
const SLIDERS = {
  temperature: range(0, 2, 0.05),
  top_k: [1, 2, 3, 5, 8, 10, 15, 20, 30, 40, 50, 75, 100, 200, 500, null],
  top_p: [...range(0.05, 0.95, 0.05), 0.98, null],
  min_p: [null, ...range(0.01, 0.1, 0.01), ...range(0.15, 0.5, 0.05)],
  typical_p: [...range(0.05, 0.95, 0.05), null],
  repetition_penalty: [...range(0.8, 2, 0.05)],
  frequency_penalty: range(-2, 2, 0.1),
  presence_penalty: range(-2, 2, 0.1),
};
const NEUTRAL = { temperature: 1, top_k: null, top_p: null, min_p: null, typical_p: null, repetition_penalty: 1, frequency_penalty: 0, presence_penalty: 0 };
const WAIT = 120;

export async function openStages({ model, prompt, answer, token, settings, pick, back }) {
  const dialog = byId("stages");
  const asked = { model: model.id, prompt, answer, token };
  const chosen = {};
  for (const name of Object.keys(SLIDERS)) if (settings[name] !== undefined) chosen[name] = settings[name];
  const first = await post("/playground/stages", { ...asked, ...chosen });
  const values = { ...first.settings };
  const figure = make("div", { class: "figure", tabindex: "0", role: "region", label: "stages_figure" });
  const wrong = make("p", { class: "notice", role: "alert", hidden: true });
  const goOn = (alternative) => { dialog.close(); pick(alternative); };
  let waiting = null;
  let turn = 0;
  const again = () => {
    clearTimeout(waiting);
    waiting = setTimeout(async () => {
      turn += 1;
      const mine = turn;
      try {
        const result = await post("/playground/stages", { ...asked, ...sendable(values) });
        if (mine !== turn) return;
        wrong.hidden = true;
        figure.replaceChildren(table(result, token, goOn));
      } catch (error) {
        wrong.textContent = sentence(error) ?? "";
        wrong.hidden = false;
      }
    }, WAIT);
  };
  figure.append(table(first, token, goOn));
  dialog.replaceChildren(
    make(
      "div", { class: "head" },
      make("h2", { say: "stages_title", id: "stages-title" }),
      make("button", { type: "button", class: "quiet", label: "close", text: "✕", onclick: () => dialog.close() }),
    ),
    make("p", { class: "faint", say: "stages_say" }),
    make("div", { class: "sliders" }, ...Object.entries(SLIDERS).map(([name, steps]) => slider(name, steps, values, again))),
    wrong,
    figure,
  );
  dialog.setAttribute("aria-labelledby", "stages-title");
  dialog.addEventListener("close", () => { clearTimeout(waiting); if (back?.isConnected) back.focus(); }, { once: true });
  dialog.onclick = (event) => { if (event.target === dialog) dialog.close(); };
  dialog.showModal();
}

// What is off must be said as its neutral value, or the model's default would hold.
function sendable(values) {
  const off = { top_k: 2 ** 31, top_p: 1, min_p: 0, typical_p: 1 };
  return Object.fromEntries(Object.entries(values).map(([name, value]) => [name, value ?? off[name] ?? NEUTRAL[name]]));
}

function slider(name, steps, values, changed) {
  const id = `stage-${name}`;
  const current = values[name] ?? NEUTRAL[name];
  let place = steps.indexOf(current);
  if (place < 0) { // a value between the steps: the nearest shows
    const sure = steps.map((step) => (step === null ? Infinity : Math.abs(step - current)));
    place = sure.indexOf(Math.min(...sure));
  }
  const shown = make("output", { for: id });
  const tell = () => {
    const value = steps[place];
    const said = value === null ? t("off") : name === "temperature" && value === 0 ? t("greedy") : number(value, 2);
    shown.textContent = said;
    input.setAttribute("aria-valuetext", said);
    input.classList.toggle("neutral", value === NEUTRAL[name]);
  };
  const input = make("input", {
    type: "range", id, min: "0", max: String(steps.length - 1), step: "1", value: String(place), hint: `${name}_says`,
    oninput: () => { place = Number(input.value); values[name] = steps[place]; tell(); changed(); },
  });
  tell();
  return make("div", { class: "slider" }, make("label", { for: id, say: name }), shown, input);
}

function table(result, token, goOn) {
  const columns = result.stages.map((stage, place) => ({ ...stage, place })).filter((stage) => stage.active);
  const last = result.stages.length - 1;
  const highest = Math.max(...result.tokens.flatMap((one) => columns.map((stage) => one.probabilities[stage.place])), 1e-9);
  const head = make(
    "tr", {}, make("th", { scope: "col", text: t("token") }),
    ...columns.map((stage) => make("th", { scope: "col", text: t(`stage_${stage.name}`), title: t(`stage_${stage.name}_says`) })),
  );
  const rows = result.tokens.map((one) => {
    const gone = one.probabilities[last] === 0;
    const name = one.id === token
      ? make("span", { class: "piece own", text: visible(one.text) })
      : make("button", { type: "button", class: "piece", text: visible(one.text), "aria-label": t("go_on_with", { token: visible(one.text) }), onclick: () => goOn({ id: one.id, text: one.text, piece: one.text, probability: one.probabilities[0] }) });
    return make(
      "tr", { class: [gone ? "gone" : "", one.id === token ? "own" : ""].join(" ").trim() || null },
      make("th", { scope: "row" }, name),
      ...columns.map((stage) => {
        const share = one.probabilities[stage.place];
        return make("td", {}, bar(share / highest), make("span", { class: "share", text: share === 0 ? "–" : percent(share) }));
      }),
    );
  });
  const foot = ["kept", "bits"].map((name) => make(
    "tr", {}, make("th", { scope: "row", text: t(`stage_${name}`) }), ...columns.map((stage) => make("td", { class: "sum", text: number(stage[name], 2) })),
  ));
  return make("table", { class: "stages" }, make("caption", { class: "unseen", text: t("stages_title") }), make("thead", {}, head), make("tbody", {}, ...rows), make("tfoot", {}, ...foot));
}
