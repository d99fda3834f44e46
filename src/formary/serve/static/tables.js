// The tabs of models that read tables: a series and what comes after it, a row and its label.

import { chart } from "./chart.js";
import { make } from "./elements.js";
import { number, t } from "./language.js";
import { asking, classes } from "./tasks.js";
import { labelled, predicted, promptField } from "./write.js";

const SHOWN = 4; // horizons of history that are drawn before a forecast

export function forecastPanel(model) {
  const field = promptField("points", "points_ghost", 8);
  const file = make("input", { type: "file", accept: ".csv,.tsv,.txt,text/csv", id: "file-points" });
  file.addEventListener("change", async () => {
    if (file.files[0]) field.value = await file.files[0].text();
  });
  const fields = [labelled("points", field), make("label", { class: "faint", for: "file-points", say: "points_file" }), file];
  return asking(model, "forecast", fields, () => {}, () => field.value.trim().includes("\n"), async () => {
    const series = columnsOf(field.value, model.columns);
    const [answer] = await predicted(model, [series]);
    return make("div", { class: "stack" }, ...answer.forecasts.map((forecast) => drawn(series, forecast)), listed(answer.forecasts));
  });
}

export function rowPanel(model) {
  const field = promptField("row", "row_ghost", Math.min(14, Math.max(4, model.columns.length)));
  field.value = model.columns.map((column) => `${column}: `).join("\n");
  return asking(model, "row", [labelled("row", field)], () => {}, () => /:\s*\S/.test(field.value), async () => {
    const cells = field.value.split("\n").map((line) => /^([^:]+):(.*)$/.exec(line)).filter(Boolean);
    const [answer] = await predicted(model, [Object.fromEntries(cells.map(([, name, value]) => [name.trim(), value.trim()]))]);
    return classes(answer);
  });
}

// Lines with a separator as columns. A first column that is not called so is the time, a lonely other one the model's value.
export function columnsOf(text, wanted) {
  const lines = text.trim().split(/\r?\n/);
  const separator = [",", "\t", ";"].reduce((best, one) => (lines[0].split(one).length > lines[0].split(best).length ? one : best), ",");
  const cells = lines.map((line) => line.split(separator).map((cell) => cell.trim().replace(/^"(.*)"$/, "$1")));
  const names = cells[0];
  const time = Math.max(0, names.indexOf("time"));
  const values = {};
  names.forEach((name, place) => {
    if (place === time) return;
    const known = wanted.includes(name) || names.length > 2;
    values[known ? name : wanted[1]] = cells.slice(1).map((row) => row[place] ?? "");
  });
  return { time: cells.slice(1).map((row) => row[time]), values };
}

function drawn(series, forecast) {
  const past = series.values[forecast.column].slice(0, forecast.origin).map((cell) => (cell === "" ? null : Number(cell)));
  const first = Math.max(0, past.length - SHOWN * forecast.point.length);
  const ahead = forecast.point.map((_, place) => forecast.origin + 1 + place);
  const levels = Object.keys(forecast.quantiles);
  const edges = levels.length > 1 ? [levels[0], levels.at(-1)] : [];
  const lines = [
    { name: t("before"), kind: "line", color: 0, x: past.slice(first).map((_, place) => first + 1 + place), y: past.slice(first) },
    { name: t("forecast"), kind: "dots", color: 1, x: ahead, y: forecast.point },
    ...edges.map((level) => ({ name: t("quantile", { level }), kind: "line", color: 2, x: ahead, y: forecast.quantiles[level] })),
  ];
  return chart(forecast.column, lines, 640, 260) ?? make("p", { text: forecast.column });
}

function listed(forecasts) {
  const levels = Object.keys(forecasts[0]?.quantiles ?? {});
  const edges = levels.length > 1 ? [levels[0], levels.at(-1)] : [];
  const head = [t("column"), t("time"), t("forecast"), ...edges.map((level) => t("quantile", { level }))];
  const rows = forecasts.flatMap((one) => one.time.map((time, place) => [one.column, time, ...[one.point[place], ...edges.map((level) => one.quantiles[level][place])].map((value) => number(value, 3))]));
  return make(
    "div", { class: "scroll", tabindex: "0", role: "region", label: "forecast" },
    make(
      "table", { class: "figures" }, make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col", text })))),
      make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((text) => make("td", { text }))))),
    ),
  );
}
