"use strict";
// Shows heads, tokens and maps from the JSON beside this script. Texts are set as text, never as markup.

const data = JSON.parse(document.getElementById("look").textContent);
const meanings = JSON.parse(document.getElementById("meanings").textContent);
const byId = (id) => document.getElementById(id);
const state = { measure: 0, layer: 0, head: 0, token: -1, hits: [], map: null, view: null, cell: null };

function unpack(text, width) {
  const characters = atob(text), bytes = new Uint8Array(characters.length);
  for (let i = 0; i < characters.length; i += 1) bytes[i] = characters.charCodeAt(i);
  if (width === 1) return bytes;
  const view = new DataView(bytes.buffer), read = width === 2 ? "getUint16" : "getUint32";
  return Array.from({ length: bytes.length / width }, (_, i) => view[read](i * width, true));
}

const unpacked = new Map();
function numbersOf(holder, name, width) {
  if (!unpacked.has(holder)) unpacked.set(holder, {});
  const found = unpacked.get(holder);
  found[name] ??= unpack(holder[name], width);
  return found[name];
}

function show(value) {
  return value === null || !Number.isFinite(value) ? "–" : String(Number(value.toPrecision(4)));
}

function element(name, className, text) {
  const found = document.createElement(name);
  if (className) found.className = className;
  if (text !== undefined) found.textContent = text;
  return found;
}

// Values: a head's numbers lie between its lowest and its highest one.

const highest = (width) => (width === 1 ? 255 : 65535);
const groups = Math.ceil(data.tokens.length / data.group);

function shareOf(token) {
  const at = (state.layer * data.heads + state.head) * groups + Math.floor(token / data.group);
  return numbersOf(data.measures[state.measure], "data", data.width)[at] / highest(data.width);
}

function valueOf(token) {
  const measure = data.measures[state.measure];
  const low = measure.low[state.layer][state.head], high = measure.high[state.layer][state.head];
  return low === null ? null : low + (high - low) * shareOf(token) ** measure.power;
}

// The overview.

function buildGrid() {
  const grid = byId("grid"), step = Math.max(1, Math.ceil(data.heads / 16));
  const top = element("div");
  top.setAttribute("role", "row");
  for (let head = -1; head < data.heads; head += 1) {
    const name = element("span", "", head < 0 || head % step ? "" : String(head));
    name.setAttribute("role", "columnheader");
    name.setAttribute("aria-label", head < 0 ? "layer" : `head ${head}`);
    top.append(name);
  }
  grid.append(top);
  for (let layer = 0; layer < data.layers; layer += 1) {
    const row = element("div");
    row.setAttribute("role", "row");
    const name = element("span", "", String(layer));
    name.setAttribute("role", "rowheader");
    row.append(name);
    for (let head = 0; head < data.heads; head += 1) {
      const cell = element("div", "cell");
      cell.setAttribute("role", "gridcell");
      Object.assign(cell.dataset, { layer, head });
      row.append(cell);
    }
    grid.append(row);
  }
}

const cells = () => byId("grid").querySelectorAll(".cell");
const cellOf = (layer, head) => cells()[layer * data.heads + head];

function paintGrid() {
  const measure = data.measures[state.measure], known = measure.table.flat().filter((value) => value !== null);
  const low = Math.min(...known), high = Math.max(...known);
  byId("lowest").textContent = show(low);
  byId("highest").textContent = show(high);
  byId("meaning").textContent = `${measure.name}: ${meanings[state.measure]}.`;
  for (const cell of cells()) {
    const { layer, head } = cell.dataset, value = measure.table[layer][head];
    const roles = data.roles[`${layer}.${head}`] ?? [];
    const spread = measure.spread ? [`standard deviation over texts ${show(measure.spread[layer][head])}`] : [];
    const label = [`layer ${layer}, head ${head}: ${measure.name} ${show(value)}`, ...spread, ...roles].join("; ");
    cell.classList.toggle("blank", value === null);
    cell.style.setProperty("--share", `${value === null ? 0 : (100 * (value - low)) / (high - low || 1)}%`);
    cell.title = label;
    cell.setAttribute("aria-label", label);
  }
}

function chooseHead(layer, head, focus = false) {
  Object.assign(state, { layer, head });
  for (const cell of cells()) {
    const own = Number(cell.dataset.layer) === layer && Number(cell.dataset.head) === head;
    cell.setAttribute("aria-selected", own);
    cell.tabIndex = own ? 0 : -1;
  }
  if (focus) cellOf(layer, head).focus();
  paintText();
  chooseMap(data.maps.findIndex((map) => map.layer === layer && map.head === head));
}

function moveHead(event) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const clamp = (value, size) => Math.min(Math.max(value, 0), size - 1);
  let { layer, head } = state;
  if (event.key in steps) {
    layer = clamp(layer + steps[event.key][0], data.layers);
    head = clamp(head + steps[event.key][1], data.heads);
  } else if (event.key === "Home") head = 0;
  else if (event.key === "End") head = data.heads - 1;
  else return;
  event.preventDefault();
  chooseHead(layer, head, true);
}

// The text.

function buildText() {
  const parts = document.createDocumentFragment();
  data.tokens.forEach((token, index) => {
    const part = element("span", index < data.prompt ? "token" : "token new", token.replaceAll("\n", "↵\n"));
    part.dataset.index = index;
    parts.append(part);
  });
  byId("text").append(parts);
}

function paintText() {
  const measure = data.measures[state.measure], table = measure.table[state.layer][state.head];
  const low = measure.low[state.layer][state.head], high = measure.high[state.layer][state.head];
  byId("head").textContent = `Layer ${state.layer}, head ${state.head}`;
  const together = data.group > 1 ? ` A colour is the mean of ${data.group} tokens in a row.` : "";
  const spread = measure.spread ? `, standard deviation over texts ${show(measure.spread[state.layer][state.head])}` : "";
  const of = measure.spread ? " of the first text" : "";
  const own = table === null
    ? "This layer is not measured."
    : `${measure.name} ${show(table)}${spread}; ${show(low)} to ${show(high)} for single tokens${of} as ${measure.over}.${together}`;
  const roles = data.roles[`${state.layer}.${state.head}`];
  const added = data.prompt < data.tokens.length ? " Underlined tokens were generated." : "";
  byId("said").textContent = own + (roles ? ` Roles: ${roles.join(", ")}.` : "") + added;
  for (const part of byId("text").children) {
    const index = Number(part.dataset.index);
    part.style.setProperty("--share", table === null ? "0%" : `${(100 * shareOf(index)).toFixed(1)}%`);
    part.title = show(valueOf(index));
  }
  readOut();
}

const quoted = (first, last = first + 1) => {
  const text = data.tokens.slice(first, last).join("").replaceAll("\n", "↵");
  return `“${text.length > 60 ? `${text.slice(0, 40)} … ${text.slice(-16)}` : text}”`;
};

function chooseToken(index, scroll = false) {
  const parts = byId("text").children;
  parts[state.token]?.classList.remove("current");
  state.token = Math.min(Math.max(index, 0), parts.length - 1);
  parts[state.token].classList.add("current");
  if (scroll) parts[state.token].scrollIntoView({ block: "nearest" });
  readOut();
}

function readOut() {
  const at = state.token, measure = data.measures[state.measure];
  if (at < 0) {
    byId("readout").textContent = "Choose a token with a click, or with the arrow keys, to read its number.";
    return;
  }
  let text = `Token ${at} ${quoted(at)}: ${measure.name} ${show(valueOf(at))}.`;
  const map = data.maps.find((each) => each.layer === state.layer && each.head === state.head);
  if (map) {
    const keys = strongest(map, at).slice(0, 3).map(({ key, weight }) => `${quoted(key)} (${key}) ${show(weight)}`);
    text += ` It looks most at ${keys.join(", ")}.`;
  }
  byId("readout").textContent = text;
}

function moveToken(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  chooseToken(state.token + step, true);
}

// Search: in the joined text, so that a word of several tokens is found.

const lowered = data.tokens.map((token) => token.toLowerCase());
const starts = [0];
for (const token of lowered) starts.push(starts.at(-1) + token.length);
const joined = lowered.join("");

function tokenAt(place) {
  let low = 0, high = lowered.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (starts[middle + 1] > place) high = middle;
    else low = middle + 1;
  }
  return low;
}

function search() {
  const wanted = byId("find").value.toLowerCase(), parts = byId("text").children;
  for (const part of byId("text").querySelectorAll(".hit")) part.classList.remove("hit");
  state.hits = [];
  for (let at = wanted ? joined.indexOf(wanted) : -1; at >= 0; at = joined.indexOf(wanted, at + wanted.length)) {
    const first = tokenAt(at), last = tokenAt(at + wanted.length - 1);
    state.hits.push(first);
    for (let index = first; index <= last; index += 1) parts[index].classList.add("hit");
  }
  const count = state.hits.length;
  byId("found").textContent = wanted ? `${count || "no"} place${count === 1 ? "" : "s"}; Enter goes to the next` : "";
  if (count) parts[state.hits[0]].scrollIntoView({ block: "nearest" });
}

function nextHit(event) {
  if (event.key !== "Enter" || !state.hits.length) return;
  event.preventDefault();
  chooseToken(state.hits.find((index) => index > state.token) ?? state.hits[0], true);
}

// Maps: tiles on a canvas, of which `view` is the visible square, and the strongest keys of each query.

function strongest(map, query) {
  const keys = numbersOf(map, "keys", map.wide ? 4 : 2), weights = numbersOf(map, "weights", 2);
  return Array.from({ length: map.count }, (_, i) => {
    const at = query * map.count + i;
    return { query, key: keys[at], weight: (weights[at] / highest(2)) ** 2 };
  }).filter(({ weight }) => weight > 0);
}

// The square root of a tile's weight, which is also its colour's strength.
function tile(map, row, column) {
  return numbersOf(map, "tiles", map.width)[row * map.size + column] / highest(map.width);
}

function chooseMap(index) {
  if (!byId("canvas")) return;
  state.map = index < 0 ? null : data.maps[index];
  for (const button of byId("mapped").children) {
    button.setAttribute("aria-pressed", Number(button.dataset.index) === index);
  }
  byId("mapbox").hidden = state.map === null;
  const map = state.map;
  byId("mapsaid").textContent = map === null
    ? `No map of layer ${state.layer}, head ${state.head} was kept: --heads ${state.layer}.${state.head} keeps it.`
    : `Layer ${map.layer}, head ${map.head}. ${map.span === 1 ? "A cell is the weight of one query on one key."
      : `A cell is the weight that ${map.span} keys get together from ${map.span} queries, on average.`}`;
  if (map === null) return;
  Object.assign(state, { view: { row: 0, column: 0, size: map.size }, cell: { row: 0, column: 0 } });
  drawMap();
}

function colour(name) {
  const text = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
}

function drawMap() {
  const { map, view, cell } = state;
  if (!map) return;
  const canvas = byId("canvas"), brush = canvas.getContext("2d", { willReadFrequently: true });
  const from = colour("paper"), to = colour("accent"), scale = canvas.width / view.size;
  for (let row = 0; row < view.size; row += 1) {
    for (let column = 0; column < view.size; column += 1) {
      const share = tile(map, view.row + row, view.column + column);
      brush.fillStyle = `rgb(${from.map((low, i) => Math.round(low + (to[i] - low) * share)).join(" ")})`;
      const [x, y] = [column, row].map((at) => Math.floor(at * scale));
      brush.fillRect(x, y, Math.ceil((column + 1) * scale) - x, Math.ceil((row + 1) * scale) - y);
    }
  }
  brush.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--ink");
  brush.lineWidth = 2;
  const side = Math.max(scale, 4);
  brush.strokeRect((cell.column - view.column) * scale, (cell.row - view.row) * scale, side, side);
  const [queries, keys] = [view.row, view.column].map((first) => tokens(first, view.size));
  canvas.setAttribute("aria-label", `Map of layer ${map.layer}, head ${map.head}: queries ${queries}, keys ${keys}`);
  readCell();
}

function bounds(row, count = 1) {
  return [row * state.map.span, Math.min((row + count) * state.map.span, data.tokens.length)];
}

function tokens(row, count = 1) {
  const [first, last] = bounds(row, count);
  return last - first === 1 ? String(first) : `${first}–${last - 1}`;
}

function readCell() {
  const { map, cell } = state, queries = bounds(cell.row), keys = bounds(cell.column);
  const weight = show(tile(map, cell.row, cell.column) ** 2);
  const from = `${tokens(cell.row)} ${quoted(...queries)}`, to = `${tokens(cell.column)} ${quoted(...keys)}`;
  byId("cell").textContent = map.span === 1
    ? `Query ${from} puts ${weight} of its attention on key ${to}.`
    : `Queries ${from} put, on average, ${weight} of their attention on keys ${to}.`;
  const pairs = [];
  for (let query = queries[0]; map.span > 1 && query < queries[1]; query += 1) {
    pairs.push(...strongest(map, query).filter(({ key }) => key >= keys[0] && key < keys[1]));
  }
  pairs.sort((a, b) => b.weight - a.weight);
  byId("pairs").replaceChildren(...pairs.slice(0, 6).map(({ query, key, weight: share }) => (
    element("li", "", `${quoted(query)} (${query}) → ${quoted(key)} (${key}): ${show(share)}`)
  )));
}

function zoom(size) {
  const { map, cell } = state, kept = Math.min(Math.max(size, Math.min(8, map.size)), map.size);
  const place = (at) => Math.min(Math.max(at - Math.floor(kept / 2), 0), map.size - kept);
  state.view = { row: place(cell.row), column: place(cell.column), size: kept };
  drawMap();
}

function pointed(event) {
  const box = byId("canvas").getBoundingClientRect(), { view } = state;
  const at = (place, size) => Math.min(Math.max(Math.floor((place / size) * view.size), 0), view.size - 1);
  const row = view.row + at(event.clientY - box.top, box.height);
  state.cell = { row, column: view.column + at(event.clientX - box.left, box.width) };
  zoom(Math.round(view.size / 4));
}

function moveCell(event) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const { map, cell, view } = state;
  if (event.key === "Enter") zoom(Math.round(view.size / 4));
  else if (event.key === "Escape") zoom(view.size * 4);
  else if (event.key in steps) {
    const inside = (at) => Math.min(Math.max(at, 0), map.size - 1);
    state.cell = { row: inside(cell.row + steps[event.key][0]), column: inside(cell.column + steps[event.key][1]) };
    const follow = (start, at) => Math.min(Math.max(start, at - view.size + 1), at);
    state.view = { ...view, row: follow(view.row, state.cell.row), column: follow(view.column, state.cell.column) };
    drawMap();
  } else return;
  event.preventDefault();
}

// What happens when.

function largest() {
  let best = { value: -Infinity, layer: 0, head: 0 };
  data.measures[0].table.forEach((row, layer) => row.forEach((value, head) => {
    if (value !== null && value > best.value) best = { value, layer, head };
  }));
  return data.maps[0] ?? best;
}

buildGrid();
buildText();
byId("measure").addEventListener("change", (event) => {
  state.measure = Number(event.target.value);
  paintGrid();
  paintText();
});
byId("grid").addEventListener("click", (event) => {
  const cell = event.target.closest(".cell");
  if (cell) chooseHead(Number(cell.dataset.layer), Number(cell.dataset.head), true);
});
byId("grid").addEventListener("keydown", moveHead);
byId("text").addEventListener("click", (event) => {
  const part = event.target.closest(".token");
  if (part) chooseToken(Number(part.dataset.index));
});
byId("text").addEventListener("keydown", moveToken);
byId("find").addEventListener("input", search);
byId("find").addEventListener("keydown", nextHit);
if (byId("canvas")) {
  byId("mapped").addEventListener("click", (event) => {
    const map = data.maps[event.target.dataset.index];
    if (map) chooseHead(map.layer, map.head);
  });
  byId("canvas").addEventListener("click", pointed);
  byId("canvas").addEventListener("keydown", moveCell);
  byId("out").addEventListener("click", () => zoom(state.view.size * 4));
  byId("whole").addEventListener("click", () => zoom(state.map.size));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
}
byId("measure").value = "0"; // a browser may remember another choice
paintGrid();
const first = largest();
chooseHead(first.layer, first.head);
