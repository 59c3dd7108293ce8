// The controls, and what happens when one is used.
function fillControls() {
  const jobs = JOBS.filter((job) => !chosen.operation || job.operation === chosen.operation);
  const count = (operation) => JOBS.filter((job) => job.operation === operation).length;
  const operations = DATA.operations.map((name) => [name, `${name} (${count(name)})`]);
  fill(
    "operation",
    DATA.operations.length > 1 ? [...operations, ["", `all (${JOBS.length})`]] : operations,
    chosen.operation,
  );
  const models = distinct(jobs.map((job) => job.model)).filter(Boolean);
  if (!models.includes(chosen.model)) chosen.model = "";
  fill("model", [["", "all"], ...models.map((name) => [name, name])], chosen.model);
  element("model-label").hidden = models.length < 2;
  const records = distinct(jobs.flatMap((job) => job.records));
  if (!records.includes(chosen.record)) chosen.record = "";
  fill("record", [["", "all"], ...records.map((name) => [name, name])], chosen.record);
  element("record-label").hidden = records.length < 2;
  const backends = backendsShown();
  if (chosen.baseline !== OTHERS && !backends.includes(chosen.baseline)) {
    chosen.baseline = backends.includes(DATA.baseline) ? DATA.baseline : OTHERS;
  }
  fill("baseline", [[OTHERS, "the fastest other"], ...backends.map((name) => [name, name])], chosen.baseline);
  element("titles").replaceChildren(
    ...distinct(jobsOfOperation().map((job) => job.title)).map((value) => make("option", { value })),
  );
  element("chips-title").textContent = `Backends (${backends.length})`;
  element("chips").replaceChildren(...backends.map(chip), ...(backends.length > 2 ? [everyone(backends)] : []));
}
function fill(id, choices, value) {
  element(id).replaceChildren(...choices.map(([key, text]) => make("option", { value: key, textContent: text })));
  element(id).value = value;
}
function chip(name) {
  return make(
    "button",
    {
      type: "button",
      className: "chip",
      ariaPressed: String(!chosen.hidden.has(name)),
      onclick: () => {
        if (!chosen.hidden.delete(name)) chosen.hidden.add(name);
        render();
        [...element("chips").children].find((node) => node.textContent === name)?.focus();
      },
    },
    dotOf(name),
    name,
  );
}
function everyone(backends) {
  const some = backends.some((name) => chosen.hidden.has(name));
  return make(
    "button",
    {
      type: "button",
      className: "chip",
      onclick: () => {
        backends.forEach((name) => (some ? chosen.hidden.delete(name) : chosen.hidden.add(name)));
        render();
      },
    },
    some ? "show all" : "hide all",
  );
}

function render() {
  rememberLooks();
  fillControls();
  const jobs = jobsShown(),
    every = jobsOfOperation();
  drawFastest(jobs);
  drawRows(jobs);
  drawCompare(jobs);
  drawRoofline(jobs);
  // A curve or a map needs more batches than one: while one is shown alone, they stay as they are.
  drawSweep(jobs.length > 2 ? jobs : every);
  drawMap(jobs.length > 3 ? jobs : every);
  // What belongs to a record is shown with the operations of that record.
  const records = new Set(every.flatMap((job) => job.records));
  for (const [id, of] of [
    ["threshold-section", DATA.thresholds],
    ["finding-section", DATA.conclusions],
    ["difference-section", DATA.differences],
  ]) {
    if (element(id)) element(id).hidden = !of.some((found) => records.has(found.record));
  }
  for (const node of document.querySelectorAll("#finding-section details"))
    node.hidden = !records.has(node.dataset.record);
}

// Many backends would push the answer off the screen.
function foldChips() {
  element("chips-box").open = backendsShown().length <= (narrow() ? 8 : 24);
}
function choose(id, change) {
  element(id).addEventListener("input", (event) => {
    change(event.target.value);
    render();
  });
}
choose("operation", (value) => {
  Object.assign(chosen, { operation: value, search: "", all: false, sort: null });
  element("search").value = "";
  for (const select of document.querySelectorAll(".picks select")) delete select.dataset.touched;
  foldChips();
});
choose("model", (value) => {
  chosen.model = value;
});
choose("record", (value) => {
  chosen.record = value;
});
choose("search", (value) => {
  chosen.search = value;
});
choose("baseline", (value) => {
  chosen.baseline = value;
});
for (const select of document.querySelectorAll(".picks select")) {
  select.addEventListener("input", () => {
    select.dataset.touched = "yes";
    if (select.id.startsWith("sweep")) drawSweep(jobsShown().length > 2 ? jobsShown() : jobsOfOperation());
    else if (select.id.startsWith("map")) drawMap(jobsShown().length > 3 ? jobsShown() : jobsOfOperation());
    else drawThreshold();
  });
}
element("more").addEventListener("click", () => {
  chosen.all = !chosen.all;
  render();
});

// Light, dark, or as the system says.
const THEMES = ["", "light", "dark"];
element("theme").addEventListener("click", () => {
  const root = document.documentElement,
    next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "") + 1) % THEMES.length];
  if (next) root.dataset.theme = next;
  else delete root.dataset.theme;
  element("theme").textContent = `theme${next ? `: ${next}` : ""}`;
  drawAll();
});
function drawAll() {
  render();
  drawThreshold();
  drawDifferences();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
matchMedia("(max-width: 640px)").addEventListener("change", drawAll);
foldChips();
drawAll();
document.documentElement.dataset.ready = "yes"; // what a test waits for
