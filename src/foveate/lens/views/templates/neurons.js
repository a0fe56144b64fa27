"use strict";
// The neuron view: a query's neurons, and for each key its neurons, their products with the query's, and their sum.

const NEURON_ROWS = 48;

// The numbers of one vector of a layer's queries (`q`) or keys (`k`).
function neuronsOf(layer, name, head, row, rows) {
  const all = numbersOf(layer, name, 2), { width } = layer, most = layer[`${name}_most`][head];
  const start = (head * rows + row) * width;
  return Array.from({ length: width }, (_, at) => ((all[start + at] / 65535) * 2 - 1) * most);
}

// A row of colours: positive numbers in the accent's colour, negative ones in the other.
function strip(values, most, label) {
  const canvas = element("canvas", "strip"), brush = canvas.getContext("2d");
  Object.assign(canvas, { width: values.length, height: 1 });
  const [paper, more, less] = ["paper", "accent", "hit"].map(colour), pixels = brush.createImageData(values.length, 1);
  values.forEach((value, at) => {
    const shade = mixed(paper, value < 0 ? less : more, Math.min(1, Math.abs(value) / (most || 1)));
    pixels.data.set([...shade, 255], 4 * at);
  });
  brush.putImageData(pixels, 0, 0);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  const order = values.map((value, at) => ({ value, at })).sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  canvas.title = order.slice(0, 4).map(({ value, at }) => `neuron ${at}: ${show(value)}`).join(", ");
  return canvas;
}

function neuronLine(heading, parts) {
  const line = element("tr"), name = element("th", "key-text", heading);
  name.scope = "row";
  line.append(name);
  for (const part of parts) {
    const cell = element("td");
    cell.append(part);
    line.append(cell);
  }
  return line;
}

function showNeurons(part, map, row) {
  if (!byId("neuronbox")) return;
  const layer = map && part.products[map.layer], query = row < 0 ? part.queries.length - 1 : row;
  byId("neurontable").hidden = !layer;
  if (!layer) {
    byId("neuronsaid").textContent = part.left_out
      ? "Queries and keys are too large for this page; AttentionView.neuron has them."
      : "Queries and keys of this layer were not captured.";
    return;
  }
  const q = neuronsOf(layer, "q", map.head, query, part.queries.length);
  const heads = layer.q_most.length, own = Math.floor(map.head / (heads / layer.groups));
  const seen = strongest(map, query, NEURON_ROWS).sort((a, b) => a.key - b.key);
  const rows = seen.map(({ key, weight }) => {
    const k = neuronsOf(layer, "k", own, key, part.keys.length);
    return { key, weight, k, qk: q.map((value, at) => value * k[at]) };
  });
  const largest = (list) => Math.max(...list.flat().map(Math.abs), 1e-12);
  const mostK = largest(rows.map(({ k }) => k)), mostQk = largest(rows.map(({ qk }) => qk));
  const table = element("table", "neurons"), head = element("thead"), heading = element("tr"), body = element("tbody");
  for (const text of ["key", "k", "q × k", "q · k, scaled", "weight"]) {
    const cell = element("th", "", text);
    cell.scope = "col";
    heading.append(cell);
  }
  head.append(heading);
  body.append(...rows.map(({ key, weight, k, qk }) => {
    const bar = element("span", "bar");
    bar.style.setProperty("--share", `${(100 * weight).toFixed(1)}%`);
    const both = element("span");
    both.append(element("span", "weight", show(weight)), bar);
    const sum = qk.reduce((total, value) => total + value, 0) * layer.scale;
    return neuronLine(`${key} ${inLine(part.keys[key])}`, [
      strip(k, mostK, `neurons of key ${key}`), strip(qk, mostQk, `products of key ${key}`), show(sum), both,
    ]);
  }));
  table.append(head, body);
  const first = element("p", "choices", "q ");
  first.append(strip(q, largest([q]), `neurons of query ${queryPlace(query)}`));
  byId("neurontable").replaceChildren(first, table);
  const some = rows.length < NEURON_ROWS ? "" : ` Of its keys, the ${NEURON_ROWS} strongest are shown.`;
  byId("neuronsaid").textContent = `Layer ${map.layer}, head ${map.head}, query ${queryPlace(query)} `
    + `${quoted(part.queries, query)}: ${layer.width} neurons. Positive products raise a key’s weight, negative ones `
    + `(the other colour) lower it; a strip’s text names the largest.${some}`;
}
