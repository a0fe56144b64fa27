"use strict";
// Places names beside the marks of a scatter plot, so that no name covers a mark or another name. Marks in pixels go
// in, boxes come out; a box's `dx`, `dy` lead from its mark to the `anchor` side of its name.

const FONT = 12;

// Widths of texts as Plotly will draw them.
function measurer(tones) {
  const context = document.createElement("canvas").getContext("2d");
  const seen = (text) => text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
  return (text, weight = "normal") => {
    context.font = `${weight} ${FONT}px ${tones.sans}`;
    return context.measureText(seen(text)).width;
  };
}

function clusters(points) {
  const groups = [];
  for (const point of points) {
    const near = groups.find((group) => Math.hypot(group.px - point.px, group.py - point.py) < 7);
    if (near) near.points.push(point);
    else groups.push({ px: point.px, py: point.py, points: [point] });
  }
  return groups;
}

function overlap(a, b) {
  const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
  const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  return wide > 0 && high > 0 ? wide * high : 0;
}

// What the line from a mark to a name further off costs: that it is there, and what it runs under.
function leader(box, taken) {
  let hits = 0;
  for (let step = 0.15; step < 1; step += 0.05) {
    const x = box.px + step * box.dx, y = box.py + step * box.dy;
    hits += taken.some((other) => x > other.left && x < other.right && y > other.top && y < other.bottom);
  }
  return 15 + hits * 20;
}

// The texts that could name a group: all in one line, or one under another.
function shapes(group, widthOf) {
  const bold = (point) => point.role === "lead";
  const widths = group.points.map((point) => widthOf(point.name, bold(point) ? "bold" : "normal"));
  const joined = (separator) => (tones) => group.points.map((point) => (
    bold(point) ? `<span style="color:${tones.lead}"><b>${point.name}</b></span>` : point.name
  )).join(separator);
  const stacked = { text: joined("<br>"), width: Math.max(...widths) + 6, height: 16 * widths.length };
  if (widths.length === 1) return [stacked];
  const line = { text: joined(", "), width: widths.reduce((sum, width) => sum + width + 8, 0), height: 16 };
  return [line, stacked];
}

function places(group, shape) {
  const found = [];
  for (const reach of [11, 18, 29, 40, 54, 70, 90, 115]) {
    const rise = reach + shape.height / 2 - 3, slant = reach * 0.8;
    for (const [dx, dy, anchor] of [
      [reach, 0, "left"], [-reach, 0, "right"], [0, -rise, "center"], [0, rise, "center"],
      [-7, -rise, "left"], [7, -rise, "right"], [-7, rise, "left"], [7, rise, "right"],
      [slant, -slant, "left"], [slant, slant, "left"], [-slant, -slant, "right"], [-slant, slant, "right"],
    ]) {
      const left = group.px + dx - { left: 0, center: shape.width / 2, right: shape.width }[anchor];
      const top = group.py + dy - shape.height / 2;
      const box = { left, top, right: left + shape.width, bottom: top + shape.height };
      found.push({ ...box, px: group.px, py: group.py, dx, dy, anchor, reach, shape });
    }
  }
  return found;
}

// The free place nearest to the mark; where none is free, the one that covers least.
function place(options, taken, area) {
  const cost = (box) => {
    const outside = Math.max(0, -box.left) + Math.max(0, box.right - area.width)
      + Math.max(0, -box.top) + Math.max(0, box.bottom - area.height);
    const covered = taken.reduce((sum, other) => sum + overlap(box, other), 0);
    return outside * 200 + covered * 2 + box.reach + (box.reach > 20 ? leader(box, taken) : 0);
  };
  return options.map((box) => ({ ...box, cost: cost(box) })).reduce((best, box) => (box.cost < best.cost ? box : best));
}

// Names placed in `order`, and each again given all others, until all have had a few turns.
function settle(order, options, marks, level, area) {
  const boxes = order.map(() => null);
  const others = (list, own) => list.filter((box, index) => box && index !== own);
  for (let turn = 0; turn < 4; turn += 1) {
    for (const index of order) {
      boxes[index] = place(options[index], [...others(marks, index), ...others(boxes, index), ...level], area);
    }
  }
  return boxes;
}

// Where each group's name goes: who chooses first matters, so a few orders are tried and the cheapest result taken.
function arrange(groups, line, area, widthOf) {
  const marks = groups.map(({ px, py }) => ({ left: px - 9, right: px + 9, top: py - 9, bottom: py + 9 }));
  const level = line === null ? [] : [{ left: 0, right: area.width, top: line - 1, bottom: line + 1 }];
  const options = groups.map((group) => shapes(group, widthOf).flatMap((shape) => places(group, shape)));
  const across = groups.map((_, index) => index).sort((a, b) => groups[a].px - groups[b].px);
  const down = groups.map((_, index) => index).sort((a, b) => groups[a].py - groups[b].py);
  const total = (boxes) => boxes.reduce((sum, box) => sum + box.cost, 0);
  return [across, across.toReversed(), down, down.toReversed()]
    .map((order) => settle(order, options, marks, level, area))
    .reduce((best, boxes) => (total(boxes) < total(best) ? boxes : best));
}
