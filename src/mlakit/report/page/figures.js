// Figures. Their heights follow from what they show, their colours from the page's.
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const narrow = () => document.documentElement.clientWidth <= 640;

function layout(more) {
  const line = style("--line"),
    axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
  const { xaxis, yaxis, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    hovermode: "closest",
    font: { color: style("--text"), family: "system-ui, sans-serif", size: narrow() ? 11 : 13 },
    margin: { l: 10, r: 14, t: 10, b: 40 },
    dragmode: narrow() ? false : "zoom",
    hoverlabel: { bgcolor: style("--panel"), bordercolor: line, font: { color: style("--text") }, align: "left" },
    legend: { orientation: "h", yanchor: "bottom", y: 1.0, x: 0, xanchor: "left", maxheight: 2000 },
    xaxis: { ...axis, ...xaxis },
    yaxis: { ...axis, ...yaxis },
    ...rest,
  };
}
function plot(id, traces, more) {
  const node = element(id);
  if (!traces.length) {
    Plotly.purge(node);
    node.replaceChildren(make("p", { className: "hint" }, "Nothing to draw of what is chosen."));
    return;
  }
  if (!node.querySelector(".plot-container")) node.replaceChildren();
  Plotly.react(node, traces, layout(more), {
    responsive: true,
    displaylogo: false,
    displayModeBar: narrow() ? false : "hover",
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
  });
}
// How many lines a legend takes, by the letters of its longest entry; 0 for one that would hide what it explains.
function legendLines(traces) {
  if (traces.length > (narrow() ? 12 : 24)) return 0;
  const longest = most(traces.map((trace) => trace.name.length));
  const room = element("compare").clientWidth * (narrow() ? 0.75 : 0.9);
  return Math.ceil(traces.length / Math.max(1, Math.floor(room / (7 * longest + 45))));
}
const marker = (backend, extra = {}) => ({
  color: look(backend).colour,
  symbol: look(backend).mark,
  size: 9,
  ...extra,
});
function hover(row) {
  const job = JOBS[row.job],
    gain = speedup(row),
    lines = [
      `<b>${safe(row.backend)}</b>`,
      safe(job.title),
      `${time(row.time)} ${known(row.low) ? `(${time(row.low)} to ${time(row.high)})` : ""}`,
    ];
  if (ofLimit(row)) lines.push(`${percent(ofLimit(row))} of the limit (${row.bound})`);
  if (gain && gain.base !== row) lines.push(`${factor(gain.value)} the speed of ${safe(gain.base.backend)}`);
  if (known(row.memory)) lines.push(`${size(row.memory)} beside its inputs`);
  return lines.join("<br>");
}

// Ticks with units: 1, 2 and 5 of each power of ten that the data spans.
const STEPS = [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]];
function powers(steps, [low, high]) {
  const found = [];
  for (let power = Math.floor(low); power <= high; power++) for (const step of steps) found.push(step * 10 ** power);
  return found.filter((value) => Math.log10(value) >= low && Math.log10(value) <= high);
}
function even(low, high) {
  // where the data spans less than a third of a power
  const raw = (high - low) / 4,
    unit = 10 ** Math.floor(Math.log10(raw)),
    step = [1, 2, 5, 10].find((n) => n * unit >= raw) * unit;
  return Array.from({ length: 12 }, (_, i) => (Math.ceil(low / step) + i) * step).filter((value) => value <= high);
}
function ticks(values, log, unit) {
  if (unit === "%") return { tickformat: ".0%", rangemode: "tozero" };
  if (!log || !values.length) return {};
  const low = Math.log10(least(values)),
    high = Math.log10(most(values));
  const pad = Math.max(0.04 * (high - low), 0.01),
    range = [low - pad, high + pad];
  const at =
    STEPS.map((steps) => powers(steps, range)).find((found) => found.length >= 3) ??
    even(10 ** range[0], 10 ** range[1]);
  const text = {
    s: time,
    B: size,
    "": (value) => `${Number(value.toPrecision(3))}×`,
    n: (value) => rate(value, "").trim(),
    FLOP: (value) => rate(value, "FLOP/s"),
  }[unit];
  return { type: "log", range, tickmode: "array", tickvals: at, ticktext: at.map(text) };
}
