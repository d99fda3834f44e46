// How text is chosen: one form for chat and completion. An empty field is the model's own default and is not sent.

import { make } from "./elements.js";

const FIELDS = [
  ["max_tokens", 1, 4096, 1],
  ["temperature", 0, 2, 0.05],
  ["top_k", 1, 1000, 1],
  ["top_p", 0.01, 1, 0.01],
  ["min_p", 0, 1, 0.01],
  ["typical_p", 0.01, 1, 0.01],
  ["repetition_penalty", 0.1, 10, 0.05],
  ["frequency_penalty", -2, 2, 0.1],
  ["presence_penalty", -2, 2, 0.1],
  ["seed", 0, 2147483647, 1],
];
const KEY = "formary.settings";
const chosen = JSON.parse(sessionStorage.getItem(KEY) ?? '{"max_tokens": 160, "temperature": 0.7}');

export const settings = () => ({ ...chosen });

export const SAMPLING = ["temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "frequency_penalty", "presence_penalty"];

export function settingsForm(model) {
  const rows = FIELDS.map(([name, min, max, step]) => {
    const id = `setting-${name}`;
    const standard = model.defaults[name];
    const input = make("input", {
      type: "number", id, min: String(min), max: String(max), step: String(step), inputmode: step < 1 ? "decimal" : "numeric",
      ...(standard === undefined ? { ghost: "default" } : { placeholder: String(standard) }),
      value: chosen[name] === undefined ? "" : String(chosen[name]),
      hint: `${name}_says`,
      oninput: () => {
        const valid = input.value !== "" && input.checkValidity();
        input.toggleAttribute("aria-invalid", input.value !== "" && !input.checkValidity());
        if (valid) chosen[name] = Number(input.value);
        else delete chosen[name];
        sessionStorage.setItem(KEY, JSON.stringify(chosen));
      },
    });
    return make("div", { class: "setting" }, make("label", { for: id, say: name, hint: `${name}_says` }), input);
  });
  const shown = make("input", {
    type: "checkbox", id: "shade", checked: document.body.dataset.shade !== "off",
    onchange: () => { document.body.dataset.shade = shown.checked ? "on" : "off"; },
  });
  return make(
    "details", { class: "settings card", open: matchMedia("(min-width: 860px)").matches },
    make("summary", { say: "settings" }),
    make("div", { class: "fields" }, ...rows),
    make("label", { class: "check", for: "shade" }, shown, make("span", { say: "shade" })),
    legend(),
    make("p", { class: "faint", say: "settings_say" }),
  );
}

function legend() {
  const steps = ["p0", "p1", "p2", "p3", "p4"].map((name) => make("span", { class: `token ${name}`, say: `legend_${name}` }));
  return make("p", { class: "legend", label: "legend" }, ...steps);
}
