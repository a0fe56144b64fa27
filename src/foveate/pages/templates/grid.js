"use strict";
// A grid of all heads, a row for each layer: chosen with a click or with the arrow keys. The page has `chooseHead`.

const grid = { layers: 0, heads: 0, layer: 0, head: 0 };

function buildGrid(layers, heads) {
  Object.assign(grid, { layers, heads });
  const holder = byId("grid"), step = Math.max(1, Math.ceil(heads / 16)), top = element("div");
  holder.style.setProperty("--heads", heads);
  holder.style.setProperty("--layers", layers);
  top.setAttribute("role", "row");
  for (let head = -1; head < heads; head += 1) {
    const name = element("span", "", head < 0 || head % step ? "" : String(head));
    name.setAttribute("role", "columnheader");
    name.setAttribute("aria-label", head < 0 ? "layer" : `head ${head}`);
    top.append(name);
  }
  const rows = [top];
  for (let layer = 0; layer < layers; layer += 1) {
    const row = element("div"), name = element("span", "", String(layer));
    row.setAttribute("role", "row");
    name.setAttribute("role", "rowheader");
    row.append(name);
    for (let head = 0; head < heads; head += 1) {
      const cell = element("div", "cell");
      cell.setAttribute("role", "gridcell");
      Object.assign(cell.dataset, { layer, head });
      row.append(cell);
    }
    rows.push(row);
  }
  holder.replaceChildren(...rows);
}

const cells = () => byId("grid").querySelectorAll(".cell");
const cellOf = (layer, head) => cells()[layer * grid.heads + head];

function markHead(layer, head, focus) {
  Object.assign(grid, { layer, head });
  for (const cell of cells()) {
    const own = Number(cell.dataset.layer) === layer && Number(cell.dataset.head) === head;
    cell.setAttribute("aria-selected", own);
    cell.tabIndex = own ? 0 : -1;
  }
  if (focus) cellOf(layer, head).focus();
}

function moveHead(event) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  let { layer, head } = grid;
  if (event.key in steps) {
    layer = clamp(layer + steps[event.key][0], 0, grid.layers - 1);
    head = clamp(head + steps[event.key][1], 0, grid.heads - 1);
  } else if (event.key === "Home") head = 0;
  else if (event.key === "End") head = grid.heads - 1;
  else return;
  event.preventDefault();
  chooseHead(layer, head, true);
}

byId("grid").addEventListener("click", (event) => {
  const cell = event.target.closest(".cell");
  if (cell) chooseHead(Number(cell.dataset.layer), Number(cell.dataset.head), true);
});
byId("grid").addEventListener("keydown", moveHead);
