"use strict";
// A query's weights over the image whose patches are the keys.

const patches = { part: null, map: null, row: -1 };

function patchRow() {
  return patches.row < 0 ? 0 : patches.row;
}

function showPatches(part, map, row) {
  if (!byId("patchbox")) return;
  Object.assign(patches, { part, map, row });
  byId("patchbox").hidden = !part.grid;
  if (!part.grid || !map) return;
  const front = part.keys.length - part.grid[0] * part.grid[1];
  byId("others").replaceChildren(...part.queries.slice(0, front).map((text, at) => {
    const button = element("button", "", inLine(text));
    button.type = "button";
    button.setAttribute("aria-pressed", patchRow() === at);
    button.addEventListener("click", () => pinRow(at));
    return button;
  }));
  drawPatches();
}

function picture(image) {
  const canvas = element("canvas"), brush = canvas.getContext("2d"), bytes = numbersOf(image, "data", 1);
  Object.assign(canvas, { width: image.width, height: image.height });
  const pixels = brush.createImageData(image.width, image.height);
  for (let at = 0; at < image.width * image.height; at += 1) {
    pixels.data.set([bytes[3 * at], bytes[3 * at + 1], bytes[3 * at + 2], 255], 4 * at);
  }
  brush.putImageData(pixels, 0, 0);
  return canvas;
}

function drawPatches() {
  const { part, map } = patches;
  if (!part?.grid || !map) return;
  const [rows, columns] = part.grid, front = part.keys.length - rows * columns, query = patchRow();
  const canvas = byId("image"), brush = canvas.getContext("2d");
  canvas.height = Math.round((canvas.width * (part.image?.height ?? rows)) / (part.image?.width ?? columns));
  brush.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--paper");
  brush.fillRect(0, 0, canvas.width, canvas.height);
  brush.imageSmoothingEnabled = false;
  brush.globalAlpha = 0.75;
  if (part.image) brush.drawImage(picture(part.image), 0, 0, canvas.width, canvas.height);
  const found = entries(map, query), inPatches = found.filter(({ key }) => key >= front);
  const most = Math.max(...inPatches.map(({ weight }) => weight));
  const [wide, high] = [canvas.width / columns, canvas.height / rows], tint = colour("hit").join(" ");
  brush.globalAlpha = 1;
  for (const { key, weight } of inPatches) {
    const [row, column] = [Math.floor((key - front) / columns), (key - front) % columns];
    brush.fillStyle = `rgb(${tint} / ${(0.85 * Math.sqrt(weight / (most || 1))).toFixed(3)})`;
    brush.fillRect(column * wide, row * high, wide, high);
  }
  if (query >= front) {
    brush.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--ink");
    brush.lineWidth = 3;
    brush.strokeRect(((query - front) % columns) * wide, Math.floor((query - front) / columns) * high, wide, high);
  }
  const inside = inPatches.reduce((sum, { weight }) => sum + weight, 0);
  canvas.setAttribute("aria-label", `Weights of query ${part.queries[query]} on ${rows} × ${columns} patches`);
  byId("patchsaid").textContent = `Layer ${map.layer}, head ${map.head}, query ${inLine(part.queries[query])}: `
    + `${show(inside)} of its attention is on patches, at most ${show(most)} on one.`;
}

function pointPatch(event) {
  const box = byId("image").getBoundingClientRect(), [rows, columns] = patches.part.grid;
  const row = clamp(Math.floor(((event.clientY - box.top) / box.height) * rows), 0, rows - 1);
  const column = clamp(Math.floor(((event.clientX - box.left) / box.width) * columns), 0, columns - 1);
  pinRow(patches.part.keys.length - rows * columns + row * columns + column);
}

function movePatch(event) {
  const [rows, columns] = patches.part.grid, front = patches.part.keys.length - rows * columns;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (!step) return;
  event.preventDefault();
  const at = patchRow() < front ? 0 : patchRow() - front + step;
  if (at >= 0 && at < rows * columns) pinRow(front + at);
}

byId("image")?.addEventListener("click", pointPatch);
byId("image")?.addEventListener("keydown", movePatch);
if (byId("image")) onScheme(drawPatches);
