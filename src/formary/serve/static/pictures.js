// The tabs of models of pictures: one is chosen, dropped or pasted, and answered with classes, a caption, boxes, or the text
// that fits it best; or pictures are painted, new ones or the rest of one.

import { make } from "./elements.js";
import { t } from "./language.js";
import { asking, classes, ranking } from "./tasks.js";
import { labelled, predicted, promptField } from "./write.js";

const SENT = 1024; // pixels of the longer side of a picture that is made smaller before it is sent
const SHOWN = 320; // of the one that is shown
const AS_IT_IS = 2 ** 21; // bytes of a file that is sent unchanged
const READ = ["image/png", "image/jpeg"]; // what the server reads; other kinds are turned into these here
const SURE = 0.5; // of a box that is shown
const PAINTED = 4; // pictures at a time
const COLOURS = 8; // that mark what is found, --c0 to --c7 in the style sheet

export function picturePanel(model) {
  const chosen = picker();
  const form = asking(model, "picture", [chosen.zone, chosen.refused], () => {}, () => chosen.sent !== null, async () => {
    const [answer] = await predicted(model, [chosen.sent]);
    if (answer.boxes) return boxed(answer.boxes, chosen);
    return answer.text === undefined ? classes(answer) : make("p", { class: "big written", text: answer.text || t("picture_nothing") });
  });
  return chosen.within(form, () => form.querySelector("button.main").click());
}

export function matchPanel(model) {
  const chosen = picker();
  const field = promptField("candidates", "candidates_ghost", 4);
  const lines = () => [...new Set(field.value.split("\n").map((line) => line.trim()).filter(Boolean))];
  const complete = () => chosen.sent !== null && lines().length > 1;
  const form = asking(model, "match", [chosen.zone, chosen.refused, labelled("candidates", field)], () => {}, complete, async () => {
    const [answer] = await predicted(model, [{ image: chosen.sent, candidates: lines() }]);
    return classes(answer);
  });
  return chosen.within(form, () => { if (complete()) form.querySelector("button.main").click(); });
}

export function paintPanel(model) {
  const chosen = picker();
  const label = make("select", { id: "field-paint" }, make("option", { value: "", say: "paint_any" }), ...model.labels.map((name) => make("option", { value: name, text: name })));
  const keep = make("input", { type: "range", id: "field-keep", min: "0.1", max: "0.9", step: "0.1", value: "0.5" });
  let seed = 1; // of the first picture, so that each time others are painted
  const fields = [labelled("paint", label), chosen.zone, chosen.refused, labelled("keep", keep)];
  const form = asking(model, "paint", fields, () => {}, () => true, async () => {
    const begun = chosen.sent === null ? {} : { image: chosen.sent, keep: Number(keep.value) };
    const rows = Array.from({ length: PAINTED }, (_, place) => ({ label: label.value || null, seed: seed + place, ...begun }));
    seed += PAINTED;
    const answers = await predicted(model, rows);
    const name = label.value || t("paint_any");
    return make("div", { class: "row painted" }, ...answers.map((answer, place) => make("img", { class: "picture tiny", src: answer.image, alt: t("paint_made", { name, number: place + 1 }) })));
  });
  return chosen.within(form, () => {});
}

// Where a picture is chosen; `sent` is it as a data URI, `size` its pixels then, `shown` a small copy on the page.
function picker() {
  const chosen = { sent: null, size: [0, 0], shown: make("canvas", { class: "picture", hidden: true, role: "img", label: "picture_chosen" }) };
  chosen.refused = make("p", { class: "wrong", role: "alert", hidden: true });
  const file = make("input", { type: "file", id: "file-picture", class: "unseen", accept: "image/*" });
  chosen.zone = make(
    "label", { class: "drop", for: "file-picture" }, file, chosen.shown,
    make("span", { class: "chosen-file", say: "picture_choose" }), make("span", { class: "faint", say: "picture_drop" }),
  );

  async function take(given, then) {
    chosen.refused.hidden = true;
    if (!given) return;
    try {
      const bitmap = await createImageBitmap(given);
      draw(chosen.shown, bitmap, SHOWN);
      chosen.shown.hidden = false;
      if (READ.includes(given.type) && given.size <= AS_IT_IS) {
        chosen.sent = await uriOf(given);
        chosen.size = [bitmap.width, bitmap.height];
      } else {
        const smaller = draw(document.createElement("canvas"), bitmap, SENT);
        chosen.sent = smaller.toDataURL("image/jpeg", 0.95);
        chosen.size = [smaller.width, smaller.height];
      }
      bitmap.close();
      then();
    } catch {
      chosen.sent = null;
      chosen.shown.hidden = true;
      chosen.refused.textContent = t("picture_refused");
      chosen.refused.hidden = false;
    }
  }

  // Listens for pictures in a form; `then` follows each.
  chosen.within = (form, then) => {
    file.addEventListener("change", () => take(file.files[0], then));
    for (const [name, over] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]]) {
      form.addEventListener(name, (event) => {
        event.preventDefault();
        chosen.zone.classList.toggle("over", over);
        if (name === "drop") take(event.dataTransfer.files[0], then);
      });
    }
    document.addEventListener("paste", (event) => {
      const pasted = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
      if (!form.isConnected || !pasted) return;
      event.preventDefault();
      take(pasted, then);
    });
    return form;
  };
  return chosen;
}

// The picture with what was found drawn into it, and the same as a list.
function boxed(boxes, chosen) {
  const sure = boxes.filter((one) => one.score >= SURE).sort((one, other) => other.score - one.score);
  if (sure.length === 0) return make("p", { class: "big faint", text: t("picture_empty") });
  const names = [...new Set(sure.map((one) => one.label))];
  const share = Math.max(2, Math.min(8, Math.floor(SHOWN / Math.max(...chosen.size)))); // boxes of small pictures are drawn fine
  const canvas = draw(make("canvas", { class: "picture boxed", role: "img", "aria-label": sure.map((one) => one.label).join(", ") }), chosen.shown, SHOWN, share);
  const drawing = canvas.getContext("2d");
  const across = canvas.width / chosen.size[0];
  const down = canvas.height / chosen.size[1];
  drawing.lineWidth = 2;
  drawing.font = "12px system-ui, sans-serif";
  for (const { label, box: [x, y, width, height] } of sure) {
    const colour = getComputedStyle(document.documentElement).getPropertyValue(`--c${names.indexOf(label) % COLOURS}`) || "#d33";
    drawing.strokeStyle = colour;
    drawing.strokeRect(x * across, y * down, width * across, height * down);
    const room = drawing.measureText(label).width + 6;
    const top = Math.max(0, y * down - 15);
    drawing.fillStyle = colour;
    drawing.fillRect(x * across - 1, top, room, 15);
    drawing.fillStyle = "white";
    drawing.fillText(label, x * across + 2, top + 11);
  }
  return make("div", { class: "stack" }, canvas, ranking(sure.map((one) => [one.label, one.score, false])));
}

function draw(canvas, bitmap, longest, most = 1) {
  const share = Math.min(most, longest / Math.max(bitmap.width, bitmap.height));
  canvas.width = Math.max(1, Math.round(bitmap.width * share));
  canvas.height = Math.max(1, Math.round(bitmap.height * share));
  const drawing = canvas.getContext("2d");
  drawing.fillStyle = "white"; // where a picture is transparent
  drawing.fillRect(0, 0, canvas.width, canvas.height);
  drawing.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  canvas.classList.toggle("tiny", Math.max(canvas.width, canvas.height) <= 96);
  return canvas;
}

function uriOf(given) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(given);
  });
}
