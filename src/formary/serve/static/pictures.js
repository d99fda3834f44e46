// The tab of models that read pictures: one is chosen, dropped or pasted, shown, and answered with classes or a caption.

import { make } from "./elements.js";
import { t } from "./language.js";
import { asking, classes } from "./tasks.js";
import { predicted } from "./write.js";

const SENT = 1024; // pixels of the longer side of a picture that is made smaller before it is sent
const SHOWN = 320; // of the one that is shown
const AS_IT_IS = 2 ** 21; // bytes of a file that is sent unchanged
const READ = ["image/png", "image/jpeg"]; // what the server reads; other kinds are turned into these here

export function picturePanel(model) {
  let sent = null;
  const shown = make("canvas", { class: "picture", hidden: true, role: "img", label: "picture_chosen" });
  const refused = make("p", { class: "wrong", role: "alert", hidden: true });
  const file = make("input", { type: "file", id: "file-picture", class: "unseen", accept: "image/*" });
  const zone = make(
    "label", { class: "drop", for: "file-picture" }, file, shown,
    make("span", { class: "chosen-file", say: "picture_choose" }), make("span", { class: "faint", say: "picture_drop" }),
  );

  async function take(given) {
    refused.hidden = true;
    if (!given) return;
    try {
      const bitmap = await createImageBitmap(given);
      draw(shown, bitmap, SHOWN);
      shown.hidden = false;
      sent = READ.includes(given.type) && given.size <= AS_IT_IS ? await uriOf(given) : smaller(bitmap);
      bitmap.close();
      form.querySelector("button.main").click();
    } catch {
      sent = null;
      shown.hidden = true;
      refused.textContent = t("picture_refused");
      refused.hidden = false;
    }
  }

  file.addEventListener("change", () => take(file.files[0]));
  const form = asking(model, "picture", [zone, refused], () => {}, () => sent !== null, async () => {
    const [answer] = await predicted(model, [sent]);
    return answer.text === undefined ? classes(answer) : make("p", { class: "big written", text: answer.text || t("picture_nothing") });
  });
  for (const [name, over] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]]) {
    form.addEventListener(name, (event) => {
      event.preventDefault();
      zone.classList.toggle("over", over);
      if (name === "drop") take(event.dataTransfer.files[0]);
    });
  }
  document.addEventListener("paste", (event) => {
    const pasted = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    if (!form.isConnected || !pasted) return;
    event.preventDefault();
    take(pasted);
  });
  return form;
}

function draw(canvas, bitmap, longest) {
  const share = Math.min(1, longest / Math.max(bitmap.width, bitmap.height));
  canvas.width = Math.max(1, Math.round(bitmap.width * share));
  canvas.height = Math.max(1, Math.round(bitmap.height * share));
  const drawing = canvas.getContext("2d");
  drawing.fillStyle = "white"; // where a picture is transparent
  drawing.fillRect(0, 0, canvas.width, canvas.height);
  drawing.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  canvas.classList.toggle("tiny", Math.max(canvas.width, canvas.height) <= 96);
  return canvas;
}

function smaller(bitmap) {
  return draw(document.createElement("canvas"), bitmap, SENT).toDataURL("image/jpeg", 0.95);
}

function uriOf(given) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(given);
  });
}
