// Backends beside one another: a line for each batch, by time or another figure.
const MOST_JOBS = 40;

const METRICS = {
  time: {
    show: time,
    title: "Time",
    axis: "time, s (log scale)",
    value: (row) => row.time,
    bounds: (row) => [row.low, row.high],
    log: true,
    unit: "s",
    hint: "Further left is faster. Whiskers: 95% intervals; grey ticks: the least time that the device allows.",
  },
  speedup: {
    show: factor,
    title: "Speed-up",
    axis: "times as fast as the baseline (log scale)",
    value: (row) => {
      const g = speedup(row);
      return g ? g.value : null;
    },
    bounds: (row) => {
      const g = speedup(row);
      return g ? [g.low, g.high] : [null, null];
    },
    log: true,
    unit: "",
    line: 1,
    hint: "Further right is faster.",
  },
  limit: {
    show: percent,
    title: "Of the limit",
    axis: "fraction of what the device can do",
    value: ofLimit,
    bounds: () => [null, null],
    unit: "%",
    hint: "100% is the least time at the measured ceilings; a job that runs from the cache can pass it.",
  },
  memory: {
    show: size,
    title: "Memory",
    axis: "memory beside the inputs, bytes (log scale)",
    value: (row) => (row.memory > 0 ? row.memory : null),
    bounds: () => [null, null],
    log: true,
    unit: "B",
    hint: "The peak that a call takes on top of its inputs; with the cache, for layers.",
  },
  host: {
    show: time,
    title: "Host",
    axis: "time of the calling thread, s (log scale)",
    value: (row) => row.host,
    bounds: () => [null, null],
    log: true,
    unit: "s",
    hint: "What the calling thread spends in a call; where it is longer than the device's time, the device waits.",
  },
};

function drawCompare(jobs) {
  const rows = jobs.flatMap(rowsOf);
  const possible = Object.entries(METRICS).filter(([, metric]) => rows.some((row) => known(metric.value(row))));
  if (!possible.some(([name]) => name === chosen.metric)) chosen.metric = possible[0]?.[0] ?? "time";
  element("metric").replaceChildren(
    ...possible.map(([name, { title }]) =>
      make(
        "button",
        {
          type: "button",
          ariaPressed: String(name === chosen.metric),
          onclick: () => {
            chosen.metric = name;
            drawCompare(jobs);
            element("metric").querySelector('[aria-pressed="true"]').focus();
          },
        },
        title,
      ),
    ),
  );
  const metric = METRICS[chosen.metric];
  const with_value = jobs.filter((job) => rowsOf(job).some((row) => known(metric.value(row))));
  const shown = with_value.slice(0, MOST_JOBS);
  const extra =
    with_value.length > shown.length
      ? ` The first ${shown.length} of ${with_value.length} batches; name one above for others.`
      : "";
  element("compare-hint").textContent = metric.hint + extra;
  const rows_shown = shown.flatMap(rowsOf).filter((row) => known(metric.value(row)));
  // One batch alone has a line for each backend, the fastest first; several have a line each.
  const alone = shown.length === 1;
  const lines = alone ? distinct(byTime(rows_shown).map((row) => row.backend)) : shown.map((job) => job.index);
  const place = (row) => lines.indexOf(alone ? row.backend : row.job);
  const names = backendsShown().filter((name) => rows_shown.some((row) => row.backend === name));
  const traces = names.map((name) => {
    const mine = rows_shown.filter((row) => row.backend === name);
    const bounds = mine.map(metric.bounds),
      values = mine.map(metric.value);
    return {
      type: "scatter",
      mode: alone ? "markers+text" : "markers",
      name: safe(name),
      x: values,
      y: mine.map(place),
      marker: marker(name, mine.every((row) => row.predicted) ? { symbol: `${look(name).mark}-open` } : {}),
      text: values.map((value) => `  ${metric.show(value)}`),
      textposition: "middle right",
      cliponaxis: false,
      error_x: {
        type: "data",
        symmetric: false,
        thickness: 1.5,
        width: 4,
        color: look(name).colour,
        visible: bounds.some(([low]) => known(low)),
        array: bounds.map(([, high], i) => (known(high) ? high - values[i] : 0)),
        arrayminus: bounds.map(([low], i) => (known(low) ? values[i] - low : 0)),
      },
      hovertext: mine.map(hover),
      hoverinfo: "text",
    };
  });
  const limits = shown.map((job) => least(rowsOf(job).map((row) => row.limit ?? Infinity)));
  if (chosen.metric === "time" && limits.some(Number.isFinite))
    traces.push(limitTicks(limits, alone ? lines.length : 1));
  const legend_lines = alone ? 0 : legendLines(traces);
  const reached = traces.flatMap((trace) => trace.x).filter((value) => value > 0);
  plot("compare", traces, {
    height: 90 + 24 * legend_lines + (lines.length > 20 ? 22 : 30) * Math.max(lines.length, 2),
    margin: { l: 10, r: alone ? 70 : 14, t: 16 + 22 * legend_lines, b: 48 },
    showlegend: legend_lines > 0,
    xaxis: { title: { text: metric.axis }, ...ticks(reached, metric.log, metric.unit) },
    yaxis: {
      tickmode: "array",
      tickvals: lines.map((_, i) => i),
      ticktext: lines.map((line) => safe(short(alone ? line : JOBS[line].title))),
      range: [lines.length - 0.5, -0.5],
      zeroline: false,
    },
    shapes: metric.line
      ? [
          {
            type: "line",
            x0: metric.line,
            x1: metric.line,
            yref: "paper",
            y0: 0,
            y1: 1,
            line: { color: style("--dim"), width: 1, dash: "dot" },
          },
        ]
      : [],
  });
}
function limitTicks(limits, height) {
  const at = limits.flatMap((limit, index) =>
    Array.from({ length: height }, (_, i) => [Number.isFinite(limit) ? limit : null, index + i]),
  );
  return {
    type: "scatter",
    mode: "markers",
    name: "limit",
    x: at.map(([x]) => x),
    y: at.map(([, y]) => y),
    hoverinfo: "text",
    marker: { symbol: "line-ns", size: 13, line: { width: 2, color: style("--dim") }, color: style("--dim") },
    hovertext: at.map(([x]) => (known(x) ? `least possible: ${time(x)}` : "")),
  };
}
// A long title keeps its end, where titles differ.
function short(title) {
  const room = narrow() ? 20 : 44;
  return title.length > room ? `${title.slice(0, room - 8)}…${title.slice(-7)}` : title;
}
