// Connects the filters with tables and charts.

const payload = JSON.parse(byId("payload").textContent);
const lower = (...words) => words.filter(known).join(" ").toLowerCase();
for (const group of payload.groups) group.text = lower(group.label, group.method, group.student, group.data);
for (const run of payload.runs)
  run.text = lower(run.name, run.method, run.student, run.data, run.state, run.error);

const lineStyle = (group) => lineStyleAt(Math.max(0, payload.labels.indexOf(group.label)), payload.palette);
const runs = new Runs(payload, byId("details").textContent);
const rows = new Rows(payload, (run) => runs.open(run));
const frames = CHARTS.map(
  (chart) => new ChartFrame(chart, byId(chart.id === "cost" ? "answer-chart" : "chart-grid")),
);
for (const frame of document.querySelectorAll("#answer .scroll")) markScroll(frame);

/** Choices of the charts beyond the filters. */
const chosen = { block: null, row: null, cost: "macs", curve: "val/accuracy" };
let shown = [];

function select(label, key, pairs) {
  const choose = (value) => {
    chosen[key] = value;
    charts();
  };
  return pairs.length < 2 ? "" : choice(label, `choose-${key}`, pairs, chosen[key], choose);
}

function charts() {
  const blocks = payload.blocks.filter(({ key }) => shown.some((group) => group.block === key && group.n));
  const size = (key) => shown.filter((group) => group.block === key && group.n).length;
  if (!blocks.some(({ key }) => key === chosen.block))
    chosen.block = [...blocks].sort((a, b) => size(b.key) - size(a.key))[0]?.key ?? null;
  const block = byInterest(shown.filter((group) => group.block === chosen.block && group.n));
  const family = block[0]?.family;
  if (!block.some((group) => group.id === chosen.row)) chosen.row = mostDetailed(block)?.id ?? null;
  const curves = distinct(block.flatMap((group) => Object.keys(group.curves)));
  const focus = document.activeElement?.id;
  byId("chart-tools").replaceChildren(
    select("Data and images", "block", blocks.map(({ key, title }) => [key, title])),
    select("Details of", "row", block.map((group) => [group.id, group.label])),
    select("Cost", "cost", Object.entries({ macs: "multiply-accumulates", parameters: "parameters" })),
    select("Curve", "curve", curves.map((name) => [name, curveName(name)])),
  );
  if (focus?.startsWith("choose-")) byId(focus)?.focus();
  const view = {
    groups: shown.filter((group) => group.family === family && group.n),
    block,
    row: block.find((group) => group.id === chosen.row),
    lineStyle,
    palette: payload.palette,
    reference: rows.reference,
    cost: chosen.cost,
    curve: chosen.curve,
  };
  const away = frames.map((frame) => frame.take(view)).filter(Boolean);
  byId("chart-away").textContent = away.length ? `Not drawn: ${away.join("; ")}.` : "";
}

/** The settings of the answer and the references first, then by accuracy: charts with little room show these. */
function byInterest(groups) {
  const rank = (group) => (group.subject ? 0 : group.reference_of.includes(rows.reference) ? 1 : 2);
  return [...groups].sort((a, b) => rank(a) - rank(b) || accuracy(b).mean - accuracy(a).mean);
}

/** The setting that represents EKD if there is one, else the one with most details on record. */
function mostDetailed(block) {
  const richness = ({ cka, reliability, method, subject }) =>
    (cka ? 2 : 0) + (reliability ? 1 : 0) + (method === "ekd" ? 0.5 : 0) + (subject ? 4 : 0);
  return [...block].sort((a, b) => richness(b) - richness(a))[0];
}

function update() {
  shown = payload.groups.filter((group) => filters.passes(group));
  const seen = payload.runs.filter((run) => filters.passes(run));
  rows.show(shown);
  runs.show(seen);
  byId("shown").textContent =
    `${shown.length.toLocaleString("en-US")} of ${plural(payload.groups.length, "setting")}, ${seen.length.toLocaleString("en-US")} of ${plural(payload.runs.length, "run")}`;
  const filtered = filters.summary();
  byId("view").textContent = (filtered ? `Only ${filtered}: ` : "") + byId("shown").textContent;
  charts();
}

const filters = new Filters(payload.groups, update);
rows.onchange = charts;

function themed() {
  const on = dark();
  byId("theme").setAttribute("aria-pressed", String(on));
  charts();
}
byId("theme").addEventListener("click", () => setTheme(dark() ? "light" : "dark"));
addEventListener("themechange", themed);
byId("print").addEventListener("click", () => window.print());
byId("to-failed")?.addEventListener("click", () => {
  runs.table.sorted = { key: "state", down: false };
  runs.table.draw();
});

// The printed page is light and complete: all charts are drawn before printing, and the theme is restored after.
let before = null;
addEventListener("beforeprint", () => {
  before = document.documentElement.dataset.theme;
  printing = true;
  for (const frame of frames) frame.visible = true;
  for (const part of document.querySelectorAll("#answer details:not(figure *)")) part.open = true;
  setTheme("light", false);
});
addEventListener("afterprint", () => {
  printing = false;
  if (before) setTheme(before, false);
});

const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      const frame = frames.find(({ box }) => box === entry.target);
      frame.visible = true;
      frame.draw();
    }
  },
  { rootMargin: "600px" },
);

update();
byId("theme").setAttribute("aria-pressed", String(dark()));

/** Unpacks the plotting library once the tables are readable. */
addEventListener("DOMContentLoaded", async () => {
  try {
    document.head.append(h("script", {}, await unpack(byId("plotly").textContent)));
  } catch (error) {
    byId("chart-away").textContent =
      `Charts are not drawn: ${error.message}. The files in this page's folder hold the same charts as SVG and PNG.`;
    byId("chart-grid").hidden = byId("answer-chart").hidden = true;
  }
  for (const { box } of frames) seen.observe(box);
  document.documentElement.dataset.ready = "yes";
});
