"use strict";
// Maps: tiles on a canvas, of which `view` is the visible square, and the strongest keys of each query. The page sets
// `mapped.queries` and `mapped.keys`, the texts of both sides, and `mapped.places`, the places of some queries alone.

const mapped = { map: null, view: null, cell: null, queries: [], keys: [], places: null };
const queryPlace = (row) => mapped.places?.[row] ?? row;

// The square root of a tile's weight, which is also its colour's strength.
function tile(map, row, column) {
  return numbersOf(map, "tiles", map.width)[row * map.columns + column] / highest(map.width);
}

// The keys of a query with their weights: all of them, or the strongest ones where tiles hold several tokens.
function entries(map, query) {
  if (map.span === 1) {
    return Array.from({ length: map.columns }, (_, key) => ({ query, key, weight: tile(map, query, key) ** 2 }));
  }
  const keys = numbersOf(map, "keys", map.wide ? 4 : 2), weights = numbersOf(map, "weights", 2);
  return Array.from({ length: map.count }, (_, i) => {
    const at = query * map.count + i;
    return { query, key: keys[at], weight: (weights[at] / highest(2)) ** 2 };
  });
}

function strongest(map, query, most = 8) {
  const found = entries(map, query).filter(({ weight }) => weight > 0);
  return found.sort((a, b) => b.weight - a.weight).slice(0, most);
}

function showMap(map, none) {
  mapped.map = map ?? null;
  byId("mapbox").hidden = !map;
  if (!map) {
    byId("mapsaid").textContent = none;
    return;
  }
  byId("mapsaid").textContent = `Layer ${map.layer}, head ${map.head}. ${map.span === 1
    ? "A cell is the weight of one query on one key."
    : `A cell is the weight that ${map.span} keys get together from ${map.span} queries, on average.`}`;
  Object.assign(mapped, { view: { row: 0, column: 0, size: map.size }, cell: { row: 0, column: 0 } });
  drawMap();
}

function drawMap() {
  const { map, view, cell } = mapped;
  if (!map) return;
  const canvas = byId("canvas"), brush = canvas.getContext("2d", { willReadFrequently: true });
  const from = colour("paper"), to = colour("accent"), scale = canvas.width / view.size;
  brush.fillStyle = `rgb(${from.join(" ")})`;
  brush.fillRect(0, 0, canvas.width, canvas.height);
  for (let row = 0; row < Math.min(view.size, map.rows - view.row); row += 1) {
    for (let column = 0; column < Math.min(view.size, map.columns - view.column); column += 1) {
      const share = tile(map, view.row + row, view.column + column);
      brush.fillStyle = `rgb(${mixed(from, to, share).join(" ")})`;
      const [x, y] = [column, row].map((at) => Math.floor(at * scale));
      brush.fillRect(x, y, Math.ceil((column + 1) * scale) - x, Math.ceil((row + 1) * scale) - y);
    }
  }
  brush.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--ink");
  brush.lineWidth = 2;
  const side = Math.max(scale, 4);
  brush.strokeRect((cell.column - view.column) * scale, (cell.row - view.row) * scale, side, side);
  const queries = numbered(view.row, view.size, mapped.queries, queryPlace);
  const keys = numbered(view.column, view.size, mapped.keys, (at) => at);
  canvas.setAttribute("aria-label", `Map of layer ${map.layer}, head ${map.head}: queries ${queries}, keys ${keys}`);
  readCell();
}

function bounds(row, count, tokens) {
  const { span } = mapped.map;
  return [row * span, Math.min((row + count) * span, tokens.length)];
}

function numbered(row, count, tokens, place) {
  const [first, last] = bounds(row, count, tokens);
  return last - first === 1 ? String(place(first)) : `${place(first)}–${place(last - 1)}`;
}

function readCell() {
  const { map, cell } = mapped, weight = show(tile(map, cell.row, cell.column) ** 2);
  const queries = bounds(cell.row, 1, mapped.queries), keys = bounds(cell.column, 1, mapped.keys);
  const from = `${numbered(cell.row, 1, mapped.queries, queryPlace)} ${quoted(mapped.queries, ...queries)}`;
  const to = `${numbered(cell.column, 1, mapped.keys, (at) => at)} ${quoted(mapped.keys, ...keys)}`;
  byId("cell").textContent = map.span === 1
    ? `Query ${from} puts ${weight} of its attention on key ${to}.`
    : `Queries ${from} put, on average, ${weight} of their attention on keys ${to}.`;
  const pairs = [];
  for (let query = queries[0]; map.span > 1 && query < queries[1]; query += 1) {
    pairs.push(...strongest(map, query).filter(({ key }) => key >= keys[0] && key < keys[1]));
  }
  pairs.sort((a, b) => b.weight - a.weight);
  byId("pairs").replaceChildren(...pairs.slice(0, 6).map(({ query, key, weight: share }) => (
    element("li", "", `${quoted(mapped.queries, query)} (${queryPlace(query)}) → ${quoted(mapped.keys, key)} (${key})`
      + `: ${show(share)}`)
  )));
}

function zoom(size) {
  const { map, cell } = mapped, kept = clamp(size, Math.min(8, map.size), map.size);
  const place = (at, count) => clamp(at - Math.floor(kept / 2), 0, Math.max(0, count - kept));
  mapped.view = { row: place(cell.row, map.rows), column: place(cell.column, map.columns), size: kept };
  drawMap();
}

function pointed(event) {
  const box = byId("canvas").getBoundingClientRect(), { map, view } = mapped;
  const at = (place, size) => clamp(Math.floor((place / size) * view.size), 0, view.size - 1);
  mapped.cell = {
    row: Math.min(view.row + at(event.clientY - box.top, box.height), map.rows - 1),
    column: Math.min(view.column + at(event.clientX - box.left, box.width), map.columns - 1),
  };
  zoom(Math.round(view.size / 4));
}

function moveCell(event) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const { map, cell, view } = mapped;
  if (event.key === "Enter") zoom(Math.round(view.size / 4));
  else if (event.key === "Escape") zoom(view.size * 4);
  else if (event.key in steps) {
    const [down, right] = steps[event.key];
    const row = clamp(cell.row + down, 0, map.rows - 1), column = clamp(cell.column + right, 0, map.columns - 1);
    mapped.cell = { row, column };
    const follow = (start, at) => clamp(start, at - view.size + 1, at);
    mapped.view = { ...view, row: follow(view.row, row), column: follow(view.column, column) };
    drawMap();
  } else return;
  event.preventDefault();
}

if (byId("canvas")) {
  byId("canvas").addEventListener("click", pointed);
  byId("canvas").addEventListener("keydown", moveCell);
  byId("out").addEventListener("click", () => zoom(mapped.view.size * 4));
  byId("whole").addEventListener("click", () => zoom(mapped.map.size));
  onScheme(drawMap);
}
