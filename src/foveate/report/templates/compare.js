"use strict";
// Draws the figures from the JSON beside this script in the page's colours, and again when those or the width change.
// The strings in that JSON are escaped for Plotly where they are written (foveate/report/figures.py). Needs labels.js.

const data = JSON.parse(document.getElementById("figures").textContent);
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

// Score against a share.

function nameMarks(points, line, area, tones) {
  const groups = clusters(points);
  const boxes = arrange(groups, line, area, measurer(tones));
  return groups.map((group, index) => {
    const box = boxes[index];
    return {
      x: group.points[0].x, y: group.points[0].y, ax: box.dx, ay: box.dy, align: box.anchor, xanchor: box.anchor,
      yanchor: "middle", text: box.shape.text(tones), font: { color: tones.ink, size: FONT }, borderpad: 0,
      bgcolor: tones.paper, showarrow: true, arrowhead: 0, arrowwidth: 0.8, standoff: 6, captureevents: false,
      arrowcolor: box.reach > 20 ? tones.other : "rgba(0,0,0,0)",
    };
  });
}

function marks(points, tones) {
  const size = { baseline: 12, lead: 11, other: 9 };
  const edge = { baseline: tones.ink, lead: tones.paper, other: tones.paper };
  return {
    type: "scatter", mode: "markers", x: points.map((p) => p.x), y: points.map((p) => p.y), cliponaxis: false,
    error_y: {
      type: "data", symmetric: false, array: points.map((p) => p.above), arrayminus: points.map((p) => p.below),
      thickness: 1, width: 0, color: tones.other,
    },
    customdata: points.map((p) => p.hover), hovertemplate: "%{customdata}<extra></extra>",
    marker: {
      opacity: 1, size: points.map((p) => size[p.role]), color: points.map((p) => tones[p.role]),
      symbol: points.map((p) => (p.role === "baseline" ? "diamond-open" : "circle")),
      line: { width: 1.5, color: points.map((p) => edge[p.role]) },
    },
  };
}

function drawQuality(panel, { line, unit }, tones) {
  const node = document.getElementById(`plot-${panel.id}`);
  const margin = { l: 46, r: 20, t: 4, b: 44 }, height = 350, width = node.clientWidth;
  const area = { width: width - margin.l - margin.r, height: height - margin.t - margin.b };
  const right = Math.max(100, ...panel.points.map((p) => p.x)) * 1.03;
  const highest = Math.max(unit ? 100 : 0, ...panel.points.map((p) => p.y + p.above));
  const top = highest * 1.2, foot = -highest * 0.04;
  const across = (x) => ((x + 3) / (right + 3)) * area.width;
  const down = (y) => ((top - y) / (top - foot)) * area.height;
  // The baseline's hollow mark goes on top of what it coincides with.
  const points = panel.points.map((p) => ({ ...p, px: across(p.x), py: down(p.y) })).reverse();
  const title = { text: panel.heading, standoff: 10, font: { size: FONT } };
  const layout = {
    ...frame(tones, height, margin), width,
    xaxis: axis(tones, { range: [-3, right], ticksuffix: " %", nticks: 6, title, showgrid: false, showline: true }),
    yaxis: axis(tones, { range: [foot, top], ticksuffix: unit, nticks: 7 }),
    annotations: nameMarks(points.toReversed().filter((p) => p.named), line === null ? null : down(line), area, tones),
  };
  const level = {
    type: "scatter", mode: "lines", x: [-3, right], y: [line, line], hoverinfo: "skip",
    line: { color: tones.ink, width: 1, dash: "4px,4px" },
  };
  Plotly.react(node, line === null ? [marks(points, tones)] : [level, marks(points, tones)], layout, CONFIG);
}

// Score against bytes and times. What another method dominates is small and pale, and has its name in the hover text.

function costMarks(points, tones, best) {
  const own = points.filter((p) => p.best === best), drawn = marks(own, tones);
  const colour = own.map((p) => (p.role === "baseline" ? tones.baseline : best ? tones.lead : tones.other));
  drawn.error_x = {
    type: "data", symmetric: false, array: own.map((p) => p.right), arrayminus: own.map((p) => p.left),
    thickness: 1, width: 0, color: tones.other,
  };
  drawn.marker.color = colour;
  if (best) return drawn;
  Object.assign(drawn.marker, { size: own.map(() => 6), opacity: 0.45 });
  drawn.error_x.thickness = drawn.error_y.thickness = 0.5;
  return drawn;
}

function steps(points, tones) {
  const best = points.filter((p) => p.best).toSorted((a, b) => a.x - b.x);
  return {
    type: "scatter", mode: "lines", x: best.map((p) => p.x), y: best.map((p) => p.y), hoverinfo: "skip",
    line: { color: tones.lead, width: 1.5, shape: "hv" },
  };
}

function curve(points, tones) {
  return {
    type: "scatter", mode: "lines", x: points.map((p) => p.x), y: points.map((p) => p.y), hoverinfo: "skip",
    line: { color: tones.rule, width: 1, dash: "2px,2px" },
  };
}

function drawPareto(panel, { unit }, tones) {
  const node = document.getElementById(`plot-${panel.id}`);
  const margin = { l: 46, r: 20, t: 4, b: 44 }, height = 350, width = node.clientWidth;
  const area = { width: width - margin.l - margin.r, height: height - margin.t - margin.b };
  // A long interval may leave the plot; the marks themselves never do.
  const right = Math.max(...panel.points.map((p) => p.x + Math.min(p.right, p.x))) * 1.08, left = -right * 0.03;
  const highest = Math.max(unit ? 100 : 0, ...panel.points.map((p) => p.y + p.above));
  const top = highest * 1.2, foot = -highest * 0.04;
  const across = (x) => ((x - left) / (right - left)) * area.width;
  const down = (y) => ((top - y) / (top - foot)) * area.height;
  const points = panel.points.map((p) => ({ ...p, px: across(p.x), py: down(p.y) }));
  const named = points.filter((p) => p.best || p.role === "baseline");
  const title = { text: panel.heading, standoff: 10, font: { size: FONT } };
  const layout = {
    ...frame(tones, height, margin), width,
    xaxis: axis(tones, {
      range: [left, right], ticksuffix: panel.suffix, nticks: 6, title, showgrid: false, showline: true,
    }),
    yaxis: axis(tones, { range: [foot, top], ticksuffix: unit, nticks: 7 }),
    annotations: nameMarks(named, null, area, tones),
  };
  const curves = panel.curves.map((indices) => curve(indices.map((index) => points[index]), tones));
  const traces = [...curves, steps(points, tones), costMarks(points, tones, false), costMarks(points, tones, true)];
  Plotly.react(node, traces, layout, CONFIG);
}

// Bars of ratios: panels side by side that share their names, or stacked where the page is narrow.

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
  for (const panel of data.quality.panels) drawQuality(panel, data.quality, tones);
  for (const panel of data.pareto) drawPareto(panel, data.quality, tones);
  if (data.cost.panels.length) drawCost(data.cost, tones);
}

let drawnAt = document.body.clientWidth;
addEventListener("resize", () => {
  if (document.body.clientWidth === drawnAt) return; // a phone's address bar changes only the height
  drawnAt = document.body.clientWidth;
  draw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
matchMedia("print").addEventListener("change", draw); // a sheet of paper has its own width, and is always light
draw();
