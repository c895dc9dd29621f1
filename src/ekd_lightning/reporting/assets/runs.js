// The table of runs, and the record of one run.

const STATES = ["failed", "partial", "stopped", "running", "done"]; // what needs attention comes first

class Runs {
  constructor(payload, packed) {
    this.payload = payload;
    this.packed = packed;
    this.details = null;
    this.table = new SortedTable(byId("run-table"), "Runs", { rowKey: (run) => run.name });
    this.dialog = byId("run");
    byId("run-close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close();
    });
    this.dialog.addEventListener("close", () => this.opener?.isConnected && this.opener.focus());
  }

  show(runs) {
    const field = (key, label, number, cell) => ({ key, label, number, value: (run) => run[key], cell });
    const plain = (key) => (run) => (known(run[key]) ? String(run[key]) : DASH);
    const all = [
      field("name", "Run", false, (run) => linkTo(run.name, () => this.open(run))),
      {
        key: "state",
        label: "State",
        value: (run) => STATES.indexOf(run.state),
        cell: (run) => h("span", { class: `state ${run.state === "done" ? "" : "failed"}` }, run.state),
      },
      field("data", "Data", false, plain("data")),
      field("method", "Method", false, plain("method")),
      field("fraction", "Images", true, (run) => (known(run.fraction) ? share(run.fraction, run.images) : DASH)),
      field("branches", "K", true, plain("branches")),
      field("teachers", "M", true, plain("teachers")),
      field("seed", "Seed", true, plain("seed")),
      field("accuracy", "Accuracy %", true, (run) => format(run.accuracy, "percent")),
      field("seconds", "Training s", true, (run) => format(run.seconds, "seconds")),
      { ...field("error", "What went wrong", false, (run) => run.error || ""), wide: true },
    ];
    this.table.update(runs, all.filter((column) => column.key !== "error" || runs.some((run) => run.error)));
  }

  async record(run) {
    if (!this.details) this.details = JSON.parse(await unpack(this.packed));
    return this.details[run.name] || {};
  }

  async open(run) {
    this.opener = document.activeElement;
    byId("run-title").textContent = run.name;
    const show = (...parts) => byId("run-body").replaceChildren(...this.summary(run), ...parts);
    show(h("p", { class: "soft", role: "status" }, "Unpacking …"));
    this.dialog.showModal();
    byId("run-close").focus();
    try {
      const { config, result, provenance } = await this.record(run);
      show(...this.text("Configuration", config), ...this.fields("Result", result), ...this.text("Provenance", provenance));
    } catch (error) {
      show(h("p", { class: "alarm" }, `The record is not shown: ${error.message}.`));
    }
  }

  summary(run) {
    const pairs = [
      ["State", run.state],
      ["Data set", run.data],
      ["Method", run.method],
      ["Seed", run.seed],
    ];
    return [
      run.error ? h("pre", { class: "alarm", tabindex: "0", "aria-label": "Error" }, run.error) : "",
      definitions(pairs.filter(([, value]) => known(value))),
    ];
  }

  text(title, content) {
    if (!content) return [];
    const copy = button("Copy", async () => {
      try {
        await navigator.clipboard.writeText(content);
        copy.textContent = "Copied";
      } catch {
        copy.textContent = "Select and copy it below";
      }
    });
    return [
      h("div", { class: "bar" }, h("h3", { class: "grow" }, title), copy),
      h("pre", { tabindex: "0", "aria-label": title }, content),
    ];
  }

  fields(title, record) {
    if (!record || !Object.keys(record).length) return [];
    const write = (value) => {
      if (typeof value === "number") return minus(String(value));
      return typeof value === "object" ? JSON.stringify(value) : String(value); // null is "null" either way
    };
    return [h("h3", title), definitions(Object.entries(record).map(([key, value]) => [key, write(value)]))];
  }
}
