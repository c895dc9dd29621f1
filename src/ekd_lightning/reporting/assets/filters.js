// Filters over settings and runs. The address keeps them, so that a view can be shared.

const FILTERS = [
  { key: "data", label: "Data set", text: String },
  { key: "fraction", label: "Fraction", text: share },
  { key: "method", label: "Method", text: String },
  { key: "teachers", label: "Teachers M", text: String },
  { key: "branches", label: "Branches K", text: String },
  { key: "student", label: "Student", text: String },
];

class Filters {
  constructor(groups, onchange) {
    this.groups = groups;
    this.onchange = onchange;
    this.chosen = Object.fromEntries(FILTERS.map(({ key }) => [key, new Set()]));
    this.words = "";
    this.read();
    this.draw();
    byId("find").value = this.words;
    byId("find").addEventListener("input", (event) => {
      this.words = event.target.value;
      this.changed();
    });
    byId("clear").addEventListener("click", () => this.clear());
    byId("filter-form").addEventListener("submit", (event) => event.preventDefault());
    byId("filter-form").addEventListener("change", (event) => this.toggled(event.target));
    addEventListener("hashchange", () => {
      if (location.hash.includes("=")) {
        this.read();
        this.draw();
        this.onchange();
      }
    });
  }

  draw() {
    byId("filter-groups").replaceChildren(
      ...FILTERS.map(({ key, label, text }) => {
        const values = distinct(this.groups.map((group) => group[key]).filter(known));
        if (values.length < 2) return "";
        const pills = values.map((value) => {
          const checked = this.chosen[key].has(String(value));
          const box = h("input", { type: "checkbox", name: key, value, checked });
          return h("label", { class: "pill" }, box, h("span", text(value)));
        });
        return h("fieldset", h("legend", label), h("div", { class: "pills" }, pills));
      }),
    );
  }

  toggled(input) {
    if (input.type !== "checkbox") return;
    if (input.checked) this.chosen[input.name].add(input.value);
    else this.chosen[input.name].delete(input.value);
    this.changed();
  }

  clear() {
    for (const values of Object.values(this.chosen)) values.clear();
    this.words = byId("find").value = "";
    for (const input of byId("filter-groups").querySelectorAll("input")) input.checked = false;
    this.changed();
  }

  changed() {
    this.write();
    this.onchange();
  }

  read() {
    const from = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
    for (const { key } of FILTERS) this.chosen[key] = new Set(from.getAll(key));
    this.words = from.get("find") || "";
  }

  write() {
    const to = new URLSearchParams();
    for (const [key, values] of Object.entries(this.chosen)) for (const value of values) to.append(key, value);
    if (this.words) to.set("find", this.words);
    try {
      history.replaceState(null, "", `#${to}`);
    } catch {
      /* some viewers forbid it: the view is not in the address */
    }
  }

  /** The filters in words, for the printed page. */
  summary() {
    const chosen = FILTERS.filter(({ key }) => this.chosen[key].size).map(
      ({ key, label, text }) =>
        `${label.toLowerCase()} ${[...this.chosen[key]].map((value) => text(key === "fraction" ? Number(value) : value)).join(", ")}`,
    );
    return [...chosen, ...(this.words ? [`text “${this.words}”`] : [])].join("; ");
  }

  /** Whether a setting or a run passes the filters. */
  passes(one) {
    for (const { key } of FILTERS) {
      const values = this.chosen[key];
      if (values.size && !values.has(String(one[key]))) return false;
    }
    if (!this.words) return true;
    const words = this.words.toLowerCase().split(/\s+/);
    return words.every((word) => one.text.includes(word));
  }
}
