// The chat page: all models are asked the same, each in a conversation of its own. What models and people write enters
// through textContent only.
const columns = data.models.map((model, place) => ({ model, colour: `c${place + 1}`, messages: [] }));
const FIELDS = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"];
let current = null;  // ends the answers that are being written

function makeTurn(kind, text = "") {
  const turn = make("div", { class: `turn ${kind}` }, make("div", { class: "text", dir: "auto" }));
  turn.firstChild.textContent = text;
  return turn;
}

function request(column) {
  const system = byId("system").value.trim();
  const body = { model: column.model, stream: true, stream_options: { include_usage: true } };
  body.messages = [...(system ? [{ role: "system", content: system }] : []), ...column.messages];
  for (const name of FIELDS) if (byId(name).value !== "") body[name] = Number(byId(name).value);
  return body;
}

// Each JSON object of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part !== "data: [DONE]") yield JSON.parse(part.slice("data: ".length));
  }
}

// The oldest exchanges go while the conversation exceeds the model's context.
async function ask(column, signal) {
  for (;;) {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(request(column)),
    });
    if (response.ok) return response;
    const { error } = await response.json();
    if (error.code !== "context_length_exceeded" || column.messages.length < 3) throw new Error(error.message);
    column.messages.splice(0, 2);
  }
}

async function answer(column, exchange, signal) {
  const turn = makeTurn(`assistant ${column.colour}`);
  const text = turn.firstChild, began = performance.now();
  let figures = "", failed = false;
  turn.classList.add("writing");
  turn.setAttribute("aria-label", column.model);
  exchange.lastChild.append(turn);
  try {
    for await (const event of events(await ask(column, signal))) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (choice?.delta.content) text.append(choice.delta.content);
      if (choice?.finish_reason === "length") figures = ", cut at its length";
      if (event.usage) {
        const count = event.usage.completion_tokens, seconds = (performance.now() - began) / 1000;
        figures = `${count} tokens, ${(count / seconds).toFixed(1)} tokens/s${figures}`;
      }
      exchange.scrollIntoView({ block: "nearest" });
    }
  } catch (error) {
    if (error.name === "AbortError") figures = "stopped";
    else turn.append(make("p", { class: "wrong" }, error.message));
    failed = true;
  }
  turn.classList.remove("writing");
  turn.append(make("p", { class: "figures" }, figures));
  if (failed && !text.textContent) column.messages.pop();  // as if it had not been asked
  else column.messages.push({ role: "assistant", content: text.textContent });  // also where it was stopped
}

async function send() {
  const text = byId("text").value.trim();
  if (!text || current) return;
  byId("text").value = "";
  const mine = current = new AbortController();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  const answers = make("div", { class: columns.length > 1 ? "answers two" : "answers" });
  const exchange = make("article", { class: "exchange" }, makeTurn("user", text), answers);
  byId("exchanges").append(exchange);
  for (const column of columns) column.messages.push({ role: "user", content: text });
  await Promise.all(columns.map((column) => answer(column, exchange, mine.signal)));
  exchange.scrollIntoView({ block: "nearest" });
  current = null;
  byId("send").disabled = false;
  byId("stop").disabled = true;
}

async function anew() {
  if (current) return;
  for (const column of columns) column.messages = [];
  byId("exchanges").replaceChildren();
  byId("text").focus();
}

byId("say").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") current?.abort();
});
byId("stop").addEventListener("click", () => current?.abort());
byId("anew").addEventListener("click", anew);
keys.n = anew;
