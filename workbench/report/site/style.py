"""The pages' style sheet and script, inlined, so that a page is one file."""

from __future__ import annotations

from workbench.report.site import svg

CSS = (
    f":root{{color-scheme:light dark;{svg.STYLE}}}@media(prefers-color-scheme:dark){{:root{{{svg.STYLE_DARK}}}}}"
    "*{box-sizing:border-box}body{margin:0 auto;max-width:1240px;padding:16px;background:var(--paper);color:var(--ink);"
    "font:15px/1.5 system-ui,'DejaVu Sans',sans-serif}h1{font-size:1.5rem;margin:.2em 0;overflow-wrap:anywhere}"
    "h2{font-size:1.15rem;margin:1.6em 0 .5em}.soft,figcaption,.notes,dl{color:var(--soft)}a{color:var(--c0)}"
    ".filters{display:flex;flex-wrap:wrap;gap:8px 20px;align-items:center;margin:0 0 10px}fieldset{border:0;padding:0;"
    "margin:0;display:flex;flex-wrap:wrap;gap:4px 14px}legend{float:left;padding:0;margin-right:10px}"
    "input[type=search]{font:inherit;padding:4px 8px;border:1px solid var(--soft);border-radius:4px;"
    "background:var(--paper);color:var(--ink);max-width:100%}"
    ".scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:6px}"
    "table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}"
    "th,td{padding:5px 10px;text-align:left;white-space:nowrap;border-bottom:1px solid var(--rule)}.n{text-align:right}"
    "thead th{border-bottom:2px solid var(--soft)}tbody tr:last-child>*{border-bottom:0}"
    "tbody th{position:sticky;left:0;background:var(--paper);font-weight:inherit}.base{font-weight:600}"
    ".no{color:var(--soft)}.bad{color:var(--c1)}small{color:var(--soft);font-weight:400}"
    "th button{all:unset;cursor:pointer;font-weight:600}th button:focus-visible,.scroll:focus-visible,a:focus-visible,"
    "input:focus-visible{outline:2px solid var(--c0);outline-offset:2px}"
    "th[aria-sort=ascending] button::after{content:' ▲'}th[aria-sort=descending] button::after{content:' ▼'}"
    ".plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,560px),1fr));gap:24px;align-items:start}"
    "figure{margin:0;min-width:0}figcaption{font-size:13px;margin-bottom:4px}svg{display:block;max-width:none}"
    ".wide,.narrow{overflow-x:auto}.narrow{display:none}@media(max-width:620px){.wide{display:none}.narrow{display:block}}"
    "svg [data-r].off{display:none}tr.off{display:none}"
    "dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 16px;font-size:14px}"
    "dd{margin:0;overflow-wrap:anywhere}@media(max-width:620px){dl{grid-template-columns:1fr}"
    "dt{font-weight:600}}.notes,.steps{font-size:14px;overflow-wrap:anywhere}.steps li{margin:4px 0}" + svg.RULES
)

SCRIPT = """
"use strict";
const table = document.getElementById("rows"), body = table.tBodies[0];
const rows = [...body.rows], start = new Map(rows.map((row, i) => [row, i]));
const find = document.getElementById("find"), ran = document.getElementById("measured");
const engines = [...document.querySelectorAll("input.engine")], count = document.getElementById("count");
const marks = new Map();
for (const mark of document.querySelectorAll("svg [data-r]"))
  marks.set(mark.dataset.r, [...(marks.get(mark.dataset.r) || []), mark]);
function filter() {
  const words = find.value.toLowerCase().split(/\\s+/).filter(Boolean);
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
"""
