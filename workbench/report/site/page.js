"use strict";
const table = document.getElementById("rows"), body = table.tBodies[0];
const rows = [...body.rows], start = new Map(rows.map((row, i) => [row, i]));
const find = document.getElementById("find"), ran = document.getElementById("measured");
const engines = [...document.querySelectorAll("input.engine")], count = document.getElementById("count");
const marks = new Map();
for (const mark of document.querySelectorAll("svg [data-r]"))
  marks.set(mark.dataset.r, [...(marks.get(mark.dataset.r) || []), mark]);
function filter() {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  const on = new Set(engines.filter(box => box.checked).map(box => box.value));
  let seen = 0;
  for (const row of rows) {
    const shown = on.has(row.dataset.g) && (!ran.checked || row.dataset.m === "1") &&
      words.every(word => row.dataset.s.includes(word));
    row.classList.toggle("off", !shown);
    for (const mark of marks.get(row.dataset.r) || []) mark.classList.toggle("off", !shown);
    seen += shown;
  }
  count.textContent = seen + " of " + rows.length + " rows";
}
function sort(head, place) {
  const old = head.getAttribute("aria-sort");
  const next = old === "none" ? "ascending" : old === "ascending" ? "descending" : "none";
  for (const other of table.tHead.rows[0].cells)
    if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", next);
  const way = next === "descending" ? -1 : 1, number = head.classList.contains("n");
  const value = row => number ? parseFloat(row.cells[place].dataset.v) : row.cells[place].textContent;
  const order = (a, b) => {
    if (next === "none") return start.get(a) - start.get(b);
    const x = value(a), y = value(b);
    if (number) return isNaN(x) - isNaN(y) || (isNaN(x) ? 0 : way * (x - y)) || start.get(a) - start.get(b);
    return way * x.localeCompare(y, "en", {numeric: true}) || start.get(a) - start.get(b);
  };
  body.append(...[...rows].sort(order));
}
[...table.tHead.rows[0].cells].forEach((head, place) => {
  const button = head.querySelector("button");
  if (button) button.addEventListener("click", () => sort(head, place));
});
for (const input of [find, ran, ...engines]) input.addEventListener("input", filter);
filter();
