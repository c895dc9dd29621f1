// Details of one setting: calibration and similarity of features.

function binsTrace(name, bins, colour, symbol) {
  const hoverText = (b) =>
    [
      name,
      `confidence ${b.confidence.toFixed(3)}`,
      `accuracy ${b.accuracy.mean.toFixed(3)} ${interval(b.accuracy, "plain")}`,
      `${(100 * b.share).toFixed(1)} % of the images`,
    ].join("<br>");
  const accuracies = bins.map((b) => b.accuracy);
  return scatter("lines+markers", name, bins.map((b) => b.confidence), accuracies.map((one) => one.mean), {
    error_y: bars(accuracies, colour, 1),
    line: { color: colour, width: 1.5 },
    marker: { symbol, size: bins.map((b) => 5 + 11 * Math.sqrt(b.share)), color: colour },
    text: bins.map(hoverText),
    hovertemplate: "%{text}<extra></extra>",
  });
}

function reliability({ row }) {
  const both = [
    ["before", row?.reliability?.before],
    ["after temperature scaling", row?.reliability?.after],
  ].filter(([, bins]) => bins);
  if (!both.length) return { missing: "reliability (the chosen setting has no predictions on record)" };
  const styles = [
    [style("--bad"), "circle"],
    [style("--accent"), "square"],
  ];
  const dashes = { hoverinfo: "skip", line: { color: style("--edge"), dash: "dash", width: 1 } };
  const { n } = row.reliability;
  const line = (name, b) => [name, b.confidence.toFixed(3), b.accuracy.mean.toFixed(3), `${(100 * b.share).toFixed(1)} %`];
  return {
    traces: [
      scatter("lines", "calibrated", [0, 1], [0, 1], dashes),
      ...both.map(([name, bins], at) => binsTrace(name, bins, ...styles[at])),
    ],
    layout: layout(axis("confidence", { range: [0, 1.02] }), axis("accuracy", { range: [0, 1.02] })),
    caption:
      `${row.label}: 15 bins of confidence, n = ${n}` +
      `${n < 3 ? ": too few runs for intervals" : ", 95 % intervals over seeds"}. Larger marks hold more images.`,
    table: {
      head: ["Bin", "Confidence", "Accuracy", "Share of images"],
      rows: both.flatMap(([name, bins]) => bins.map((bin) => line(name, bin))),
    },
  };
}

const CATEGORIES = { type: "category", showgrid: false };

function matrixTrace({ values, name }, at, last) {
  return heatMap([...values[0].keys()], [...values.keys()], values, "linear CKA", {
    xaxis: at ? "x2" : "x",
    yaxis: at ? "y2" : "y",
    zmin: 0,
    zmax: 1,
    texttemplate: "%{z:.3f}",
    showscale: last,
    hovertemplate: `branch %{y}, ${name} %{x}<br>CKA %{z:.4f}<extra></extra>`,
  });
}

/** Frames around each branch's own teacher, in the second panel. */
function ownFrames(row) {
  const frame = (x, y) => ({ x0: x - 0.46, x1: x + 0.46, y0: y - 0.46, y1: y + 0.46 });
  const look = { type: "rect", xref: "x2", yref: "y2", line: { color: ON_SHADES, width: 2.5 } };
  return row.own_teachers.flatMap((teacher, k) => (known(teacher) ? [{ ...look, ...frame(teacher, k) }] : []));
}

function similarity({ row }) {
  const panels = [
    { values: row?.branches > 1 ? row.cka?.branch : null, name: "branch" },
    { values: row?.cka?.teacher, name: "teacher" },
  ].filter(({ values }) => values);
  if (!panels.length || !(row.branches > 1))
    return { missing: "similarity of features (the chosen setting has one branch, or no CKA on record)" };
  const two = panels.length > 1;
  const shapes = two ? ownFrames(row) : [];
  const beside = two
    ? {
        grid: { rows: 1, columns: 2, pattern: "independent" },
        xaxis2: axis(panels[1].name, CATEGORIES),
        yaxis2: axis("", { ...CATEGORIES, autorange: "reversed", showticklabels: false }),
      }
    : {};
  const tableRows = ({ values, name }) =>
    values.flatMap((line, k) => line.map((value, at) => [`branch ${k}, ${name} ${at}`, value.toFixed(4)]));
  return {
    traces: panels.map((panel, at) => matrixTrace(panel, at, at === panels.length - 1)),
    layout: layout(axis(panels[0].name, CATEGORIES), axis("branch", { ...CATEGORIES, autorange: "reversed" }), {
      ...beside,
      shapes,
      margin: { l: 46, r: 10, t: 34, b: 46 },
    }),
    caption:
      `${row.label}: linear CKA of pooled features on the test images, mean over seeds, n = ${row.cka.n}.` +
      (shapes.length ? " Framed: the branch’s own teacher." : ""),
    table: { head: ["Pair", "CKA"], rows: panels.flatMap(tableRows) },
  };
}

const CHARTS = [
  { id: "fraction", title: "Accuracy against training images", build: byFraction },
  { id: "counts", title: "Teachers × branches", build: byCounts },
  { id: "cost", title: "Accuracy against cost", build: byCost, full: true },
  { id: "differences", title: "Differences from the reference", build: differences },
  { id: "branches", title: "Branches and their ensemble", build: branches },
  { id: "learning", title: "Learning curves", build: learning },
  { id: "corruptions", title: "Corrupted images", build: corruptions },
  { id: "reliability", title: "Calibration", build: reliability },
  { id: "similarity", title: "Similarity of features", build: similarity },
];
