// Charts of branches, training and corrupted images.

/** One part of every student: a branch, the ensemble, any branch that is right. */
function partTrace(have, place, { name, symbol, size, colour, pick, part = null }) {
  const some = have.filter((group) => pick(group));
  const figures = some.map(pick);
  const hoverText = (f, at) => `${inert(some[at].label)}<br>${name}: ${format(f.mean, "percent")} % ${interval(f)}`;
  return scatter("markers", name, figures.map((f) => 100 * f.mean), some.map((group) => place(group, part)), {
    error_x: bars(figures, colour),
    marker: { symbol, size, color: colour, line: { width: 1, color: colour } },
    text: figures.map(hoverText),
    hovertemplate: "%{text}<extra></extra>",
  });
}

function partsOf(have, palette) {
  const most = Math.max(...have.map((group) => group.branch_accuracy.length));
  const single = Array.from({ length: most }, (_, k) => ({
    name: `branch ${k}`,
    symbol: ["circle", "square", "triangle-up", "cross"][k % 4],
    size: 6,
    colour: lineStyleAt(k, palette).colour,
    pick: (group) => group.branch_accuracy[k],
    part: k,
  }));
  return [
    ...single,
    { name: "ensemble", symbol: "diamond", size: 11, colour: style("--ink"), pick: accuracy },
    {
      name: "any branch right",
      symbol: "triangle-up-open",
      size: 10,
      colour: style("--soft"),
      pick: (group) => group.metrics.test_oracle_accuracy,
    },
  ];
}

function branches({ block, palette }) {
  const all = block.filter((group) => group.branch_accuracy.length > 1);
  if (!all.length) return { missing: "accuracy of branches (no student has several)" };
  const have = all.slice(0, 2 * MOST_LINES);
  const parts = partsOf(have, palette);
  const aside = (group, part) => (0.5 * (part - (group.branch_accuracy.length - 1) / 2)) / (parts.length - 2);
  const place = (group, part = null) => -have.indexOf(group) - (part === null ? 0 : aside(group, part));
  const shown = have.flatMap((group) =>
    parts.filter(({ pick }) => pick(group)).map(({ name, pick }) => [`${group.label}, ${name}`, pick(group)]),
  );
  return {
    traces: parts.map((part) => partTrace(have, place, part)).filter((trace) => trace.x.length),
    layout: layout(
      accuracyAxis(shown.map(([, figure]) => figure)),
      axis("", {
        tickvals: have.map((group) => place(group)),
        ticktext: have.map((group) => inert(group.label)),
        range: [0.6 - have.length, 0.6],
      }),
      { height: Math.max(280, 140 + 34 * have.length), margin: { l: 110, r: 14, t: 34, b: 46 } },
    ),
    caption:
      `${meansOf(have.map(accuracy))}, ${nOf(have)}.` +
      (all.length > have.length ? ` The first ${have.length} of ${all.length} settings.` : ""),
    table: valueTable("Setting, part", shown),
  };
}

function learning({ block, lineStyle, curve }) {
  const key = curve || "val/accuracy";
  const all = block.filter((group) => group.curves[key]?.length > 1);
  if (!all.length) return { missing: "learning curves (no metrics.csv with two epochs)" };
  const have = all.slice(0, MOST_LINES);
  const kind = key.endsWith("accuracy") ? "percent" : "plain";
  const figures = have.flatMap((group) => group.curves[key].map((place) => place.figure));
  const last = have.map((group) => group.curves[key].at(-1).figure);
  return {
    traces: have.flatMap((group) =>
      bandTraces(group.label, group.curves[key], lineStyle(group), kind, (place) => `epoch ${place.x}`),
    ),
    layout: layout(
      axis("epoch"),
      kind === "percent" ? accuracyAxis(figures, `${curveName(key)}, %`) : axis(curveName(key)),
    ),
    caption: `${meansOf(last, "band")}, ${runsBehind(last.map((f) => f.n))}.${cut(all, "settings")}`,
    table: valueTable("Setting, last epoch", have.map((group, at) => [group.label, last[at]]), kind, key),
  };
}

function corruptions({ block, lineStyle }) {
  const shifted = block.filter((group) => group.severity.length);
  if (!shifted.length) return { missing: "corruptions (no run was evaluated on corrupted images)" };
  // Only settings evaluated on the same images share the axes: the kind of images that most settings have.
  const kinds = distinct(shifted.map((group) => group.corrupted));
  const ofKind = (kind) => shifted.filter((group) => group.corrupted === kind);
  const all = kinds.map(ofKind).reduce((most, some) => (some.length > most.length ? some : most));
  const others = shifted.length - all.length;
  const have = all.slice(0, MOST_LINES);
  const first = have.map((group) => group.severity[0]);
  const places = (group) =>
    [group.metrics.corruption_clean_accuracy, ...group.severity].map((figure, x) => ({ x, figure })).filter(({ figure }) => figure);
  const hover = ({ x }) => (x ? `severity ${x}` : "clean images");
  return {
    traces: have.flatMap((group) => bandTraces(group.label, places(group), lineStyle(group), "percent", hover)),
    layout: layout(
      axis("severity (0: clean)", { dtick: 1 }),
      accuracyAxis(have.flatMap((g) => places(g).map((p) => p.figure))),
    ),
    caption:
      `Mean over corruptions. ${meansOf(first, "band")}, ${runsBehind(first.map((f) => f.n))}; ${have[0].corrupted}.` +
      (others ? ` Not drawn: ${others} evaluated on other images.` : "") +
      cut(all, "settings"),
    table: valueTable(
      "Setting, severity",
      have.flatMap((g) => places(g).map(({ x, figure }) => [`${g.label}, ${x}`, figure])),
    ),
  };
}
