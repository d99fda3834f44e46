// Runs and their curves, live: the folder is looked at again and again while the tab is open.

import { get, sentence } from "./api.js";
import { chart, smoothed } from "./chart.js";
import { make } from "./elements.js";
import { number, onLanguage, t } from "./language.js";

const INTERVAL = 3000; // milliseconds
const MOST = 4; // runs drawn into one chart
const INSET = 42; // padding and border of a card
const NARROW = 300; // pixels that a chart needs
const LIVE = 90; // seconds since the last line

export function runsPanel() {
  const list = make("ul", { class: "plain runlist" });
  const charts = make("div", { class: "charts" });
  const wrong = make("p", { class: "notice", role: "alert", hidden: true });
  const panel = make("div", { class: "columns runs" }, make("div", { class: "stack" }, wrong, charts), make("aside", { class: "card" }, make("h2", { say: "runs" }), make("p", { class: "faint", say: "runs_say" }), list));
  const chosen = [];
  let listed = "";
  let drawn = "";

  async function look() {
    if (!panel.isConnected || document.hidden) return;
    try {
      const { runs } = await get("/playground/runs");
      wrong.hidden = true;
      chosen.splice(0, chosen.length, ...chosen.filter((name) => runs.some((run) => run.name === name)));
      if (chosen.length === 0 && runs.length) chosen.push(runs[0].name);
      showList(runs);
      const data = await Promise.all(chosen.map((name) => get(`/playground/runs/${encodeURIComponent(name)}`)));
      const state = JSON.stringify([data.map((run) => [run.name, run.step, run.training.step.length, run.validation.step.length]), charts.clientWidth, document.documentElement.lang]);
      if (state === drawn) return;
      drawn = state;
      const focused = [...charts.querySelectorAll("svg")].indexOf(document.activeElement);
      charts.replaceChildren(...pictures(data, charts.clientWidth));
      if (focused >= 0) charts.querySelectorAll("svg")[focused]?.focus({ preventScroll: true });
    } catch (error) {
      wrong.textContent = sentence(error) ?? "";
      wrong.hidden = false;
    }
  }

  function showList(runs) {
    const state = JSON.stringify([runs.map((run) => [run.name, ago(run.seconds_ago)]), chosen, document.documentElement.lang]);
    if (state === listed) return;
    listed = state;
    const focused = document.activeElement?.id;
    list.replaceChildren(...runs.map((run, place) => {
      const color = chosen.indexOf(run.name);
      const box = make("input", {
        type: "checkbox", id: `run-${place}`, checked: color >= 0, disabled: color < 0 && chosen.length >= MOST,
        onchange: () => { if (box.checked) chosen.push(run.name); else chosen.splice(chosen.indexOf(run.name), 1); listed = ""; look(); },
      });
      const live = run.seconds_ago < LIVE;
      return make("li", {}, make(
        "label", { for: `run-${place}`, class: "check" }, box,
        make("span", { class: color >= 0 ? `runname c${color}` : "runname", text: run.name }),
        make("span", { class: live ? "live" : "faint", text: live ? t("live") : ago(run.seconds_ago) }),
      ));
    }));
    if (runs.length === 0) list.replaceChildren(make("li", { class: "faint", text: t("no_runs") }));
    if (focused?.startsWith("run-")) document.getElementById(focused)?.focus();
  }

  new ResizeObserver(() => { if (drawn) look(); }).observe(charts);
  setInterval(look, INTERVAL);
  document.addEventListener("visibilitychange", look);
  onLanguage(() => { listed = ""; look(); });
  setTimeout(look, 0);
  return panel;
}

function pictures(runs, room) {
  const inside = (width) => Math.max(220, width - INSET);
  const half = room >= 2 * NARROW + 16 ? (room - 16) / 2 : room;
  const several = runs.length > 1;
  const named = (run, what) => (several ? `${run.name} · ${what}` : what);
  const lines = (field) => runs.map((run, color) => ({ name: several ? run.name : "", kind: "line", color, x: run.training.step, y: run.training[field] }));
  const losses = runs.flatMap((run, color) => [
    { name: t("loss"), kind: "faint", color, x: run.training.step, y: run.training.loss },
    { name: named(run, t("training")), kind: "line", color, x: run.training.step, y: smoothed(run.training.loss) },
    { name: named(run, t("validation")), kind: "dots", color, x: run.validation.step, y: run.validation.validation_loss },
  ]);
  const facts = runs.map((run) => make("p", { class: "faint", text: [
    several ? run.name : null, run.step ? t("at_step", { step: number(run.step) }) : null,
    run.tokens ? t("count_of", { count: number(run.tokens), unit: t(`unit_${run.unit}`) }) : null, run.seconds ? duration(run.seconds) : null,
  ].filter(Boolean).join(" · ") }));
  const samples = runs.flatMap((run) => run.samples.slice(-2)).map((sample) => make("blockquote", {}, make("p", { class: "faint", text: t("at_step", { step: number(sample.step) }) }), make("p", { class: "written", text: sample.text })));
  return [
    ...facts,
    chart(t("loss"), losses, inside(room), 280),
    make("div", { class: "pair" }, ...[chart(t("lr"), lines("lr"), inside(half), 180), chart(t("speed", { unit: units(runs) }), lines("tokens_per_second"), inside(half), 180)].filter(Boolean)),
    samples.length ? make("section", { class: "card samples" }, make("h3", { text: t("samples") }), ...samples) : null,
  ].filter(Boolean);
}

function units(runs) {
  return [...new Set(runs.map((run) => t(`unit_${run.unit}`)))].join(", ");
}

function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return t("seconds", { count: whole });
  if (whole < 3600) return t("minutes", { count: Math.round(whole / 60) });
  return t("hours", { count: number(whole / 3600, 1) });
}

function ago(seconds) {
  if (seconds < 86400) return t("ago", { time: duration(seconds < 3600 ? Math.max(60, seconds) : Math.round(seconds / 3600) * 3600) });
  return t("ago", { time: t("days", { count: Math.round(seconds / 86400) }) });
}
