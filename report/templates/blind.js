// Blind votes: answers without names or figures, in an order of its own for each prompt; a tally and a file at the end.
const NEITHER = -1;
let vote = null; // { seed, among: columns voted on, choices: Map(row index -> column or NEITHER), saved }

// mulberry32: 32 bits of state are enough to shuffle a handful of answers, and give the same order everywhere.
function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

function shuffled(columnsHere, seed, index) {
  const random = generator(Math.imul(seed, 0x9e3779b1) ^ Math.imul(index + 1, 0x85ebca6b));
  const order = columnsHere.slice();
  for (let last = order.length - 1; last > 0; last--) {
    const other = Math.floor(random() * (last + 1));
    [order[last], order[other]] = [order[other], order[last]];
  }
  return order;
}

const isBlind = () => document.body.classList.contains("blind");
const columnOrder = () => data.checkpoints.map((_, column) => column);
const letter = (place) => String.fromCharCode(65 + place);

function arrange(row, order, blind) {
  const answers = order.map((column) => row.answers[column]);
  row.element.querySelector(".answers").append(...answers);
  answers.forEach((answer, place) => {
    const name = blind ? `Answer ${letter(place)}` : data.checkpoints[order[place]];
    answer.setAttribute("aria-label", name);
    answer.querySelector("h3").textContent = name;
  });
}

function voteButtons(row, order) {
  const button = (choice, text, key) =>
    make("button", { type: "button", "data-choice": choice, "aria-pressed": "false", onclick: () => cast(row, choice) }, text, " ", make("kbd", {}, key));
  const best = order.length > 2 ? "best" : "better";
  const each = order.slice(0, 9).map((column, place) => button(column, `${letter(place)} is ${best}`, `${place + 1}`));
  return make("div", { class: "vote", role: "group", "aria-label": "Your vote" }, ...each, button(NEITHER, "Neither", "0"));
}

function startVote() {
  const among = columnOrder().filter(isShown);
  byId("blind-start").close();
  if (control.sort) control.sort.value = ""; // "worst of X first" would tell whose answers are the bad ones
  sortRows();
  vote = { seed: Number(byId("seed").value) >>> 0, among, choices: new Map(), saved: true };
  byId("tally").hidden = true;
  setBlind(true);
  for (const row of rows) {
    row.order = shuffled(among, vote.seed, row.index);
    arrange(row, row.order, true);
    row.element.querySelectorAll(".chosen").forEach((answer) => answer.classList.remove("chosen"));
    row.element.append(voteButtons(row, row.order));
  }
  showProgress();
  move(1);
}

function setBlind(on) {
  document.body.classList.toggle("blind", on);
  byId("blind").textContent = on ? "End the vote" : "Blind vote";
  for (const box of [...columns, control.sort]) if (box) box.disabled = on;
}

function cast(row, choice) {
  vote.choices.set(row.index, choice);
  vote.saved = false;
  for (const button of row.element.querySelectorAll(".vote button")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.choice) === choice));
  }
  showProgress();
  const visible = visibleRows();
  const later = [...visible.slice(visible.indexOf(row) + 1), ...visible].find((each) => !vote.choices.has(each.index));
  if (later) goTo(later);
  else byId("blind").focus();
}

function showProgress() {
  const open = visibleRows().filter((row) => !vote.choices.has(row.index)).length;
  byId("shown").textContent = `${vote.choices.size} voted, ${open} to go`;
}

function endVote() {
  setBlind(false);
  for (const row of rows) {
    row.element.querySelector(".vote").remove();
    arrange(row, columnOrder(), false);
    const choice = vote.choices.get(row.index);
    if (choice >= 0) row.answers[choice].classList.add("chosen");
  }
  applyFilters();
  showTally();
}

// Two-sided sign test: how often a fair coin, thrown once a decided vote, comes out at least as uneven as this.
function signTest(wins, losses) {
  const throws = wins + losses;
  let term = throws * Math.log(0.5);
  let sum = 0;
  for (let k = 0; k <= Math.min(wins, losses); k++) {
    sum += Math.exp(term);
    term += Math.log(throws - k) - Math.log(k + 1);
  }
  return Math.min(1, 2 * sum);
}

function tallyLines() {
  const won = (column) => Array.from(vote.choices.values()).filter((choice) => choice === column).length;
  const lines = vote.among.map((column) => [data.checkpoints[column], `${won(column)}`]);
  lines.push(["neither", `${won(NEITHER)}`]);
  const tests = vote.among.flatMap((one, place) =>
    vote.among.slice(place + 1).map((two) => {
      const p = signTest(won(one), won(two));
      const chance = won(one) + won(two) ? `p = ${p < 0.001 ? p.toExponential(1) : p.toFixed(3)}` : "no vote for either";
      return `${data.checkpoints[one]} ${won(one)} : ${won(two)} ${data.checkpoints[two]}, ${chance}`;
    }),
  );
  return { lines, tests };
}

function showTally() {
  const { lines, tests } = tallyLines();
  const body = lines.map(([name, count]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, count)));
  byId("tally").replaceChildren(
    make("h2", { class: "part" }, `Tally of ${vote.choices.size} ${vote.choices.size === 1 ? "vote" : "votes"}`),
    make("table", {}, make("tbody", {}, ...body)),
    ...tests.map((text) => make("p", { class: "note" }, `${text} (two-sided sign test)`)),
    make("button", { type: "button", id: "save", onclick: saveVotes }, "Save the votes"),
  );
  byId("tally").hidden = false;
  byId("tally").focus();
  byId("tally").scrollIntoView({ block: "start" });
}

function votesFile() {
  const entries = Array.from(vote.choices, ([index, choice]) => ({
    row: index,
    prompt: rows[index].prompt,
    category: rows[index].category,
    shown: rows[index].order,
    choice: choice === NEITHER ? null : choice,
  }));
  const { title, comparison, checkpoints } = data;
  return { format: 1, kind: "votes", title, comparison, checkpoints, rows: rows.length, seed: vote.seed, votes: entries };
}

function saveVotes() {
  const file = new Blob([JSON.stringify(votesFile(), null, 1)], { type: "application/json" });
  const link = make("a", { href: URL.createObjectURL(file), download: `votes-${data.comparison}-${vote.seed}.json` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  vote.saved = true;
}

function voteByKey(key) {
  if (!isBlind()) return;
  const visible = visibleRows();
  const row = currentRow() ?? visible.find((each) => !vote.choices.has(each.index));
  const choice = key === "0" ? NEITHER : row?.order[Number(key) - 1];
  if (row && choice !== undefined) cast(row, choice);
}

function blindOrEnd() {
  if (isBlind()) return endVote();
  byId("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 100000; // nobody knows the order beforehand
  byId("blind-start").showModal();
  byId("start").focus();
}

keys.b = blindOrEnd;
for (const key of "0123456789") keys[key] = () => voteByKey(key);
byId("blind").addEventListener("click", blindOrEnd);
byId("start").addEventListener("click", startVote);
for (const name of ["filter", "category", "differs"]) control[name]?.addEventListener("input", () => isBlind() && showProgress());
window.addEventListener("beforeunload", (event) => {
  if (vote && !vote.saved) event.preventDefault();
});
