"use strict";
// Filter, marks and keys. The page is complete without this script: it only hides and shows what is there.
const filter = document.getElementById("filter");
const marks = document.getElementById("marks");
const shown = document.getElementById("shown");
const rows = Array.from(document.querySelectorAll(".row"), (row) => ({ row, text: row.textContent.toLowerCase() }));

function applyFilter() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const { row, text } of rows) {
    row.hidden = !words.every((word) => text.includes(word));
    count += row.hidden ? 0 : 1;
  }
  shown.textContent = words.length ? `${count} of ${rows.length}` : `${rows.length} ${rows.length === 1 ? "prompt" : "prompts"}`;
  document.getElementById("none").hidden = count > 0;
}

function move(step) {
  const visible = rows.map(({ row }) => row).filter((row) => !row.hidden);
  const here = visible.indexOf(document.activeElement.closest(".row"));
  const next = visible[here < 0 ? (step > 0 ? 0 : visible.length - 1) : Math.min(Math.max(here + step, 0), visible.length - 1)];
  if (next) {
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "start" });
  }
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && document.activeElement === filter) {
    filter.value = "";
    applyFilter();
    filter.blur();
  } else if (document.activeElement !== filter && "/jk".includes(event.key)) {
    event.preventDefault();
    if (event.key === "/") filter.focus();
    else move(event.key === "j" ? 1 : -1);
  }
});
filter.addEventListener("input", applyFilter);
if (marks) {
  const applyMarks = () => document.body.classList.toggle("unmarked", !marks.checked);
  marks.addEventListener("change", applyMarks);
  applyMarks(); // a reload may keep the box unticked
}
document.querySelector(".bar").hidden = false;
applyFilter();
