"use strict";
const specs = JSON.parse(document.getElementById("specs").textContent);
const views = new Map();
const hidden = new Set();
const actions = { export: true, source: false, compiled: false, editor: false };

async function draw(figure) {
  const spec = specs[figure.id][figure.querySelector("select").selectedIndex];
  const drawn = await vegaEmbed(figure.querySelector(".chart"), spec, { renderer: "svg", actions, downloadFileName: figure.id });
  views.set(figure.id, drawn.view);
  await drawn.view.signal("hidden", [...hidden]).runAsync();
}

for (const figure of document.querySelectorAll(".interactive")) {
  figure.querySelector("select").addEventListener("change", () => draw(figure));
  draw(figure);
}

const boxes = document.querySelectorAll("input[data-attention]");
for (const box of boxes) {
  box.checked = true; // a browser may remember otherwise
  box.addEventListener("change", () => {
    const { attention } = box.dataset;
    box.checked ? hidden.delete(attention) : hidden.add(attention);
    for (const twin of boxes) if (twin.dataset.attention === attention) twin.checked = box.checked;
    for (const view of views.values()) view.signal("hidden", [...hidden]).runAsync();
  });
}

function sort(heading) {
  const ascending = heading.getAttribute("aria-sort") !== "ascending";
  for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const column = heading.cellIndex;
  const key = (row) => row.cells[column].dataset.key;
  const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  const body = heading.closest("table").tBodies[0];
  const rows = [...body.rows].sort((a, b) => {
    if (!key(a) || !key(b)) return !key(a) - !key(b); // what is unknown comes last either way
    return (ascending ? 1 : -1) * compare(key(a), key(b));
  });
  body.append(...rows);
}

for (const heading of document.querySelectorAll("thead th")) heading.addEventListener("click", () => sort(heading));
