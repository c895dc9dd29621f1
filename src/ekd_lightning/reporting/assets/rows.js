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
    const [from, to] = [
      Math.max(0, at(figure.low)),
      Math.min(144, at(figure.high)),
    ];
    picture.append(svg("line", { x1: from, x2: to, y1: 10, y2: 10 }));
  }
  picture.append(
    svg("circle", { class: known(figure.low) ? "" : "alone", cx: at(figure.mean), cy: 10, r: 4 }),
  );
  return picture;
}

class Rows {
  constructor(payload, openRun) {
    this.payload = payload;
    this.openRun = openRun;
    this.runs = new Map(payload.runs.map((run) => [run.id, run]));
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
    const change = (name) => (event) => {
      this[name] = event.target.value;
      this.show(this.shown);
      this.onchange?.();
    };
    const has = (fields) => this.payload.groups.some((group) => fields.some(([key]) => group.metrics[key]));
    const themes = Object.entries(THEMES).filter(([, [, fields]]) => has(fields));
    const options = (pairs, chosen) =>
      pairs.map(([value, text]) => h("option", { value, selected: value === chosen }, text));
    byId("row-tools").replaceChildren(
      h(
        "label",
        {},
        "Columns",
        h(
          "select",
          { id: "theme-columns", onchange: change("theme") },
          options(
            themes.map(([key, [text]]) => [key, text]),
            this.theme,
          ),
        ),
      ),
      this.payload.references.length
        ? h(
            "label",
            {},
            "Difference from",
            h(
              "select",
              { id: "reference", onchange: change("reference") },
              options(
                this.payload.references.map(({ key, text }) => [key, text]),
                this.reference,
              ),
            ),
          )
        : "",
    );
  }

  /** Of the block of a row: what it is, and what its differences are taken to. */
  title(row) {
    const block = this.payload.blocks.find(({ key }) => key === row.block);
    const to = this.payload.groups.find(
      (one) => one.block === row.block && one.reference_of.includes(this.reference),
    );
    return block.title + (to ? `; differences from ${to.label}` : "");
  }

  show(groups) {
    this.shown = groups;
    this.ranges = {};
    for (const {
      block,
      metrics: { test_accuracy: one },
    } of groups) {
      if (!one) continue;
      const range = (this.ranges[block] ||= [1, 0]);
      range[0] = Math.max(0, Math.min(range[0], low(one)));
      range[1] = Math.min(1, Math.max(range[1], high(one)));
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
    const shared = [
      text("data", "Data", "data set"),
      text("student", "Student", "the student's network"),
    ].filter(varies);
    const counts = [
      text("fraction", "Images", "share and number of the training images", (value, row) =>
        share(value, row.images),
      ),
      text("branches", "K", "branches"),
      text("teachers", "M", "teachers"),
      text("unlabelled", "Unlabelled", "images without labels in training"),
    ].filter(varies);
    const fields = THEMES[this.theme][1].filter(([key]) =>
      this.payload.groups.some((row) => row.metrics[key]),
    );
    return [
      { key: "label", label: "Setting", value: (row) => row.label, cell: (row) => h("span", { title: row.setting || null }, row.label) },
      {
        key: "accuracy",
        label: "Accuracy %",
        title: "test accuracy of the last epoch",
        number: true,
        value: (row) => row.metrics.test_accuracy?.mean,
        cell: (row) => figureCell(row.metrics.test_accuracy, "percent"),
      },
      {
        key: "track",
        label: "Interval",
        title: "mean and 95 % interval; the rows of a block share the axis",
        cell: (row) => track(row.metrics.test_accuracy, ...(this.ranges[row.block] || [0, 1])),
      },
      ...(this.reference
        ? [
            {
              key: "difference",
              label: this.differenceHead(),
              number: true,
              title: "difference in points, paired by seed",
              value: (row) => this.difference(row)?.mean,
              cell: (row) => differenceCell(this.difference(row)),
            },
          ]
        : []),
      {
        key: "n",
        label: "n",
        title: "runs that are done",
        number: true,
        value: (row) => row.n,
        cell: (row) => this.count(row),
      },
      ...counts,
      ...shared,
      ...fields.map(([key, label, title, kind]) => ({
        key,
        label,
        title,
        number: true,
        value: (row) => row.metrics[key]?.mean,
        cell: (row) => figureCell(row.metrics[key], kind),
      })),
    ];
  }

  count(row) {
    const open = this.table.unfolded.has(row.id);
    const text = row.failed ? `${row.n} + ${row.failed} failed` : String(row.n);
    return h(
      "button",
      {
        type: "button",
        "aria-expanded": String(open),
        onclick: () => this.table.toggle(row),
        "aria-label": `${text} runs of ${row.label}: ${open ? "hide" : "show"}`,
      },
      `${text} ${open ? "▴" : "▾"}`,
    );
  }

  seeds(row) {
    const runs = row.runs.map((id) => this.runs.get(id)).filter(Boolean);
    const full = row.setting ? h("span", { class: "soft" }, `${row.setting}.`) : "";
    return h(
      "div",
      { class: "bar" },
      full,
      runs.map((run) =>
        h(
          "span",
          {},
          h(
            "button",
            { type: "button", class: "link", onclick: () => this.openRun(run) },
            `seed ${known(run.seed) ? run.seed : "?"}`,
          ),
          run.state === "done"
            ? ` ${format(run.accuracy, "percent")} %`
            : [" ", h("span", { class: `state ${run.state}` }, run.state)],
        ),
      ),
    );
  }
}
