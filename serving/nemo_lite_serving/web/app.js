"use strict";

// The playground. Model text only ever becomes text nodes; nothing is loaded from elsewhere.

const get = (selector, root = document) => root.querySelector(selector);
const DEEPEST = 4; // tints; deeper drafts share the last

function make(tag, attributes = {}, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

const form = get("#settings"), prompt = get("#prompt"), model = get("#model");
const send = get("#send"), stop = get("#stop"), regenerate = get("#regenerate");
const ENDPOINT = { chat: "/v1/chat/completions", completion: "/v1/completions" };
const HINT = { chat: "Write a message", completion: "Write the beginning of a text" };
const drafts = { chat: "", completion: "" }; // what is typed in the other tab
const meters = {}; // of each tab's latest answer
const messages = []; // the conversation
let mode = "chat";
let running = null; // the AbortController of the request under way

// ------------------------------------------------------------------------------------------------ talking to the server

class ServerError extends Error {}

function headers() {
  const key = get("#key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers() });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer; is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) askForKey();
  let sentence = `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  try {
    sentence = (await response.json()).error.message || sentence;
  } catch { /* not JSON, such as a proxy's page: the status is all there is to say */ }
  const wait = response.headers.get("Retry-After");
  throw new ServerError(wait ? `${sentence} (Try again in ${wait} s.)` : sentence);
}

function askForKey() {
  if (get("#key-row").hidden) {
    get("#key-row").hidden = false;
    showSettings(true);
    get("#key").focus();
  }
}

/** The JSON of each server-sent event; an answer without its end is an error. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      part = { done: true };
    }
    if (part.done) throw new ServerError("The connection ended before the answer did; the server may have stopped.");
    const lines = (rest + part.value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.message || "The server reported an error.");
      yield event;
    }
  }
}

async function loadModels() {
  try {
    const list = (await (await request("/v1/models")).json()).data;
    model.replaceChildren(...list.map(({ id }) => make("option", { value: id, textContent: id })));
    model.title = list[0]?.max_model_len ? `up to ${list[0].max_model_len} tokens` : "";
  } catch (error) {
    model.replaceChildren(make("option", { value: "", textContent: "no model" }));
    model.title = error.message;
  }
}

// -------------------------------------------------------------------------------------------------------- the settings

function parameters() {
  const body = {};
  for (const field of form.querySelectorAll("input[type=number]")) {
    if (field.validity.badInput) throw new ServerError(`${field.name} is not a number.`);
    if (field.value !== "" && field.name !== "budget") body[field.name] = Number(field.value);
  }
  const stops = form.elements.stop.value.split("\n").filter(Boolean);
  if (stops.length) body.stop = stops;
  return body;
}

function chatParameters() {
  const { thinking, budget, tools } = form.elements, body = {};
  if (thinking.value) body.reasoning_effort = { on: "medium", low: "low", off: "none" }[thinking.value];
  if (budget.value !== "") body.thinking_token_budget = Number(budget.value);
  if (tools.value.trim()) {
    try {
      body.tools = JSON.parse(tools.value);
    } catch (error) {
      throw new ServerError(`The tools are not JSON: ${error.message}.`);
    }
  }
  return body;
}

function requestBody(text) {
  const system = form.elements.system.value;
  return {
    model: model.value,
    ...(mode === "chat"
      ? { messages: [...(system.trim() ? [{ role: "system", content: system }] : []), ...messages], ...chatParameters() }
      : { prompt: text }),
    ...parameters(),
    stream: true,
    stream_options: { include_usage: true },
    token_origins: true,
  };
}

function curl(path, body) {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const key = get("#key").value ? '  -H "Authorization: Bearer $API_KEY" \\\n' : ""; // the key itself is not for a clipboard
  return `curl -N ${location.origin}${path} \\\n  -H 'Content-Type: application/json' \\\n${key}  -d '${quoted}'`;
}

// ------------------------------------------------------------------------------------------------------------- numbers

/** What one answer costs, as it comes: tokens by draft depth, times, and at last the server's own counts. */
class Meter {
  start = performance.now();
  first = null;
  last = null;
  atFirst = 0;
  depths = []; // depths[k]: tokens that were accepted drafts of depth k; depths[0]: from the main model
  tokens = 0;
  chunks = 0;
  usage = null;
  counts = null;

  take(event) {
    this.usage = event.usage ?? this.usage;
    this.counts = event.nemo_lite?.counts ?? this.counts;
    const told = event.nemo_lite?.tokens ?? [];
    for (const [, depth] of told) this.depths[depth] = (this.depths[depth] ?? 0) + 1;
    this.tokens += told.length;
    const { delta, text } = event.choices?.[0] ?? {};
    if (!told.length && !(text || delta?.content || delta?.reasoning_content || delta?.tool_calls)) return;
    this.chunks += 1;
    this.last = performance.now();
    if (this.first === null) {
      this.first = this.last;
      this.atFirst = this.tokens || 1;
    }
  }

  get total() {
    return this.usage?.completion_tokens ?? (this.tokens || this.chunks);
  }

  get rate() {
    const seconds = (this.last - this.first) / 1000, after = this.total - this.atFirst;
    return seconds > 0 && after > 0 ? after / seconds : null;
  }

  get acceptance() {
    const { accepted, verify_steps: steps } = this.counts ?? {};
    if (steps) return (1 + accepted / steps).toFixed(2);
    const guessed = this.depths.slice(1).reduce((sum, count) => sum + (count ?? 0), 0);
    // Every verify step ends with a token of the main model, and so did the prompt. Steps without drafts do too and
    // cannot be told apart, so until the server's counts come this is about right.
    const main = (this.depths[0] ?? 0) - 1;
    return !this.counts && guessed && main > 0 ? `≈ ${(1 + guessed / main).toFixed(2)}` : null;
  }

  get cached() {
    const prompted = this.usage?.prompt_tokens ?? this.counts?.prompt_tokens;
    const cached = this.usage?.prompt_tokens_details?.cached_tokens ?? this.counts?.cached_tokens;
    return prompted === undefined ? null : cached === undefined ? `? of ${prompted}` : `${cached} of ${prompted}`;
  }

  summary(finish) {
    const ends = { stop: "finished", length: "cut at the token limit", tool_calls: "asks for a tool", aborted: "stopped" };
    if (!this.total && !finish) return "";
    const parts = [`${this.total} token${this.total === 1 ? "" : "s"}`];
    if (this.counts?.drafted) parts.push(`${this.counts.accepted} of ${this.counts.drafted} drafts accepted`);
    if (finish) parts.push(ends[finish] ?? finish);
    return parts.join(", ");
  }
}

function showGauges(meter) {
  const wait = meter?.first ? meter.first - meter.start : null;
  const texts = {
    rate: meter?.rate?.toFixed(meter.rate < 100 ? 1 : 0),
    acceptance: meter?.acceptance,
    first: wait === null ? null : wait < 1000 ? `${Math.round(wait)} ms` : `${(wait / 1000).toFixed(2)} s`,
    cached: meter?.cached,
  };
  for (const [name, text] of Object.entries(texts)) get(`#gauge-${name}`).textContent = text ?? "–";
  const counts = new Array(DEEPEST + 1).fill(0);
  (meter?.depths ?? []).forEach((count, depth) => { counts[Math.min(depth, DEEPEST)] += count; });
  const deepest = Math.max(2, counts.findLastIndex((count) => count > 0));
  get("#legend").replaceChildren(...counts.slice(0, deepest + 1).map((count, depth) => {
    const name = depth === 0 ? "main model" : `draft ${depth}${depth === DEEPEST ? "+" : ""}`;
    return make("li", {}, make("i", { className: `d${depth}` }), name, ...(meter ? [": ", make("b", { textContent: count })] : []));
  }));
}

// ------------------------------------------------------------------------------------------------------------- answers

/** The tokens that were told but not shown yet; text is cut into them, so that each gets its colour. */
class Origins {
  queue = [];

  add(tokens) {
    this.queue.push(...tokens.map(([text, depth]) => ({ text, depth })));
  }

  /** Nodes for `text`. Told text that is not shown (a tag, a stop string) is passed over; unknown text stays plain. */
  paint(text) {
    const at = this.queue.map((token) => token.text).join("").indexOf(text);
    if (at < 0) return [make("span", { textContent: text })];
    const nodes = [];
    let skip = at, left = text.length;
    while (left > 0) {
      const token = this.queue[0], begin = Math.min(skip, token.text.length);
      const piece = token.text.slice(begin, begin + left);
      skip -= begin;
      left -= piece.length;
      if (piece) {
        const title = token.depth ? `accepted draft, ${token.depth} ahead` : "main model";
        nodes.push(make("span", { textContent: piece, className: `d${Math.min(token.depth, DEEPEST)}`, title }));
      }
      token.text = token.text.slice(begin + piece.length);
      if (!token.text) this.queue.shift();
    }
    return nodes;
  }
}

class Answer {
  content = "";
  calls = [];
  finish = null;
  origins = new Origins();

  constructor(log, given) {
    this.text = make("div", { className: "text" });
    if (given) this.text.append(make("span", { textContent: given, className: "given" }));
    this.node = make("article", { className: "answer busy" }, this.text);
    this.node.setAttribute("aria-busy", "true"); // a screen reader hears the answer once, whole
    log.append(this.node);
  }

  take(event) {
    this.origins.add(event.nemo_lite?.tokens ?? []);
    const choice = event.choices?.[0];
    if (!choice) return;
    const delta = choice.delta ?? { content: choice.text };
    if (delta.reasoning_content) {
      if (!this.reasoning) {
        this.reasoning = make("div", { className: "text" });
        const fold = make("details", { className: "reasoning" }, make("summary", { textContent: "Reasoning" }), this.reasoning);
        this.text.before(fold);
      }
      this.reasoning.append(...this.origins.paint(delta.reasoning_content));
    }
    if (delta.content) {
      this.content += delta.content;
      this.text.append(...this.origins.paint(delta.content));
    }
    for (const part of delta.tool_calls ?? []) this.takeCall(part);
    this.finish = choice.finish_reason ?? this.finish;
  }

  takeCall({ index, id, function: called = {} }) {
    let call = this.calls[index];
    if (!call) {
      call = this.calls[index] = { id, name: "", arguments: "", title: make("code"), body: make("pre") };
      call.result = make("input", { type: "text", placeholder: "what the tool returned; sent with the next message" });
      this.node.append(make("section", { className: "call" }, make("h3", {}, "Tool call ", call.title), call.body,
        make("label", {}, make("small", { textContent: "Result" }), call.result)));
    }
    call.name += called.name ?? "";
    call.arguments += called.arguments ?? "";
    call.title.textContent = call.name;
    call.body.textContent = call.arguments;
  }

  fail(sentence) {
    this.node.append(make("p", { className: "error", textContent: sentence }));
  }

  end(meter, command) {
    this.node.classList.remove("busy");
    this.node.removeAttribute("aria-busy");
    for (const call of this.calls.filter(Boolean)) {
      try {
        call.body.textContent = JSON.stringify(JSON.parse(call.arguments), null, 2);
      } catch { /* cut off, or the model's JSON is wrong: it stays as it came */ }
    }
    const shown = make("pre", { textContent: command });
    const copy = make("button", { type: "button", className: "copy", textContent: "Copy" });
    copy.onclick = () => copyText(shown, copy);
    this.node.append(make("div", { className: "foot" }, make("p", { textContent: meter.summary(this.finish) }),
      make("details", {}, make("summary", { textContent: "as curl" }), shown, copy)));
  }

  get message() {
    const calls = this.calls.filter(Boolean).map(({ id, name, arguments: text }) => (
      { id, type: "function", function: { name, arguments: text } }));
    return { role: "assistant", content: this.content, ...(calls.length && { tool_calls: calls }) };
  }
}

async function copyText(node, button) {
  try {
    await navigator.clipboard.writeText(node.textContent); // only over https or on this machine
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(node);
    button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

// ------------------------------------------------------------------------------------------------------- what one does

const panel = () => get(`#panel-${mode}`);
let lastAnswer = null; // of the chat, for its tool calls

/** Send what is typed; `again` asks for the last answer anew. */
async function ask(again = false) {
  if (running) return;
  const text = prompt.value, log = get(".answers", panel());
  if (mode === "chat") {
    if (again) {
      while (messages.at(-1)?.role === "assistant") messages.pop();
      while (log.lastElementChild?.matches(".answer")) log.lastElementChild.remove();
    } else {
      const results = (lastAnswer && messages.at(-1) === lastAnswer.said ? lastAnswer.calls : []).filter((call) => call?.result.value);
      for (const { id, result } of results) messages.push({ role: "tool", tool_call_id: id, content: result.value });
      if (!text.trim() && !results.length) return;
      if (text.trim()) {
        messages.push({ role: "user", content: text });
        log.append(make("div", { className: "user", textContent: text }));
      }
      prompt.value = "";
    }
    if (!messages.length) return;
  } else {
    if (!text) return;
    log.replaceChildren();
  }
  get(".intro", panel()).hidden = true;
  const path = ENDPOINT[mode], where = mode, answer = new Answer(log, where === "completion" ? text : "");
  const meter = (meters[where] = new Meter());
  const scroller = panel();
  let command = "";
  running = new AbortController();
  busy(true);
  scroller.scrollTop = scroller.scrollHeight;
  try {
    const body = requestBody(text);
    command = curl(path, body);
    const response = await request(path, { method: "POST", body: JSON.stringify(body), signal: running.signal });
    for await (const event of events(response)) {
      const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
      meter.take(event);
      answer.take(event);
      if (where === mode) showGauges(meter);
      if (atEnd) scroller.scrollTop = scroller.scrollHeight; // who scrolled up to read is left there
    }
  } catch (error) {
    if (error.name === "AbortError") answer.finish = "aborted";
    else if (error instanceof ServerError) answer.fail(error.message);
    else answer.fail(`The answer could not be read: ${error.message}.`);
  } finally {
    running.abort(); // nothing more is read of it
    running = null;
  }
  if (where === "chat" && (answer.content || answer.calls.length)) {
    answer.said = answer.message;
    messages.push(answer.said);
    lastAnswer = answer;
  }
  answer.end(meter, command);
  scroller.scrollTop = scroller.scrollHeight;
  if (where === mode) showGauges(meter);
  busy(false);
}

function busy(yes) {
  const focused = document.activeElement;
  stop.disabled = !yes;
  send.disabled = yes;
  regenerate.disabled = yes || !get(".answer", panel());
  get("#clear").disabled = yes;
  if (document.activeElement !== focused || focused?.disabled) (yes ? stop : send).focus(); // focus never falls off the page
}

function clear() {
  if (mode === "chat") messages.length = 0;
  get(".answers", panel()).replaceChildren();
  get(".intro", panel()).hidden = false;
  delete meters[mode];
  showGauges();
  regenerate.disabled = true;
  prompt.focus();
}

function choose(next) {
  drafts[mode] = prompt.value;
  mode = next;
  for (const name of Object.keys(ENDPOINT)) {
    const tab = get(`#tab-${name}`), chosen = name === mode;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    get(`#panel-${name}`).hidden = !chosen;
  }
  document.body.classList.toggle("completing", mode === "completion");
  get("#prompt-label").textContent = mode === "chat" ? "Message" : "Text to continue";
  prompt.placeholder = HINT[mode];
  prompt.value = drafts[mode];
  regenerate.textContent = mode === "chat" ? "Regenerate" : "Again";
  if (!running) regenerate.disabled = !get(".answer", panel());
  showGauges(meters[mode]);
}

function showSettings(yes) {
  document.body.classList.toggle("settings-open", yes);
  get("#show-settings").setAttribute("aria-expanded", yes);
  get("#show-settings").textContent = yes ? "Done" : "Settings";
}

// What is set outlives a reload; the key does so in this tab only. Storage may be forbidden: then nothing is kept.
function remember() {
  try {
    localStorage.setItem("settings", JSON.stringify(Object.fromEntries(new FormData(form))));
    sessionStorage.setItem("key", get("#key").value);
  } catch { /* forbidden */ }
}

function recall() {
  try {
    for (const [name, value] of Object.entries(JSON.parse(localStorage.getItem("settings") ?? "{}"))) {
      if (form.elements[name]) form.elements[name].value = value;
    }
    get("#key").value = sessionStorage.getItem("key") ?? "";
    get("#key-row").hidden = !get("#key").value;
  } catch { /* forbidden, or from another version */ }
}

get("#composer").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
stop.addEventListener("click", () => running?.abort());
regenerate.addEventListener("click", () => ask(true));
get("#clear").addEventListener("click", clear);
get("#colours").addEventListener("change", (event) => document.body.classList.toggle("coloured", event.target.checked));
get("#show-settings").addEventListener("click", () => showSettings(!document.body.classList.contains("settings-open")));
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", remember);
form.addEventListener("reset", () => setTimeout(remember));
get("#key").addEventListener("change", loadModels);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    ask();
  } else if (event.key === "Escape") {
    if (running) running.abort();
    else showSettings(false);
  }
});
get(".tabs").addEventListener("click", (event) => event.target.id.startsWith("tab-") && choose(event.target.id.slice(4)));
get(".tabs").addEventListener("keydown", (event) => {
  if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  choose(mode === "chat" ? "completion" : "chat");
  get(`#tab-${mode}`).focus();
});

document.body.classList.toggle("coloured", get("#colours").checked);
recall();
choose("chat");
loadModels();
