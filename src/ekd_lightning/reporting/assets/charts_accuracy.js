// Charts of accuracy: against images, counts and cost, and what each part of the method adds.
// Each takes {groups, block, row, lineStyle, reference}: all groups of the data set, those at the chosen fraction, the chosen one.

const accuracy = (group) => group.metrics.test_accuracy;
const measured = (groups) => groups.filter((group) => accuracy(group));
const nOf = (groups) => runsBehind(groups.map((group) => accuracy(group).n));
const cut = (all, what) =>
  all.length > MOST_LINES
    ? ` The first ${MOST_LINES} of ${all.length} ${what} are drawn: filter to see others.`
    : "";
const valueRow = (name, figure) => [
  name,
  (100 * figure.mean).toFixed(2),
  known(figure.low) ? ends(figure, "percent") : "too few runs",
  String(figure.n),
];

function byFraction({ groups, lineStyle }) {
  const lines = new Map();
  for (const group of measured(groups)) {
    if (!lines.has(group.label)) lines.set(group.label, []);
    if (!lines.get(group.label).some((one) => one.fraction === group.fraction))
      lines.get(group.label).push(group);
  }
  const drawn = [...lines].filter(([, own]) => new Set(own.map((one) => one.fraction)).size > 1);
  if (!drawn.length) return { missing: "accuracy against images (needs one method at two fractions)" };
  const kept = drawn.slice(0, MOST_LINES);
  const ticks = distinct(kept.flatMap(([, own]) => own.map((one) => one.fraction)));
  const images = new Map(kept.flatMap(([, own]) => own.map((one) => [one.fraction, one.images])));
  const traces = kept.flatMap(([name, own]) =>
    bandTraces(
      name,
      own
        .sort((a, b) => a.fraction - b.fraction)
        .map((one) => ({ x: 100 * one.fraction, figure: accuracy(one) })),
      lineStyle(own[0]),
      "percent",
      (point) => `${Number(point.x.toPrecision(4))} % of the images`,
    ),
  );
  return {
    traces,
    layout: layout(
      axis("training images, % (number)", {
        type: "log",
        tickvals: ticks.map((f) => 100 * f),
        ticktext: ticks.map((f) => share(f, images.get(f)).replace(" %", "")),
      }),
      accuracyAxis(kept.flatMap(([, own]) => own.map(accuracy))),
    ),
    caption: `${meansOf(kept.flatMap(([, own]) => own.map(accuracy)), "band")}, ${nOf(kept.flatMap(([, own]) => own))}.${cut(drawn, "methods")}`,
    table: {
      head: ["Method, images", "Accuracy %", "95 % interval", "n"],
      rows: kept.flatMap(([name, own]) =>
        own.map((one) => valueRow(`${name}, ${share(one.fraction, one.images)}`, accuracy(one))),
      ),
    },
  };
}

function byCounts({ block }) {
  const lines = new Map();
  for (const group of measured(block)) {
    if (!lines.has(group.grid)) lines.set(group.grid, []);
    lines.get(group.grid).push(group);
  }
  const best = [...lines.values()]
    .filter((own) => new Set(own.map((g) => `${g.teachers}/${g.branches}`)).size > 1)
    .sort((a, b) => b.length - a.length)[0];
  if (!best) return { missing: "teachers × branches (needs one method with several counts)" };
  const [teachers, branches] = [distinct(best.map((g) => g.teachers)), distinct(best.map((g) => g.branches))];
  const at = (m, k) => best.find((g) => g.teachers === m && g.branches === k);
  const cells = teachers.flatMap((m) => branches.map((k) => ({ m, k, group: at(m, k) })));
  const text = ({ group }) =>
    group
      ? `<b>${(100 * accuracy(group).mean).toFixed(2)}</b><br>${known(accuracy(group).low) ? ends(accuracy(group), "percent") : "too few runs"}<br>n = ${accuracy(group).n}`
      : "";
  return {
    traces: [
      {
        type: "heatmap",
        x: branches.map(String),
        y: teachers.map(String),
        colorscale: SHADES,
        textfont: { color: ON_SHADES },
        xgap: 2,
        ygap: 2,
        z: teachers.map((m) => branches.map((k) => (at(m, k) ? 100 * accuracy(at(m, k)).mean : null))),
        text: teachers.map((m) =>
          branches.map((k) => text(cells.find((cell) => cell.m === m && cell.k === k))),
        ),
        texttemplate: "%{text}",
        hovertemplate: "M = %{y}, K = %{x}<br>%{text}<extra></extra>",
        hoverongaps: false,
        colorbar: { title: { text: "accuracy, %", side: "right" }, thickness: 12, outlinewidth: 0 },
      },
    ],
    layout: layout(axis("branches K", { type: "category" }), axis("teachers M", { type: "category" }), {
      margin: { l: 50, r: 10, t: 34, b: 46 },
    }),
    caption: `${best[0].grid}: mean, 95 % interval, n. Empty: no run is done.`,
    table: {
      head: ["M, K", "Accuracy %", "95 % interval", "n"],
      rows: cells.filter((c) => c.group).map((c) => valueRow(`M = ${c.m}, K = ${c.k}`, accuracy(c.group))),
    },
  };
}

function differences({ block, lineStyle, reference }) {
  const to = block.find((group) => group.differences[reference])?.differences[reference].to || "a reference";
  const have = block.filter((group) => group.differences[reference]);
  if (!have.length) return { missing: `differences (no setting shares a seed with ${to})` };
  const sure = have
    .filter((group) => known(group.differences[reference].low))
    .sort((a, b) => a.differences[reference].mean - b.differences[reference].mean);
  const unsure = have.length - sure.length;
  if (!sure.length) return { missing: `differences from ${to} (too few runs: an interval needs three pairs)` };
  const names = sure.map((group) => inert(group.label));
  const values = sure.map((group) => group.differences[reference]);
  return {
    traces: [
      {
        type: "bar",
        orientation: "h",
        y: names,
        x: values.map((d) => 100 * d.mean),
        marker: { color: sure.map((g) => fade(lineStyle(g).colour, 0.75)) },
        error_x: bars(values, style("--ink")),
        text: values.map((d) => `${format(d.mean, "points")} ${interval(d, "points")}<br>${pValue(d.p)}`),
        textposition: "none",
        hovertemplate: "%{y}<br>%{text}<extra></extra>",
      },
    ],
    layout: layout(
      axis(`points above ${inert(to)}`, {
        zeroline: true,
        zerolinecolor: style("--edge"),
        zerolinewidth: 1.5,
      }),
      axis("", { type: "category", showgrid: false }),
      {
        height: Math.max(220, 90 + 26 * sure.length),
        showlegend: false,
        margin: { l: 110, r: 14, t: 34, b: 46 },
      },
    ),
    caption:
      `Mean difference paired by seed with its 95 % interval, ${runsBehind(values.map((d) => d.n))}.` +
      (unsure
        ? ` Too few runs for an interval: ${have
            .filter((g) => !sure.includes(g))
            .map((g) => g.label)
            .join(", ")}.`
        : ""),
    table: {
      head: ["Setting", `− ${to}, points`, "95 % interval", "n", "p (Holm)"],
      rows: [...sure]
        .reverse()
        .map((g) => [
          g.label,
          format(g.differences[reference].mean, "points"),
          ends(g.differences[reference], "points"),
          String(g.differences[reference].n),
          pValue(g.differences[reference].p),
        ]),
    },
  };
}
