"use strict";
const $ = id => document.getElementById(id);
document.documentElement.classList.add("scripted");

// The view: every field of the form `view`. What differs from its first state is in the address.
const fields = [...$("view").elements], table = $("rows"), heads = [...table.tHead.rows[0].cells];
const rows = [...table.tBodies[0].rows], box = $("box");
const named = name => fields.filter(field => field.name === name);
function state() {
  const found = {};
  for (const field of fields) {
    found[field.name] ??= [];
    if (field.type !== "checkbox" || field.checked) found[field.name].push(field.value);
  }
  return Object.fromEntries(Object.entries(found).map(([name, values]) => [name, values.join(",")]));
}
if (matchMedia("(max-width: 1100px)").matches) for (const field of named("columns"))
  if ("wide" in field.dataset) field.checked = false;
const usual = state();
for (const [name, value] of new URLSearchParams(location.search)) for (const field of named(name))
  if (field.type === "checkbox") field.checked = value.split(",").includes(field.value);
  else field.value = value;

// A word with * or ? is a pattern of a whole name, as in a recipe; another is sought anywhere.
function matcher(word) {
  if (!/[*?]/.test(word)) return names => names.includes(word);
  const pattern = word.replace(/[.+^${}()|[\]\\]/g, "\\$&").replace(/\*/g, "\\S*").replace(/\?/g, "\\S");
  const whole = new RegExp("(^|\\s)" + pattern + "(\\s|$)");
  return names => whole.test(names);
}

// The points of a plot are one stop of the Tab key; arrow keys lead from one to the next, from left to right.
const plots = [...document.querySelectorAll("svg:has(a)")].map(svg => {
  const links = [...svg.querySelectorAll("a")].sort((a, b) => a.dataset.x - b.dataset.x);
  svg.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (!step) return;
    const seen = links.filter(link => !link.classList.contains("off"));
    seen[seen.indexOf(document.activeElement) + step]?.focus();
    event.preventDefault();
  });
  return links;
});
const marks = [...document.querySelectorAll("svg [data-r]")].map(mark => [mark, mark.dataset.r.split(" ")]);
function filter(now) {
  const words = now.find.toLowerCase().split(/[\s,]+/).filter(Boolean).map(matcher);
  const engines = new Set(now.engines.split(","));
  const shown = rows.filter(row => engines.has(row.dataset.g) && (!now.measured || row.dataset.m === "1") &&
    words.every(matches => matches(row.dataset.s)));
  const ids = new Set(shown.map(row => row.dataset.r));
  for (const row of rows) row.classList.toggle("off", !ids.has(row.dataset.r));
  for (const [mark, own] of marks) mark.classList.toggle("off", !own.some(id => ids.has(id)));
  for (const links of plots) {
    const seen = links.filter(link => !link.classList.contains("off"));
    seen.forEach((link, i) => link.setAttribute("tabindex", i ? -1 : 0));
  }
  $("count").textContent = shown.length + " of " + rows.length + " rows";
}

// `sort` is the name of a column, after a minus where the largest come first. A first click brings up the best.
const best = head => head.dataset.best === "high" ? "-" : "";
function sort(now) {
  const down = now.sort.startsWith("-"), place = heads.findIndex(head => head.dataset.name === now.sort.replace(/^-/, ""));
  heads.forEach((head, i) => head.hasAttribute("aria-sort") &&
    head.setAttribute("aria-sort", i !== place ? "none" : down ? "descending" : "ascending"));
  const number = place >= 0 && heads[place].classList.contains("n"), way = down ? -1 : 1;
  const value = row => number ? parseFloat(row.cells[place].dataset.v) : row.cells[place].textContent;
  const order = (a, b) => {
    const x = value(a), y = value(b);
    if (!number) return way * x.localeCompare(y, "en", {numeric: true});
    return isNaN(x) - isNaN(y) || (isNaN(x) ? 0 : way * (x - y));
  };
  table.tBodies[0].append(...(place < 0 ? rows : [...rows].sort(order)));
}
for (const head of heads) head.querySelector("button")?.addEventListener("click", () => {
  const [field] = named("sort"), turns = [best(head) + head.dataset.name];
  turns.push(turns[0].startsWith("-") ? head.dataset.name : "-" + head.dataset.name, "");
  field.value = turns[turns.indexOf(field.value) + 1] ?? turns[0];
  update();
});

const style = document.head.appendChild(document.createElement("style"));
function columns(now) {
  const chosen = new Set(now.columns.split(","));
  style.textContent = heads.map((head, i) => !head.classList.contains("n") ? "" :
    `#rows tr > :nth-child(${i + 1}) { display: ${chosen.has(head.dataset.name) ? "table-cell" : "none"} }`).join("");
  // Only a box that scrolls sideways needs to be one: in it the header sticks to the box, not to the window.
  box.classList.remove("scroll");
  box.classList.toggle("scroll", table.scrollWidth > box.clientWidth + 1);
}

function update() {
  const now = state(), view = new URLSearchParams();
  for (const [name, value] of Object.entries(now)) if (value !== usual[name]) view.set(name, value);
  const query = view.toString().replaceAll("%2C", ",").replaceAll("*", "%2A");
  history.replaceState(null, "", (query ? "?" + query : location.pathname) + location.hash);
  filter(now); sort(now); columns(now); choose(now);
}
for (const field of fields) field.addEventListener("input", update);
addEventListener("resize", () => columns(state()));

// A row in full: what stands at the end of the page, in a panel, as long as the address names it.
const panel = $("panel");
function open() {
  const found = /^#r\d+$/.test(location.hash) && $(location.hash.slice(1));
  if (!found) return panel.close();
  panel.querySelector("h3").textContent = found.previousElementSibling.textContent;
  panel.lastElementChild.replaceChildren(...found.cloneNode(true).childNodes);
  panel.querySelectorAll("pre").forEach(copiable);
  if (!panel.open) panel.showModal();
}
function copiable(command) {
  if (!navigator.clipboard) return;
  const button = Object.assign(document.createElement("button"), {type: "button", textContent: "Copy"});
  const words = command.textContent;
  button.addEventListener("click", () => navigator.clipboard.writeText(words)
    .then(() => { button.textContent = "Copied"; }));
  command.prepend(button);
}
// Without the jump to where it stands.
document.addEventListener("click", event => {
  const hash = event.target.closest?.("a")?.getAttribute("href");
  if (!/^#r\d+$/.test(hash) || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  history.replaceState(null, "", hash);
  open();
});
panel.addEventListener("close", () => location.hash &&
  history.replaceState(null, "", location.pathname + location.search));
panel.addEventListener("click", event => event.target === panel && panel.close());
addEventListener("hashchange", open);
