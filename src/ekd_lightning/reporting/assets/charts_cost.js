// Accuracy against cost: settings, their Pareto front, and the operating points of one student.

const MILLION = 1e-6;

/** Points that no cheaper or equally cheap point surpasses. */
function pareto(points) {
  const front = [];
  for (const point of [...points].sort((a, b) => a.x - b.x || b.y - a.y)) {
    if (!front.length || point.y > front[front.length - 1].y) front.push(point);
  }
  return front;
}

/** Draws points of equal cost slightly beside each other. */
function besideEachOther(points) {
  const width = Math.max(...points.map((p) => p.x)) - Math.min(...points.map((p) => p.x)) || 1;
  for (const x of new Set(points.map((p) => p.x))) {
    const same = points.filter((p) => p.x === x);
    const step = Math.min(0.008, 0.06 / same.length) * width;
    same.forEach((point, position) => {
      point.at = x + step * (position - (same.length - 1) / 2);
    });
  }
}

function prefixPoints(row, field) {
  return (row?.subsets || [])
    .filter(({ branches }) => branches.every((branch, at) => branch === at))
    .map((subset) => ({
      x: MILLION * subset[field],
      figure: subset.accuracy,
      branches: subset.branches.length,
    }))
    .sort((a, b) => a.branches - b.branches);
}

function settingTrace({ group, x, y, at }, marks, named) {
  const lines = [inert(group.label), `${y.toFixed(2)} % ${interval(accuracy(group))}`, `${x.toFixed(2)} M`];
  return {
    type: "scatter",
    mode: "markers",
    name: inert(group.label),
    x: [at],
    y: [y],
    showlegend: named,
    error_y: bars([accuracy(group)], marks.colour),
    marker: { color: marks.colour, symbol: marks.symbol, size: 10 },
    hovertemplate: `${lines.join("<br>")}<extra></extra>`,
  };
}

function prefixTrace(row, points, colour) {
  const hoverText = (p) =>
    `${p.branches} of ${points.length} branches<br>${format(p.figure.mean, "percent")} % ${interval(p.figure)}`;
  return {
    type: "scatter",
    mode: "lines+markers",
    name: inert(`first j branches of ${row.label}`),
    x: points.map((p) => p.x),
    y: points.map((p) => 100 * p.figure.mean),
    text: points.map(hoverText),
    error_y: bars(
      points.map((p) => p.figure),
      colour,
    ),
    line: { color: colour, width: 1.5, dash: "dot" },
    marker: { symbol: "circle-open", size: 8, color: colour },
    hovertemplate: "%{text}<br>%{x:.2f} M<extra></extra>",
  };
}

function exitTrace(row, exits, colour) {
  const hoverText = (e) =>
    [
      `confidence ≥ ${e.threshold}`,
      `${e.mean_branches.toFixed(2)} branches on average`,
      `${format(e.accuracy.mean, "percent")} % ${interval(e.accuracy)}`,
    ].join("<br>");
  return {
    type: "scatter",
    mode: "lines",
    name: inert(`early exit, ${row.label}`),
    text: exits.map(hoverText),
    x: exits.map((e) => MILLION * e.macs),
    y: exits.map((e) => 100 * e.accuracy.mean),
    line: { color: colour, width: 1.5 },
    hovertemplate: "%{text}<br>%{x:.2f} M<extra></extra>",
  };
}

function frontTrace(front) {
  return {
    type: "scatter",
    mode: "lines",
    name: "Pareto front",
    x: front.map((p) => p.x),
    y: front.map((p) => p.y),
    hoverinfo: "skip",
    line: { color: style("--edge"), width: 1.5, dash: "dash", shape: "hv" },
  };
}

function byCost({ block, lineStyle, row, cost }) {
  const field = cost === "parameters" ? "num_parameters" : "macs";
  const have = measured(block).filter((group) => group.metrics[field]);
  if (have.length < 2) return { missing: "accuracy against cost (needs two settings)" };
  const points = have.map((group) => ({
    group,
    x: MILLION * group.metrics[field].mean,
    y: 100 * accuracy(group).mean,
  }));
  besideEachOther(points);
  const front = pareto(points);
  const traces = [
    ...(front.length > 1 ? [frontTrace(front)] : []),
    ...points.map((p, at) => settingTrace(p, lineStyle(p.group), at < 2 * MOST_LINES)),
  ];
  const prefixes = prefixPoints(row, field);
  const exits = field === "macs" ? (row?.branches > 1 && row.exits) || [] : [];
  if (prefixes.length > 1) traces.push(prefixTrace(row, prefixes, lineStyle(row).colour));
  if (exits.length > 1) traces.push(exitTrace(row, exits, lineStyle(row).colour));
  const head = field === "macs" ? "MACs of an image, millions" : "parameters, millions";
  const figures = [...have.map(accuracy), ...prefixes.map((p) => p.figure)];
  return {
    traces,
    layout: layout(axis(head), accuracyAxis(figures), { height: 400 }),
    caption:
      `${meansOf(have.map(accuracy))}, ${nOf(have)}.` +
      (front.length > 1 ? " Dashed: no setting is both cheaper and better in the mean." : "") +
      " Settings of equal cost are drawn beside each other." +
      (points.length > 2 * MOST_LINES ? " Hover over a mark for its name if the legend has none." : "") +
      (prefixes.length > 1 ? " Open circles: the same student with its first branches only." : ""),
    table: {
      head: [`Setting (${field === "macs" ? "M MACs" : "M parameters"})`, "Accuracy %", "95 % interval", "n"],
      rows: points.map(({ group, x }) => valueRow(`${group.label} (${x.toFixed(2)})`, accuracy(group))),
    },
  };
}
