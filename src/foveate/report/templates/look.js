"use strict";
// Shows heads, tokens and maps from the JSON beside this script.

const data = JSON.parse(byId("look").textContent);
const meanings = JSON.parse(byId("meanings").textContent);
const state = { measure: 0, layer: 0, head: 0, token: -1, hits: [] };
Object.assign(mapped, { queries: data.tokens, keys: data.tokens });
Object.assign(arcs, { prompt: data.prompt, onRow: (row) => row >= 0 && row !== state.token && chooseToken(row) });

// Values: a head's numbers lie between its lowest and its highest one.

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
  markHead(layer, head, focus);
  paintText();
  if (byId("canvas")) chooseMap(data.maps.findIndex((map) => map.layer === layer && map.head === head));
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

function chooseToken(index, scroll = false) {
  const parts = byId("text").children;
  parts[state.token]?.classList.remove("current");
  state.token = clamp(index, 0, parts.length - 1);
  parts[state.token].classList.add("current");
  if (scroll) parts[state.token].scrollIntoView({ block: "nearest" });
  readOut();
  if (byId("arcs")) pinRow(state.token);
}

function readOut() {
  const at = state.token, measure = data.measures[state.measure];
  if (at < 0) {
    byId("readout").textContent = "Choose a token with a click, or with the arrow keys, to read its number.";
    return;
  }
  let text = `Token ${at} ${quoted(data.tokens, at)}: ${measure.name} ${show(valueOf(at))}.`;
  const map = data.maps.find((each) => each.layer === state.layer && each.head === state.head);
  if (map) {
    const best = strongest(map, at, 3);
    const keys = best.map(({ key, weight }) => `${quoted(data.tokens, key)} (${key}) ${show(weight)}`);
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

// Search.

const placesOf = finder(data.tokens);

function search() {
  const parts = byId("text").children, wanted = byId("find").value;
  for (const part of byId("text").querySelectorAll(".hit")) part.classList.remove("hit");
  const found = placesOf(wanted);
  state.hits = found.map(([first]) => first);
  for (const [first, last] of found) {
    for (let index = first; index <= last; index += 1) parts[index].classList.add("hit");
  }
  byId("found").textContent = placesFound(found.length, wanted);
  if (found.length) parts[state.hits[0]].scrollIntoView({ block: "nearest" });
}

function nextHit(event) {
  if (event.key !== "Enter" || !state.hits.length) return;
  event.preventDefault();
  chooseToken(state.hits.find((index) => index > state.token) ?? state.hits[0], true);
}

// Maps and arcs of the heads whose weights were kept.

function chooseMap(index) {
  const map = data.maps[index], here = `layer ${state.layer}, head ${state.head}`;
  for (const button of byId("mapped").children) {
    button.setAttribute("aria-pressed", Number(button.dataset.index) === index);
  }
  byId("arcbox").hidden = !map;
  if (map) showArcs([map]);
  showMap(map, `No map of ${here} was kept: --heads ${state.layer}.${state.head} keeps it.`);
}

// What happens when.

function largest() {
  let best = { value: -Infinity, layer: 0, head: 0 };
  data.measures[0].table.forEach((row, layer) => row.forEach((value, head) => {
    if (value !== null && value > best.value) best = { value, layer, head };
  }));
  return data.maps[0] ?? best;
}

buildGrid(data.layers, data.heads);
buildText();
byId("measure").addEventListener("change", (event) => {
  state.measure = Number(event.target.value);
  paintGrid();
  paintText();
});
byId("text").addEventListener("click", (event) => {
  const part = event.target.closest(".token");
  if (part) chooseToken(Number(part.dataset.index));
});
byId("text").addEventListener("keydown", moveToken);
byId("find").addEventListener("input", search);
byId("find").addEventListener("keydown", nextHit);
byId("mapped")?.addEventListener("click", (event) => {
  const map = data.maps[event.target.dataset.index];
  if (map) chooseHead(map.layer, map.head);
});
byId("measure").value = "0"; // a browser may remember another choice
paintGrid();
const first = largest();
chooseHead(first.layer, first.head);
