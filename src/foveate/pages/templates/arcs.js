"use strict";
// The head view: queries on the left, keys on the right, and a line for each weight, in the colour of its head. The
// texts are those of `mapped`; the page sets `arcs.boundary`, `arcs.prompt` and `arcs.onRow`, called with a chosen query.

const arcs = { maps: [], row: -1, hover: null, segments: "all", boundary: null, prompt: null, onRow: null };
const ARCS = { full: 300, lines: 6000, faint: 0.02, row: 19, between: 140, longest: 28, left: 0, right: 0 };
const svgSpace = byId("arcs")?.firstElementChild.namespaceURI;
const headColour = (head) => `hsl(${(head * 137.5) % 360} 70% var(--line))`;

function drawn(name, attributes, text) {
  const found = document.createElementNS(svgSpace, name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  if (text !== undefined) found.textContent = text;
  return found;
}

function showArcs(maps) {
  Object.assign(arcs, { maps, hover: null });
  arcs.row = Math.min(arcs.row, mapped.queries.length - 1);
  buildArcs();
}

// The tokens that are listed: all, or one query and its strongest keys where the text is long.
function listed() {
  const { queries, keys } = mapped;
  if (Math.max(queries.length, keys.length) <= ARCS.full) {
    return { queries: queries.map((_, at) => at), keys: keys.map((_, at) => at), alone: false };
  }
  const row = arcs.row < 0 ? queries.length - 1 : arcs.row;
  const best = arcs.maps.flatMap((map) => strongest(map, row, 12).map(({ key }) => key));
  return { queries: [row], keys: [...new Set(best)].sort((a, b) => a - b), alone: true };
}

function isIn(segments, query, key) {
  if (segments === "all" || arcs.boundary === null) return true;
  const segment = (place) => (place < arcs.boundary ? "A" : "B");
  return segments === `${segment(queryPlace(query))}->${segment(key)}`;
}

function linesOf(query, least) {
  return arcs.maps.flatMap((map) => entries(map, query)
    .filter(({ key, weight }) => weight > least && isIn(arcs.segments, query, key))
    .map((line) => ({ ...line, head: map.head })));
}

function chosenLines(list) {
  const { hover, row } = arcs;
  if (list.alone) return linesOf(list.queries[0], 0);
  if (hover?.side === "query" || (!hover && row >= 0)) return linesOf(hover ? hover.at : row, 0.002);
  const all = list.queries.flatMap((query) => linesOf(query, hover ? 0.002 : ARCS.faint));
  const found = hover ? all.filter(({ key }) => key === hover.at) : all;
  if (found.length <= ARCS.lines) return found;
  return found.sort((a, b) => b.weight - a.weight).slice(0, ARCS.lines);
}

const arcHeight = (list) => ARCS.row * Math.max(list.queries.length, list.keys.length) + 8;
const arcPlace = (at) => ARCS.row * (at + 0.5) + 4;

function buildArcs() {
  const list = listed(), bars = Math.min(arcs.maps.length, 12) * 7, height = arcHeight(list);
  const longest = (numbers, tokens) => Math.max(1, ...numbers.map((at) => tokens[at].length));
  const wide = (numbers, tokens) => 24 + 7.5 * Math.min(ARCS.longest, longest(numbers, tokens));
  ARCS.left = wide(list.queries, mapped.queries);
  ARCS.right = ARCS.left + ARCS.between;
  const width = ARCS.right + bars + wide(list.keys, mapped.keys);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, width, height });
  svg.append(drawn("g", { class: "lines" }));
  for (const [side, numbers, tokens, x, anchor] of [
    ["query", list.queries, mapped.queries, ARCS.left - 8, "end"],
    ["key", list.keys, mapped.keys, ARCS.right + 8 + bars, "start"],
  ]) {
    numbers.forEach((at, row) => {
      const place = side === "query" ? queryPlace(at) : at, whole = inLine(tokens[at]);
      const short = whole.length > ARCS.longest ? `${whole.slice(0, ARCS.longest - 1)}…` : whole;
      const token = drawn("text", { x, y: arcPlace(row) + 4, "text-anchor": anchor, class: "arc-token" }, short);
      token.append(drawn("title", {}, `${place}: ${whole}`));
      Object.assign(token.dataset, { side, at });
      if (arcs.prompt !== null && place >= arcs.prompt) token.classList.add("new");
      svg.append(token);
    });
  }
  byId("arcs").replaceChildren(svg);
  paintArcs(list);
}

function paintArcs(list = listed()) {
  const svg = byId("arcs").firstElementChild, lines = chosenLines(list), { hover, row } = arcs;
  const rowOf = new Map(list.queries.map((at, place) => [at, place]));
  const keyOf = new Map(list.keys.map((at, place) => [at, place]));
  const parts = lines.filter(({ key }) => keyOf.has(key)).map(({ query, key, head, weight }) => {
    const ends = { x1: ARCS.left, y1: arcPlace(rowOf.get(query)), x2: ARCS.right, y2: arcPlace(keyOf.get(key)) };
    const line = drawn("line", { ...ends, "stroke-opacity": weight.toFixed(4) });
    Object.assign(line.dataset, { query, key, head });
    line.style.stroke = headColour(head);
    return line;
  });
  const one = list.alone || hover?.side === "query" || (!hover && row >= 0);
  if (one) {
    const slot = new Map(arcs.maps.slice(0, 12).map((map, at) => [map.head, at]));
    for (const { key, head, weight } of lines.filter(({ key, head }) => keyOf.has(key) && slot.has(head))) {
      const y = arcPlace(keyOf.get(key)) - 7;
      const bar = drawn("rect", { x: ARCS.right + 6 + 7 * slot.get(head), y, width: 6, height: 14 });
      bar.setAttribute("fill-opacity", weight.toFixed(4));
      bar.style.fill = headColour(head);
      parts.push(bar);
    }
  }
  svg.querySelector(".lines").replaceChildren(...parts);
  const pinned = list.alone ? list.queries[0] : row;
  const chosen = (list.alone ? null : hover) ?? (pinned < 0 ? null : { side: "query", at: pinned });
  for (const token of svg.querySelectorAll(".arc-token")) {
    const own = chosen && token.dataset.side === chosen.side && Number(token.dataset.at) === chosen.at;
    token.classList.toggle("chosen", Boolean(own));
  }
  sayArcs(chosen);
}

function sayArcs(chosen) {
  if (chosen?.side !== "query") {
    byId("arcsaid").textContent = "";
    return;
  }
  const said = arcs.maps.slice(0, 6).map((map) => {
    const best = strongest(map, chosen.at, 3);
    const keys = best.map(({ key, weight }) => `${quoted(mapped.keys, key)} (${key}) ${show(weight)}`);
    return `head ${map.head}: ${keys.join(", ") || "no weight"}`;
  });
  const query = `Query ${queryPlace(chosen.at)} ${quoted(mapped.queries, chosen.at)}`;
  byId("arcsaid").textContent = `${query}. ${said.join("; ")}.`;
}

function pinRow(row, scroll = false) {
  arcs.row = clamp(row, -1, mapped.queries.length - 1);
  arcs.hover = null;
  if (listed().alone) buildArcs();
  else paintArcs();
  if (scroll && arcs.row >= 0) {
    byId("arcs").querySelector(".arc-token.chosen")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  arcs.onRow?.(arcs.row);
}

function pointAt(event) {
  const token = event.target.closest?.(".arc-token");
  const hover = token ? { side: token.dataset.side, at: Number(token.dataset.at) } : null;
  if (hover?.side === arcs.hover?.side && hover?.at === arcs.hover?.at) return;
  arcs.hover = hover;
  if (arcs.maps.length && !listed().alone) paintArcs();
}

byId("arcs")?.addEventListener("pointerover", pointAt);
byId("arcs")?.addEventListener("pointerleave", pointAt);
byId("arcs")?.addEventListener("click", (event) => {
  const token = event.target.closest(".arc-token");
  if (token?.dataset.side === "query") pinRow(Number(token.dataset.at) === arcs.row ? -1 : Number(token.dataset.at));
});
byId("arcs")?.addEventListener("keydown", (event) => {
  const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (event.key === "Escape") pinRow(-1);
  else if (step) pinRow(Math.max(0, arcs.row + step), true);
  else return;
  event.preventDefault();
});
