// Charts of accuracy: against images, counts and cost, and what each part of the method adds.
// Each takes {groups, block, row, lineStyle, reference}: all groups of the data set, those at the chosen fraction, the chosen one.

const accuracy = (group) => group.metrics.test_accuracy;
const measured = (groups) => groups.filter((group) => accuracy(group));
const nOf = (groups) => runsBehind(groups.map((group) => accuracy(group).n));
const cut = (all, what) =>
  all.length > MOST_LINES ? ` The first ${MOST_LINES} of ${all.length} ${what} are drawn: filter to see others.` : "";

function byFraction({ groups, lineStyle }) {
  const lines = new Map();
  for (const group of measured(groups)) {
    if (!lines.has(group.label)) lines.set(group.label, []);
    if (!lines.get(group.label).some((one) => one.fraction === group.fraction)) lines.get(group.label).push(group);
  }
  const drawn = [...lines.values()].filter((own) => own.length > 1);
  if (!drawn.length) return { missing: "accuracy against images (needs one method at two fractions)" };
  const kept = drawn.slice(0, MOST_LINES).map((own) => own.sort((a, b) => a.fraction - b.fraction));
  const all = kept.flat();
  const ticks = distinct(all.map((one) => one.fraction));
  const images = new Map(all.map((one) => [one.fraction, one.images]));
  const hover = (place) => `${Number(place.x.toPrecision(4))} % of the images`;
  const traces = kept.flatMap((own) => {
    const places = own.map((one) => ({ x: 100 * one.fraction, figure: accuracy(one) }));
    return bandTraces(own[0].label, places, lineStyle(own[0]), "percent", hover);
  });
  return {
    traces,
    layout: layout(
      axis("training images, % (number)", {
        type: "log",
        tickvals: ticks.map((f) => 100 * f),
        ticktext: ticks.map((f) => share(f, images.get(f)).replace(" %", "")),
      }),
      accuracyAxis(all.map(accuracy)),
    ),
    caption: `${meansOf(all.map(accuracy), "band")}, ${nOf(all)}.${cut(drawn, "methods")}`,
    table: valueTable(
      "Method, images",
      all.map((one) => [`${one.label}, ${share(one.fraction, one.images)}`, accuracy(one)]),
    ),
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
  const cells = teachers.map((m) => branches.map((k) => best.find((g) => g.teachers === m && g.branches === k)));
  const matrix = (write, empty) => cells.map((row) => row.map((group) => (group ? write(accuracy(group)) : empty)));
  const text = (figure) =>
    `<b>${format(figure.mean, "percent")}</b><br>${spread(figure, "percent")}<br>n = ${figure.n}`;
  return {
    traces: [
      heatMap(branches, teachers, matrix((figure) => 100 * figure.mean, null), "accuracy, %", {
        text: matrix(text, ""),
        texttemplate: "%{text}",
        hovertemplate: "M = %{y}, K = %{x}<br>%{text}<extra></extra>",
        hoverongaps: false,
      }),
    ],
    layout: layout(axis("branches K", { type: "category" }), axis("teachers M", { type: "category" }), {
      margin: { l: 50, r: 10, t: 34, b: 46 },
    }),
    caption: `${best[0].grid}: mean, 95 % interval, n. Empty: no run is done.`,
    table: valueTable(
      "M, K",
      cells.flat().filter(Boolean).map((g) => [`M = ${g.teachers}, K = ${g.branches}`, accuracy(g)]),
    ),
  };
}

function differences({ block, lineStyle, reference }) {
  const against = (group) => group.differences[reference];
  const have = block.filter(against);
  if (!have.length) return { missing: "differences (no setting shares a seed with a reference)" };
  const { to } = against(have[0]);
  const sure = have.filter((group) => known(against(group).low)).sort((a, b) => against(a).mean - against(b).mean);
  if (!sure.length) return { missing: `differences from ${to} (too few runs: an interval needs three pairs)` };
  const unsure = have.filter((group) => !sure.includes(group)).map((group) => group.label);
  const values = sure.map(against);
  const table = valueTable("Setting", sure.map((g) => [g.label, against(g)]), "points", `− ${to}, points`);
  return {
    traces: [
      {
        type: "bar",
        orientation: "h",
        y: sure.map((group) => inert(group.label)),
        x: values.map((d) => 100 * d.mean),
        marker: { color: sure.map((g) => fade(lineStyle(g).colour, 0.75)) },
        error_x: bars(values, style("--ink")),
        text: values.map((d) => `${format(d.mean, "points")} ${interval(d, "points")}<br>${pValue(d.p)}`),
        textposition: "none",
        hovertemplate: "%{y}<br>%{text}<extra></extra>",
      },
    ],
    layout: layout(
      axis(`points above ${inert(to)}`, { zeroline: true, zerolinecolor: style("--edge"), zerolinewidth: 1.5 }),
      axis("", { type: "category", showgrid: false }),
      { height: Math.max(220, 90 + 26 * sure.length), showlegend: false, margin: { l: 110, r: 14, t: 34, b: 46 } },
    ),
    caption:
      `Mean difference paired by seed with its 95 % interval, ${runsBehind(values.map((d) => d.n))}.` +
      (unsure.length ? ` Too few runs for an interval: ${unsure.join(", ")}.` : ""),
    table: {
      head: [...table.head, "p (Holm)"],
      rows: table.rows.map((row, at) => [...row, pValue(values[at].p)]).reverse(),
    },
  };
}
