"use strict";
// Draws the figures from the JSON beside this script in the page's colours, and again when those or the width change.
// The strings in that JSON are escaped for Plotly where they are written (foveate/report/figures.py).

const data = JSON.parse(document.getElementById("figures").textContent);
const FONT = 12;
const CONFIG = { displayModeBar: false, scrollZoom: false, doubleClick: false };

function theme() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    ink: colour("ink"), muted: colour("muted"), rule: colour("rule"), paper: colour("paper"), raised: colour("raised"),
    lead: colour("accent"), other: colour("other"), baseline: colour("ink"), sans: colour("sans"),
  };
}

function frame(tones, height, margin) {
  return {
    height, margin, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false,
    hovermode: "closest", font: { family: tones.sans, size: FONT, color: tones.muted },
    hoverlabel: {
      bgcolor: tones.raised, bordercolor: tones.rule, align: "left", font: { family: tones.sans, color: tones.ink },
    },
  };
}

function axis(tones, more) {
  const plain = { fixedrange: true, zeroline: false, automargin: false };
  return { ...plain, gridcolor: tones.rule, linecolor: tones.rule, ...more };
}

// --- score against a share: every mark is named, and no name covers a mark or another name

// Widths of texts as Plotly will draw them.
function measurer(tones) {
  const context = document.createElement("canvas").getContext("2d");
  const plain = document.createElement("textarea"); // turns &lt; back into <: the width is that of what is seen
  return (text, weight = "normal") => {
    context.font = `${weight} ${FONT}px ${tones.sans}`;
    plain.innerHTML = text;
    return context.measureText(plain.value).width;
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

// How much of the line from a mark to the near edge of its name runs under other names.
function crossing(group, box, taken) {
  let hits = 0;
  for (let step = 0.15; step < 1; step += 0.05) {
    const x = group.px + step * box.dx, y = group.py + step * box.dy;
    hits += taken.some((other) => x > other.left && x < other.right && y > other.top && y < other.bottom);
  }
  return hits * 20;
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
  for (const reach of [11, 18, 28, 40, 54, 70, 90, 115]) {
    const rise = reach + shape.height / 2 - 3, slant = reach * 0.8;
    for (const [dx, dy, anchor] of [
      [reach, 0, "left"], [-reach, 0, "right"], [0, -rise, "center"], [0, rise, "center"],
      [-7, -rise, "left"], [7, -rise, "right"], [-7, rise, "left"], [7, rise, "right"],
      [slant, -slant, "left"], [slant, slant, "left"], [-slant, -slant, "right"], [-slant, slant, "right"],
    ]) {
      const left = group.px + dx - { left: 0, center: shape.width / 2, right: shape.width }[anchor];
      const top = group.py + dy - shape.height / 2;
      const box = { left, top, right: left + shape.width, bottom: top + shape.height };
      found.push({ ...box, dx, dy, anchor, reach, shape });
    }
  }
  return found;
}

// The free place nearest to the mark; where none is free, the one that covers least.
function place(group, options, taken, area) {
  const cost = (box) => {
    const outside = Math.max(0, -box.left) + Math.max(0, box.right - area.width)
      + Math.max(0, -box.top) + Math.max(0, box.bottom - area.height);
    const covered = taken.reduce((sum, other) => sum + overlap(box, other), 0);
    return outside * 200 + covered + box.reach + (box.reach > 20 ? crossing(group, box, taken) : 0);
  };
  return options.map((box) => ({ ...box, cost: cost(box) })).reduce((best, box) => (box.cost < best.cost ? box : best));
}

// Where each group's name goes: every name is placed again, given the others, until all have had a few turns.
function arrange(groups, line, area, widthOf) {
  const marks = groups.map(({ px, py }) => ({ left: px - 9, right: px + 9, top: py - 9, bottom: py + 9 }));
  const level = line === null ? [] : [{ left: 0, right: area.width, top: line - 1, bottom: line + 1 }];
  const options = groups.map((group) => shapes(group, widthOf).flatMap((shape) => places(group, shape)));
  const boxes = groups.map(() => null);
  for (let turn = 0; turn < 4; turn += 1) {
    groups.forEach((group, index) => {
      const others = (list) => list.filter((box, other) => box && other !== index);
      boxes[index] = place(group, options[index], [...others(marks), ...others(boxes), ...level], area);
    });
  }
  return boxes;
}

function nameMarks(points, line, area, tones) {
  const groups = clusters(points);
  const boxes = arrange(groups, line, area, measurer(tones));
  return groups.map((group, index) => {
    const box = boxes[index];
    return {
      x: group.points[0].x, y: group.points[0].y, ax: box.dx, ay: box.dy, align: box.anchor, xanchor: box.anchor,
      yanchor: "middle", text: box.shape.text(tones), font: { color: tones.ink, size: FONT }, borderpad: 0,
      showarrow: true, arrowhead: 0, arrowwidth: 0.8, standoff: 6, captureevents: false,
      arrowcolor: box.reach > 20 ? tones.other : "rgba(0,0,0,0)",
    };
  });
}

function marks(points, tones) {
  const size = { baseline: 12, lead: 11, other: 9 };
  const edge = { baseline: tones.ink, lead: tones.paper, other: tones.paper };
  return {
    type: "scatter", mode: "markers", x: points.map((p) => p.x), y: points.map((p) => p.y), cliponaxis: false,
    customdata: points.map((p) => p.hover), hovertemplate: "%{customdata}<extra></extra>",
    marker: {
      opacity: 1, size: points.map((p) => size[p.role]), color: points.map((p) => tones[p.role]),
      symbol: points.map((p) => (p.role === "baseline" ? "diamond-open" : "circle")),
      line: { width: 1.5, color: points.map((p) => edge[p.role]) },
    },
  };
}

function drawQuality(panel, line, tones) {
  const node = document.getElementById(`plot-${panel.id}`);
  const margin = { l: 46, r: 20, t: 4, b: 44 }, height = 350, width = node.clientWidth;
  const area = { width: width - margin.l - margin.r, height: height - margin.t - margin.b };
  const most = (values) => Math.max(100, ...values);
  const right = most(panel.points.map((p) => p.x)) * 1.03, top = most(panel.points.map((p) => p.y)) * 1.16;
  const across = (x) => ((x + 3) / (right + 3)) * area.width, down = (y) => ((top - y) / (top + 4)) * area.height;
  // The baseline's hollow mark goes on top of what it coincides with.
  const points = panel.points.map((p) => ({ ...p, px: across(p.x), py: down(p.y) })).reverse();
  const title = { text: panel.heading, standoff: 10, font: { size: FONT } };
  const layout = {
    ...frame(tones, height, margin), width,
    xaxis: axis(tones, { range: [-3, right], ticksuffix: " %", nticks: 6, title, showgrid: false, showline: true }),
    yaxis: axis(tones, { range: [-4, top], ticksuffix: " %", nticks: 7 }),
    annotations: nameMarks(points.toReversed(), line === null ? null : down(line), area, tones),
  };
  const level = {
    type: "scatter", mode: "lines", x: [-3, right], y: [line, line], hoverinfo: "skip",
    line: { color: tones.ink, width: 1, dash: "4px,4px" },
  };
  Plotly.react(node, line === null ? [marks(points, tones)] : [level, marks(points, tones)], layout, CONFIG);
}

// --- bars of ratios: panels side by side that share their names, or stacked where the page is narrow

function domains(count, gap) {
  const size = (1 - gap * (count - 1)) / count;
  return Array.from({ length: count }, (_, index) => [index * (size + gap), index * (size + gap) + size]);
}

// The bars, and their ratios in a column of their own at the right edge, clear of the line at 1×.
function bars(panel, cost, axes, edge, tones) {
  const rows = cost.names.map((_, row) => row);
  const shared = { ...axes, y: rows, customdata: panel.hovers, hovertemplate: "%{customdata}<extra></extra>" };
  return [
    {
      ...shared, type: "bar", orientation: "h", x: panel.values,
      marker: { color: cost.roles.map((role) => tones[role]) },
    },
    {
      ...axes, type: "scatter", mode: "text", x: rows.map(() => edge), y: rows, text: panel.texts,
      textposition: "middle left", textfont: { color: tones.ink }, hoverinfo: "skip", cliponaxis: false,
    },
  ];
}

function costAxes(layout, index, across, down, edge, cost, tones, named) {
  const suffix = index ? index + 1 : "", rows = cost.names.map((_, row) => row);
  layout[`xaxis${suffix}`] = axis(tones, {
    domain: across, anchor: `y${suffix}`, range: [0, edge], ticksuffix: "×", nticks: 4, showgrid: false,
  });
  layout[`yaxis${suffix}`] = axis(tones, {
    domain: down, anchor: `x${suffix}`, range: [rows.length - 0.4, -0.6], showgrid: false, showticklabels: named,
    tickvals: rows, ticktext: cost.names, ticklabelstandoff: 6, tickfont: { color: tones.ink, size: FONT },
  });
  layout.annotations.push({
    text: `<b>${cost.panels[index].heading}</b>`, xref: "paper", yref: "paper", x: across[0], y: down[1],
    xanchor: "left", yanchor: "bottom", yshift: 8, showarrow: false, font: { color: tones.ink, size: FONT + 1 },
  });
  layout.shapes.push({
    type: "line", xref: `x${suffix}`, yref: `y${suffix} domain`, x0: 1, x1: 1, y0: 0, y1: 1,
    line: { color: tones.ink, width: 1, dash: "4px,4px" },
  });
  return { xaxis: `x${suffix}`, yaxis: `y${suffix}` };
}

function drawCost(cost, tones) {
  const node = document.getElementById("plot-cost");
  const width = node.clientWidth, narrow = width < 720, count = cost.panels.length;
  const tall = cost.names.length * 26 + 12, between = 68, widthOf = measurer(tones);
  const longest = Math.max(...cost.names.map((name) => widthOf(name)));
  const margin = { l: Math.min(width * 0.42, longest + 14), r: 8, t: 30, b: 28 };
  const inner = narrow ? count * tall + (count - 1) * between : tall;
  const height = inner + margin.t + margin.b;
  const layout = { ...frame(tones, height, margin), width, bargap: 0.45, annotations: [], shapes: [] };
  const cuts = domains(count, narrow ? between / inner : 0.05);
  const traces = cost.panels.flatMap((panel, index) => {
    const [from, to] = cuts[index];
    const edge = Math.max(1, ...panel.values.filter((value) => value !== null)) * 1.3;
    const [across, down] = narrow ? [[0, 1], [1 - to, 1 - from]] : [[from, to], [0, 1]];
    const axes = costAxes(layout, index, across, down, edge, cost, tones, narrow || index === 0);
    return bars(panel, cost, axes, edge, tones);
  });
  Plotly.react(node, traces, layout, CONFIG);
}

function draw() {
  const tones = theme();
  for (const panel of data.quality.panels) drawQuality(panel, data.quality.line, tones);
  if (data.cost.panels.length) drawCost(data.cost, tones);
}

let drawnAt = document.body.clientWidth;
addEventListener("resize", () => {
  if (document.body.clientWidth === drawnAt) return; // a phone's address bar changes only the height
  drawnAt = document.body.clientWidth;
  draw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
