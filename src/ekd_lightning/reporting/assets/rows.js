// The table of results: one row per setting.

/** Mean with its interval; a field is {mean, low, high, n}. */
function figureCell(figure, kind) {
  if (!figure) return DASH;
  const top = format(figure.mean, kind);
  if (!known(figure.low) || ["count", "millions", "bytes"].includes(kind)) return top;
  return [top, h("span", { class: "soft" }, ` ${ends(figure, kind)}`)];
}

function differenceCell(difference) {
  if (difference === "self") return h("span", { class: "soft" }, "reference");
  if (!difference) return DASH;
  const value = format(difference.mean, "points");
  if (!known(difference.low)) return [value, h("span", { class: "sub" }, "too few runs")];
  if (!known(difference.p)) return [value, h("span", { class: "sub" }, `the same in ${difference.n} pairs`)];
  const { low, high } = difference;
  const sure = known(difference.p) && difference.p < 0.05; // corrected for all comparisons, which an interval is not
  const side = !sure ? "" : low > 0 ? "up" : high < 0 ? "down" : "";
  const arrow = { up: "▲ ", down: "▼ ", "": "" }[side];
  return [
    h("span", { class: side }, arrow + value),
    h("span", { class: "sub" }, `${ends(difference, "points")} ${pValue(difference.p)}`),
  ];
}

/** Mean and interval on the axis that all shown rows share. */
function track(figure, low, high) {
  if (!figure) return "";
  const at = (value) => 4 + 136 * ((value - low) / (high - low || 1));
  const picture = svg(
    "svg",
    { class: "track", viewBox: "0 0 144 20", "aria-hidden": "true" },
    svg("line", { class: "axis", x1: 0, x2: 144, y1: 10, y2: 10 }),
  );
  if (known(figure.low)) {
    picture.append(svg("line", { x1: Math.max(0, at(figure.low)), x2: Math.min(144, at(figure.high)), y1: 10, y2: 10 }));
  }
  picture.append(svg("circle", { class: known(figure.low) ? "" : "alone", cx: at(figure.mean), cy: 10, r: 4 }));
  return picture;
}

class Rows {
  constructor(payload, openRun) {
    this.payload = payload;
    this.openRun = openRun;
    this.runs = new Map(payload.runs.map((run) => [run.name, run]));
    this.theme = "overview";
    this.reference = payload.references[0]?.key || null;
    this.table = new SortedTable(byId("row-table"), "Results by setting", {
      rowKey: (row) => row.id,
      section: (row) => this.title(row),
      detail: (row) => this.seeds(row),
    });
    this.tools();
  }

  tools() {
    const change = (name) => (value) => {
      this[name] = value;
      this.show(this.shown);
      this.onchange?.();
    };
    const has = (fields) => this.payload.groups.some((group) => fields.some(([key]) => group.metrics[key]));
    const themes = Object.entries(THEMES).filter(([, [, fields]]) => has(fields));
    const names = themes.map(([key, [text]]) => [key, text]);
    const references = this.payload.references.map(({ key, text }) => [key, text]);
    byId("row-tools").replaceChildren(
      choice("Columns", "theme-columns", names, this.theme, change("theme")),
      references.length ? choice("Difference from", "reference", references, this.reference, change("reference")) : "",
    );
  }

  /** Of the block of a row: what it is, and what its differences are taken to. */
  title(row) {
    const block = this.payload.blocks.find(({ key }) => key === row.block);
    const to = this.payload.groups.find((one) => one.block === row.block && one.reference_of.includes(this.reference));
    return block.title + (to ? `; differences from ${to.label}` : "");
  }

  show(groups) {
    this.shown = groups;
    this.ranges = {};
    for (const group of measured(groups)) {
      const range = (this.ranges[group.block] ||= [1, 0]);
      range[0] = Math.max(0, Math.min(range[0], low(accuracy(group))));
      range[1] = Math.min(1, Math.max(range[1], high(accuracy(group))));
    }
    this.table.update(groups, this.columns());
  }

  differenceHead() {
    const { text, many } = this.payload.references.find(({ key }) => key === this.reference);
    return many ? "Difference" : `− ${text}`;
  }

  difference(row) {
    return row.reference_of.includes(this.reference) ? "self" : row.differences[this.reference];
  }

  columns() {
    const text = (key, label, title, write = String) => ({
      key,
      label,
      title,
      number: typeof this.payload.groups[0]?.[key] === "number",
      value: (row) => row[key],
      cell: (row) => (known(row[key]) ? write(row[key], row) : DASH),
    });
    const varies = (column) => distinct(this.payload.groups.map((row) => row[column.key])).length > 1;
    const varying = [
      text("fraction", "Images", "share and number of the training images", (value, row) => share(value, row.images)),
      text("branches", "K", "branches"),
      text("teachers", "M", "teachers"),
      text("unlabelled", "Unlabelled", "images without labels in training"),
      text("data", "Data", "data set"),
      text("student", "Student", "the student's network"),
    ].filter(varies);
    const number = (key, label, title, value, cell) => ({ key, label, title, number: true, value, cell });
    const metric = (key, field, label, title, kind) =>
      number(key, label, title, (row) => row.metrics[field]?.mean, (row) => figureCell(row.metrics[field], kind));
    const fields = THEMES[this.theme][1].filter(([key]) => this.payload.groups.some((row) => row.metrics[key]));
    const difference = [(row) => this.difference(row)?.mean, (row) => differenceCell(this.difference(row))];
    return [
      { key: "label", label: "Setting", value: (row) => row.label, cell: (row) => h("span", { title: row.setting || null }, row.label) },
      metric("accuracy", "test_accuracy", "Accuracy %", "test accuracy of the last epoch", "percent"),
      {
        key: "track",
        label: "Interval",
        title: "mean and 95 % interval; the rows of a block share the axis",
        cell: (row) => track(accuracy(row), ...(this.ranges[row.block] || [0, 1])),
      },
      this.reference && number("difference", this.differenceHead(), "difference in points, paired by seed", ...difference),
      number("n", "n", "runs that are done", (row) => row.n, (row) => this.count(row)),
      ...varying,
      ...fields.map(([key, label, title, kind]) => metric(key, key, label, title, kind)),
    ].filter(Boolean);
  }

  count(row) {
    const open = this.table.unfolded.has(row.id);
    const text = row.failed ? `${row.n} + ${row.failed} failed` : String(row.n);
    const named = `${text} runs of ${row.label}: ${open ? "hide" : "show"}`;
    return button(`${text} ${open ? "▴" : "▾"}`, () => this.table.toggle(row), {
      "aria-expanded": String(open),
      "aria-label": named,
    });
  }

  seeds(row) {
    const runs = row.runs.map((name) => this.runs.get(name)).filter(Boolean);
    const full = row.setting ? h("span", { class: "soft" }, `${row.setting}.`) : "";
    const outcome = (run) =>
      run.state === "done"
        ? [` ${format(run.accuracy, "percent")} %`]
        : [" ", h("span", { class: `state ${run.state}` }, run.state)];
    const seed = (run) => linkTo(`seed ${known(run.seed) ? run.seed : "?"}`, () => this.openRun(run));
    return h("div", { class: "bar" }, full, runs.map((run) => h("span", seed(run), ...outcome(run))));
  }
}
