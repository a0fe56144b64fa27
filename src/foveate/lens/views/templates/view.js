"use strict";
// Links the views: the grid chooses a head, the head view a query, and map, image and neurons follow.

const data = JSON.parse(byId("view").textContent);
const state = { part: null, maps: new Map(), layer: 0, head: 0, heads: new Set(), hits: [], find: null };
const PICTURE = { side: 88, rows: 48, faint: 0.04 };

const mapAt = (layer, head) => state.maps.get(`${layer}.${head}`);
const headsOf = (layer) => state.part.maps.filter((map) => map.layer === layer).map((map) => map.head);

function choosePart(index, layer, heads) {
  const part = data.parts[index];
  state.part = part;
  state.maps = new Map(part.maps.map((map) => [`${map.layer}.${map.head}`, map]));
  state.find = finder(part.queries);
  Object.assign(mapped, { queries: part.queries, keys: part.keys, places: part.places });
  Object.assign(arcs, { boundary: part.boundary, prompt: part.prompt, row: -1, segments: "all" });
  if (byId("segments")) {
    byId("segments").value = "all";
    byId("segments").parentElement.hidden = part.boundary === null;
  }
  buildGrid(part.layers, part.heads);
  drawPictures();
  const first = part.maps[0];
  chooseHead(layer ?? first.layer, heads?.[0] ?? first.head, false, heads);
}

// The small pictures of the grid.

function drawPictures() {
  const scale = devicePixelRatio > 1 ? 2 : 1, side = PICTURE.side * scale;
  const tint = colour("accent").join(" ");
  for (const cell of cells()) {
    const { layer, head } = cell.dataset, map = mapAt(layer, head);
    const label = `layer ${layer}, head ${head}${map ? "" : ": no map was kept"}`;
    cell.classList.toggle("blank", !map);
    cell.setAttribute("aria-label", label);
    cell.title = label;
    if (!map) continue;
    const canvas = element("canvas");
    Object.assign(canvas, { width: side, height: side });
    drawPicture(canvas.getContext("2d"), map, side, scale, tint);
    cell.replaceChildren(canvas);
  }
}

function drawPicture(brush, map, side, scale, tint) {
  const step = Math.max(1, Math.ceil(map.rows / PICTURE.rows)), place = side / map.size;
  brush.lineWidth = scale;
  for (let row = 0; row < map.rows; row += step) {
    for (let column = 0; column < map.columns; column += 1) {
      const weight = tile(map, row, column) ** 2;
      if (weight <= PICTURE.faint) continue;
      brush.strokeStyle = `rgb(${tint} / ${weight.toFixed(3)})`;
      brush.beginPath();
      brush.moveTo(2 * scale, (row + 0.5) * place);
      brush.lineTo(side - 2 * scale, (column + 0.5) * place);
      brush.stroke();
    }
  }
}

// Heads.

function chooseHead(layer, head, focus = false, heads = [head]) {
  markHead(layer, head, focus);
  Object.assign(state, { layer, head, heads: new Set(heads.filter((each) => mapAt(layer, each))) });
  byId("head").textContent = `Layer ${layer}, head${state.heads.size > 1 ? "s" : ""} ${heads.join(", ")}`;
  paintChips();
  showHeads();
}

function paintChips() {
  byId("chips").replaceChildren(...headsOf(state.layer).map((head) => {
    const chip = element("button", "", String(head));
    chip.type = "button";
    chip.dataset.head = head;
    chip.style.setProperty("--own", headColour(head));
    chip.setAttribute("aria-pressed", state.heads.has(head));
    return chip;
  }));
}

function toggleHead(head) {
  const heads = new Set(state.heads);
  if (!heads.delete(head)) heads.add(head);
  if (!heads.size) return;
  const shown = [...heads].sort((a, b) => a - b);
  chooseHead(state.layer, heads.has(head) ? head : shown[0], false, shown);
}

function showHeads() {
  const maps = [...state.heads].map((head) => mapAt(state.layer, head)), map = mapAt(state.layer, state.head);
  byId("arcbox").hidden = !maps.length;
  if (maps.length) showArcs(maps);
  showMap(map, `No map of layer ${state.layer}, head ${state.head} was kept.`);
  followRow();
}

function followRow() {
  const map = mapAt(state.layer, state.head);
  showNeurons(state.part, map, arcs.row);
  showPatches(state.part, map, arcs.row);
}

// Search.

function search() {
  const wanted = byId("find").value;
  state.hits = state.find(wanted).map(([first]) => first);
  byId("found").textContent = placesFound(state.hits.length, wanted);
  if (state.hits.length) pinRow(state.hits[0], true);
}

function nextHit(event) {
  if (event.key !== "Enter" || !state.hits.length) return;
  event.preventDefault();
  pinRow(state.hits.find((row) => row > arcs.row) ?? state.hits[0], true);
}

arcs.onRow = followRow;
byId("chips").addEventListener("click", (event) => {
  const chip = event.target.closest("button");
  if (chip) toggleHead(Number(chip.dataset.head));
});
byId("allheads").addEventListener("click", () => {
  const heads = headsOf(state.layer);
  if (heads.length) chooseHead(state.layer, heads.includes(state.head) ? state.head : heads[0], false, heads);
});
byId("segments")?.addEventListener("change", (event) => {
  arcs.segments = event.target.value;
  paintArcs();
});
byId("part")?.addEventListener("change", (event) => choosePart(Number(event.target.value)));
byId("find").addEventListener("input", search);
byId("find").addEventListener("keydown", nextHit);
onScheme(() => {
  drawPictures();
  followRow();
});
if (byId("part")) byId("part").value = String(data.start.part);
choosePart(data.start.part, data.start.layer, data.start.heads);
