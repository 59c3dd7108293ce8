// Figures. Their heights follow from what they show, their colours from the page's.
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const narrow = () => document.documentElement.clientWidth <= 640;
const MOST_JOBS = 40;

function layout(more) {
  const line = style("--line"), axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
  const { xaxis, yaxis, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
    font: { color: style("--text"), family: "system-ui, sans-serif", size: narrow() ? 11 : 13 },
    margin: { l: 10, r: 14, t: 10, b: 40 }, dragmode: narrow() ? false : "zoom",
    hoverlabel: { bgcolor: style("--panel"), bordercolor: line, font: { color: style("--text") }, align: "left" },
    legend: { orientation: "h", yanchor: "bottom", y: 1.0, x: 0, xanchor: "left", maxheight: 2000 },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}
function plot(id, traces, more) {
  const node = element(id);
  if (!traces.length) { Plotly.purge(node); node.replaceChildren(make("p", { className: "hint" }, "Nothing to draw of what is chosen.")); return; }
  if (!node.querySelector(".plot-container")) node.replaceChildren();
  Plotly.react(node, traces, layout(more), { responsive: true, displaylogo: false, displayModeBar: narrow() ? false : "hover",
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] });
}
// How many lines a legend takes, by the letters of its longest entry.
function legendLines(traces) {
  const longest = most(traces.map((trace) => trace.name.length)), room = element("compare").clientWidth * (narrow() ? 0.75 : 0.9);
  return Math.ceil(traces.length / Math.max(1, Math.floor(room / (7 * longest + 45))));
}
const marker = (backend, extra = {}) => ({ color: look(backend).colour, symbol: look(backend).mark, size: 9, ...extra });
function hover(row) {
  const job = JOBS[row.job], gain = speedup(row), lines = [
    `<b>${safe(row.backend)}</b>`, safe(job.title),
    `${time(row.time)} ${known(row.low) ? `(${time(row.low)} to ${time(row.high)})` : ""}`,
  ];
  if (ofLimit(row)) lines.push(`${percent(ofLimit(row))} of the limit (${row.bound})`);
  if (gain && gain.base !== row) lines.push(`${factor(gain.value)} the speed of ${safe(gain.base.backend)}`);
  if (known(row.memory)) lines.push(`${size(row.memory)} beside its inputs`);
  return lines.join("<br>");
}

const METRICS = {
  time: { show: time, title: "Time", axis: "time, s (log scale)", value: (row) => row.time, bounds: (row) => [row.low, row.high], log: true, unit: "s",
    hint: "Further left is faster. Whiskers: 95% intervals; grey ticks: the least time that the device allows." },
  speedup: { show: factor, title: "Speed-up", axis: "times as fast as the baseline (log scale)", value: (row) => { const g = speedup(row); return g ? g.value : null; },
    bounds: (row) => { const g = speedup(row); return g ? [g.low, g.high] : [null, null]; }, log: true, unit: "", line: 1,
    hint: "Further right is faster." },
  limit: { show: percent, title: "Of the limit", axis: "fraction of what the device can do", value: ofLimit, bounds: () => [null, null], unit: "%",
    hint: "100% is the least time at the measured ceilings; a job that runs from the cache can pass it." },
  memory: { show: size, title: "Memory", axis: "memory beside the inputs, bytes (log scale)", value: (row) => (row.memory > 0 ? row.memory : null), bounds: () => [null, null], log: true, unit: "B",
    hint: "The peak that a call takes on top of its inputs; with the cache, for layers." },
  host: { show: time, title: "Host", axis: "time of the calling thread, s (log scale)", value: (row) => row.host, bounds: () => [null, null], log: true, unit: "s",
    hint: "What the calling thread spends in a call; where it is longer than the device's time, the device waits." },
};

function drawCompare(jobs) {
  const rows = jobs.flatMap(rowsOf);
  const possible = Object.entries(METRICS).filter(([, metric]) => rows.some((row) => known(metric.value(row))));
  if (!possible.some(([name]) => name === chosen.metric)) chosen.metric = possible[0]?.[0] ?? "time";
  element("metric").replaceChildren(...possible.map(([name, { title }]) => make("button", {
    type: "button", ariaPressed: String(name === chosen.metric), onclick: () => { chosen.metric = name; drawCompare(jobs); element("metric").querySelector('[aria-pressed="true"]').focus(); },
  }, title)));
  const metric = METRICS[chosen.metric];
  const with_value = jobs.filter((job) => rowsOf(job).some((row) => known(metric.value(row))));
  const shown = with_value.slice(0, MOST_JOBS);
  const extra = with_value.length > shown.length ? ` The first ${shown.length} of ${with_value.length} batches; name one above for others.` : "";
  element("compare-hint").textContent = metric.hint + extra;
  const rows_shown = shown.flatMap(rowsOf).filter((row) => known(metric.value(row)));
  // One batch alone has a line for each backend, the fastest first; several have a line each.
  const alone = shown.length === 1;
  const lines = alone ? distinct(byTime(rows_shown).map((row) => row.backend)) : shown.map((job) => job.index);
  const place = (row) => lines.indexOf(alone ? row.backend : row.job);
  const names = backendsShown().filter((name) => rows_shown.some((row) => row.backend === name));
  const traces = names.map((name) => {
    const mine = rows_shown.filter((row) => row.backend === name);
    const bounds = mine.map(metric.bounds), values = mine.map(metric.value);
    return {
      type: "scatter", mode: alone ? "markers+text" : "markers", name: safe(name), x: values, y: mine.map(place), marker: marker(name),
      text: values.map((value) => `  ${metric.show(value)}`), textposition: "middle right", cliponaxis: false,
      error_x: { type: "data", symmetric: false, thickness: 1.5, width: 4, color: look(name).colour, visible: bounds.some(([low]) => known(low)),
        array: bounds.map(([, high], i) => (known(high) ? high - values[i] : 0)), arrayminus: bounds.map(([low], i) => (known(low) ? values[i] - low : 0)) },
      hovertext: mine.map(hover), hoverinfo: "text",
    };
  });
  const limits = shown.map((job) => least(rowsOf(job).map((row) => row.limit ?? Infinity)));
  if (chosen.metric === "time" && limits.some(Number.isFinite)) traces.push(limitTicks(limits, alone ? lines.length : 1));
  const legend_lines = alone ? 0 : legendLines(traces);
  const reached = traces.flatMap((trace) => trace.x).filter((value) => value > 0);
  plot("compare", traces, {
    height: 90 + 24 * legend_lines + (lines.length > 20 ? 22 : 30) * Math.max(lines.length, 2),
    margin: { l: 10, r: alone ? 70 : 14, t: 16 + 22 * legend_lines, b: 48 }, showlegend: !alone,
    xaxis: { title: { text: metric.axis }, ...ticks(reached, metric.log, metric.unit) },
    yaxis: { tickmode: "array", tickvals: lines.map((_, i) => i), ticktext: lines.map((line) => safe(short(alone ? line : JOBS[line].title))), range: [lines.length - 0.5, -0.5], zeroline: false },
    shapes: metric.line ? [{ type: "line", x0: metric.line, x1: metric.line, yref: "paper", y0: 0, y1: 1, line: { color: style("--dim"), width: 1, dash: "dot" } }] : [],
  });
}
function limitTicks(limits, height) {
  const at = limits.flatMap((limit, index) => Array.from({ length: height }, (_, i) => [Number.isFinite(limit) ? limit : null, index + i]));
  return { type: "scatter", mode: "markers", name: "limit", x: at.map(([x]) => x), y: at.map(([, y]) => y), hoverinfo: "text",
    marker: { symbol: "line-ns", size: 13, line: { width: 2, color: style("--dim") }, color: style("--dim") },
    hovertext: at.map(([x]) => (known(x) ? `least possible: ${time(x)}` : "")) };
}
// A long title keeps its end, where titles differ.
function short(title) {
  const room = narrow() ? 20 : 44;
  return title.length > room ? `${title.slice(0, room - 8)}…${title.slice(-7)}` : title;
}

// Ticks with units: 1, 2 and 5 of each power of ten that the data spans.
const STEPS = [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]];
function powers(steps, [low, high]) {
  const found = [];
  for (let power = Math.floor(low); power <= high; power++) for (const step of steps) found.push(step * 10 ** power);
  return found.filter((value) => Math.log10(value) >= low && Math.log10(value) <= high);
}
function even(low, high) { // where the data spans less than a third of a power
  const raw = (high - low) / 4, unit = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].find((n) => n * unit >= raw) * unit;
  return Array.from({ length: 12 }, (_, i) => (Math.ceil(low / step) + i) * step).filter((value) => value <= high);
}
function ticks(values, log, unit) {
  if (unit === "%") return { tickformat: ".0%", rangemode: "tozero" };
  if (!log || !values.length) return {};
  const low = Math.log10(least(values)), high = Math.log10(most(values));
  const pad = Math.max(0.04 * (high - low), 0.01), range = [low - pad, high + pad];
  const at = STEPS.map((steps) => powers(steps, range)).find((found) => found.length >= 3) ?? even(10 ** range[0], 10 ** range[1]);
  const text = { s: time, B: size, "": (value) => `${Number(value.toPrecision(3))}×`, n: (value) => rate(value, "").trim(), FLOP: (value) => rate(value, "FLOP/s") }[unit];
  return { type: "log", range, tickmode: "array", tickvals: at, ticktext: at.map(text) };
}

function drawRoofline(jobs) {
  const rows = jobs.flatMap(rowsOf).filter((row) => row.time && row.flops && row.bytes);
  const devices = distinct(jobs.map((job) => job.device));
  const dtypes = distinct(jobs.map((job) => job.sizes.dtype).filter(known));
  const all = DATA.roofs.filter((roof) => devices.includes(roof.device));
  const roofs = all.some((roof) => dtypes.includes(roof.dtype)) ? all.filter((roof) => dtypes.includes(roof.dtype)) : all;
  element("roofline-section").hidden = !rows.length || !roofs.length;
  if (!rows.length || !roofs.length) return;
  const spread = rows.map((row) => row.flops / row.bytes);
  const ridges = roofs.map((roof) => roof.flops / roof.bytes);
  const low = Math.min(least(spread), least(ridges)) / 3, high = Math.max(most(spread), most(ridges)) * 3;
  const traces = roofs.map((roof) => {
    const x = [low, roof.flops / roof.bytes, high];
    const name = `${roofs.length > 1 && devices.length > 1 ? `${roof.device}, ` : ""}${roof.dtype}: ${rate(roof.bytes, "B/s")}, ${rate(roof.flops, "FLOP/s")}`;
    return { type: "scatter", mode: "lines", name: safe(name), x, y: x.map((v) => Math.min(v * roof.bytes, roof.flops)), hoverinfo: "name", line: { color: style("--dim"), width: 2 } };
  });
  for (const name of distinct(rows.map((row) => row.backend))) {
    const mine = rows.filter((row) => row.backend === name);
    traces.push({ type: "scatter", mode: "markers", name: safe(name), x: mine.map((row) => row.flops / row.bytes), y: mine.map((row) => row.flops / row.time),
      marker: marker(name), hovertext: mine.map((row) => `${hover(row)}<br>${rate(row.flops / row.time, "FLOP/s")}, ${rate(row.bytes / row.time, "B/s")}`), hoverinfo: "text" });
  }
  const reached = traces.flatMap((trace) => trace.y);
  const legend_lines = legendLines(traces);
  element("roofline-hint").textContent = "Operations a second over operations a byte, both as the job needs them at least. The line is what this device reached at best: left of its bend memory is the limit, right of it the units that multiply.";
  plot("roofline", traces, { height: 420 + 22 * legend_lines, margin: { l: 10, r: 14, t: 16 + 22 * legend_lines, b: 48 },
    xaxis: { title: { text: "FLOP a byte (log scale)" }, type: "log", range: [Math.log10(low), Math.log10(high)], dtick: 1 },
    yaxis: { title: { text: narrow() ? "" : "reached (log scale)" }, ...ticks(reached, true, "FLOP") } });
}
