// An answer token by token: how likely each was, what else could have come, and going on from another one.
// It keeps every version that was written; a version is a list of tokens {id, text, piece, probability, alternatives}.

import { sentence, stream } from "./api.js";
import { bar, byId, make, percent, say, visible } from "./elements.js";
import { number, t } from "./language.js";
import { settings } from "./settings.js";
import { openStages } from "./stages.js";

const ALTERNATIVES = 5;
const UNSEEN = /^[\p{Cc}\p{Cf}]*$(?<![\n\t])/u; // nothing that one could see or choose

export class Answer {
  // `prompt` gives the prompt's token ids (for going on exactly), `changed` is called when another version is shown.
  constructor({ model, prompt = null, changed = () => {} }) {
    this.model = model;
    this.prompt = prompt;
    this.changed = changed;
    this.versions = [];
    this.current = -1;
    this.abort = null;
    this.text = make("div", { class: "tokens", role: "group", label: "answer", onkeydown: (event) => this.walk(event) });
    this.text.addEventListener("click", (event) => this.clicked(event.target.closest(".token")));
    this.status = make("p", { class: "status" });
    this.wrong = make("p", { class: "notice", role: "alert", hidden: true });
    this.pages = make("span", { class: "pages", hidden: true });
    this.element = make("div", { class: "answer" }, this.text, this.wrong, make("div", { class: "below" }, this.pages, this.status));
  }

  get busy() { return this.abort !== null; }

  get written() { return this.version ? this.version.tokens.map((token) => token.text).join("") : ""; }

  get version() { return this.versions[this.current]; }

  stop() { this.abort?.abort(); }

  // Streams from the public API into a new version that begins with `kept` tokens.
  async write(path, body, kept = []) {
    this.stop();
    const version = { tokens: [...kept], finish: null, settings: settings() };
    this.versions.push(version);
    this.show(this.versions.length - 1);
    const abort = new AbortController();
    this.abort = abort;
    this.wrong.hidden = true;
    this.element.classList.add("writing");
    this.status.textContent = t("writing");
    say(t("writing"));
    const began = performance.now();
    let first = null;
    const before = kept.length;
    try {
      await stream(path, { ...body, ...asked(path), ...version.settings }, abort.signal, (event) => {
        const choice = event.choices?.[0];
        if (!choice) return;
        first ??= performance.now();
        for (const token of tokensOf(choice, version.tokens.at(-1))) this.add(version, token);
        version.finish = choice.finish_reason ?? version.finish;
        const many = version.tokens.length - before;
        version.rate = many > 1 ? (many - 1) / ((performance.now() - first) / 1000) : null;
        version.wait = (first - began) / 1000;
        if (this.version === version) this.tell();
      });
      version.finish ??= "stopped";
      say(`${t("done")} ${version.tokens.map((token) => token.text).join("")}`);
    } catch (error) {
      version.finish = "stopped";
      const said = sentence(error);
      if (said !== null) {
        this.wrong.textContent = said;
        this.wrong.hidden = false;
      }
    } finally {
      if (this.abort === abort) {
        this.abort = null;
        this.element.classList.remove("writing");
      }
      this.tell();
      this.changed();
    }
  }

  // Another token in place of the one at `place`, and on from there: prompt and tokens as ids, so that it is exact.
  async continueFrom(place, alternative) {
    const kept = this.version.tokens.slice(0, place);
    const chosen = { ...this.version.tokens[place], ...alternative, picked: true };
    if (this.model.ends.includes(alternative.id)) chosen.text = "";
    kept.push(chosen);
    this.changed("branch");
    if (this.model.ends.includes(alternative.id)) {
      this.versions.push({ tokens: kept, finish: "stop", settings: settings() });
      this.show(this.versions.length - 1);
      return;
    }
    try {
      const prompt = await this.prompt();
      await this.write("/v1/completions", { model: this.model.id, prompt: [...prompt, ...kept.map((token) => token.id)] }, kept);
    } catch (error) {
      this.wrong.textContent = sentence(error) ?? "";
      this.wrong.hidden = this.wrong.textContent === "";
    }
  }

  show(index) {
    this.current = index;
    this.text.replaceChildren(...this.version.tokens.map((token, place) => this.span(token, place)));
    this.tell();
  }

  add(version, token) {
    if (token.more) { // text that was held back until now belongs to the token before
      const last = version.tokens.at(-1);
      last.text += token.more;
      if (this.version === version && this.text.lastChild) this.text.lastChild.textContent = last.text;
      return;
    }
    version.tokens.push(token);
    if (this.version === version) this.text.append(this.span(token, version.tokens.length - 1));
  }

  span(token, place) {
    const end = token.text === "" && this.model.ends.includes(token.id);
    const names = ["token", shade(token.probability)];
    if (token.picked) names.push("picked");
    if (UNSEEN.test(token.text)) names.push(end ? "end" : "empty");
    if (/^\n+$/.test(token.text)) names.push("line");
    return make("span", {
      class: names.join(" "), role: "button", "aria-haspopup": "dialog", tabindex: place === 0 ? "0" : "-1",
      "data-place": String(place), text: token.text, title: percent(token.probability),
      ...(token.text.trim() === "" ? { "aria-label": end ? t("end") : visible(token.piece || token.text) } : {}),
    });
  }

  tell() {
    const version = this.version;
    if (!version) return;
    const parts = [];
    if (!this.busy && version.tokens.length === 0 && !this.wrong.hidden) return this.status.replaceChildren();
    if (this.busy) parts.push(t("writing"));
    else if (version.finish) parts.push(t(`finish_${version.finish}`));
    parts.push(t("count_tokens", { count: number(version.tokens.length) }));
    if (version.rate) parts.push(t("rate", { rate: number(version.rate, 1) }));
    this.status.textContent = parts.join(" · ");
    this.pages.hidden = this.versions.length < 2;
    if (this.versions.length < 2) return;
    const page = (step, label, sign) => make("button", {
      type: "button", class: "quiet small", label, text: sign,
      disabled: this.busy || this.current + step < 0 || this.current + step >= this.versions.length,
      onclick: () => { this.show(this.current + step); this.changed(); },
    });
    this.pages.replaceChildren(
      page(-1, "earlier", "‹"),
      make("span", { text: t("version", { place: this.current + 1, count: this.versions.length }) }),
      page(1, "later", "›"),
    );
  }

  clicked(span) {
    if (span && getSelection().isCollapsed) this.open(span);
  }

  // Arrow keys walk from token to token, Enter looks at one.
  walk(event) {
    const span = event.target.closest?.(".token");
    if (!span) return;
    const to = {
      ArrowRight: span.nextElementSibling, ArrowLeft: span.previousElementSibling,
      Home: this.text.firstElementChild, End: this.text.lastElementChild,
    }[event.key];
    if (to) {
      event.preventDefault();
      span.tabIndex = -1;
      to.tabIndex = 0;
      to.focus();
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.open(span);
    }
  }

  open(span) {
    const place = Number(span.dataset.place);
    const token = this.version.tokens[place];
    const box = byId("alternatives");
    const goOn = (alternative) => { box.hidePopover(); this.continueFrom(place, alternative); };
    const rows = token.alternatives.map((one) => {
      const own = one.id === undefined ? one.text === token.piece : one.id === token.id;
      const possible = one.id !== undefined && this.prompt !== null;
      return make(
        "li", {},
        make(
          "button",
          {
            type: "button", class: own ? "alternative own" : "alternative", disabled: own || !possible,
            "aria-label": t(own ? "own_label" : "alternative_label", { token: visible(one.text), share: percent(one.probability) }),
            onclick: () => goOn(one),
          },
          make("span", { class: "piece", text: visible(one.text) }), bar(one.probability),
          make("span", { class: "share", text: percent(one.probability) }),
        ),
      );
    });
    const stages = this.prompt && token.id !== undefined
      ? make("button", { type: "button", class: "wide", say: "see_stages", onclick: () => { box.hidePopover(); this.look(place, span); } })
      : null;
    box.setAttribute("aria-label", t("alternatives"));
    box.replaceChildren(
      make("p", { class: "chosen" }, make("span", { class: "piece", text: visible(token.piece || token.text) }), make("span", { class: "share", text: percent(token.probability) })),
      make("p", { class: "faint", say: rows.length && this.prompt ? "pick" : "alternatives" }),
      make("ul", { class: "plain" }, ...rows),
      ...(stages ? [stages] : []),
    );
    box.showPopover();
    beside(box, span);
    const back = (event) => { if (event.newState === "closed" && box.contains(document.activeElement)) span.focus(); };
    box.addEventListener("beforetoggle", back, { once: true });
    (box.querySelector("button:not([disabled])") ?? box).focus();
  }

  async look(place, span) {
    const tokens = this.version.tokens;
    try {
      await openStages({
        model: this.model, prompt: await this.prompt(), answer: tokens.slice(0, place).map((token) => token.id), token: tokens[place].id,
        settings: this.version.settings, pick: (alternative) => this.continueFrom(place, alternative), back: span,
      });
    } catch (error) {
      this.wrong.textContent = sentence(error) ?? "";
      this.wrong.hidden = this.wrong.textContent === "";
    }
  }
}

export function shade(probability) {
  return probability >= 0.9 ? "p0" : probability >= 0.5 ? "p1" : probability >= 0.2 ? "p2" : probability >= 0.05 ? "p3" : "p4";
}

function asked(path) {
  return path.includes("chat") ? { logprobs: true, top_logprobs: ALTERNATIVES } : { logprobs: ALTERNATIVES };
}

// The tokens in one event of a stream; a piece of text without one is {more}.
export function tokensOf(choice, last) {
  const text = choice.delta ? choice.delta.content ?? "" : choice.text ?? "";
  const scores = choice.logprobs;
  const found = scores?.content ? scores.content.map(chatToken) : scores?.tokens ? scores.tokens.map((_, place) => completionToken(scores, place)) : [];
  if (found.length === 1) found[0].text = text;
  else if (found.length > 1 && found.map((token) => token.text).join("") !== text) found.forEach((token, place) => { token.text = place ? "" : text; });
  if (found.length === 0 && text !== "") {
    return last ? [{ more: text }] : [{ text, piece: text, probability: 1, alternatives: [] }];
  }
  return found;
}

function chatToken(entry) {
  return {
    id: entry.id, text: entry.token, piece: entry.token, probability: Math.exp(entry.logprob),
    alternatives: (entry.top_logprobs ?? []).map((one) => ({ id: one.id, text: one.token, piece: one.token, probability: Math.exp(one.logprob) })),
  };
}

function completionToken(scores, place) {
  const ids = scores.top_token_ids?.[place] ?? [];
  // JSON objects lose their order where names are digits; the ids are in the order of likelihood.
  const top = Object.entries(scores.top_logprobs?.[place] ?? {}).sort((one, other) => other[1] - one[1]);
  const known = ids.length === top.length; // two tokens of one text are one name here
  return {
    id: scores.token_ids?.[place], text: scores.tokens[place], piece: scores.tokens[place], probability: Math.exp(scores.token_logprobs[place]),
    alternatives: top.map(([text, logprob], rank) => ({ id: known ? ids[rank] : undefined, text, piece: text, probability: Math.exp(logprob) })),
  };
}

// Below the token, or above it where there is no room; never outside the window.
function beside(box, span) {
  const at = span.getBoundingClientRect();
  const size = box.getBoundingClientRect();
  const below = at.bottom + size.height + 12 < innerHeight || at.top < size.height + 12;
  box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
  box.style.top = `${Math.max(8, below ? Math.min(at.bottom + 6, innerHeight - size.height - 8) : at.top - size.height - 6)}px`;
}
