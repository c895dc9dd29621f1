// Charts of what happens inside: branches, training, calibration, corruptions, similarity of features.

function branches({ block, look }) {
  const all = block.filter((group) => group.branch_accuracy.length > 1);
  if (!all.length) return { missing: "accuracy of branches (no student has several)" };
  const have = all.slice(0, 2 * MOST_LINES);
  const most = Math.max(...have.map((group) => group.branch_accuracy.length));
  const place = (group, part = null) => -have.indexOf(group) - (part === null ? 0 : (0.5 * (part - (group.branch_accuracy.length - 1) / 2)) / most);
  const dots = (name, symbol, size, colour, pick, part = null) => {
    const some = have.filter((group) => pick(group));
    const figures = some.map(pick);
    return { type: "scatter", mode: "markers", name, y: some.map((group) => place(group, part)), x: figures.map((f) => 100 * f.mean),
      error_x: bars(figures, colour), marker: { symbol, size, color: colour, line: { width: 1, color: colour } },
      text: figures.map((f, at) => `${inert(some[at].label)}<br>${name}: ${(100 * f.mean).toFixed(2)} % ${interval(f)}`), hovertemplate: "%{text}<extra></extra>" };
  };
  const traces = Array.from({ length: most }, (_, k) => dots(`branch ${k + 1}`, ["circle", "square", "triangle-up", "cross"][k % 4], 6, look({ branch: k }).colour, (g) => g.branch_accuracy[k], k));
  traces.push(dots("ensemble", "diamond", 11, style("--ink"), accuracy), dots("any branch right", "triangle-up-open", 10, style("--soft"), (g) => g.metrics.test_oracle_accuracy));
  return {
    traces: traces.filter((trace) => trace.x.length),
    layout: layout(accuracyAxis(have.flatMap((g) => [...g.branch_accuracy, accuracy(g), g.metrics.test_oracle_accuracy].filter(Boolean))),
      axis("", { tickvals: have.map((g) => place(g)), ticktext: have.map((g) => inert(g.label)), range: [0.6 - have.length, 0.6] }), { height: Math.max(280, 140 + 34 * have.length), margin: { l: 110, r: 14, t: 12, b: 46 } }),
    caption: `Mean with 95 % interval over seeds, ${nOf(have)}.${all.length > have.length ? ` The first ${have.length} of ${all.length} settings.` : ""}`,
    table: { head: ["Setting, part", "Accuracy %", "95 % interval", "n"], rows: have.flatMap((g) => [
      ...g.branch_accuracy.map((f, k) => valueRow(`${g.label}, branch ${k + 1}`, f)), valueRow(`${g.label}, ensemble`, accuracy(g)),
      ...(g.metrics.test_oracle_accuracy ? [valueRow(`${g.label}, any branch right`, g.metrics.test_oracle_accuracy)] : [])]) },
  };
}

function learning({ block, look, curve }) {
  const key = curve || "val/accuracy";
  const all = block.filter((group) => group.curves[key]?.length > 1);
  if (!all.length) return { missing: "learning curves (no metrics.csv with two epochs)" };
  const have = all.slice(0, MOST_LINES);
  const kind = key.endsWith("accuracy") ? "percent" : "plain";
  const points = (group) => group.curves[key].map(([x, mean_, half, n]) => ({ x, figure: { mean: mean_, half, n } }));
  const last = have.map((group) => points(group).at(-1).figure);
  return {
    traces: have.flatMap((group) => bandTraces(group.label, points(group), look(group), kind, (point) => `epoch ${point.x}`)),
    layout: layout(axis("epoch"), kind === "percent" ? accuracyAxis(have.flatMap((g) => points(g).map((p) => p.figure)), `${key.replace("/", " ")}, %`) : axis(key.replace("/", " "))),
    caption: `Mean and 95 % band over seeds, ${runsBehind(last.map((f) => f.n))}.${cut(all, "settings")}`,
    table: { head: ["Setting, last epoch", key, "95 % interval", "n"], rows: have.map((g, at) => [g.label, format(last[at].mean, kind),
      known(last[at].half) ? ends(last[at], kind) : "not enough runs", String(last[at].n)]) },
  };
}

function reliability({ row }) {
  const both = [["before", row?.reliability?.before], ["after temperature scaling", row?.reliability?.after]].filter(([, one]) => one);
  if (!both.length) return { missing: "reliability (the chosen setting has no predictions on record)" };
  const colours = [style("--bad"), style("--accent")];
  const traces = [{ type: "scatter", mode: "lines", x: [0, 1], y: [0, 1], hoverinfo: "skip", name: "calibrated", line: { color: style("--edge"), dash: "dash", width: 1 } }];
  both.forEach(([name, bins], at) => traces.push({ type: "scatter", mode: "lines+markers", name, x: bins.map((b) => b.confidence), y: bins.map((b) => b.accuracy.mean),
    error_y: bars(bins.map((b) => b.accuracy), colours[at], 1), marker: { symbol: at ? "square" : "circle", size: bins.map((b) => 5 + 11 * Math.sqrt(b.share)), color: colours[at] },
    line: { color: colours[at], width: 1.5 }, hovertemplate: "%{text}<extra></extra>",
    text: bins.map((b) => `${name}<br>confidence ${b.confidence.toFixed(3)}<br>accuracy ${b.accuracy.mean.toFixed(3)} ${interval(b.accuracy, "plain")}<br>${(100 * b.share).toFixed(1)} % of the images`) }));
  const n = row.reliability.n;
  return {
    traces, layout: layout(axis("confidence", { range: [0, 1.02] }), axis("accuracy", { range: [0, 1.02] })),
    caption: `${row.label}: 15 bins of confidence, n = ${n}${n < 2 ? ": not enough runs for intervals" : ", 95 % intervals over seeds"}. Larger marks hold more images.`,
    table: { head: ["Bin", "Confidence", "Accuracy", "Share of images"], rows: both.flatMap(([name, bins]) => bins.map((b) => [name, b.confidence.toFixed(3), b.accuracy.mean.toFixed(3), `${(100 * b.share).toFixed(1)} %`])) },
  };
}

function corruptions({ block, look }) {
  const all = block.filter((group) => group.severity.length);
  if (!all.length) return { missing: "corruptions (no run was evaluated on corrupted images)" };
  const have = all.slice(0, MOST_LINES);
  const clean = (group) => (accuracy(group) ? [{ x: 0, figure: accuracy(group) }] : []);
  const points = (group) => [...clean(group), ...group.severity.map((figure, at) => ({ x: at + 1, figure }))];
  return {
    traces: have.flatMap((group) => bandTraces(group.label, points(group), look(group), "percent", (point) => (point.x ? `severity ${point.x}` : "clean images"))),
    layout: layout(axis("severity (0: clean)", { dtick: 1 }), accuracyAxis(have.flatMap((g) => points(g).map((p) => p.figure)))),
    caption: `Mean over corruptions, mean and 95 % band over seeds, ${runsBehind(have.map((g) => g.severity[0].n))}; images ${distinct(have.map((g) => g.corruption_source)).join(" and ")}.${cut(all, "settings")}`,
    table: { head: ["Setting, severity", "Accuracy %", "95 % interval", "n"], rows: have.flatMap((g) => points(g).map((p) => valueRow(`${g.label}, ${p.x}`, p.figure))) },
  };
}

function similarity({ row }) {
  const blocks = [["between branches", row?.cka?.branch, "branch"], ["with teachers", row?.cka?.teacher, "teacher"]].filter(([, one]) => one);
  if (!blocks.length) return { missing: "similarity of features (the chosen setting has no CKA on record)" };
  const number = (count) => Array.from({ length: count }, (_, at) => String(at + 1));
  const rows = number(blocks[0][1].length);
  const traces = blocks.map(([, z, name], at) => ({ type: "heatmap", z, x: number(z[0].length), y: rows, xaxis: at ? "x2" : "x", yaxis: at ? "y2" : "y", colorscale: SHADES, textfont: { color: ON_SHADES },
    zmin: 0, zmax: 1, xgap: 2, ygap: 2, texttemplate: "%{z:.3f}", hovertemplate: `branch %{y}, ${name} %{x}<br>CKA %{z:.4f}<extra></extra>`, showscale: at === blocks.length - 1,
    colorbar: { title: { text: "linear CKA", side: "right" }, thickness: 12, outlinewidth: 0 } }));
  const own = (row.own_teachers || []).map((teacher, k) => [teacher, k]).filter(([teacher]) => known(teacher));
  const shapes = blocks.length > 1 ? own.map(([teacher, k]) => ({ type: "rect", xref: "x2", yref: "y2", x0: teacher - 0.46, x1: teacher + 0.46, y0: k - 0.46, y1: k + 0.46, line: { color: ON_SHADES, width: 2.5 } })) : [];
  const more = blocks.length > 1 ? { grid: { rows: 1, columns: 2, pattern: "independent" }, xaxis2: axis(blocks[1][2], { type: "category", showgrid: false }), yaxis2: axis("", { type: "category", autorange: "reversed", showgrid: false, showticklabels: false }) } : {};
  return {
    traces, layout: layout(axis(blocks[0][2], { type: "category", showgrid: false }), axis("branch", { type: "category", autorange: "reversed", showgrid: false }), { ...more, shapes, margin: { l: 46, r: 10, t: 12, b: 46 } }),
    caption: `${row.label}: linear CKA of pooled features on the test images, mean over seeds, n = ${row.cka.n}.${shapes.length ? " Framed: the branch’s own teacher." : ""}`,
    table: { head: ["Pair", "CKA"], rows: blocks.flatMap(([, z, name]) => z.flatMap((line, k) => line.map((value, at) => [`branch ${k + 1}, ${name} ${at + 1}`, value.toFixed(4)]))) },
  };
}

const CHARTS = [
  { id: "fraction", title: "Accuracy against training images", build: byFraction },
  { id: "counts", title: "Teachers × branches", build: byCounts },
  { id: "cost", title: "Accuracy against cost", build: byCost, full: true },
  { id: "differences", title: "Differences to the reference", build: differences },
  { id: "branches", title: "Branches and their ensemble", build: branches },
  { id: "learning", title: "Learning curves", build: learning },
  { id: "corruptions", title: "Corrupted images", build: corruptions },
  { id: "reliability", title: "Calibration", build: reliability },
  { id: "similarity", title: "Similarity of features", build: similarity },
];
