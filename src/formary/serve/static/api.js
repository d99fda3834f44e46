// The server's API as any client uses it: JSON, server-sent events, and the key. Failures become sentences.

import { byId, make } from "./elements.js";
import { t } from "./language.js";

const KEY = "formary.key";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function get(path) {
  return (await send(path, {})).json();
}

export async function post(path, body, signal) {
  return (await send(path, posted(body, signal))).json();
}

// Calls `each` with every event's JSON until the stream ends.
export async function stream(path, body, signal, each) {
  const response = await send(path, posted({ ...body, stream: true }, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    waiting += value;
    const parts = waiting.split(/\r?\n\r?\n/);
    waiting = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data === "" || data === "[DONE]") continue;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(500, event.error.message ?? t("failed"));
      each(event);
    }
  }
}

// The sentence for people; null for an answer that they stopped themselves.
export function sentence(error) {
  if (error.name === "AbortError") return null;
  return error instanceof Refused ? error.message : t("unreachable");
}

function posted(body, signal) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
}

async function send(path, options) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(path, { ...options, headers, cache: "no-cache" });
    if (response.status === 401) {
      await askForKey(Boolean(key));
      continue;
    }
    if (!response.ok) throw new Refused(response.status, await reason(response));
    return response;
  }
}

async function reason(response) {
  const again = response.headers.get("Retry-After");
  try {
    const body = await response.json();
    const said = body.error?.message ?? (typeof body.detail === "string" ? body.detail : null);
    if (said) return again ? `${said} ${t("retry_after", { seconds: again })}` : said;
  } catch {
    // no JSON: only the status is known
  }
  return t("status", { status: response.status });
}

let asking = null;

function askForKey(wrong) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key");
    const input = make("input", { type: "password", id: "key-field", autocomplete: "off", spellcheck: "false", required: true });
    const form = make(
      "form",
      {
        class: "stack",
        onsubmit: (event) => {
          event.preventDefault();
          sessionStorage.setItem(KEY, input.value.trim());
          dialog.close();
        },
      },
      make("h2", { text: t("key_title") }),
      make("p", { class: wrong ? "wrong" : "faint", text: t(wrong ? "key_wrong" : "key_says") }),
      make("label", { for: "key-field", text: t("key_label") }),
      input,
      make("button", { type: "submit", class: "main", text: t("key_use") }),
    );
    dialog.replaceChildren(form);
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.addEventListener("close", () => { asking = null; resolve(); }, { once: true });
    dialog.showModal();
  });
  return asking;
}
