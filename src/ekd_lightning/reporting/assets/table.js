// A table that sorts by its heads and comes in pages.

const PAGE = 50;

class SortedTable {
  /**
   * @param place where it goes
   * @param label its content, for screen readers
   * @param options.rowKey row => id of a row
   * @param options.section row => head above the rows that follow each other with the same one, while not sorted
   * @param options.detail row => an element shown below the row when it is unfolded, or null
   */
  constructor(place, label, options = {}) {
    Object.assign(this, { place, label, ...options });
    this.rows = [];
    this.columns = [];
    this.page = 0;
    this.all = false;
    this.sorted = options.sorted || null; // {key, down}
    this.unfolded = new Set();
  }

  /** Shows other rows or columns; a column: {key, label, title, number, value: row => to sort by, cell: row => node or text}. */
  update(rows, columns) {
    this.rows = rows;
    this.columns = columns;
    this.page = 0;
    this.draw();
  }

  ordered() {
    const column = this.sorted && this.columns.find((one) => one.key === this.sorted.key);
    if (!column) return this.rows;
    const turn = this.sorted.down ? -1 : 1;
    return [...this.rows].sort((a, b) => {
      const [x, y] = [column.value(a), column.value(b)];
      if (!known(x) || !known(y)) return known(x) ? -1 : known(y) ? 1 : 0; // what is unknown comes last
      return turn * compare(x, y);
    });
  }

  sortBy(column) {
    const same = this.sorted && this.sorted.key === column.key;
    this.sorted = { key: column.key, down: same ? !this.sorted.down : Boolean(column.number) };
    this.page = 0;
    this.draw();
    this.place.querySelector(`[data-key="${column.key}"] button`).focus();
  }

  draw() {
    const rows = this.ordered();
    if (!rows.length) {
      this.place.replaceChildren(h("p", { class: "empty" }, "Nothing matches these filters."));
      return;
    }
    const pages = this.all ? 1 : Math.ceil(rows.length / PAGE);
    this.page = Math.min(this.page, pages - 1);
    const shown = this.all ? rows : rows.slice(this.page * PAGE, (this.page + 1) * PAGE);
    const body = h("tbody");
    let section = null;
    const sections = !this.sorted && this.section && new Set(rows.map((row) => this.section(row))).size > 1;
    for (const row of shown) {
      if (sections && this.section(row) !== section) {
        section = this.section(row);
        body.append(
          h(
            "tr",
            { class: "section" },
            h("th", { scope: "rowgroup", colspan: this.columns.length }, section),
          ),
        );
      }
      body.append(this.line(row));
      if (this.unfolded.has(this.rowKey(row))) body.append(this.below(row));
    }
    const table = h("table", {}, h("caption", { class: "unseen" }, this.label), this.head(), body);
    const frame = h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": this.label },
      table,
    );
    this.place.replaceChildren(frame, this.pager(rows.length, pages));
    markScroll(frame);
  }

  head() {
    return h(
      "thead",
      {},
      h(
        "tr",
        {},
        this.columns.map((column) => {
          const kind = column.number ? "number" : "";
          if (!column.value)
            return h("th", { scope: "col", class: `plain ${kind}`, title: column.title }, column.label);
          const by = this.sorted && this.sorted.key === column.key;
          const sort = by ? (this.sorted.down ? "descending" : "ascending") : "none";
          const button = h(
            "button",
            { type: "button", title: column.title, onclick: () => this.sortBy(column) },
            column.label,
          );
          return h("th", { scope: "col", class: kind, "aria-sort": sort, "data-key": column.key }, button);
        }),
      ),
    );
  }

  line(row) {
    return h(
      "tr",
      { "data-row": this.rowKey(row) },
      this.columns.map((column, position) =>
        h(
          position ? "td" : "th",
          {
            class: [column.number && "number", column.wide && "wide"].filter(Boolean).join(" ") || null,
            scope: position ? null : "row",
          },
          column.cell(row),
        ),
      ),
    );
  }

  below(row) {
    return h(
      "tr",
      { class: "below" },
      h("td", { colspan: this.columns.length, class: "wide" }, this.detail(row)),
    );
  }

  toggle(row) {
    const key = this.rowKey(row);
    if (!this.unfolded.delete(key)) this.unfolded.add(key);
    this.draw();
    this.place.querySelector(`[data-row="${CSS.escape(key)}"] [aria-expanded]`)?.focus();
  }

  pager(count, pages) {
    if (count <= PAGE) return "";
    const from = this.all ? 1 : this.page * PAGE + 1;
    const to = this.all ? count : Math.min(count, (this.page + 1) * PAGE);
    const step = (by, text) =>
      h(
        "button",
        {
          type: "button",
          "data-step": by,
          disabled: this.page + by < 0 || this.page + by >= pages,
          onclick: () => {
            this.page += by;
            this.draw();
            this.refocus(by);
          },
        },
        text,
      );
    const every = h(
      "button",
      {
        type: "button",
        "data-step": "all",
        onclick: () => {
          this.all = !this.all;
          this.page = 0;
          this.draw();
          this.refocus("all");
        },
      },
      this.all ? "Show pages" : "Show all",
    );
    return h(
      "div",
      { class: "pager" },
      this.all ? "" : step(-1, "Previous"),
      this.all ? "" : step(1, "Next"),
      every,
      h(
        "span",
        { role: "status", class: "small soft" },
        `${from} to ${to} of ${count.toLocaleString("en-US")}`,
      ),
    );
  }

  refocus(step) {
    const button = this.place.querySelector(`[data-step="${step}"]`);
    (button.disabled ? this.place.querySelector(`.pager button:not(:disabled)`) : button).focus();
  }
}
