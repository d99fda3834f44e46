// Light and dark: as the system says until the switch is used; the choice is remembered.

import { t } from "./language.js";

const KEY = "formary.theme";
const system = matchMedia("(prefers-color-scheme: dark)");
const chosen = () => localStorage.getItem(KEY);
const dark = () => (chosen() ?? (system.matches ? "dark" : "light")) === "dark";

export function startTheme(button) {
  const show = () => {
    document.documentElement.dataset.theme = dark() ? "dark" : "light";
    button.textContent = dark() ? "☀" : "☾";
    button.setAttribute("aria-label", t(dark() ? "to_light" : "to_dark"));
    button.title = t(dark() ? "to_light" : "to_dark");
  };
  button.addEventListener("click", () => {
    localStorage.setItem(KEY, dark() ? "light" : "dark");
    show();
  });
  system.addEventListener("change", show);
  show();
  return show;
}
