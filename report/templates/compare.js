// Search, filters, order, marks and keys. The page is complete without this: it only hides, moves and shows what is there.
const bar = document.querySelector(".bar");
const main = document.querySelector("main");
const control = Object.fromEntries(["filter", "category", "sort", "differs", "marks"].map((id) => [id, byId(id)]));
const columns = Array.from(document.querySelectorAll("input.column"));
const rows = Array.from(document.querySelectorAll(".row"), (element, index) => ({
  element,
  index,
  ...data.rows[index],
  answers: Array.from(element.querySelectorAll(".answer")),
  // Of each part by itself, so that what names a column or a vote is not searched.
  words: Array.from(element.querySelectorAll(".text, .tags"), (part) => part.textContent).join("\n").toLowerCase(),
}));

const isShown = (column) => !columns.length || columns[column].checked;
const losses = (row) => row.losses.filter((loss, column) => loss !== null && isShown(column));
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const spread = (values) => Math.max(...values) - Math.min(...values);
// The larger, the further up; rows without a value (NaN) go last.
const orders = {
  differs: (row) => row.differs,
  worst: (row) => mean(losses(row)),
  best: (row) => -mean(losses(row)),
  gap: (row) => (losses(row).length > 1 ? spread(losses(row)) : NaN),
};

function sortRows() {
  const [name, column] = control.sort ? control.sort.value.split(" ") : [""];
  const value = column ? (row) => row.losses[column] ?? NaN : orders[name];
  const key = (row) => (value && !Number.isNaN(value(row)) ? value(row) : -Infinity);
  const sorted = value ? rows.toSorted((a, b) => key(b) - key(a) || a.index - b.index) : rows;
  main.append(...sorted.map((row) => row.element));
}

function applyFilters() {
  const words = control.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const category = control.category?.value ? data.categories[control.category.value] : "";
  const least = control.differs ? Number(control.differs.value) / 100 : 0;
  let count = 0;
  for (const row of rows) {
    const fits = (!category || row.category === category) && row.differs >= least;
    row.element.hidden = !fits || !words.every((word) => row.words.includes(word));
    count += row.element.hidden ? 0 : 1;
  }
  const all = `${rows.length} ${rows.length === 1 ? "prompt" : "prompts"}`;
  byId("shown").textContent = count === rows.length ? all : `${count} of ${all}`;
  byId("none").hidden = count > 0;
  if (control.differs) byId("at-least").textContent = `${control.differs.value}%`;
}

function applyColumns() {
  for (const row of rows) row.answers.forEach((answer, column) => (answer.hidden = !isShown(column)));
  sortRows();
}

function visibleRows() {
  const byElement = new Map(rows.map((row) => [row.element, row]));
  return Array.from(main.children, (element) => byElement.get(element)).filter((row) => row && !row.element.hidden);
}

function currentRow() {
  return rows.find((row) => row.element === document.activeElement.closest(".row"));
}

function goTo(row) {
  row.element.focus({ preventScroll: true });
  row.element.scrollIntoView({ block: "start" });
}

function move(step) {
  const visible = visibleRows();
  const here = visible.indexOf(currentRow());
  const next = visible[here < 0 ? (step > 0 ? 0 : visible.length - 1) : Math.min(Math.max(here + step, 0), visible.length - 1)];
  if (next) goTo(next);
}

Object.assign(keys, { "/": () => control.filter.focus(), j: () => move(1), k: () => move(-1) });
control.filter.addEventListener("input", applyFilters);
control.filter.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  control.filter.value = "";
  applyFilters();
  control.filter.blur();
});
for (const name of ["category", "differs"]) control[name]?.addEventListener("input", applyFilters);
control.sort?.addEventListener("change", sortRows);
for (const box of columns) {
  box.addEventListener("change", () => {
    if (!columns.some((each) => each.checked)) box.checked = true; // one column stays
    applyColumns();
  });
}
if (control.marks) {
  const applyMarks = () => document.body.classList.toggle("unmarked", !control.marks.checked);
  control.marks.addEventListener("change", applyMarks);
  keys.m = () => control.marks.click();
  applyMarks(); // a reload may keep the box unticked
}
bar.hidden = false;
new ResizeObserver(() => {
  const covers = getComputedStyle(bar).position === "sticky" ? bar.offsetHeight : 0; // rows stop below the bar
  document.documentElement.style.setProperty("--bar", `${covers}px`);
}).observe(bar);
applyColumns();
applyFilters();
