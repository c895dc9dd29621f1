// Details of one setting: calibration and similarity of features.

function binsTrace(name, bins, colour, symbol) {
  const hoverText = (b) =>
    [
      name,
      `confidence ${b.confidence.toFixed(3)}`,
      `accuracy ${b.accuracy.mean.toFixed(3)} ${interval(b.accuracy, "plain")}`,
      `${(100 * b.share).toFixed(1)} % of the images`,
    ].join("<br>");
  return {
    type: "scatter",
    mode: "lines+markers",
    name,
    x: bins.map((b) => b.confidence),
    y: bins.map((b) => b.accuracy.mean),
    error_y: bars(
      bins.map((b) => b.accuracy),
      colour,
      1,
    ),
    line: { color: colour, width: 1.5 },
    marker: { symbol, size: bins.map((b) => 5 + 11 * Math.sqrt(b.share)), color: colour },
    text: bins.map(hoverText),
    hovertemplate: "%{text}<extra></extra>",
  };
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
  const ideal = {
    type: "scatter",
    mode: "lines",
    x: [0, 1],
    y: [0, 1],
    hoverinfo: "skip",
    name: "calibrated",
    line: { color: style("--edge"), dash: "dash", width: 1 },
  };
  const { n } = row.reliability;
  const line = (name) => (b) => [
    name,
    b.confidence.toFixed(3),
    b.accuracy.mean.toFixed(3),
    `${(100 * b.share).toFixed(1)} %`,
  ];
  return {
    traces: [ideal, ...both.map(([name, bins], at) => binsTrace(name, bins, ...styles[at]))],
    layout: layout(axis("confidence", { range: [0, 1.02] }), axis("accuracy", { range: [0, 1.02] })),
    caption:
      `${row.label}: 15 bins of confidence, n = ${n}` +
      `${n < 3 ? ": too few runs for intervals" : ", 95 % intervals over seeds"}. Larger marks hold more images.`,
    table: {
      head: ["Bin", "Confidence", "Accuracy", "Share of images"],
      rows: both.flatMap(([name, bins]) => bins.map(line(name))),
    },
  };
}

const CATEGORIES = { type: "category", showgrid: false };

function matrixTrace({ values, name }, at, last) {
  const number = (count) => Array.from({ length: count }, (_, position) => String(position));
  return {
    type: "heatmap",
    z: values,
    x: number(values[0].length),
    y: number(values.length),
    xaxis: at ? "x2" : "x",
    yaxis: at ? "y2" : "y",
    colorscale: SHADES,
    textfont: { color: ON_SHADES },
    zmin: 0,
    zmax: 1,
    xgap: 2,
    ygap: 2,
    texttemplate: "%{z:.3f}",
    showscale: last,
    hovertemplate: `branch %{y}, ${name} %{x}<br>CKA %{z:.4f}<extra></extra>`,
    colorbar: { title: { text: "linear CKA", side: "right" }, thickness: 12, outlinewidth: 0 },
  };
}

/** Frames around each branch's own teacher, in the second panel. */
function ownFrames(row) {
  return row.own_teachers
    .map((teacher, k) => [teacher, k])
    .filter(([teacher]) => known(teacher))
    .map(([teacher, k]) => ({
      type: "rect",
      xref: "x2",
      yref: "y2",
      x0: teacher - 0.46,
      x1: teacher + 0.46,
      y0: k - 0.46,
      y1: k + 0.46,
      line: { color: ON_SHADES, width: 2.5 },
    }));
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
    values.flatMap((line, k) =>
      line.map((value, at) => [`branch ${k}, ${name} ${at}`, value.toFixed(4)]),
    );
  return {
    traces: panels.map((panel, at) => matrixTrace(panel, at, at === panels.length - 1)),
    layout: layout(
      axis(panels[0].name, CATEGORIES),
      axis("branch", { ...CATEGORIES, autorange: "reversed" }),
      { ...beside, shapes, margin: { l: 46, r: 10, t: 34, b: 46 } },
    ),
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
