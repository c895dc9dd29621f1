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
        const head = h("th", { scope: "rowgroup", colspan: this.columns.length }, section);
        body.append(h("tr", { class: "section" }, head));
      }
      body.append(this.line(row));
      if (this.unfolded.has(this.rowKey(row))) body.append(this.below(row));
    }
    const caption = h("caption", { class: "unseen" }, this.label);
    const frame = scrolling(this.label, h("table", caption, this.head(), body));
    this.place.replaceChildren(frame, this.pager(rows.length, pages));
    markScroll(frame);
  }

  head() {
    const heads = this.columns.map((column) => {
      const { key, label, title, number, value } = column;
      const kind = number ? "number" : "";
      if (!value) return h("th", { scope: "col", class: `plain ${kind}`, title }, label);
      const sort = this.sorted?.key !== key ? "none" : this.sorted.down ? "descending" : "ascending";
      const turn = button(label, () => this.sortBy(column), { title });
      return h("th", { scope: "col", class: kind, "aria-sort": sort, "data-key": key }, turn);
    });
    return h("thead", h("tr", heads));
  }

  line(row) {
    const cells = this.columns.map(({ number, wide, cell }, position) => {
      const kind = [number && "number", wide && "wide"].filter(Boolean).join(" ") || null;
      return h(position ? "td" : "th", { class: kind, scope: position ? null : "row" }, cell(row));
    });
    return h("tr", { "data-row": this.rowKey(row) }, cells);
  }

  below(row) {
    const cell = h("td", { colspan: this.columns.length, class: "wide" }, this.detail(row));
    return h("tr", { class: "below" }, cell);
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
    const step = (by, text) => {
      const disabled = this.page + by < 0 || this.page + by >= pages;
      return button(text, () => this.turn(by, this.page + by, false), { "data-step": by, disabled });
    };
    const other = this.all ? "Show pages" : "Show all";
    const every = button(other, () => this.turn("all", 0, !this.all), { "data-step": "all" });
    const place = `${from} to ${to} of ${count.toLocaleString("en-US")}`;
    return h(
      "div",
      { class: "pager" },
      ...(this.all ? ["", ""] : [step(-1, "Previous"), step(1, "Next")]),
      every,
      h("span", { role: "status", class: "small soft" }, place),
    );
  }

  /** Shows another page, or all; the button that asked for it keeps the focus. */
  turn(step, page, all) {
    Object.assign(this, { page, all });
    this.draw();
    const pressed = this.place.querySelector(`[data-step="${step}"]`);
    (pressed.disabled ? this.place.querySelector(`.pager button:not(:disabled)`) : pressed).focus();
  }
}
