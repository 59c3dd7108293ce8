// Curves along a size, and maps over two. A point's traits are its job's sizes and its backend's settings; `rest` is
// what of them is neither axis, and only points that share it lie on one curve or map.
const traits = (row) => ({ ...row.settings, ...JOBS[row.job].sizes });
const isNumber = (value) => typeof value === "number";
function rest(row, axes) {
  const job = JOBS[row.job];
  if (axes.some((axis) => !(axis in job.sizes))) return { title: job.title, device: job.device }; // along a setting
  const sizes = { operation: job.operation, model: job.model, device: job.device, ...job.sizes };
  for (const axis of axes) {
    delete sizes[axis];
    // A prefill has as many keys as tokens.
    if ((axis === "q_len" || axis === "tokens") && sizes.keys === job.sizes[axis]) delete sizes.keys;
  }
  return sizes;
}
// What varies: names of numeric traits, those with most values first.
function axes(rows) {
  const seen = new Map();
  for (const row of rows)
    for (const [name, value] of Object.entries(traits(row))) {
      if (isNumber(value)) seen.set(name, (seen.get(name) ?? new Set()).add(value));
    }
  return [...seen]
    .filter(([, values]) => values.size > 1)
    .sort((a, b) => b[1].size - a[1].size)
    .map(([name]) => name);
}
// Groups of rows that share all but the axes, each with a name; those with most points first.
function groups(rows, along) {
  const found = new Map();
  for (const row of rows) {
    if (!along.every((axis) => isNumber(traits(row)[axis]))) continue;
    const left = rest(row, along),
      key = JSON.stringify(left);
    if (!found.has(key)) found.set(key, { left, rows: [] });
    found.get(key).rows.push(row);
  }
  const all = [...found.values()];
  const names = distinct(all.flatMap((group) => Object.keys(group.left)));
  const differing = names.filter((name) => distinct(all.map((group) => JSON.stringify(group.left[name]))).length > 1);
  const at = (row) => JSON.stringify(along.map((axis) => traits(row)[axis]));
  for (const group of all) {
    const parts = differing.filter((name) => known(group.left[name]) && group.left[name] !== "");
    group.name =
      parts
        .map((name) =>
          isNumber(group.left[name]) || typeof group.left[name] === "boolean"
            ? `${words(name)} ${group.left[name]}`
            : group.left[name],
        )
        .join(", ") || "all";
    group.points = distinct(group.rows.map(at)).length;
  }
  return all.filter((group) => group.points > 1).sort((a, b) => b.points - a.points);
}
const WORDS = { q_len: "new tokens", batch: "requests", topk: "top k", kv_heads: "KV heads" };
const words = (name) => WORDS[name] ?? name.replaceAll("_", " ");

// Fill a select; keeps what was chosen where it is still there.
function options(id, choices, preferred) {
  const select = element(id),
    old = select.value;
  select.replaceChildren(...choices.map(([value, text]) => make("option", { value, textContent: text })));
  const values = choices.map(([value]) => value);
  select.value =
    select.dataset.touched && values.includes(old) ? old : values.includes(preferred) ? preferred : (values[0] ?? "");
  return select.value;
}

function drawSweep(jobs) {
  const rows = jobs.flatMap(rowsOf).filter((row) => row.time);
  const possible = axes(rows)
    .map((axis) => [axis, groups(rows, [axis])])
    .filter(([, found]) => found.length && found[0].points > 2);
  element("sweep-section").hidden = !possible.length;
  if (!possible.length) return;
  const longest = possible.reduce((a, b) => (b[1][0].points > a[1][0].points ? b : a))[0];
  const x = options(
    "sweep-x",
    possible.map(([axis]) => [axis, words(axis)]),
    longest,
  );
  const found = possible.find(([axis]) => axis === x)[1];
  const where = Number(
    options(
      "sweep-where",
      found.map((group, i) => [String(i), group.name]),
      "0",
    ),
  );
  element("sweep-where-label").hidden = found.length < 2;
  const mine = found[where].rows,
    setting = mine.some((row) => !isNumber(JOBS[row.job].sizes[x]));
  // A label that holds the swept value is no curve's name: the backend is, with what else of its settings varies.
  const others = setting
    ? distinct(mine.flatMap((row) => Object.keys(row.settings))).filter(
        (name) => name !== x && name !== "backend" && distinct(mine.map((row) => row.settings[name])).length > 1,
      )
    : [];
  const part = (row, other) => (row.settings[other] === true ? words(other) : `${words(other)} ${row.settings[other]}`);
  const told = (row) => others.filter((other) => known(row.settings[other]) && row.settings[other] !== false);
  const name = (row) => (setting ? [row.base, ...told(row).map((other) => part(row, other))].join(", ") : row.backend);
  const traces = distinct(mine.map(name)).map((backend) => {
    const points = mine.filter((row) => name(row) === backend).sort((a, b) => traits(a)[x] - traits(b)[x]);
    const { colour, mark } = setting ? lookAt(distinct(mine.map(name)).indexOf(backend)) : look(backend);
    return {
      type: "scatter",
      mode: "lines+markers",
      name: safe(backend),
      x: points.map((row) => traits(row)[x]),
      y: points.map((row) => row.time),
      line: { color: colour, width: 2, dash: points.every((row) => row.predicted) ? "dash" : "solid" },
      marker: { color: colour, symbol: mark, size: 8 },
      hovertext: points.map(hover),
      hoverinfo: "text",
      error_y: {
        type: "data",
        symmetric: false,
        thickness: 1.2,
        width: 3,
        visible: points.some((row) => known(row.low)),
        array: points.map((row) => (known(row.high) ? row.high - row.time : 0)),
        arrayminus: points.map((row) => (known(row.low) ? row.time - row.low : 0)),
      },
    };
  });
  const values = distinct(mine.map((row) => traits(row)[x])).sort((a, b) => a - b);
  if (setting) traces.push(...defaults(rows, mine, x, values, name));
  const log = values[0] > 0 && values[values.length - 1] / values[0] >= 8;
  const legend_lines = legendLines(traces);
  const at = apart(values, log, narrow() ? 0.12 : 0.05);
  plot("sweep", traces, {
    height: 400 + 22 * legend_lines,
    margin: { l: 10, r: 14, t: 16 + 22 * legend_lines, b: 48 },
    showlegend: legend_lines > 0,
    xaxis: {
      title: { text: `${safe(words(x))}${log ? " (log scale)" : ""}` },
      type: log ? "log" : "linear",
      tickmode: "array",
      tickvals: at,
      ticktext: at.map(String),
    },
    yaxis: {
      title: { text: narrow() ? "" : "time (log scale)" },
      ...ticks(
        mine.map((row) => row.time),
        true,
        "s",
      ),
    },
  });
}

// Of ascending values those whose labels have room beside one another: at least a part of the axis apart.
function apart(values, log, part) {
  const place = (value) => (log ? Math.log(value) : value),
    room = part * (place(values[values.length - 1]) - place(values[0]));
  return values.reduce(
    (kept, value) => (kept.length && place(value) - place(kept[kept.length - 1]) < room ? kept : [...kept, value]),
    [],
  );
}

// Where a setting has a word for a value ("auto"), its time as a line from end to end.
function defaults(rows, mine, x, values, name) {
  const curves = distinct(mine.map(name)),
    jobs = new Set(mine.map((row) => row.job));
  const found = rows.filter(
    (row) => jobs.has(row.job) && typeof row.settings[x] === "string" && curves.includes(name(row)),
  );
  return found.map((row) => ({
    type: "scatter",
    mode: "lines",
    name: safe(`${name(row)}, ${row.settings[x]}`),
    x: [values[0], values[values.length - 1]],
    y: [row.time, row.time],
    line: { color: lookAt(curves.indexOf(name(row))).colour, width: 1.5, dash: "dot" },
    hovertext: [hover(row), hover(row)],
    hoverinfo: "text",
  }));
}
