// The page of runs that go on: asks its own server for what metrics.jsonl holds, and shows it.
const EVERY = 2000; // milliseconds

function showRuns(runs) {
  const list = document.querySelector(".checkpoints");
  while (list.children.length < runs.length) {
    const card = byId("card").content.firstElementChild.cloneNode(true);
    card.className = `checkpoint ${colour(list.children.length)}`;
    list.append(card);
    watchRuns();
  }
  runs.forEach(({ label, facts, path }, place) => {
    const card = list.children[place];
    card.querySelector(".label").textContent = label;
    card.querySelector(".path").textContent = path;
    card.querySelector("dl").replaceChildren(
      ...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))),
    );
  });
}

function showWarnings(runs) {
  const lines = runs.flatMap(({ label, warnings }) => warnings.map((text) => (runs.length > 1 ? `${label}: ${text}` : text)));
  byId("warnings").hidden = lines.length === 0;
  byId("warnings").querySelector("ul").replaceChildren(...lines.map((text) => make("li", {}, text)));
}

function take(news) {
  const changed = JSON.stringify(news.panels) !== JSON.stringify(data.panels);
  Object.assign(data, news);
  showRuns(data.runs);
  showWarnings(data.runs);
  if (changed) makePanels();
  else drawAll();
}

async function ask() {
  let told = "";
  try {
    const answer = await fetch("data.json", { cache: "no-store" });
    const news = await answer.json();
    if (news.error) told = news.error;
    else {
      if (news.version !== data.version) take(news);
      told = `Live, as of ${new Date().toLocaleTimeString("en-GB")}`;
    }
  } catch {
    told = "No answer from the server: it was stopped, or this machine is busy. Asking on.";
  }
  byId("state").textContent = told;
}

async function askOn() {
  if (!document.hidden) await ask();
  setTimeout(askOn, EVERY);
}
askOn();
