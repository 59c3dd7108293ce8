"use strict";
// The records, and what of them is chosen. All labels come from records: they go into the page as text nodes only, and
// into Plotly, which reads a little HTML, through `safe`.
const DATA = JSON.parse(document.getElementById("data").textContent);
const ROWS = DATA.rows,
  JOBS = DATA.jobs;
const OTHERS = "\u0000others"; // as a baseline: whichever other backend is the fastest at that job
const chosen = {
  operation: DATA.operations[0],
  model: "",
  record: "",
  search: "",
  baseline: DATA.baseline ?? OTHERS,
  hidden: new Set(),
  metric: "time",
  sort: null,
  all: false,
};

const element = (id) => document.getElementById(id);
const distinct = (values) => [...new Set(values)];
const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
const most = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
const known = (value) => value !== null && value !== undefined;

function safe(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter(known));
  return node;
}

// Numbers as people read them: three significant digits and a unit.
function three(value) {
  if (value === 0 || !Number.isFinite(value)) return String(value);
  const digits = 2 - Math.floor(Math.log10(Math.abs(Number(value.toPrecision(3)))));
  return digits <= 5 ? value.toFixed(Math.max(digits, 0)) : value.toExponential(2);
}
function scaled(value, units) {
  for (const [factor, unit] of units) if (value >= factor * 0.9995) return `${three(value / factor)} ${unit}`;
  const [factor, unit] = units[units.length - 1];
  return `${three(value / factor)} ${unit}`;
}
const time = (value) =>
  scaled(value, [
    [1, "s"],
    [1e-3, "ms"],
    [1e-6, "µs"],
  ]);
const rate = (value, unit) =>
  scaled(value, [
    [1e12, `T${unit}`],
    [1e9, `G${unit}`],
    [1e6, `M${unit}`],
    [1, unit],
  ]);
const size = (value) =>
  scaled(value, [
    [2 ** 30, "GiB"],
    [2 ** 20, "MiB"],
    [2 ** 10, "KiB"],
    [1, "B"],
  ]);
function percent(fraction) {
  const value = fraction * 100;
  return `${value.toFixed(Math.abs(value) >= 9.95 ? 0 : Math.abs(value) >= 0.995 ? 1 : 2)}%`;
}
const factor = (value) => `${three(value)}×`;
function interval(row) {
  if (!known(row.low) || !row.time) return "";
  return `−${percent(1 - row.low / row.time)} +${percent(row.high / row.time - 1)}`;
}

// What is chosen.
function jobsOfOperation() {
  return JOBS.map((job, index) => ({ ...job, index })).filter(
    (job) =>
      (!chosen.operation || job.operation === chosen.operation) &&
      (!chosen.model || job.model === chosen.model) &&
      (!chosen.record || job.records.includes(chosen.record)),
  );
}
function jobsShown() {
  const words = chosen.search.toLowerCase().split(/\s+/).filter(Boolean);
  const hasTime = (job) => ROWS_OF[job.index].some((row) => row.time);
  const jobs = jobsOfOperation().sort((a, b) => hasTime(b) - hasTime(a));
  const exact = jobs.filter((job) => job.title.toLowerCase() === chosen.search.trim().toLowerCase());
  if (exact.length) return exact;
  return jobs.filter((job) => {
    const text = `${job.title} ${job.operation} ${job.phase} ${job.model} ${job.device}`.toLowerCase();
    return words.every((word) => text.includes(word));
  });
}
const ROWS_OF = JOBS.map(() => []);
ROWS.forEach((row) => ROWS_OF[row.job].push(row));
const ofRecord = (row) => !chosen.record || row.record === chosen.record;
const rowsOf = (job) => ROWS_OF[job.index].filter((row) => ofRecord(row) && !chosen.hidden.has(row.backend));
const timed = (rows) => rows.filter((row) => row.time);
const byTime = (rows) => timed(rows).sort((a, b) => a.time - b.time);
// What was predicted competes with nobody.
const ranked = (rows) => byTime(rows.filter((row) => !row.predicted));
// Of the chosen operation, model and record; those that have a time before those that have none.
function backendsShown() {
  const rows = jobsOfOperation()
    .flatMap((job) => ROWS_OF[job.index])
    .filter(ofRecord);
  return distinct([...timed(rows), ...rows].map((row) => row.backend));
}

// The row that another is compared with, and how many times as fast as it that is, with the interval of that.
function baselineOf(row) {
  const rows = ROWS_OF[row.job].filter(ofRecord);
  if (chosen.baseline === OTHERS) {
    return ranked(rows.filter((other) => other !== row && !chosen.hidden.has(other.backend)))[0];
  }
  return timed(rows).find((other) => other.backend === chosen.baseline);
}
function speedup(row) {
  const base = row.time ? baselineOf(row) : undefined;
  if (!base) return null;
  const bounds = known(row.low) && known(base.low);
  return {
    value: base.time / row.time,
    base,
    low: bounds ? base.low / row.high : null,
    high: bounds ? base.high / row.low : null,
  };
}
// A backend is the fastest for sure where no other's interval reaches its own.
function tiedWith(best, rows) {
  return rows.filter((row) => row !== best && known(row.low) && known(best.high) && row.low <= best.high);
}
const ofLimit = (row) => (row.limit && row.time ? row.limit / row.time : null);

// A colour and a mark for each backend of an operation, the same whatever is hidden. Told apart with any colour vision.
const LIGHT = ["#0072B2", "#C84E00", "#00835F", "#A8457F", "#A87400", "#3390CC", "#5B4FA8", "#4A4F55"];
const DARK = ["#4FA3E0", "#FF8A4C", "#2FC79A", "#E59CC6", "#F2B632", "#8FD3FF", "#A99CF0", "#C9D0D8"];
const MARKS = [
  "circle",
  "square",
  "diamond",
  "triangle-up",
  "cross",
  "triangle-down",
  "star",
  "hexagon",
  "x",
  "pentagon",
];
function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}
let looks = new Map();
function lookAt(index) {
  const colours = isDark() ? DARK : LIGHT;
  return {
    colour: colours[index % colours.length],
    mark: MARKS[(index + Math.floor(index / colours.length)) % MARKS.length],
  };
}
function rememberLooks() {
  looks = new Map(backendsShown().map((backend, index) => [backend, lookAt(index)]));
}
const look = (backend) => looks.get(backend) ?? { colour: style("--dim"), mark: MARKS[0] };
