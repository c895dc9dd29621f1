// Accuracy against cost: settings, their Pareto front, and the operating points of one student.

const MILLION = 1e-6;

/** Places that no cheaper or equally cheap place surpasses. */
function pareto(places) {
  const front = [];
  for (const place of [...places].sort((a, b) => a.x - b.x || b.y - a.y)) {
    if (!front.length || place.y > front.at(-1).y) front.push(place);
  }
  return front;
}

const nearlyEqual = (costs) => Math.max(...costs) - Math.min(...costs) <= 0.1 * Math.max(...costs);

/** Draws places that would hide each other beside each other, around their mean cost. */
function besideEachOther(places) {
  const costs = places.map((p) => p.x);
  const width = nearlyEqual(costs) ? 2 * Math.max(...costs) : Math.max(...costs) - Math.min(...costs);
  const clusters = [];
  for (const place of [...places].sort((a, b) => a.x - b.x)) {
    const last = clusters.at(-1);
    if (last && place.x - last.at(-1).x < 0.008 * width) last.push(place);
    else clusters.push([place]);
  }
  for (const same of clusters) {
    const mean = same.reduce((sum, p) => sum + p.x, 0) / same.length;
    const step = Math.min(0.008, 0.06 / same.length) * width;
    same.forEach((place, position) => {
      place.at = mean + step * (position - (same.length - 1) / 2);
    });
  }
}

function prefixPoints(row, field) {
  return (row?.subsets || [])
    .filter(({ name }) => name.every((branch, at) => branch === at))
    .map((one) => ({ x: MILLION * one[field], figure: one.accuracy, branches: one.name.length }))
    .sort((a, b) => a.branches - b.branches);
}

function settingTrace({ group, x, y, at }, marks, named) {
  const lines = [inert(group.label), `${y.toFixed(2)} % ${interval(accuracy(group))}`, `${x.toFixed(2)} M`];
  return scatter("markers", inert(group.label), [at], [y], {
    showlegend: named,
    error_y: bars([accuracy(group)], marks.colour),
    marker: { color: marks.colour, symbol: marks.symbol, size: 10 },
    hovertemplate: `${lines.join("<br>")}<extra></extra>`,
  });
}

function prefixTrace(row, prefixes, colour) {
  const figures = prefixes.map((p) => p.figure);
  const hoverText = ({ branches, figure }) =>
    `${branches} of ${prefixes.length} branches<br>${format(figure.mean, "percent")} % ${interval(figure)}`;
  const name = inert(`first j branches of ${row.label}`);
  return scatter("lines+markers", name, prefixes.map((p) => p.x), figures.map((f) => 100 * f.mean), {
    text: prefixes.map(hoverText),
    error_y: bars(figures, colour),
    line: { color: colour, width: 1.5, dash: "dot" },
    marker: { symbol: "circle-open", size: 8, color: colour },
    hovertemplate: "%{text}<br>%{x:.2f} M<extra></extra>",
  });
}

function exitTrace(row, exits, colour) {
  const hoverText = (e) =>
    [
      `confidence ≥ ${e.name}`,
      `${e.mean_branches.toFixed(2)} branches on average`,
      `${format(e.accuracy.mean, "percent")} % ${interval(e.accuracy)}`,
    ].join("<br>");
  const [costs, means] = [exits.map((e) => MILLION * e.macs), exits.map((e) => 100 * e.accuracy.mean)];
  return scatter("lines", inert(`early exit, ${row.label}`), costs, means, {
    text: exits.map(hoverText),
    line: { color: colour, width: 1.5 },
    hovertemplate: "%{text}<br>%{x:.2f} M<extra></extra>",
  });
}

function frontTrace(front) {
  const line = { color: style("--edge"), width: 1.5, dash: "dash", shape: "hv" };
  return scatter("lines", "Pareto front", front.map((p) => p.x), front.map((p) => p.y), { hoverinfo: "skip", line });
}

function byCost({ block, lineStyle, row, cost }) {
  const field = cost === "parameters" ? "num_parameters" : "macs";
  const have = measured(block).filter((group) => group.metrics[field]);
  if (have.length < 2) return { missing: "accuracy against cost (needs two settings)" };
  const places = have.map((group) => ({ group, x: MILLION * group.metrics[field].mean, y: 100 * accuracy(group).mean }));
  besideEachOther(places);
  const front = pareto(places);
  const traces = [
    ...(front.length > 1 ? [frontTrace(front)] : []),
    ...places.map((p, at) => settingTrace(p, lineStyle(p.group), at < 2 * MOST_LINES)),
  ];
  const prefixes = prefixPoints(row, field);
  const exits = field === "macs" ? (row?.branches > 1 && row.exits) || [] : [];
  if (prefixes.length > 1) traces.push(prefixTrace(row, prefixes, lineStyle(row).colour));
  if (exits.length > 1) traces.push(exitTrace(row, exits, lineStyle(row).colour));
  const head = field === "macs" ? "MACs of an image, millions" : "parameters, millions";
  const figures = [...have.map(accuracy), ...prefixes.map((p) => p.figure)];
  const costs = [...places, ...prefixes].map((p) => p.x).concat(exits.map((e) => MILLION * e.macs));
  const range = nearlyEqual(costs) ? { range: [0, 2 * Math.max(...costs)] } : {};
  return {
    traces,
    layout: layout(axis(head, range), accuracyAxis(figures), { height: 400 }),
    caption:
      `${meansOf(have.map(accuracy))}, ${nOf(have)}.` +
      (front.length > 1 ? " Dashed: no setting is both cheaper and better in the mean." : "") +
      " Settings of about equal cost are drawn beside each other." +
      (places.length > 2 * MOST_LINES ? " Hover over a mark for its name if the legend has none." : "") +
      (prefixes.length > 1 ? " Open circles: the same student with its first branches only." : ""),
    table: valueTable(
      `Setting (${field === "macs" ? "M MACs" : "M parameters"})`,
      places.map(({ group, x }) => [`${group.label} (${x.toFixed(2)})`, accuracy(group)]),
    ),
  };
}
