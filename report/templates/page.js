"use strict";
// What all pages share: the data block, the theme, the help. Text enters a page through textContent only.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function switchTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
}

const typing = () => document.activeElement.matches("input:not([type=checkbox]):not([type=range]), select, textarea");
const keys = { "?": () => byId("help").showModal(), t: switchTheme };

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || typing() || document.querySelector("dialog[open]")) return;
  const action = Object.hasOwn(keys, event.key) ? keys[event.key] : null;
  if (action) {
    event.preventDefault();
    action();
  }
});
for (const button of document.querySelectorAll("dialog .close")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
byId("theme").addEventListener("click", switchTheme);
byId("theme").hidden = byId("ask").hidden = false;
byId("ask").addEventListener("click", keys["?"]);
