"use strict";
// Shows queries and keys of each head as dots; near means high attention. The points are the same tokens for all heads.

const data = JSON.parse(byId("joint").textContent);
const state = { picture: null, colour: "kind", query: -1, hits: new Set(), hover: null };
const SIDE = 88, MARGIN = 0.04;
const pictureAt = (layer, head) => data.pictures.find((each) => each.layer === layer && each.head === head);
const total = data.queries.tokens.length;

// The kind and the number of a dot: queries come first.
const dotOf = (at) => (at < total ? { side: data.queries, at, isQuery: true } : { side: data.keys, at: at - total });
const tokenOf = (at) => { const dot = dotOf(at); return dot.side.tokens[dot.at]; };
const longest = Math.max(1, ...data.queries.place, ...data.keys.place);

function placeOf(picture, at, side) {
  const xy = numbersOf(picture, "xy", 2), inner = side * (1 - 2 * MARGIN);
  return [0, 1].map((axis) => side * MARGIN + (inner * (axis ? 65535 - xy[2 * at + 1] : xy[2 * at])) / 65535);
}

// A dot's colour: its kind, or a number from the queries' colour to the other one.
function dotColour(picture, at, tints) {
  const dot = dotOf(at);
  if (state.colour === "kind") return dot.isQuery ? tints.query : tints.key;
  if (state.colour === "patch") {
    const patches = numbersOf(data, "patches", 1);
    return data.same ? [0, 1, 2].map((part) => patches[3 * dot.at + part]) : tints.query;
  }
  const share = state.colour === "norm" ? numbersOf(picture, "norms", 1)[at] / 255 : dot.side.place[dot.at] / longest;
  return mixed(tints.low, tints.high, share);
}

const tintsNow = () => ({ query: colour("accent"), key: colour("hit"), low: colour("accent"), high: colour("hit") });

function drawDots(brush, picture, side, radius) {
  const tints = tintsNow(), count = total + data.keys.tokens.length;
  brush.clearRect(0, 0, side, side);
  for (let at = 0; at < count; at += 1) {
    const [x, y] = placeOf(picture, at, side), faded = state.hits.size && !state.hits.has(at);
    brush.fillStyle = `rgb(${dotColour(picture, at, tints).join(" ")} / ${faded ? 0.12 : 0.75})`;
    brush.beginPath();
    if (at < total) brush.arc(x, y, radius, 0, 2 * Math.PI);
    else brush.rect(x - radius, y - radius, 2 * radius, 2 * radius);
    brush.fill();
  }
}

function drawGrid() {
  for (const cell of cells()) {
    const layer = Number(cell.dataset.layer), head = Number(cell.dataset.head), picture = pictureAt(layer, head);
    const value = picture ? `: correlation ${show(picture.measures.correlation_after)}` : "";
    const label = `layer ${layer}, head ${head}${value}`;
    cell.classList.toggle("blank", !picture);
    cell.setAttribute("aria-label", label);
    cell.title = label;
    if (!picture) continue;
    const canvas = cell.firstElementChild ?? element("canvas"), scale = devicePixelRatio > 1 ? 2 : 1;
    Object.assign(canvas, { width: SIDE * scale, height: SIDE * scale });
    drawDots(canvas.getContext("2d"), picture, SIDE * scale, 1.2 * scale);
    cell.replaceChildren(canvas);
  }
}

// The strongest keys of a query in a head.
function nearest(picture, query) {
  const keys = numbersOf(picture, "neighbours", 2), weights = numbersOf(picture, "weights", 2);
  return Array.from({ length: picture.count }, (_, slot) => {
    const at = query * picture.count + slot;
    return { key: keys[at] - 1, weight: weights[at] / 65535 };
  }).filter(({ key, weight }) => key >= 0 && weight > 0);
}

function drawPoints() {
  const { picture, query } = state, canvas = byId("points"), brush = canvas.getContext("2d"), side = canvas.width;
  drawDots(brush, picture, side, 5);
  if (query >= 0) {
    const [x, y] = placeOf(picture, query, side), ink = colour("ink").join(" ");
    brush.lineWidth = 3;
    for (const { key, weight } of nearest(picture, query)) {
      brush.strokeStyle = `rgb(${ink} / ${Math.max(weight, 0.05).toFixed(3)})`;
      brush.beginPath();
      brush.moveTo(x, y);
      brush.lineTo(...placeOf(picture, total + key, side));
      brush.stroke();
    }
    brush.strokeStyle = `rgb(${ink})`;
    brush.beginPath();
    brush.arc(x, y, 9, 0, 2 * Math.PI);
    brush.stroke();
  }
  canvas.setAttribute("aria-label", `Queries and keys of layer ${picture.layer}, head ${picture.head}`);
  readOut();
  paintText();
}

function named(at) {
  const dot = dotOf(at), kind = dot.isQuery ? "Query" : "Key";
  return `${kind} “${tokenOf(at)}”, place ${dot.side.place[dot.at]} of text ${dot.side.text[dot.at]}`;
}

function readOut() {
  const at = state.hover ?? (state.query < 0 ? null : state.query);
  byId("readout").textContent = at === null ? "No token is chosen." : `${named(at)}.`;
  const keys = state.query < 0 ? [] : nearest(state.picture, state.query);
  byId("nearest").replaceChildren(...keys.map(({ key, weight }) => (
    element("li", "", `“${data.keys.tokens[key]}” (${data.keys.place[key]}): ${show(weight)}`)
  )));
}

function paintText() {
  const query = Math.max(0, state.query), text = data.queries.text[query], weights = new Map();
  if (state.query >= 0) {
    for (const { key, weight } of nearest(state.picture, query)) weights.set(data.keys.place[key], weight);
  }
  byId("textsaid").textContent = `Text ${text}. ${state.query < 0 ? "Choose a query to see its strongest keys."
    : `The colours are the weights of query “${tokenOf(query)}” on its strongest keys.`}`;
  byId("text").replaceChildren(...data.texts[text].map((token, place) => {
    const part = element("span", "token", token.replaceAll("\n", "↵\n"));
    part.style.setProperty("--share", `${(100 * Math.sqrt(weights.get(place) ?? 0)).toFixed(1)}%`);
    part.title = weights.has(place) ? show(weights.get(place)) : "";
    part.dataset.place = place;
    const own = data.same && state.query >= 0 && place === data.queries.place[query];
    part.classList.toggle("current", own);
    return part;
  }));
}

function chooseHead(layer, head, focus = false) {
  markHead(layer, head, focus);
  const picture = pictureAt(layer, head);
  byId("head").textContent = `Layer ${layer}, head ${head}`;
  byId("points").parentElement.hidden = !picture;
  if (!picture) {
    byId("said").textContent = "This head was not captured.";
    return;
  }
  const m = picture.measures;
  byId("said").textContent = `Correlation of distance and product ${show(m.correlation_after)} (before: `
    + `${show(m.correlation_before)}); c = ${show(picture.c)}; keys’ mean norm over queries’ `
    + `${show(m.norm_ratio_after)} (before: ${show(m.norm_ratio_before)}); separation ${show(m.separation_after)} `
    + `(before: ${show(m.separation_before)}).`;
  state.picture = picture;
  drawPoints();
}

function chooseQuery(at) {
  state.query = clamp(at, 0, total - 1);
  drawPoints();
}

// The dot nearest to a place on the page, within a few pixels.
function dotAt(event) {
  const box = byId("points").getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  let best = { far: 12, at: null };
  for (let at = 0; at < total + data.keys.tokens.length; at += 1) {
    const [px, py] = placeOf(state.picture, at, box.width), far = Math.hypot(px - x, py - y);
    if (far < best.far) best = { far, at };
  }
  return best.at;
}

function search() {
  const wanted = byId("find").value.toLowerCase(), count = total + data.keys.tokens.length;
  state.hits = new Set();
  for (let at = 0; wanted && at < count; at += 1) if (tokenOf(at).toLowerCase().includes(wanted)) state.hits.add(at);
  byId("found").textContent = wanted ? `${state.hits.size || "no"} dots` : "";
  drawGrid();
  drawPoints();
}

function paintLegend() {
  const words = {
    kind: "Queries are round, in the accent’s colour; keys are square, in the other.",
    place: "From the first place in a text to the last: from the accent’s colour to the other. Queries are round.",
    norm: "From the smallest norm to the largest: from the accent’s colour to the other. Queries are round.",
    patch: "The mean colour of each patch. Queries are round.",
  };
  byId("legend").textContent = `${words[state.colour]} Choose a head with a click, or with the arrow keys.`;
}

byId("points").addEventListener("pointermove", (event) => {
  const at = dotAt(event);
  if (at === state.hover) return;
  state.hover = at;
  readOut();
});
byId("points").addEventListener("click", (event) => {
  const at = dotAt(event);
  if (at !== null && at < total) chooseQuery(at);
});
byId("points").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  chooseQuery(state.query + step);
});
byId("text").addEventListener("click", (event) => {
  const part = event.target.closest(".token"), text = data.queries.text[Math.max(0, state.query)];
  if (!part || !data.same) return;
  const wanted = Number(part.dataset.place), { place, text: texts } = data.queries;
  const at = place.findIndex((each, i) => each === wanted && texts[i] === text);
  if (at >= 0) chooseQuery(at);
});
byId("colour").addEventListener("change", (event) => {
  state.colour = event.target.value;
  paintLegend();
  drawGrid();
  drawPoints();
});
byId("find").addEventListener("input", search);
onScheme(() => {
  drawGrid();
  drawPoints();
});
byId("colour").value = "kind"; // a browser may remember another choice
paintLegend();
buildGrid(data.layers, data.heads);
drawGrid();
chooseHead(data.pictures[0].layer, data.pictures[0].head);
