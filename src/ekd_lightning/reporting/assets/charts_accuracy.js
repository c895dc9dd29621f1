// Charts of accuracy: against images, counts and cost, and what each part of the method adds.
// Each takes {groups, block, row, look, reference}: all groups of the data set, those at the chosen fraction, the chosen one.

const accuracy = (group) => group.metrics.test_accuracy;
const measured = (groups) => groups.filter((group) => accuracy(group));
const nOf = (groups) => runsBehind(groups.map((group) => accuracy(group).n));
const cut = (all, what) => (all.length > MOST_LINES ? ` The first ${MOST_LINES} of ${all.length} ${what} are drawn: filter to see others.` : "");
const valueRow = (name, figure) => [name, (100 * figure.mean).toFixed(2), known(figure.half) ? ends(figure, "percent") : "not enough runs", String(figure.n)];

function byFraction({ groups, look }) {
  const lines = new Map();
  for (const group of measured(groups)) {
    if (!lines.has(group.label)) lines.set(group.label, []);
    if (!lines.get(group.label).some((one) => one.fraction === group.fraction)) lines.get(group.label).push(group);
  }
  const drawn = [...lines].filter(([, own]) => new Set(own.map((one) => one.fraction)).size > 1);
  if (!drawn.length) return { missing: "accuracy against images (needs one method at two fractions)" };
  const kept = drawn.slice(0, MOST_LINES);
  const ticks = distinct(kept.flatMap(([, own]) => own.map((one) => one.fraction)));
  const traces = kept.flatMap(([name, own]) => bandTraces(name,
    own.sort((a, b) => a.fraction - b.fraction).map((one) => ({ x: 100 * one.fraction, figure: accuracy(one) })),
    look(own[0]), "percent", (point) => `${Number(point.x.toPrecision(6))} % of the images`));
  return {
    traces, layout: layout(axis("training images, %", { type: "log", tickvals: ticks.map((f) => 100 * f), ticktext: ticks.map((f) => String(Number((100 * f).toPrecision(6)))) }),
      accuracyAxis(kept.flatMap(([, own]) => own.map(accuracy)))),
    caption: `Mean and 95 % band over seeds, ${nOf(kept.flatMap(([, own]) => own))}.${cut(drawn, "methods")}`,
    table: { head: ["Method, images", "Accuracy %", "95 % interval", "n"],
      rows: kept.flatMap(([name, own]) => own.map((one) => valueRow(`${name}, ${share(one.fraction)}`, accuracy(one)))) },
  };
}

function byCounts({ block }) {
  const lines = new Map();
  for (const group of measured(block)) {
    if (!lines.has(group.grid)) lines.set(group.grid, []);
    lines.get(group.grid).push(group);
  }
  const best = [...lines.values()].filter((own) => new Set(own.map((g) => `${g.teachers}/${g.branches}`)).size > 1)
    .sort((a, b) => b.length - a.length)[0];
  if (!best) return { missing: "teachers × branches (needs one method with several counts)" };
  const [teachers, branches] = [distinct(best.map((g) => g.teachers)), distinct(best.map((g) => g.branches))];
  const at = (m, k) => best.find((g) => g.teachers === m && g.branches === k);
  const cells = teachers.flatMap((m) => branches.map((k) => ({ m, k, group: at(m, k) })));
  const text = ({ group }) => (group ? `<b>${(100 * accuracy(group).mean).toFixed(2)}</b><br>${known(accuracy(group).half) ? ends(accuracy(group), "percent") : "no interval"}<br>n = ${accuracy(group).n}` : "");
  return {
    traces: [{ type: "heatmap", x: branches.map(String), y: teachers.map(String), colorscale: SHADES, textfont: { color: ON_SHADES }, xgap: 2, ygap: 2,
      z: teachers.map((m) => branches.map((k) => (at(m, k) ? 100 * accuracy(at(m, k)).mean : null))),
      text: teachers.map((m) => branches.map((k) => text(cells.find((cell) => cell.m === m && cell.k === k)))),
      texttemplate: "%{text}", hovertemplate: "M = %{y}, K = %{x}<br>%{text}<extra></extra>", hoverongaps: false,
      colorbar: { title: { text: "accuracy, %", side: "right" }, thickness: 12, outlinewidth: 0 } }],
    layout: layout(axis("branches K", { type: "category" }), axis("teachers M", { type: "category" }), { margin: { l: 50, r: 10, t: 12, b: 46 } }),
    caption: `${best[0].grid}: mean, 95 % interval, n. Empty: no run is done.`,
    table: { head: ["M, K", "Accuracy %", "95 % interval", "n"], rows: cells.filter((c) => c.group).map((c) => valueRow(`M = ${c.m}, K = ${c.k}`, accuracy(c.group))) },
  };
}

/** Points that no cheaper or equally cheap one surpasses. */
function pareto(points) {
  const front = [];
  for (const point of [...points].sort((a, b) => a.x - b.x || b.y - a.y)) {
    if (!front.length || point.y > front[front.length - 1].y) front.push(point);
  }
  return front;
}

function byCost({ block, look, row, cost }) {
  const field = cost === "parameters" ? "num_parameters" : "macs";
  const scale = 1e-6;
  const have = measured(block).filter((group) => group.metrics[field]);
  if (have.length < 2) return { missing: "accuracy against cost (needs two settings)" };
  const points = have.map((group) => ({ group, x: scale * group.metrics[field].mean, y: 100 * accuracy(group).mean }));
  besideEachOther(points);
  const traces = [];
  for (const { group, x, y, at } of points) {
    const marks = look(group);
    traces.push({ type: "scatter", mode: "markers", name: inert(group.label), x: [at], y: [y], error_y: bars([accuracy(group)], marks.colour),
      marker: { color: marks.colour, symbol: marks.symbol, size: 10 }, showlegend: points.length <= 2 * MOST_LINES,
      hovertemplate: `${inert(group.label)}<br>${y.toFixed(2)} % ${interval(accuracy(group))}<br>${x.toFixed(2)} M<extra></extra>` });
  }
  const prefixes = prefixPoints(row, field, scale);
  if (prefixes.length > 1) traces.push({ type: "scatter", mode: "lines+markers", name: inert(`first j branches of ${row.label}`),
    x: prefixes.map((p) => p.x), y: prefixes.map((p) => p.y), line: { color: look(row).colour, width: 1.5, dash: "dot" },
    error_y: bars(prefixes.map((p) => p.figure), look(row).colour), marker: { symbol: "circle-open", size: 8, color: look(row).colour },
    text: prefixes.map((p) => `${p.branches} of ${prefixes.length} branches<br>${p.y.toFixed(2)} % ${interval(p.figure)}`), hovertemplate: "%{text}<br>%{x:.2f} M<extra></extra>" });
  const exits = field === "macs" ? (row?.exits || []) : [];
  if (exits.length > 1) traces.push({ type: "scatter", mode: "lines", name: inert(`early exit, ${row.label}`),
    x: exits.map((e) => scale * e.macs), y: exits.map((e) => 100 * e.accuracy.mean), line: { color: look(row).colour, width: 1.5 },
    text: exits.map((e) => `confidence ≥ ${e.threshold}<br>${e.mean_branches.toFixed(2)} branches on average<br>${(100 * e.accuracy.mean).toFixed(2)} % ${interval(e.accuracy)}`), hovertemplate: "%{text}<br>%{x:.2f} M<extra></extra>" });
  const front = pareto(points);
  traces.unshift({ type: "scatter", mode: "lines", name: "Pareto front", x: front.map((p) => p.x), y: front.map((p) => p.y), hoverinfo: "skip",
    line: { color: style("--edge"), width: 1.5, dash: "dash", shape: "hv" } });
  const head = field === "macs" ? "multiply-accumulates of an image, millions" : "parameters, millions";
  return {
    traces, layout: layout(axis(head), accuracyAxis([...have.map(accuracy), ...prefixes.map((p) => p.figure)]), { height: 400 }),
    caption: `Mean with 95 % interval, ${nOf(have)}. Dashed: no setting is both cheaper and better in the mean. Settings of the same cost stand beside each other.`
      + (prefixes.length > 1 ? " Open circles: the same student with its first branches only." : ""),
    table: { head: [`Setting (${(field === "macs" ? "M MACs" : "M parameters")})`, "Accuracy %", "95 % interval", "n"],
      rows: points.map(({ group, x }) => valueRow(`${group.label} (${x.toFixed(2)})`, accuracy(group))) },
  };
}

/** Where points are drawn that cost the same: a little beside each other. */
function besideEachOther(points) {
  const width = Math.max(...points.map((p) => p.x)) - Math.min(...points.map((p) => p.x)) || 1;
  for (const x of new Set(points.map((p) => p.x))) {
    const same = points.filter((p) => p.x === x);
    const step = Math.min(0.008, 0.06 / same.length) * width;
    same.forEach((point, position) => { point.at = x + step * (position - (same.length - 1) / 2); });
  }
}

function prefixPoints(row, field, scale) {
  return (row?.subsets || []).filter(({ branches }) => branches.every((branch, at) => branch === at)).map((subset) => ({
    x: scale * subset[field], y: 100 * subset.accuracy.mean, figure: subset.accuracy, branches: subset.branches.length }))
    .sort((a, b) => a.branches - b.branches);
}

function differences({ block, look, reference }) {
  const to = block.find((group) => group.differences[reference])?.differences[reference].to || "a reference";
  const have = block.filter((group) => group.differences[reference]);
  if (!have.length) return { missing: `differences (no setting shares a seed with ${to})` };
  const sure = have.filter((group) => known(group.differences[reference].half)).sort((a, b) => a.differences[reference].mean - b.differences[reference].mean);
  const unsure = have.length - sure.length;
  if (!sure.length) return { missing: `differences to ${to} (not enough runs: an interval needs two pairs)` };
  const names = sure.map((group) => inert(group.label));
  const values = sure.map((group) => group.differences[reference]);
  return {
    traces: [{ type: "bar", orientation: "h", y: names, x: values.map((d) => 100 * d.mean), marker: { color: sure.map((g) => fade(look(g).colour, 0.75)) },
      error_x: { type: "data", array: values.map((d) => 100 * d.half), color: style("--ink"), thickness: 1.5, width: 4 },
      text: values.map((d) => `${format(d.mean, "points")} ${interval(d, "points")}<br>${pValue(d.p)}`), textposition: "none", hovertemplate: "%{y}<br>%{text}<extra></extra>" }],
    layout: layout(axis(`points of accuracy above ${inert(to)}`, { zeroline: true, zerolinecolor: style("--edge"), zerolinewidth: 1.5 }),
      axis("", { type: "category", showgrid: false }), { height: Math.max(220, 90 + 26 * sure.length), showlegend: false, margin: { l: 110, r: 14, t: 12, b: 46 } }),
    caption: `Mean difference paired by seed with its 95 % interval, ${runsBehind(values.map((d) => d.n))}.`
      + (unsure ? ` Not enough runs for an interval: ${have.filter((g) => !sure.includes(g)).map((g) => g.label).join(", ")}.` : ""),
    table: { head: ["Setting", `− ${to}, points`, "95 % interval", "n", "p (Holm)"],
      rows: [...sure].reverse().map((g) => [g.label, format(g.differences[reference].mean, "points"), ends(g.differences[reference], "points"), String(g.differences[reference].n), pValue(g.differences[reference].p)]) },
  };
}
