// What all charts share: colours, layout, the frame around a chart, and when it is drawn.

const LINE = 19; // height of a line of a legend
const PAPER = 640; // width of a chart on A4, in CSS pixels
let printing = false;
const MOST_LINES = 8; // more are indistinguishable

/** Text for Plotly, which reads tags and templates in it. */
const inert = (text) =>
  String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/%\{/g, "%&#123;");
const fade = (colour, alpha) =>
  `rgba(${[1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)).join(",")},${alpha})`;
const dark = () => document.documentElement.dataset.theme === "dark";
const touch = () => matchMedia("(pointer: coarse)").matches;
const low = (figure) => figure.low ?? figure.mean;
const high = (figure) => figure.high ?? figure.mean;
const interval = (figure, kind = "percent") =>
  known(figure.low)
    ? `${ends(figure, kind)} (95 %, n = ${figure.n})`
    : `n = ${figure.n}: too few runs for an interval`;
/** What the marks of a chart are; without intervals where there are too few runs. */
const meansOf = (figures, marks = "interval") =>
  figures.some((figure) => known(figure.low)) ? `Mean with 95 % ${marks} over seeds` : "Too few runs for intervals: means";
const runsBehind = (numbers) => {
  const [from, to] = [Math.min(...numbers), Math.max(...numbers)];
  return from === to ? `n = ${from}` : `n = ${from} to ${to}`;
};

/** Colour, marker and dash at a place in the order of methods, which is the same in all charts. */
function lineStyleAt(position, palette) {
  const colours = palette[dark() ? "dark" : "light"];
  const symbols = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star"];
  const turn = Math.floor(position / colours.length);
  return {
    colour: colours[position % colours.length],
    symbol: symbols[(position + turn) % symbols.length],
    dash: ["solid", "dash", "dot", "dashdot"][turn % 4],
  };
}

function axis(title, more = {}) {
  return {
    title: { text: title, standoff: 8 },
    gridcolor: style("--line"),
    linecolor: style("--edge"),
    zeroline: false,
    automargin: true,
    showline: true,
    ticks: "outside",
    tickcolor: style("--edge"),
    ticklen: 4,
    ...more,
  };
}

function layout(x, y, more = {}) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 56, r: 14, t: 34, b: 46 }, // the tools lie above what is drawn
    height: 340,
    font: { family: style("--sans"), size: 12, color: style("--ink") },
    hovermode: "closest",
    hoverlabel: {
      bgcolor: style("--raised"),
      bordercolor: style("--edge"),
      font: { color: style("--ink") },
      align: "left",
    },
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, font: { size: 11 } },
    transition: { duration: 0 },
    xaxis: x,
    yaxis: y,
    dragmode: touch() ? false : "zoom",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: style("--soft"), activecolor: style("--accent") },
    ...more,
  };
}

/** The axis of accuracies in percent: what is drawn, and never beyond what an accuracy can be. */
function accuracyAxis(figures, title = "test accuracy, %") {
  const [from, to] = [100 * Math.min(...figures.map(low)), 100 * Math.max(...figures.map(high))];
  const room = 0.04 * (to - from) + 0.1;
  return axis(title, { range: [Math.max(-0.5, from - room), Math.min(100.5, to + room)] });
}

/** A column of metrics.csv in words. */
const curveName = (key) =>
  key.replace(/^val\//, "validation ").replace(/^train\//, "training ").replace("nll", "NLL");

/** Light enough for dark text on every step, on light and dark ground. */
const SHADES = ["#f4f1de", "#a9d5c3", "#4ea5c4"].map((colour, at) => [at / 2, colour]);
const ON_SHADES = "#191c20";

const scatter = (mode, name, x, y, more) => ({ type: "scatter", mode, name, x, y, ...more });
/** A matrix as coloured cells with a text in each. */
const heatMap = (x, y, z, scale, more) => ({
  type: "heatmap",
  x: x.map(String),
  y: y.map(String),
  z,
  colorscale: SHADES,
  textfont: { color: ON_SHADES },
  xgap: 2,
  ygap: 2,
  colorbar: { title: { text: scale, side: "right" }, thickness: 12, outlinewidth: 0 },
  ...more,
});

const spread = (figure, kind) => (known(figure.low) ? ends(figure, kind) : "too few runs");
/** The values of a chart as a table; pairs: [name, figure]. */
const valueTable = (first, pairs, kind = "percent", head = "Accuracy %") => ({
  head: [first, head, "95 % interval", "n"],
  rows: pairs.map(([name, figure]) => [name, format(figure.mean, kind), spread(figure, kind), String(figure.n)]),
});

/** A line through places {x, figure} with a band where there are enough runs for intervals; `hover` names a place. */
function bandTraces(name, places, { colour, dash, symbol }, kind, hover) {
  const banded = places.filter((place) => known(place.figure.low));
  const legendgroup = inert(name);
  const scale = kind === "percent" ? 100 : 1;
  const xs = banded.map((place) => place.x);
  const [tops, bottoms] = [high, low].map((end) => banded.map((place) => scale * end(place.figure)));
  const band = scatter("lines", undefined, [...xs, ...[...xs].reverse()], [...tops, ...bottoms.reverse()], {
    line: { width: 0 },
    fill: "toself",
    fillcolor: fade(colour, dark() ? 0.22 : 0.15),
    hoverinfo: "skip",
    showlegend: false,
    legendgroup,
  });
  const told = (figure) => `${format(figure.mean, kind)} ${interval(figure, kind)}`;
  const mode = places.length > 60 ? "lines" : "lines+markers";
  const line = scatter(mode, legendgroup, places.map((p) => p.x), places.map((p) => scale * p.figure.mean), {
    legendgroup,
    line: { color: colour, dash, width: 2 },
    marker: { color: colour, symbol, size: places.length > 15 ? 4 : 8 },
    text: places.map((p) => `${legendgroup}<br>${inert(hover(p))}: ${told(p.figure)}`),
    hovertemplate: "%{text}<extra></extra>",
  });
  return banded.length ? [band, line] : [line];
}

/** Lines of a legend below a chart. */
function legendLines(traces, width) {
  const names = traces.filter((trace) => trace.name && trace.showlegend !== false).map((trace) => trace.name.length);
  if (!names.length) return 0;
  const beside = Math.max(1, Math.floor(width / (60 + 6.5 * Math.max(...names))));
  return Math.ceil(names.length / beside);
}

/** Error bars, but none where there is no interval. */
const bars = (figures, colour, scale = 100) => ({
  type: "data",
  symmetric: false,
  array: figures.map((f) => (known(f.high) ? scale * (f.high - f.mean) : null)),
  arrayminus: figures.map((f) => (known(f.low) ? scale * (f.mean - f.low) : null)),
  color: colour,
  thickness: 1.5,
  width: 4,
  visible: figures.some((f) => known(f.low)),
});

class ChartFrame {
  constructor(chart, grid) {
    this.chart = chart;
    this.drawn = false;
    this.stale = true;
    this.visible = false;
    this.plot = h("div", { class: "plot", id: `plot-${chart.id}` });
    this.caption = h("figcaption", { id: `caption-${chart.id}` });
    this.values = h("details", h("summary", "Values"));
    this.values.addEventListener("toggle", () => this.table());
    this.box = h(
      "figure",
      {
        id: `chart-${chart.id}`,
        class: chart.full ? "full" : null,
        "aria-labelledby": `title-${chart.id}`,
        "aria-describedby": `caption-${chart.id}`,
      },
      h("h3", { id: `title-${chart.id}` }, chart.title),
      this.plot,
      this.caption,
      this.values,
    );
    grid.append(this.box);
  }

  /** Takes what it is to show; returns why not, if it cannot. */
  take(view) {
    this.built = this.chart.build(view);
    this.stale = true;
    this.box.hidden = Boolean(this.built.missing);
    this.caption.textContent = this.built.caption || "";
    this.values.open = false;
    if (!this.built.missing) this.plot.style.minHeight = `${this.height()}px`; // nothing moves when it is drawn
    if (this.visible) this.draw();
    return this.built.missing;
  }

  height() {
    return this.built.layout.height + LINE * Math.max(0, this.lines() - 2);
  }

  lines() {
    return legendLines(this.built.traces, printing ? PAPER : this.plot.clientWidth);
  }

  draw() {
    if (!this.stale || !this.built || this.built.missing || !window.Plotly) return;
    this.stale = false;
    const options = {
      responsive: !printing,
      displaylogo: false,
      displayModeBar: touch() ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
      toImageButtonOptions: { format: "svg", filename: `ekd-${this.chart.id}` },
    };
    const size = printing ? { width: PAPER, autosize: false } : { autosize: true };
    const { layout: form, traces } = this.built;
    const showlegend = this.lines() > 0;
    const margin = { ...form.margin, b: form.margin.b + LINE * this.lines() };
    window.Plotly.react(this.plot, traces, { ...form, ...size, showlegend, margin, height: this.height() }, options);
    this.plot.firstElementChild?.setAttribute("aria-hidden", "true"); // its values are in the table below it
  }

  table() {
    if (!this.values.open) return;
    const { head, rows } = this.built.table;
    const cell = (text, at) => h(at ? "td" : "th", { scope: at ? null : "row" }, text);
    const table = h(
      "table",
      h("caption", { class: "unseen" }, this.chart.title),
      h("thead", h("tr", head.map((text) => h("th", { scope: "col", class: "plain" }, text)))),
      h("tbody", rows.map((row) => h("tr", row.map(cell)))),
    );
    this.values.replaceChildren(this.values.firstElementChild, scrolling(`Values of: ${this.chart.title}`, table));
  }
}
